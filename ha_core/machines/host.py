"""The aam process of one host as one machine: endpoint, AAM, and who is a member.

The parent of two children: ``EndpointMachine`` below, ``AamMachine`` above. It passes sessions and datagrams up, what the AAM
sends down, and keeps the endpoint's peers equal to the registered hosts. Everything is synchronous: one ``receive`` carries a
batch through both.

In: every event of the two children. Out: every effect of the two, but for those that only pass between them.

Each aam introduces itself on channel ``aam`` when a session comes up: its replica and its addresses. The leader makes members
of those that are registered (machines/membership.py), one change at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import attrs
import msgpack

from ha_core.ids import ChannelName, LinkName, NodeId, ReplicaId, host_of
from ha_core.machines.aam import AamMachine, PeerReached, RecordsChanged
from ha_core.machines.contract import Effect, Event
from ha_core.machines.database_events import (
    CHANNELS,
    RAFT,
    Arrived,
    DatabaseReply,
    DatabaseRequest,
    DatagramArrived,
    PeerDown,
    PeerUp,
    Reconfigure,
    Send,
)
from ha_core.machines.endpoint import EndpointMachine
from ha_core.machines.membership import REPLACE_AFTER_NS, Contact, next_change
from ha_core.machines.messages import (
    Accepted,
    Connected,
    Consumed,
    DatagramReceived,
    DeliverDatagram,
    DeliverRun,
    Disconnected,
    Flushed,
    ForgetPeer,
    PeerReachable,
    Priority,
    Received,
    SendRun,
    SessionDown,
    SessionUp,
    SetPeer,
)

INTRODUCTION: Final = ChannelName("aam")
REVIEW_NS: Final = 500_000_000
"""How often the leader compares the members with the hosts."""
_CHANGE_REQUEST: Final = 1 << 60
"""Our requests to the database; those of this node's callers are numbered from 1."""
_CHANGE_TIMEOUT_NS: Final = 5_000_000_000
_FROM_BELOW: Final = (Received, Flushed, DatagramReceived, Connected, Accepted, Disconnected)


@attrs.define
class _Peer:
    replica: bytes = b""
    addresses: Mapping[LinkName, str] = attrs.field(factory=dict)
    has_session: bool = False
    reachable: bool = False
    silent_since_ns: int = 0


