"""The AAM of one host as a machine: its database replica, the leader's lease server and coordinator, and what the host says.

The parts: ``DatabaseMachine`` (Raft and the key-value map with the procedures of high availability), ``Inventory`` (the decoded
records of this replica), ``LeaseServer`` and ``Coordinator`` (idle unless this node leads), ``Isolation``. All is synchronous:
one ``receive`` carries a batch through all of them.

In, beside every event of the DatabaseMachine (DatabaseRequest with request numbers > 0, PeerUp, PeerDown, Arrived,
DatagramArrived, OpenWatch, ...; Persisted by the contract):

* ``GuardDatagram(source, data)``   a packet that begins with the guard's magic, as it came; ``source`` comes back
* ``PeerReached(peer, reachable)``  the endpoint's PeerReachable
* ``PingAnswered(address)``         an isolation address answered

Out, beside every effect of the DatabaseMachine (Persist, WriteCheckpoint, Send, DatabaseReply, WatchEvents, WatchClosed,
LeaderChanged, Leading, ConfigurationChanged, MessageRefused), with Applied replaced by RecordsChanged:

* ``AnswerGuard(source, data)``                  send ``data`` as a raw datagram to where the renewal came from
* ``RecordsChanged(index, changes, restored)``   records under ``\\x00ha/`` that changed, for host agent and names; with
                                                 ``restored`` they are all there are. ``inventory`` has them decoded already.
* ``Ping(address)``                              ask an isolation address; PingAnswered if it answers
* ``VerdictChanged(verdict, reason)``            connected, pinging, partitioned, isolated, failed: explains, stops nothing

The parent may read ``inventory``, ``database``, ``waiting`` between its steps.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Final

import attrs

from ha_core.config import Profile, ns
from ha_core.guard.renewal import RenewalCodec, RenewalError
from ha_core.ids import HostName, NodeId
from ha_core.machines.contract import Effect, Event
from ha_core.machines.database import DatabaseMachine
from ha_core.machines.database_events import (
    Applied,
    Confirm,
    Confirmed,
    DatabaseOutcome,
    DatabaseReply,
    DatabaseRequest,
    LeaderChanged,
    Leading,
)
from ha_core.machines.failover.commands import Command, Outcome, RegisterHost
from ha_core.machines.failover.coordinator import Coordinator
from ha_core.machines.failover.inventory import Inventory
from ha_core.machines.failover.isolation import Isolation, Verdict
from ha_core.machines.failover.leases import Answer, LeaseServer, Proposal, Round
from ha_core.machines.failover.planner import Waiting
from ha_core.machines.failover.records import PREFIX, Host, Settings
from ha_core.machines.keyvalue.model import Call, Called

REGISTER_AGAIN_NS: Final = 1_000_000_000


@attrs.frozen
class GuardDatagram(Event):
    source: Hashable
    data: bytes


@attrs.frozen
class PeerReached(Event):
    peer: NodeId
    reachable: bool


@attrs.frozen
class PingAnswered(Event):
    address: str


@attrs.frozen
class AnswerGuard(Effect):
    source: Hashable
    data: bytes


@attrs.frozen
class RecordsChanged(Effect):
    index: int
    changes: Sequence[tuple[bytes, bytes | None]]
    restored: bool = False


@attrs.frozen
class Ping(Effect):
    address: str


@attrs.frozen
class VerdictChanged(Effect):
    verdict: Verdict
    reason: str


@attrs.frozen
class _Asked:
    """An own request under way: a proposal by its key, or a quorum round by its number."""

    key: Hashable
    office: int = 0
    """Not 0: the coordinator's plan waits for it."""
    round: int = 0


