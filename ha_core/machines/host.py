"""What one host's aam adds to its AAM machine: whom it talks to, and who is a member.

A child of the NodeMachine (``host_child``), and the parent of the AamMachine. It keeps the endpoint's peers equal to the
registered hosts and the members: who is no longer registered still votes until it is a member no longer. Each aam introduces
itself on channel ``aam`` when a session comes up: its replica and its addresses. The leader makes members of those that are
registered (machines/membership.py), one change at a time, and hands over first if its own host is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, cast

import attrs
import msgpack

from ha_core.ids import ChannelName, LinkName, NodeId, ReplicaId, SessionId, host_of
from ha_core.machines.aam import AamMachine, GuardDatagram, PeerReached, PingAnswered, RecordsChanged
from ha_core.machines.contract import Effect, Event
from ha_core.machines.database_events import (
    CHANNELS,
    CloseWatch,
    DatabaseReply,
    DatabaseRequest,
    OpenWatch,
    PeerDown,
    PeerUp,
    Reconfigure,
    Transfer,
    WatchTaken,
    from_endpoint,
)
from ha_core.machines.failover.commands import Command, RegisterHost, SetSettings
from ha_core.machines.failover.records import Host
from ha_core.machines.keyvalue.model import Call
from ha_core.machines.membership import MAX_PRIMARIES, REPLACE_AFTER_NS, Contact, next_change, next_leader
from ha_core.machines.messages import Consumed, DeliverRun, ForgetPeer, PeerReachable, Priority, SendRun, SetPeer
from ha_core.machines.node import Child
from ha_core.machines.raft.types import ConfigurationChanged

INTRODUCTION: Final = ChannelName("aam")
REVIEW_NS: Final = 500_000_000
"""How often the leader compares the members with the hosts."""
_CHANGE_REQUEST: Final = 1 << 60
"""Our requests to the database; those of this node's callers are numbered from 1."""
_CHANGE_TIMEOUT_NS: Final = 5_000_000_000


@attrs.frozen
class Introduced(Event):
    """Messages of channel ``aam``."""

    run: DeliverRun


@attrs.define
class _Peer:
    replica: bytes = b""
    addresses: Mapping[LinkName, str] = attrs.field(factory=dict)
    has_session: bool = False
    session: SessionId | None = None
    """The present one, or the last."""
    reachable: bool = False
    silent_since_ns: int = 0


