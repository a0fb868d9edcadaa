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
        seed=7,
    ),
    Mutant(
        name="M2 a high-water mark per peer swallows the messages of its next life",
        file="ha_core/machines/connections.py",
        old="            session = peer.session = Session(session_id, ours, theirs, self.effects)\n",
        new=(
            "            marks = globals().setdefault('MARKS', {}).setdefault((id(self), peer.node), {})\n"
            "            session = peer.session = Session(session_id, ours, theirs, self.effects, receiving=marks)\n"
        ),
        invariant="I26",
        campaign="messages",
        seed=8,
    ),
    Mutant(
        name="M4 another life takes over though the present one lives",
        file="ha_core/machines/connections.py",
        old="            self._contest(peer, connection, now_ns)\n        else:\n",
        new="            self._establish(peer, connection, ours, theirs, now_ns)\n        else:\n",
        invariant="I11",
        campaign="messages",
        seed=24,
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
        seed=18,
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
        seed=18,
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
]
