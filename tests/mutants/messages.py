"""Planted bugs of messages (M*)."""

from __future__ import annotations

from tests.mutants.harness import Mutant

MUTANTS: list[Mutant] = [
    Mutant(
        name="M1 deduplication by a window",
        file="ha_core/machines/channels.py",
        old="        if first < self.next_unit or first in self.early:\n",
        new=(
            "        if first < self.next_unit - 8 and not flags:\n"
            "            return wire.decode_run(body)[1]\n"
            "        if first < self.next_unit or first in self.early:\n"
        ),
        invariant="I13",
        campaign="messages",
        seed=4,
    ),
    Mutant(
        name="M2 a high-water mark per peer swallows the messages of its next life",
        file="ha_core/machines/connections.py",
        old="            session = peer.session = Session(session_id, ours, theirs, self.effects)\n",
        new=(
            "            marks = globals().setdefault('MARKS', {}).setdefault((ours.boot, peer.node), {})\n"
            "            session = peer.session = Session(session_id, ours, theirs, self.effects, receiving=marks)\n"
        ),
        invariant="I26",
        campaign="messages",
    ),
    Mutant(
        name="M4 another life takes over though the present one lives",
        file="ha_core/machines/connections.py",
        old="            self._contest(peer, connection, now_ns)\n        else:\n",
        new="            self._establish(peer, connection, ours, theirs, now_ns)\n        else:\n",
        invariant="I11",
        campaign="messages",
        seed=16,
    ),
    Mutant(
        name="M4 a receiver that restarted has forgotten whom it served",
        file="ha_core/machines/endpoint.py",
        old="        for known in seen:\n",
        new="        for known in ():\n",
        invariant="I11",
        campaign="messages",
        seed=10,
    ),
    Mutant(
        name="M5 acknowledged on receipt instead of on commit",
        file="ha_core/machines/durable_receiver.py",
        old="ChannelReport(self.name, self.cursor, self.digest, ",
        new="ChannelReport(self.name, self.received, self.received_digest, ",
        invariant="I5",
        campaign="messages",
        seed=1,
    ),
    Mutant(
        name="M12 credit counted twice",
        file="ha_core/machines/channels.py",
        old="        self.credit_bytes = max(self.credit_bytes, credit_bytes)\n",
        new="        self.credit_bytes += credit_bytes\n",
        invariant="I18",
        campaign="messages",
        seed=16,
    ),
    Mutant(
        name="M17 receiving is taken as proof that sending works",
        file="ha_core/machines/connections.py",
        old="        connection.liveness.received += 1\n",
        new=(
            "        connection.liveness.received += 1\n"
            "        self._evidence(peer, session, connection, connection.liveness.sent, now_ns)\n"
        ),
        invariant="I23",
        campaign="messages",
        seed=3,
    ),
    Mutant(
        name="M26 a datagram of an earlier session is taken in the present one",
        file="ha_core/machines/endpoint.py",
        old="        peer = self._lower.by_session.get(session) if session is not None else None\n",
        new=(
            "        known = sorted(self._lower.peers.items())\n"
            "        peer = next((item for _, item in known if event.remote in item.addresses.values()), None)\n"
        ),
        invariant="I16",
        campaign="messages",
        seed=47,
    ),
    Mutant(
        name="M28 a poison message blocks for ever",
        file="ha_core/machines/durable_receiver.py",
        old="        if channel.failures >= self._max_attempts:\n            self._emit(",
        new="        if channel.failures >= 1_000_000_000:\n            self._emit(",
        invariant="I26",
        campaign="messages",
        seed=6,
    ),
    Mutant(
        name="M32 an unknown frame type closes the session",
        file="ha_core/machines/wire.py",
        old="            if kind not in _KNOWN and not kind & IGNORABLE:\n",
        new="            if kind not in _KNOWN:\n",
        invariant="I28",
        campaign="messages",
        seed=1,
    ),
    Mutant(
        name="M33 no prefix digest, so a restored backup that has caught up is not seen",
        file="ha_core/machines/durable_wire.py",
        old="        before = state.digest()\n",
        new="        before = START_DIGEST\n",
        invariant="I10",
        campaign="messages",
        seed=13,
    ),
    Mutant(
        name="M15 heartbeats behind bulk: no bound on what a connection is given",
        file="ha_core/machines/session.py",
        old="                return priority if unflushed < ROOM[priority] else None\n",
        new="                return priority\n",
        invariant="I20",
        campaign="messages",
        seed=4,
    ),
    Mutant(
        name="M15 one queue for all priorities",
        file="ha_core/machines/session.py",
        old="            channel.busy = True\n            self._busy[channel.priority].append(channel)\n",
        new="            channel.busy = True\n            self._busy[Priority.BULK].append(channel)\n",
        invariant="I20",
        campaign="messages",
        seed=17,
    ),
    Mutant(
        name="M22 a path that failed is trusted again at once",
        file="ha_core/machines/paths.py",
        old="        if self.troubled and other_up:\n",
        new="        if False:\n",
        invariant="I24",
        campaign="messages",
    ),
    Mutant(
        name="M22 data goes back to the first link as soon as that is UP",
        file="ha_core/machines/session.py",
        old="(_rank(best)[:2] < _rank(active)[:2] and _rank(active)[0] >= _RANK[PathState.SUSPECT])",
        new="_rank(best) < _rank(active)",
        invariant="I24",
        campaign="messages",
    ),
    Mutant(
        name="M23 dials do not back off",
        file="ha_core/machines/paths.py",
        old="        base = min(MIN_REDIAL_NS << min(self.failures, 20), MAX_REDIAL_NS)\n",
        new="        base = MIN_REDIAL_NS\n",
        invariant="I27",
        campaign="messages",
    ),
    Mutant(
        name="M26 what was unacknowledged is sent again in the next session",
        file="ha_core/machines/connections.py",
        old="            session = peer.session = Session(session_id, ours, theirs, self.effects)\n",
        new=(
            "            from ha_core.machines.messages import SendRun\n"
            "            unsent = globals().setdefault('UNSENT', {})\n"
            "            old = unsent.get((ours.boot, peer.node))\n"
            "            session = peer.session = Session(session_id, ours, theirs, self.effects)\n"
            "            unsent[ours.boot, peer.node] = session\n"
            "            for channel in old.channels() if old is not None else ():\n"
            "                runs = [memoryview(item.frame)[8:] for item in channel.segments.values() if item.frame[5] == 0]\n"
            "                bodies = [body for run in runs for body in wire.decode_run(run)[1]]\n"
            "                session.send(SendRun(peer.node, channel.name, bodies, channel.priority))\n"
        ),
        invariant="I14",
        campaign="messages",
        seed=20,
    ),
    Mutant(
        name="M24 one sequence for all channels of a session",
        file="ha_core/machines/session.py",
        old="            first = channel.number(len(bodies))\n",
        new="            first = max([item.number(len(bodies)) for item in self._receiving.values()])\n",
        invariant="I13",
        campaign="messages",
    ),
    Mutant(
        name="M34 one channel may fill the outbox",
        file="ha_core/machines/durable_admission.py",
        old="    return used_bytes + size <= limit_bytes - total_bytes\n",
        new="    return size <= limit_bytes - total_bytes\n",
        invariant="I19",
        campaign="messages",
        seed=2,
    ),
    Mutant(
        name="M32 the newer of two versions is chosen",
        file="ha_core/machines/handshake.py",
        old="        self.version = min(self.ours.version_max, peer.version_max)\n",
        new="        self.version = self.ours.version_max\n",
        invariant="I30",
        campaign="messages",
    ),
    Mutant(
        name="M20 our own lag counts against the peer",
        file="ha_core/machines/connection_table.py",
        old="            connection.liveness.shift(lag_ns, now_ns + LAG_GRACE_NS)\n",
        new="            pass\n",
        invariant="I22",
        campaign="lag",
    ),
]
