"""The lower half of the endpoint: handshakes, frames, and the verdicts on paths.

Rules:

* Both ends may dial. Of two connections on one link the one dialled by the lower node id stays, of two by the same end the
  newer one; the other is closed once both have given evidence.
* Strangers get little: 64 connections in all, 8 an address, 5 s to prove the key, frames of at most 4 KiB.
* A later life of a peer replaces its session only when the present one is dead: until then its connection is held.
"""

from __future__ import annotations

import attrs

from ha_core.config import ns
from ha_core.errors import RemoteProtocolError
from ha_core.machines import handshake, wire
from ha_core.machines.connection import Connection
from ha_core.machines.connection_table import ConnectionTable
from ha_core.machines.datagrams import DatagramPort
from ha_core.machines.handshake import REFUSALS, Handshake, Hello
from ha_core.machines.messages import (
    Accepted,
    Disconnect,
    PathChanged,
    PathKey,
    PathState,
    SessionUp,
)
from ha_core.machines.paths import ACK_DELAY_NS, MILLISECOND_NS, Path
from ha_core.machines.peers import Peer, judge
from ha_core.machines.session import MAX_CHANNELS, Session
from ha_core.machines.wire import Frame, FrameType, Plain

MAX_STRANGERS = 64
MAX_STRANGERS_PER_ADDRESS = 8
MAX_HELD_BYTES = 1 << 20
CONTEST_NS = 60 * MILLISECOND_NS
"""So long, at least, a peer's present life has to prove itself before its next one is let in."""


