"""All peers, paths and connections of one node: timers, dials and endings. What is said on them is in ``connections.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import attrs

from ha_core.config import Profile, ns
from ha_core.errors import RemoteProtocolError
from ha_core.ids import LinkName, NodeId, StoreId
from ha_core.machines import handshake, wire
from ha_core.machines.connection import Connection
from ha_core.machines.contract import Effect, Rng
from ha_core.machines.handshake import REFUSALS, Handshake, Hello, SeenBoot
from ha_core.machines.messages import Dial, Disconnect, PathChanged, PathKey, PathState, PeerReachable, PeerRefused, SessionDown
from ha_core.machines.paths import MILLISECOND_NS, SECOND_NS, Liveness, Path
from ha_core.machines.peers import Peer

LAG_NS = 2 * MILLISECOND_NS
"""A timer that comes later than this means that our own loop was busy."""
LAG_GRACE_NS = 10 * MILLISECOND_NS
"""After such a lag: time to read what waits in the sockets, before any deadline counts."""
REFUSAL_REPEAT_NS = 60 * SECOND_NS
MAX_REFUSALS = 256
MAX_SEEN = 4096
"""Stores whose boots are remembered: a node without a durable store has another one in each life."""
REFUSED_FAILURES = 5
"""A refused dial is repeated as late as if it had failed so often already: nothing will change within milliseconds."""


@attrs.define(eq=False)
class ConnectionTable:
    """What is common to everything below: the state, when to be woken, how a connection begins and how it ends."""

    connection_kind: ClassVar[type[Connection]] = Connection
    """For the simulator's nodes of other versions."""
    identity: Hello
    """What we say about ourselves; link, address, nonce and epoch are filled in for each handshake."""
    key: bytes = attrs.field(repr=False)
    links: Mapping[LinkName, str]
    profile: Profile
    rng: Rng
    accept_unknown: bool
    seen: dict[StoreId, SeenBoot] = attrs.field(factory=dict)
    """The newest boots of other stores, those that an earlier life of this node has seen among them."""
    effects: list[Effect] = attrs.field(factory=list)
    peers: dict[NodeId, Peer] = attrs.field(factory=dict)
    by_session: dict[bytes, Peer] = attrs.field(factory=dict)
    timer_ns: int | None = None
    """When to be woken: not later than anything that is due."""
    lag_ns: int = 0
    """By how much our own loop was late in this step."""
    _connections: dict[int, Connection] = attrs.field(factory=dict)
    _epochs: dict[NodeId, int] = attrs.field(factory=dict)
    _next_connection: int = 2
    _touched: dict[int, Connection] = attrs.field(factory=dict)
    _pumped: dict[NodeId, Peer] = attrs.field(factory=dict)
    _refused_ns: dict[tuple[str, str], int] = attrs.field(factory=dict)

    # -- time --

    def get(self, number: int) -> Connection | None:
        return self._connections.get(number)

    def note_lag(self, now_ns: int) -> None:
        """A late timer moves every deadline: we were slow, not the peers."""
        self.lag_ns = 0
        if self.timer_ns is None or now_ns - self.timer_ns <= LAG_NS:
            return
        self.lag_ns = lag_ns = now_ns - self.timer_ns
        self.timer_ns = now_ns
        for connection in self._connections.values():
            connection.liveness.shift(lag_ns, now_ns + LAG_GRACE_NS)
        for peer in self.peers.values():
            if peer.contest_end_ns is not None:
                peer.contest_end_ns += lag_ns + LAG_GRACE_NS

    def arm(self, when_ns: int | None) -> None:
        if when_ns is not None and (self.timer_ns is None or when_ns < self.timer_ns):
            self.timer_ns = when_ns

    def arm_all(self) -> None:
        """Find the next timer among all; between two timers it is only ever lowered."""
        self.timer_ns = None
        for peer in self.peers.values():
            self.arm(peer.contest_end_ns)
            for path in peer.paths.values():
                self.arm(path.redial_ns)
        for connection in self._connections.values():
            self._arm(connection)

    def _arm(self, connection: Connection) -> None:
        if connection.path is None or connection.held is not None:
            self.arm(connection.deadline_ns)
            return
        self.arm(connection.liveness.deadline_ns)
        self.arm(connection.ack_ns)
        self.arm(connection.ping_ns)

    def want(self, peer: Peer) -> None:
        """The peer's session may have something to send: look at the end of this step."""
        self._pumped[peer.node] = peer

    def finish(self, now_ns: int) -> None:
        """The end of a step: acknowledgements, data, and everything queued out in one Transmit per connection."""
        touched = self._touched
        for peer in self._pumped.values():
            session = peer.session
            if session is not None:
                session.send_acks(now_ns)
                session.pump(now_ns)
                touched.update(session.connections)
        self._pumped.clear()
        for connection in touched.values():
            if not connection.closed:
                connection.flush(now_ns, self.effects)
                self._arm(connection)
        touched.clear()

    # -- peers and paths --

    def peer(self, node: NodeId) -> Peer:
        """The peer's record, made if it is new."""
        peer = self.peers.get(node)
        if peer is None:
            peer = self.peers[node] = Peer(node)
        return peer

    def set_path(self, peer: Peer, link: LinkName, remote: str, now_ns: int) -> None:
        """The peer is reached at ``remote`` on this link."""
        path = peer.paths.get(link)
        if path is not None and path.key.remote != remote:
            if path.dialling:
                self.drop_path(peer, path, "its address changed", now_ns)
                path = None
            else:
                path.key = PathKey(peer.node, link, remote)
        if path is None:
            path = peer.paths[link] = Path(PathKey(peer.node, link, remote), dialling=peer.dial)
        path.dialling = peer.dial
        self._plan_dial(path, now_ns)

    def drop_path(self, peer: Peer, path: Path, reason: str, now_ns: int) -> None:
        path.dialling = False
        for connection in [item for item in self._connections.values() if item.path is path or item.number == path.dial]:
            self.lose(connection, reason, now_ns, tell=True)
        peer.paths.pop(path.key.link, None)
        self._note_reachable(peer)

    def note_seen(self, seen: SeenBoot) -> None:
        self.seen.pop(seen.store, None)
        if len(self.seen) >= MAX_SEEN:
            del self.seen[next(iter(self.seen))]
        self.seen[seen.store] = seen

    def forget(self, peer: Peer, now_ns: int) -> None:
        """No session, no paths; a later session with the same process has another id."""
        if peer.session is not None:
            self._epochs[peer.node] = self._epochs.get(peer.node, 0) + 1
            self._end_session(peer, "the peer was forgotten", now_ns)
        for path in list(peer.paths.values()):
            self.drop_path(peer, path, "the peer was forgotten", now_ns)
        for connection in peer.contenders.copy():
            self.lose(connection, "the peer was forgotten", now_ns, tell=True)
        del self.peers[peer.node]

    def _plan_dial(self, path: Path, now_ns: int, delay_ns: int = 0) -> None:
        idle = path.established is None and path.dial is None
        if path.dialling and idle and (path.redial_ns is None or path.redial_ns > now_ns + delay_ns):
            path.redial_ns = now_ns + delay_ns
            self.arm(path.redial_ns)

    def _dial(self, path: Path, now_ns: int) -> None:
        path.redial_ns = None
        if not path.dialling or path.established is not None or path.dial is not None:
            return
        connection = self._new(self._next_connection, path.key.link, path.key.remote, dialled=True, now_ns=now_ns)
        self._next_connection += 2
        connection.peer = path.key.peer
        connection.handshake = self._handshake(connection, path.key.peer, "welcome")
        path.dial = connection.number
        self._move(path, "dial", "dialling")
        self.effects.append(Dial(connection.number, path.key))

    def _move(self, path: Path, happening: str, reason: str) -> None:
        if path.move(happening):
            self.effects.append(PathChanged(path.key, path.state, reason))

    def _note_reachable(self, peer: Peer) -> None:
        states = {path.state for path in peer.paths.values()}
        if peer.reachable:
            reachable = PathState.UP in states or PathState.SUSPECT in states
        else:
            reachable = PathState.UP in states
        if reachable != peer.reachable:
            peer.reachable = reachable
            self.effects.append(PeerReachable(peer.node, reachable))

    def _new(self, number: int, link: LinkName, remote: str, *, dialled: bool, now_ns: int) -> Connection:
        deadline_ns = now_ns + handshake.TIMEOUT_NS
        liveness = Liveness(ns(self.profile.probe_timeout_floor_s))
        connection = self.connection_kind(number, link, remote, dialled, liveness, deadline_ns)
        self._connections[number] = connection
        self.arm(deadline_ns)
        return connection

    def _handshake(self, connection: Connection, expected: NodeId | None, step: handshake.Step) -> Handshake:
        session = self.peers[expected].session if expected in self.peers else None
        ours = attrs.evolve(
            self.identity,
            epoch=self._epochs.get(expected, 0) if expected is not None else 0,
            link=connection.link,
            address=self.links.get(connection.link, ""),
            session=session.id if session is not None else b"",
            nonce=handshake.fresh_nonce(self.key, self.rng),
            expected=expected or "",
        )
        return Handshake(ours, self.key, wire.grease_field(self.rng), step, connection.remote)

    # -- endings --

    def lose(self, connection: Connection, reason: str, now_ns: int, *, tell: bool) -> None:
        """The connection is gone, or shall go (``tell`` the shell): its data moves, its path is judged and dialled again."""
        if connection.closed:
            return
        connection.closed = True
        del self._connections[connection.number]
        if tell:
            connection.flush(now_ns, self.effects)
            self.effects.append(Disconnect(connection.number, reason))
        peer = self.peers.get(connection.peer) if connection.peer is not None else None
        if peer is None:
            return
        if connection in peer.contenders:
            peer.contenders.remove(connection)
            if not peer.contenders:  # the present session stays: nobody is there to replace it
                peer.contest_end_ns = None
        session = peer.session
        if session is not None and connection.number in session.connections:
            session.leave(connection, now_ns)
            self.want(peer)
        path = peer.paths.get(connection.link)
        if path is not None:
            self._lose_path(peer, path, connection, reason, now_ns)
        if peer.contenders and session is not None and not session.connections:
            peer.contest_end_ns = now_ns
            self.arm(now_ns)

    def _lose_path(self, peer: Peer, path: Path, connection: Connection, reason: str, now_ns: int) -> None:
        if path.established == connection.number:
            session = peer.session
            rest = [] if session is None else [item for item in session.connections.values() if item.path is path]
            path.established = rest[-1].number if rest else None
            if rest:
                return
            path.note_bad(now_ns)
        elif path.dial == connection.number:
            path.dial = None
            if path.established is not None:
                return
        else:
            return
        self._move(path, "lost", reason)
        self._note_reachable(peer)
        self._plan_dial(path, now_ns, path.next_redial_ns(self.rng))

    def _end_session(self, peer: Peer, reason: str, now_ns: int) -> None:
        session = peer.session
        if session is None:
            return
        peer.session = peer.datagrams = None
        del self.by_session[session.id]
        self.effects.append(SessionDown(peer.node, session.id, reason))
        for connection in list(session.connections.values()):
            self.lose(connection, reason, now_ns, tell=True)

    def refuse(self, connection: Connection, exc: RemoteProtocolError, now_ns: int) -> None:
        """Say why, close, and tell the administrator once a minute."""
        code = exc.code if exc.code in REFUSALS else "protocol"
        name = exc.peer or connection.peer or connection.remote
        text = str(exc) if exc.peer else f"{name} at {connection.remote}: {exc}: connection closed"
        versions = self.identity.version_min, self.identity.version_max
        connection.put_handshake(handshake.encode_reject(code, versions))
        path = self.peers[connection.peer].paths.get(connection.link) if connection.peer in self.peers else None
        if path is not None:
            path.failures = max(path.failures, REFUSED_FAILURES)
        self.lose(connection, text, now_ns, tell=True)
        where = (exc.peer or connection.remote.rpartition(":")[0], code)
        last_ns = self._refused_ns.get(where)
        if last_ns is None or now_ns - last_ns >= REFUSAL_REPEAT_NS:
            self._refused_ns.pop(where, None)
            if len(self._refused_ns) >= MAX_REFUSALS:
                del self._refused_ns[min(self._refused_ns)]
            self._refused_ns[where] = now_ns
            self.effects.append(PeerRefused(name, code, text))

    def check(self) -> None:
        """Raises InvariantError: a rule of the state does not hold."""
        for peer in self.peers.values():
            if peer.session is not None:
                peer.session.check()
        for connection in self._connections.values():
            connection.liveness.check()