class HostMachine:
    """A machine by the contract; among its effects are events for the endpoint (``ChildMachine``)."""

    def __init__(
        self,
        *,
        node: NodeId,
        replica: ReplicaId,
        addresses: Mapping[LinkName, str],
        aam: AamMachine,
        primaries: Mapping[NodeId, Mapping[LinkName, str]],
        founds: Host | None = None,
        max_primaries: int = MAX_PRIMARIES,
    ) -> None:
        """``primaries``: whom this host knew when it was last up; the registered hosts are added as the database tells them.
        ``founds``: this host's record, if it is the first of its cluster: it registers itself, but only while no host is
        registered at all, else the founder could never be removed. ``max_primaries``: how many shall vote at most."""
        self.aam = aam
        self._node = node
        self._introduction = _encode(replica, addresses)
        self._effects: list[Effect | Event] = []
        self._peers: dict[NodeId, _Peer] = {}
        self._set: dict[NodeId, Mapping[LinkName, str]] = {}
        self._known_at_start = dict(primaries)
        self._founds = founds
        self._max_primaries = max_primaries
        self._review_ns = 0
        self._change_open = False

    # -- the contract --

    def receive(self, events: Sequence[Event], now_ns: int) -> None:
        above: list[Event] = []
        for event in events:
            match event:
                case Introduced(run):
                    self._heard(run)
                    continue
                case PeerUp(peer, session):
                    self._peer(peer).has_session = True
                    self._peer(peer).session = session
                    self._note(peer, now_ns)
                    self._effects.append(SendRun(peer, INTRODUCTION, [self._introduction], Priority.URGENT))
                case PeerDown(peer):
                    self._peer(peer).has_session = False
                    self._note(peer, now_ns)
                case PeerReached(peer, reachable):
                    self._peer(peer).reachable = reachable
                    self._note(peer, now_ns)
            above.append(event)
        if above:
            self.aam.receive(above, now_ns)
        self._settle(now_ns)

    def handle_timer(self, now_ns: int) -> None:
        timer = self.aam.next_timer()
        if timer is not None and timer <= now_ns:
            self.aam.handle_timer(now_ns)
        self._settle(now_ns)

    def next_timer(self) -> int | None:
        timer = self.aam.next_timer()
        return self._review_ns if timer is None else min(timer, self._review_ns)

    def take_effects(self) -> list[Effect | Event]:
        effects, self._effects = self._effects, []
        return effects

    def persisted(self, number: int, now_ns: int) -> None:
        self.aam.persisted(number, now_ns)
        self._settle(now_ns)

    def persist_failed(self, number: int, error: str, now_ns: int) -> None:
        self.aam.persist_failed(number, error, now_ns)
        self._settle(now_ns)

    def _settle(self, now_ns: int) -> None:
        if now_ns >= self._review_ns:
            self._review_ns = now_ns + REVIEW_NS
            self._follow_the_hosts()
            change = self._review(now_ns)
            if change is not None:
                self.aam.receive([change], now_ns)
        found = self._found()
        if found is not None:
            self.aam.receive([found], now_ns)
        for effect in self.aam.take_effects():
            if isinstance(effect, DatabaseReply) and effect.request == _CHANGE_REQUEST:
                self._change_open = False
                continue
            if isinstance(effect, RecordsChanged | ConfigurationChanged):
                self._follow_the_hosts()
            self._effects.append(effect)

    def _found(self) -> DatabaseRequest | None:
        if self._founds is None or self._change_open or not self.aam.coordinating:
            return None
        if self.aam.inventory.hosts:
            self._founds = None
            return None
        self._change_open = True
        # Nobody gets a lease before a host is registered: all of them are as the founder's profile has them.
        settings = self.aam.founding_settings
        command: Command = RegisterHost.of(self._founds)
        if self.aam.inventory.settings != settings:
            command = SetSettings.of(settings)
        return DatabaseRequest(_CHANGE_REQUEST, Call(command.name, command.args()), _CHANGE_TIMEOUT_NS)

    # -- peers --

    def _peer(self, peer: NodeId) -> _Peer:
        return self._peers.setdefault(peer, _Peer())

    def _note(self, peer: NodeId, now_ns: int) -> None:
        known = self._peer(peer)
        if known.has_session and known.reachable:
            known.silent_since_ns = 0
        elif not known.silent_since_ns:
            known.silent_since_ns = now_ns

    def _heard(self, run: DeliverRun) -> None:
        for body in run.bodies:
            introduced = _decode(body)
            if introduced is not None:
                known = self._peer(run.peer)
                known.replica, known.addresses = introduced
        session = self._peer(run.peer).session
        self._effects.append(Consumed(run.peer, run.channel, len(run.bodies), sum(map(len, run.bodies)), session))

    def _follow_the_hosts(self) -> None:
        """The endpoint's peers are the registered hosts' aams, and whoever is still a member; before the database is there,
        those known at the start."""
        configuration = self.aam.database.configuration
        members = configuration.members if configuration is not None else {}
        wanted: dict[NodeId, Mapping[LinkName, str]] = {
            node: dict(member.addresses) for node, member in sorted(members.items()) if member.addresses
        }
        for host in self.aam.inventory.hosts.values():
            wanted[NodeId(f"aam@{host.name}")] = {LinkName(link): address for link, address in host.addresses}
        if host_of(self._node) not in self.aam.inventory.hosts:
            wanted = {**self._known_at_start, **wanted}
        wanted.pop(self._node, None)
        self._effects += [ForgetPeer(node) for node in sorted(self._set) if node not in wanted]
        self._effects += [SetPeer(node, links) for node, links in sorted(wanted.items()) if self._set.get(node) != links]
        self._set = wanted

    # -- members --

    def _review(self, now_ns: int) -> DatabaseRequest | None:
        configuration = self.aam.database.configuration
        if not self.aam.coordinating or self._change_open or configuration is None:
            return None
        contacts = {node: self._contact(node, now_ns) for node in sorted({*self._peers, *configuration.nodes} - {self._node})}
        registered = [NodeId(f"aam@{name}") for name in sorted(self.aam.inventory.hosts)]
        change = next_change(
            configuration, leader=self._node, registered=registered, contacts=contacts, replace_after_ns=REPLACE_AFTER_NS,
            max_voters=self._max_primaries,
        )  # fmt: skip
        heir = next_leader(configuration, leader=self._node, registered=registered, contacts=contacts)
        if change is None and heir is None:
            return None
        self._change_open = True
        operation = Reconfigure(change) if change is not None else Transfer(cast(NodeId, heir))
        return DatabaseRequest(_CHANGE_REQUEST, operation, _CHANGE_TIMEOUT_NS)

    def _contact(self, node: NodeId, now_ns: int) -> Contact:
        known = self._peer(node)
        self._note(node, now_ns)
        silent_ns = max(1, now_ns - known.silent_since_ns) if known.silent_since_ns else 0
        return Contact(known.replica, known.addresses, silent_ns)


def host_child(machine: HostMachine) -> Child:
    """The host machine's place in a NodeMachine."""
    handles = (DatabaseRequest, OpenWatch, WatchTaken, CloseWatch, GuardDatagram, PingAnswered)
    return Child(machine, handles, _hears, (*CHANNELS, INTRODUCTION), persists=True)


def _hears(effect: Effect) -> Event | None:
    match effect:
        case DeliverRun(channel=channel) if channel == INTRODUCTION:
            return Introduced(effect)
        case PeerReachable(peer, reachable):
            return PeerReached(peer, reachable)
    return from_endpoint(effect)


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