@attrs.define(eq=False)
class Connections(ConnectionTable):
    """The lower half of the endpoint; ``receive``, ``accept``, ``connected`` and ``handle_timer`` are told what happened."""

    # -- handshakes --

    def accept(self, event: Accepted, now_ns: int) -> None:
        """A stranger connected."""
        host = event.remote.rpartition(":")[0]
        strangers = [item for item in self._connections.values() if item.path is None and not item.dialled]
        same = sum(item.remote.rpartition(":")[0] == host for item in strangers)
        if len(strangers) >= MAX_STRANGERS or same >= MAX_STRANGERS_PER_ADDRESS:
            self.effects.append(Disconnect(event.connection, "too many connections that have not proved themselves"))
            return
        connection = self._new(event.connection, event.link, event.remote, dialled=False, now_ns=now_ns)
        connection.handshake = self._handshake(connection, None, "hello")

    def connected(self, connection: Connection) -> None:
        """Our dial succeeded: speak first."""
        if connection.handshake is not None and connection.dialled:
            connection.put_handshake(connection.handshake.begin())
            self._touched[connection.number] = connection

    def _shake(self, connection: Connection, shaking: Handshake, frame: Frame, now_ns: int) -> None:
        if shaking.step == "hello" and frame.kind == FrameType.HELLO:
            # Our epoch depends on who speaks; that is only claimed here, and proved before anything comes of it.
            claimed = handshake.claimed_node(frame)
            if claimed not in self.peers and not self.accept_unknown:
                text = f"{claimed} at {connection.remote}: {REFUSALS['unknown']}"
                raise RemoteProtocolError(text, peer=claimed, code="unknown")
            shaking.ours = attrs.evolve(shaking.ours, epoch=self._epochs.get(claimed, 0))
        answer = shaking.receive(frame)
        if answer:
            connection.put_handshake(answer)
        if shaking.step == "done" and shaking.peer is not None:
            connection.handshake = None
            connection.ours, connection.theirs = shaking.ours, shaking.peer
            connection.version, connection.features = shaking.version, shaking.features
            connection.peer = shaking.peer.node
            connection.decoder.limit = wire.MAX_BODY_BYTES
            self._prove(connection, shaking.ours, shaking.peer, now_ns)

    def _prove(self, connection: Connection, ours: Hello, theirs: Hello, now_ns: int) -> None:
        """The peer has the key: is it who it was, its next life, or a clone?"""
        peer = self.peer(theirs.node)
        if ours.epoch != self._epochs.get(peer.node, 0):
            self.lose(connection, "the session was given up meanwhile", now_ns, tell=True)
            return
        verdict = judge(peer.last, theirs)
        if peer.last is None or peer.last.store != theirs.store:
            before = judge(self.seen.get(theirs.store), theirs)  # by an earlier life of this node, or before another store
            verdict = before if before in REFUSALS else verdict
        if verdict in REFUSALS:
            text = f"{theirs.node} at {connection.remote}: {REFUSALS[verdict]} (boot {theirs.boot.counter})"
            raise RemoteProtocolError(text, peer=theirs.node, code=verdict)
        if verdict == "same" and peer.last is not None and theirs.epoch < peer.last.epoch:
            self.lose(connection, "of a session that the peer gave up", now_ns, tell=True)
        elif verdict == "next" and peer.session is not None and peer.session.connections:
            self._contest(peer, connection, now_ns)
        else:
            self._establish(peer, connection, ours, theirs, now_ns)

    def _contest(self, peer: Peer, connection: Connection, now_ns: int) -> None:
        """Hold the next life until the present one is silent; if that one answers, one of the two is a clone."""
        connection.held = bytearray()
        connection.deadline_ns = None
        peer.contenders.append(connection)
        if peer.contest_end_ns is None and peer.session is not None:
            present = list(peer.session.connections.values())
            peer.contest_pings = {item.number: self._ping(item, now_ns) for item in present}
            peer.contest_end_ns = now_ns + max(CONTEST_NS, *(2 * item.liveness.timeout_ns() for item in present))
            self.arm(peer.contest_end_ns)

    def _lose_contest(self, peer: Peer, now_ns: int) -> None:
        """The present life answered."""
        peer.contest_end_ns = None
        for connection in peer.contenders.copy():
            text = f"{peer.node} at {connection.remote}: {REFUSALS['clone']}"
            self.refuse(connection, RemoteProtocolError(text, peer=peer.node, code="clone"), now_ns)

    def _end_contest(self, peer: Peer, now_ns: int) -> None:
        """The present life is dead: the next one begins."""
        contenders = [item for item in peer.contenders if item.theirs is not None]
        peer.contenders.clear()
        peer.contest_end_ns = None
        peer.contest_pings.clear()
        self._end_session(peer, "the peer restarted", now_ns)
        for connection in sorted(contenders, key=_boot_counter, reverse=True):
            held, connection.held = connection.held, None
            if connection.closed or connection.ours is None or connection.theirs is None:
                continue
            try:
                self._prove(connection, connection.ours, connection.theirs, now_ns)
            except RemoteProtocolError as exc:
                self.refuse(connection, exc, now_ns)
            if not connection.closed and connection.held is None:
                self.decode(connection, bytes(held or b""), now_ns)

    def _establish(self, peer: Peer, connection: Connection, ours: Hello, theirs: Hello, now_ns: int) -> None:
        """The connection belongs to the peer's session, which begins now if it is the first of a pair of processes."""
        session_id = handshake.session_id(ours, theirs)
        session = peer.session
        if session is None or session.id != session_id:
            self._end_session(peer, "the peer restarted" if theirs.epoch == 0 else "the peer gave it up", now_ns)
            session = peer.session = Session(session_id, ours, theirs, self.effects)
            peer.datagrams = DatagramPort(ours.cluster, self.key, session_id, ours.node, theirs.node)
            self.by_session[session_id] = peer
            for path in peer.paths.values():
                path.forgive()
            up = SessionUp(peer.node, session_id, theirs.store, theirs.boot, theirs.boots_digest)
            self.effects.append(up)
            self.note_seen(up.seen)
        peer.last = theirs
        path = self._path_of(peer, connection, theirs)
        connection.path = path
        connection.deadline_ns = None
        if path.dial == connection.number:
            path.dial = None
        if path.established is None:
            path.established = connection.number
            path.redial_ns = None
            self._move(path, "open", "connected")
        if not connection.dialled:
            connection.put_handshake(handshake.READY)
        connection.put(wire.grease_frame(self.rng), eliciting=False)
        self._ping(connection, now_ns)
        session.join(connection, now_ns)
        self.want(peer)
        for other in peer.paths.values():
            # The peer lives: do not wait out the backoff of its other paths.
            self._plan_dial(other, now_ns, int(20 * MILLISECOND_NS * self.rng.random()))

    def _path_of(self, peer: Peer, connection: Connection, theirs: Hello) -> Path:
        path = peer.paths.get(connection.link)
        if path is None:
            remote = peer.addresses.get(connection.link) or theirs.address
            path = peer.paths[connection.link] = Path(PathKey(peer.node, connection.link, remote), dialling=False)
        elif not path.key.remote and theirs.address:
            path.key = PathKey(peer.node, connection.link, theirs.address)
        return path

    # -- frames --

    def receive(self, connection: Connection, data: bytes, now_ns: int) -> None:
        """Bytes arrived."""
        self._touched[connection.number] = connection
        if connection.held is None:
            self.decode(connection, data, now_ns)
            return
        connection.held += data
        if len(connection.held) > MAX_HELD_BYTES:
            self.lose(connection, "sent too much before it was let in", now_ns, tell=True)

    def decode(self, connection: Connection, data: bytes, now_ns: int) -> None:
        try:
            while (shaking := connection.handshake) is not None:
                frames = connection.decoder.feed(data, single=True)
                if not frames:
                    return
                data = b""
                self._shake(connection, shaking, frames[0], now_ns)
                if connection.closed or connection.held is not None:
                    return
            peer = self.peers[connection.peer] if connection.peer is not None else None
            if peer is None or peer.session is None:
                return
            self.want(peer)
            for frame in connection.decoder.feed(data):
                self._take(peer, peer.session, connection, frame, now_ns)
                if connection.closed:
                    return
        except RemoteProtocolError as exc:
            self.refuse(connection, exc, now_ns)

    def _take(self, peer: Peer, session: Session, connection: Connection, frame: Frame, now_ns: int) -> None:
        kind = frame.kind
        connection.liveness.received += 1
        if kind == FrameType.DATA:
            session.receive_data(connection, frame, now_ns)
        elif kind == FrameType.ACK:
            fields = wire.decode_fields(frame.body, max_array=4 * MAX_CHANNELS)
            session.receive_ack(fields)
            if frame.flags & wire.ELICITING:
                connection.queue_ack(now_ns + ACK_DELAY_NS)
            self._evidence(peer, session, connection, wire.int_field(fields, 1), now_ns)
        elif kind == FrameType.PING:
            number = wire.int_field(wire.decode_fields(frame.body), 0)
            answer: dict[int, Plain] = {0: number, 1: self.lag_ns, 2: connection.liveness.received}
            connection.put(wire.encode_frame(FrameType.PONG, wire.encode_fields(answer)), eliciting=False)
        elif kind == FrameType.PONG:
            fields = wire.decode_fields(frame.body)
            number = wire.int_field(fields, 0)
            if connection.liveness.pong(number, wire.int_field(fields, 1, default=0), now_ns):
                first = peer.contest_pings.get(connection.number)
                if peer.contenders and first is not None and number >= first:
                    self._lose_contest(peer, now_ns)
            self._evidence(peer, session, connection, wire.int_field(fields, 2), now_ns)
        elif kind == FrameType.OPEN:
            session.receive_open(frame)
            connection.queue_ack(now_ns + ACK_DELAY_NS)
        elif kind == FrameType.REJECT:
            handshake.raise_rejected(frame, connection.peer or connection.remote, self.identity.node)
        elif not kind & wire.IGNORABLE:
            raise RemoteProtocolError(f"frame type {kind} after the handshake", code="protocol")

    def _evidence(self, peer: Peer, session: Session, connection: Connection, count: int, now_ns: int) -> None:
        """The peer proved that our direction works."""
        path = connection.path
        if path is None or not connection.liveness.note_proved(count, now_ns):
            return
        session.trust(connection)
        if path.established != connection.number:
            self._resolve(path, connection, now_ns)
        if path.state is PathState.UP or connection.closed:
            return
        other_up = any(other.state is PathState.UP for other in peer.paths.values())
        if path.note_good(now_ns, self.profile, other_up=other_up):
            self.effects.append(PathChanged(path.key, path.state, "good probes"))
            self._note_reachable(peer)
            session.consider(now_ns)

    def _resolve(self, path: Path, connection: Connection, now_ns: int) -> None:
        """Two connections on one path: both ends keep the same one."""
        current = self._connections.get(path.established) if path.established is not None else None
        if current is not None:
            if current.liveness.timeouts or not current.liveness.evidence_ns:
                return
            keep = max(connection, current, key=self._precedence)
            loser = current if keep is connection else connection
            path.established = keep.number
            self.lose(loser, "a second connection on the same link", now_ns, tell=True)
        else:
            path.established = connection.number

    def _precedence(self, connection: Connection) -> tuple[bool, int]:
        dialled_by_lower = connection.peer is not None and connection.dialled == (self.identity.node < connection.peer)
        return dialled_by_lower, connection.number

    # -- probes and verdicts --

    def handle_timer(self, now_ns: int) -> None:
        """Whatever is due."""
        for peer in list(self.peers.values()):
            if peer.contest_end_ns is not None and peer.contest_end_ns <= now_ns:
                self._end_contest(peer, now_ns)
            for path in list(peer.paths.values()):
                if path.redial_ns is not None and path.redial_ns <= now_ns:
                    self._dial(path, now_ns)
        for connection in list(self._connections.values()):
            if not connection.closed:
                self._check(connection, now_ns)

    def _ping(self, connection: Connection, now_ns: int) -> int:
        number = connection.liveness.ping(now_ns)
        fields: dict[int, Plain] = {0: number}
        if number % 16 == 0:
            key, value = wire.grease_field(self.rng)
            fields[key] = value
        connection.put(wire.encode_frame(FrameType.PING, wire.encode_fields(fields)), eliciting=True)
        settled = connection.path is not None and connection.path.state is PathState.UP and not connection.busy
        interval_ns = ns(self.profile.probe_idle_s if settled else self.profile.probe_busy_s)
        connection.ping_ns = now_ns + int(interval_ns * self.rng.uniform(0.75, 1.25))
        connection.busy = False
        self._touched[connection.number] = connection
        return number

    def _check(self, connection: Connection, now_ns: int) -> None:
        """What is due on one connection."""
        if connection.path is None or connection.held is not None:
            if connection.deadline_ns is not None and connection.deadline_ns <= now_ns:
                self.lose(connection, "no handshake within 5 s", now_ns, tell=True)
            return
        deadline_ns = connection.liveness.deadline_ns
        if deadline_ns is not None and deadline_ns <= now_ns:
            self._timed_out(connection, connection.path, now_ns)
        if connection.closed:
            return
        if connection.ping_ns <= now_ns:
            self._ping(connection, now_ns)
        if connection.ack_ns is not None and connection.ack_ns <= now_ns:
            self.want(self.peers[connection.path.key.peer])

    def _timed_out(self, connection: Connection, path: Path, now_ns: int) -> None:
        peer = self.peers[path.key.peer]
        session = peer.session
        if session is None:
            return
        others = [item for item in session.connections.values() if item is not connection]
        other_ns = max((item.liveness.evidence_ns for item in others), default=0)
        verdict = connection.liveness.timed_out(now_ns, ns(self.profile.down_s), other_ns)
        if verdict == "down":
            self.lose(connection, f"silent for {self.profile.down_s:g} s", now_ns, tell=True)
            return
        if path.state is not PathState.UP:
            path.note_bad(now_ns)
        self._ping(connection, now_ns)
        if verdict == "doubt":
            # Ask the other paths, too: if all are silent at once, it is the peer that is slow.
            for other in others:
                self._ping(other, now_ns)
            if connection is session.active:
                session.doubt(now_ns)
        elif verdict == "suspect" and path.established == connection.number:
            path.note_bad(now_ns)
            self._move(path, "silent", "two probe timeouts while another path answers")
            session.consider(now_ns)
        self.want(peer)


def _boot_counter(connection: Connection) -> int:
    return connection.theirs.boot.counter if connection.theirs is not None else 0
