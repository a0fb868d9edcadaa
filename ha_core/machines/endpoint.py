"""The endpoint: all messaging of one node below durable channels, as one machine.

Events and effects are those of ``ha_core.machines.messages``; it persists nothing. The lower half (connections, handshakes,
verdicts on paths) is ``connections.py``, a session's data ``session.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from ha_core.config import Profile
from ha_core.errors import InvariantError
from ha_core.ids import Boot, ChannelName, LinkName, NodeId, StoreId
from ha_core.machines.channels import INITIAL_WINDOW_BYTES, INITIAL_WINDOW_MESSAGES
from ha_core.machines.connections import Connections
from ha_core.machines.contract import Effect, Event, Rng
from ha_core.machines.datagrams import session_of
from ha_core.machines.handshake import NONCE_BYTES, VERSION_MAX, VERSION_MIN, Hello, SeenBoot
from ha_core.machines.messages import (
    Accepted,
    Connected,
    Consumed,
    DatagramReceived,
    DeliverDatagram,
    Disconnected,
    Flushed,
    ForgetPeer,
    PathKey,
    PathState,
    Received,
    SendDatagram,
    SendRun,
    SetPeer,
    TransmitDatagram,
)
from ha_core.machines.paths import Path
from ha_core.machines.session import Session


class EndpointMachine:
    """Sessions and datagrams with all peers, over all paths; implements the machine contract."""

    table_kind: ClassVar[type[Connections]] = Connections
    """For the simulator's nodes of other versions."""

    def __init__(
        self,
        *,
        node: NodeId,
        cluster: str,
        key: bytes,
        store: StoreId,
        boot: Boot,
        boots_digest: bytes,
        links: Mapping[LinkName, str],
        profile: Profile,
        rng: Rng,
        accept_unknown: bool = True,
        versions: tuple[int, int] = (VERSION_MIN, VERSION_MAX),
        seen: Iterable[SeenBoot] = (),
    ) -> None:
        """
        Args:
            boots_digest: of all boots of the store before this one (``handshake.extend_boots_digest``).
            links: our links and the ``host:port`` under which others reach us on each.
            accept_unknown: serve nodes that prove the key though SetPeer never named them (they are joining).
            seen: the newest boots of other stores that earlier lives of this node saw: who goes back behind one is refused.
            versions: the lowest and the highest version of the protocol that this node speaks.
        """
        identity = Hello(
            cluster=cluster,
            node=node,
            store=store,
            boot=boot,
            boots_digest=boots_digest,
            epoch=0,
            link=LinkName(""),
            address="",
            session=b"",
            window_bytes=INITIAL_WINDOW_BYTES,
            window_messages=INITIAL_WINDOW_MESSAGES,
            nonce=bytes(NONCE_BYTES),
            version_min=versions[0],
            version_max=versions[1],
        )
        self.node = node
        self._lower = self.table_kind(identity, key, dict(links), profile, rng, accept_unknown)
        for known in seen:
            self._lower.note_seen(known)

    # -- the contract --

    def receive(self, events: Sequence[Event], now_ns: int) -> None:
        lower = self._lower
        lower.note_lag(now_ns)
        for event in events:
            match event:
                case Received():
                    connection = lower.get(event.connection)
                    if connection is not None:
                        lower.receive(connection, event.data, now_ns)
                case Flushed():
                    self._flushed(event)
                case SendRun():
                    self._send_run(event)
                case Consumed():
                    self._consumed(event, now_ns)
                case SendDatagram():
                    self._send_datagram(event, now_ns)
                case DatagramReceived():
                    self._receive_datagram(event, now_ns)
                case _:
                    self._receive_rare(event, now_ns)
        lower.finish(now_ns)

    def _receive_rare(self, event: Event, now_ns: int) -> None:
        lower = self._lower
        match event:
            case SetPeer():
                self._set_peer(event, now_ns)
            case ForgetPeer():
                peer = lower.peers.get(event.peer)
                if peer is not None:
                    lower.forget(peer, now_ns)
            case Accepted():
                lower.accept(event, now_ns)
            case Connected():
                connection = lower.get(event.connection)
                if connection is not None:
                    lower.connected(connection)
            case Disconnected():
                connection = lower.get(event.connection)
                if connection is not None:
                    lower.lose(connection, event.error, now_ns, tell=False)
            case _:
                raise InvariantError(f"the endpoint knows no event {type(event).__name__}")

    def handle_timer(self, now_ns: int) -> None:
        self._lower.note_lag(now_ns)
        self._lower.handle_timer(now_ns)
        self._lower.finish(now_ns)
        self._lower.arm_all()

    def next_timer(self) -> int | None:
        return self._lower.timer_ns

    def take_effects(self) -> list[Effect]:
        effects = self._lower.effects.copy()
        self._lower.effects.clear()
        return effects

    def persisted(self, number: int, now_ns: int) -> None:
        raise InvariantError("the endpoint persists nothing")

    def persist_failed(self, number: int, error: str, now_ns: int) -> None:
        raise InvariantError("the endpoint persists nothing")

    def check(self) -> None:
        """Raises InvariantError: a rule of the state does not hold."""
        self._lower.check()

    # -- questions of the parent --

    def has_room(self, to: NodeId, channel: ChannelName) -> bool:
        """Whether the next SendRun may come now; if not, RoomChanged will say when."""
        session = self.session_with(to)
        return session is None or session.has_room(channel)

    def session_with(self, node: NodeId) -> Session | None:
        peer = self._lower.peers.get(node)
        return peer.session if peer is not None else None

    def paths(self) -> list[tuple[PathKey, PathState, int]]:
        """All paths with their state and smoothed round trip in nanoseconds (0: unknown)."""
        peers = self._lower.peers
        return [
            (path.key, path.state, self._round_trip_ns(path))
            for node in sorted(peers)
            for _, path in sorted(peers[node].paths.items())
        ]

    def _round_trip_ns(self, path: Path) -> int:
        connection = self._lower.get(path.established) if path.established is not None else None
        return connection.liveness.round_trip.smoothed_ns if connection is not None else 0

    # -- events --

    def _set_peer(self, event: SetPeer, now_ns: int) -> None:
        peer = self._lower.peer(event.peer)
        peer.addresses = dict(event.addresses)
        peer.dial = event.dial
        for link in sorted(peer.paths.keys() - event.addresses.keys()):
            if peer.paths[link].dialling:
                self._lower.drop_path(peer, peer.paths[link], "its address was withdrawn", now_ns)
        for link, remote in sorted(event.addresses.items()):
            if link in self._lower.links:
                self._lower.set_path(peer, link, remote, now_ns)

    def _send_run(self, event: SendRun) -> None:
        peer = self._lower.peers.get(event.to)
        if peer is None or peer.session is None or event.session not in (None, peer.session.id):
            return
        if event.bodies:
            peer.session.send(event)
            self._lower.want(peer)

    def _consumed(self, event: Consumed, now_ns: int) -> None:
        peer = self._lower.peers.get(event.peer)
        if peer is not None and peer.session is not None and event.session in (None, peer.session.id):
            peer.session.consumed(event, now_ns)
            self._lower.want(peer)

    def _flushed(self, event: Flushed) -> None:
        connection = self._lower.get(event.connection)
        if connection is not None:
            connection.unflushed -= event.byte_count
            if connection.path is not None:
                peer = self._lower.peers[connection.path.key.peer]
                if peer.session is not None and peer.session.may_send():
                    peer.session.flushed()
                    self._lower.want(peer)

    def _send_datagram(self, event: SendDatagram, now_ns: int) -> None:
        peer = self._lower.peers.get(event.to)
        if peer is None or peer.datagrams is None:
            return
        data = peer.datagrams.encode(event.topic, event.body, now_ns)
        paths = [path for _, path in sorted(peer.paths.items()) if path.key.remote]
        live = [path for path in paths if path.state is not PathState.DOWN]
        for path in live or paths:
            self._lower.effects.append(TransmitDatagram(path.key.link, path.key.remote, data))

    def _receive_datagram(self, event: DatagramReceived, now_ns: int) -> None:
        session = session_of(event.data)
        peer = self._lower.by_session.get(session) if session is not None else None
        if peer is None or peer.datagrams is None:
            return
        found = peer.datagrams.decode(event.data, now_ns)
        if found is not None:
            self._lower.effects.append(DeliverDatagram(peer.node, found[0], found[1]))