class AamMachine:
    """A machine by the contract."""

    def __init__(
        self,
        *,
        node: NodeId,
        host: Host,
        database: DatabaseMachine,
        codec: RenewalCodec,
        profile: Profile,
        joins: bool = False,
        isolation_addresses: Sequence[str] = (),
    ) -> None:
        """``database`` was built with ``procedures.PROCEDURES``. ``host``: what this host registers as; ``joins``: also if the
        cluster does not know it yet (founders; others are registered by the center)."""
        self.database = database
        self.inventory = Inventory()
        self.leases = LeaseServer(node, self.inventory, ns(profile.renewal_s))
        self.isolation = Isolation(isolation_addresses, ns(profile.election_max_s), ns(profile.election_min_s))
        self.refused_packets = 0
        self._coordinator = Coordinator(self.inventory, ns(profile.renewal_s))
        self._node = node
        self._host = host
        self._joins = joins
        self._codec = codec
        self._profile = profile
        self._timeout_ns = 2 * ns(profile.election_max_s)
        self._round_ns = 4 * ns(profile.renewal_s)
        self._register_ns: int | None = 0
        self._effects: list[Effect] = []
        self._requests: list[Event] = []
        self._asked: dict[int, _Asked] = {}
        self._proposed: dict[Hashable, None] = {}
        self._last_request = 0
        self._coordinating = False
        self._verdict: tuple[Verdict, str] = (Verdict.CONNECTED, "")

    # -- the contract --

    def receive(self, events: Sequence[Event], now_ns: int) -> None:
        rest: list[Event] = []
        for event in events:
            match event:
                case GuardDatagram(source, data):
                    self._guard_datagram(source, data, now_ns)
                case PeerReached(peer, reachable):
                    self.isolation.peer(peer, reachable, now_ns)
                case PingAnswered(address):
                    self.isolation.answered(address, now_ns)
                case _:
                    rest.append(event)
        if rest:
            self.database.receive(rest, now_ns)
        self._settle(now_ns)

    def handle_timer(self, now_ns: int) -> None:
        for child in (self.database, self.leases, self.isolation):
            timer = child.next_timer()
            if timer is not None and timer <= now_ns:
                child.handle_timer(now_ns)
        self._settle(now_ns)

    def next_timer(self) -> int | None:
        times = (
            self.database.next_timer(),
            self.leases.next_timer(),
            self.isolation.next_timer(),
            self._coordinator.next_timer(),
            self._register_ns if self.database.leader is not None else None,
        )
        return min((time for time in times if time is not None), default=None)

    def take_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    def persisted(self, number: int, now_ns: int) -> None:
        self.database.persisted(number, now_ns)
        self._settle(now_ns)

    def persist_failed(self, number: int, error: str, now_ns: int) -> None:
        self.database.persist_failed(number, error, now_ns)
        self.isolation.store_failed(error, now_ns)
        self._settle(now_ns)

    # -- for the parent --

    @property
    def coordinating(self) -> bool:
        """This node is the active primary and has taken over the leases."""
        return self._coordinating

    @property
    def waiting(self) -> Sequence[Waiting]:
        """VMs that cannot start or move now, and why; on the active primary only."""
        return self._coordinator.waiting

    @property
    def founding_settings(self) -> Settings:
        """The cluster's settings with leases as this node's profile has them: the founder writes them into the database."""
        profile = self._profile
        return attrs.evolve(
            self.inventory.settings,
            lease_ns=ns(profile.lease_s),
            margin_ns=ns(profile.margin_s),
            renewal_ns=ns(profile.renewal_s),
        )

    # -- the parts --

    def _guard_datagram(self, source: Hashable, data: bytes, now_ns: int) -> None:
        if not self.leases.leading:
            return
        try:
            renewal = self._codec.decode_renewal(data)
        except RenewalError:
            self.refused_packets += 1
            return
        self.leases.receive(renewal, source, now_ns)

    def _settle(self, now_ns: int) -> None:
        """Carry everything on until nothing moves any more."""
        while True:
            for effect in self.database.take_effects():
                self._database_effect(effect, now_ns)
            self._meet_demands()
            self._coordinate(now_ns)
            self._register(now_ns)
            if not self._requests:
                break
            requests, self._requests = self._requests, []
            self.database.receive(requests, now_ns)
        self._tell_verdict()

    def _database_effect(self, effect: Effect, now_ns: int) -> None:
        match effect:
            case Applied():
                self._applied(effect, now_ns)
            case DatabaseReply(request, outcome) if request < 0:
                self._replied(request, outcome, now_ns)
            case Leading(term, counted_from_ns):
                self.leases.lead(term, counted_from_ns, now_ns)
                self._effects.append(effect)
            case LeaderChanged(leader, _):
                self.leases.follow()
                self._coordinator.follow()
                self._coordinating = False
                self.isolation.leader(leader is not None, now_ns)
                self._effects.append(effect)
            case _:
                self._effects.append(effect)

    def _applied(self, applied: Applied, now_ns: int) -> None:
        if applied.restored:
            records = self.database.state.range(PREFIX)
            items = [(record.key, record.value) for record in records]
            self.inventory.restore(applied.index, items, now_ns)
            self._register_ns = now_ns
            self._effects.append(RecordsChanged(applied.index, items, restored=True))
        else:
            changes = [
                (event.key, None if event.record is None else event.record.value)
                for group in applied.changes
                for event in group.events
                if event.key.startswith(PREFIX)
            ]
            self.inventory.apply(applied.index, changes, now_ns)
            if not changes:
                return
            if any(key == Host.key_of(self._host.name) for key, _ in changes):
                self._register_ns = now_ns
            self._effects.append(RecordsChanged(applied.index, changes))
        self.leases.applied(now_ns)
        self._coordinator.look(now_ns)

    def _coordinate(self, now_ns: int) -> None:
        if self.leases.serving and not self._coordinating:
            self._coordinating = True
            self._coordinator.lead(now_ns)
        if self._coordinator.due(now_ns):
            office, commands = self._coordinator.run(self.leases.fresh(now_ns), now_ns)
            for command in commands:
                self._propose(("plan", office, command), command, office)

    def _meet_demands(self) -> None:
        for demand in self.leases.take_demands():
            match demand:
                case Answer(source, answer):
                    self._effects.append(AnswerGuard(source, self._codec.encode_answer(answer)))
                case Round(number):
                    self._request(Confirm(), _Asked(("round", number), round=number), self._round_ns)
                case Proposal(key, command):
                    self._propose(key, command)

    def _register(self, now_ns: int) -> None:
        """Let the database know what this host is: again until it does."""
        if self._register_ns is None or now_ns < self._register_ns or self.database.leader is None:
            return
        known = self.inventory.hosts.get(HostName(self._host.name))
        self._register_ns = None
        if known is None and not self._joins:
            return
        if known is not None and self._host.taking_over(known) == known:
            return
        self._register_ns = now_ns + REGISTER_AGAIN_NS
        self._propose(("register",), RegisterHost.of(self._host))

    # -- own requests --

    def _propose(self, key: Hashable, command: Command, office: int = 0) -> None:
        if key not in self._proposed:
            self._proposed[key] = None
            self._request(Call(command.name, command.args()), _Asked(key, office), self._timeout_ns)

    def _request(self, operation: Call | Confirm, asked: _Asked, timeout_ns: int) -> None:
        self._last_request -= 1
        self._asked[self._last_request] = asked
        self._requests.append(DatabaseRequest(self._last_request, operation, timeout_ns))

    def _replied(self, request: int, outcome: DatabaseOutcome, now_ns: int) -> None:
        asked = self._asked.pop(request)
        if asked.round:
            self.leases.round_done(asked.round, outcome.term if isinstance(outcome, Confirmed) else 0, now_ns)
            return
        self._proposed.pop(asked.key, None)
        if asked.office:
            done = isinstance(outcome, Called) and Outcome.decode(outcome.value).done
            self._coordinator.decided(asked.office, done, now_ns)

    def _tell_verdict(self) -> None:
        self._effects.extend(Ping(address) for address in self.isolation.take_pings())
        verdict = (self.isolation.verdict, self.isolation.reason)
        if verdict[0] is not self._verdict[0]:
            self._effects.append(VerdictChanged(*verdict))
        self._verdict = verdict