class HostMachine:
    """A machine by the contract."""

    def __init__(
        self,
        *,
        node: NodeId,
        replica: ReplicaId,
        addresses: Mapping[LinkName, str],
        endpoint: EndpointMachine,
        aam: AamMachine,
        primaries: Mapping[NodeId, Mapping[LinkName, str]],
    ) -> None:
        """``primaries``: whom this host knew when it was last up; the registered hosts are added as the database tells them."""
        self.endpoint = endpoint
        self.aam = aam
        self._node = node
        self._introduction = _encode(replica, addresses)
        self._effects: list[Effect] = []
        self._peers: dict[NodeId, _Peer] = {}
        self._set: dict[NodeId, Mapping[LinkName, str]] = {}
        self._known_at_start = dict(primaries)
        self._review_ns: int | None = 0
        self._change_open = False

    # -- the contract --

    def receive(self, events: Sequence[Event], now_ns: int) -> None:
        below: list[Event] = []
        above: list[Event] = []
        for event in events:
            (below if isinstance(event, _FROM_BELOW) else above).append(event)
        self._settle(below, above, now_ns)

    def handle_timer(self, now_ns: int) -> None:
        for child in (self.endpoint, self.aam):
            timer = child.next_timer()
            if timer is not None and timer <= now_ns:
                child.handle_timer(now_ns)
        self._settle([], [], now_ns)

    def next_timer(self) -> int | None:
        times = (self.endpoint.next_timer(), self.aam.next_timer(), self._review_ns)
        return min((time for time in times if time is not None), default=None)

    def take_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    def persisted(self, number: int, now_ns: int) -> None:
        self.aam.persisted(number, now_ns)
        self._settle([], [], now_ns)

    def persist_failed(self, number: int, error: str, now_ns: int) -> None:
        self.aam.persist_failed(number, error, now_ns)
        self._settle([], [], now_ns)

    # -- between the children --

    def _settle(self, below: list[Event], above: list[Event], now_ns: int) -> None:
        """Carry events up and down until nothing moves any more."""
        if self._review_ns is not None and now_ns >= self._review_ns:
            below += self._follow_the_hosts()
            above += self._review(now_ns)
        while True:
            if below:
                self.endpoint.receive(below, now_ns)
                below = []
            for effect in self.endpoint.take_effects():
                self._from_endpoint(effect, above, below, now_ns)
            if above:
                self.aam.receive(above, now_ns)
                above = []
            for effect in self.aam.take_effects():
                self._from_aam(effect, below, now_ns)
            if not below:
                return

    def _from_endpoint(self, effect: Effect, above: list[Event], below: list[Event], now_ns: int) -> None:
        match effect:
            case DeliverRun(peer, channel, _, bodies):
                if channel in CHANNELS:
                    above.append(Arrived(peer, channel, bodies))
                else:
                    self._heard(peer, channel, bodies)
                    below.append(Consumed(peer, channel, len(bodies), sum(map(len, bodies))))
            case DeliverDatagram(peer, topic, body):
                if topic == RAFT:
                    above.append(DatagramArrived(peer, body))
            case SessionUp(peer):
                self._peer(peer).has_session = True
                self._note(peer, now_ns)
                above.append(PeerUp(peer, effect.session))
                below.append(SendRun(peer, INTRODUCTION, [self._introduction], Priority.URGENT))
                self._effects.append(effect)
            case SessionDown(peer):
                self._peer(peer).has_session = False
                self._note(peer, now_ns)
                above.append(PeerDown(peer))
                self._effects.append(effect)
            case PeerReachable(peer, reachable):
                self._peer(peer).reachable = reachable
                self._note(peer, now_ns)
                above.append(PeerReached(peer, reachable))
                self._effects.append(effect)
            case _:
                self._effects.append(effect)

    def _from_aam(self, effect: Effect, below: list[Event], now_ns: int) -> None:
        match effect:
            case Send(event):
                below.append(event)
            case DatabaseReply(request) if request == _CHANGE_REQUEST:
                self._change_open = False
            case RecordsChanged():
                below += self._follow_the_hosts()
                self._effects.append(effect)
            case _:
                self._effects.append(effect)

    # -- peers --

    def _peer(self, peer: NodeId) -> _Peer:
        return self._peers.setdefault(peer, _Peer())

    def _note(self, peer: NodeId, now_ns: int) -> None:
        known = self._peer(peer)
        if known.has_session and known.reachable:
            known.silent_since_ns = 0
        elif not known.silent_since_ns:
            known.silent_since_ns = now_ns

    def _heard(self, peer: NodeId, channel: ChannelName, bodies: Sequence[bytes]) -> None:
        if channel != INTRODUCTION:
            return
        for body in bodies:
            introduced = _decode(body)
            if introduced is not None:
                known = self._peer(peer)
                known.replica, known.addresses = introduced

    def _follow_the_hosts(self) -> list[Event]:
        """The endpoint's peers are the registered hosts' aams; before the database is there, those known at the start."""
        wanted: dict[NodeId, Mapping[LinkName, str]] = {
            NodeId(f"aam@{host.name}"): {LinkName(link): address for link, address in host.addresses}
            for host in self.aam.inventory.hosts.values()
        }
        if host_of(self._node) not in self.aam.inventory.hosts:
            wanted = {**self._known_at_start, **wanted}
        wanted.pop(self._node, None)
        events: list[Event] = [ForgetPeer(node) for node in sorted(self._set) if node not in wanted]
        events += [SetPeer(node, links) for node, links in sorted(wanted.items()) if self._set.get(node) != links]
        self._set = wanted
        return events

    # -- members --

    def _review(self, now_ns: int) -> list[Event]:
        self._review_ns = now_ns + REVIEW_NS
        configuration = self.aam.database.configuration
        if not self.aam.coordinating or self._change_open or configuration is None:
            return []
        contacts = {node: self._contact(node, now_ns) for node in sorted({*self._peers, *configuration.nodes} - {self._node})}
        change = next_change(
            configuration,
            leader=self._node,
            registered=[NodeId(f"aam@{name}") for name in sorted(self.aam.inventory.hosts)],
            contacts=contacts,
            replace_after_ns=REPLACE_AFTER_NS,
        )
        if change is None:
            return []
        self._change_open = True
        return [DatabaseRequest(_CHANGE_REQUEST, Reconfigure(change), _CHANGE_TIMEOUT_NS)]

    def _contact(self, node: NodeId, now_ns: int) -> Contact:
        known = self._peer(node)
        self._note(node, now_ns)
        silent_ns = max(1, now_ns - known.silent_since_ns) if known.silent_since_ns else 0
        return Contact(known.replica, known.addresses, silent_ns)


def _encode(replica: bytes, addresses: Mapping[LinkName, str]) -> bytes:
    body: bytes = msgpack.packb([1, replica, sorted(addresses.items())])
    return body


def _decode(body: bytes) -> tuple[bytes, dict[LinkName, str]] | None:
    """None for anything that is no introduction; a newer one may have more fields."""
    try:
        fields = msgpack.unpackb(body, use_list=False)
        replica, addresses = fields[1], fields[2]
        links = {LinkName(str(link)): str(address) for link, address in addresses}
    except (ValueError, TypeError, IndexError, KeyError, msgpack.UnpackException):
        return None
    return (replica, links) if isinstance(replica, bytes) and len(replica) <= 64 else None
