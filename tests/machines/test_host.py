"""HostMachines with all their children in virtual time: hosts that are registered join, those that are removed go, safely."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence

import attrs
import pytest

from ha_core.config import AAM, FAST, LAN, Profile, ns
from ha_core.guard.renewal import RenewalCodec
from ha_core.ids import HostName, LinkName, NodeId, ReplicaId
from ha_core.machines.aam import AamMachine, PeerReached
from ha_core.machines.contract import Effect, Event, Persist, Persisted, WriteCheckpoint, feed
from ha_core.machines.database import DatabaseMachine
from ha_core.machines.database_events import Arrived, DatabaseReply, DatabaseRequest, DatagramArrived, PeerDown, PeerUp, Send
from ha_core.machines.failover.commands import Command, RegisterHost, RemoveHost
from ha_core.machines.failover.procedures import PROCEDURES
from ha_core.machines.failover.records import Host
from ha_core.machines.host import INTRODUCTION, HostMachine, Introduced
from ha_core.machines.keyvalue.model import Call, Called
from ha_core.machines.messages import Consumed, DeliverRun, ForgetPeer, SendDatagram, SendRun, SetPeer
from ha_core.machines.raft.configuration import Configuration, Member
from ha_core.machines.raft.types import Limits

MS = 1_000_000
S = 1_000 * MS
DELAY_NS = 300_000


def node_of(number: int) -> NodeId:
    return NodeId(f"aam@h{number}.example")


def record_of(number: int) -> Host:
    return Host(HostName(f"h{number}.example"), (("a", f"127.0.0.{number}:7400"),), 8000, 8192)


@attrs.define(eq=False)
class Process:
    """One host's aam, and the Ports of its machine: sessions stand while both ends have each other as peers."""

    world: World
    node: NodeId
    machine: HostMachine
    peers: set[NodeId] = attrs.field(factory=set)
    timer_ns: int | None = None
    replies: dict[int, object] = attrs.field(factory=dict)

    def feed(self, *events: Event) -> None:
        feed(self.machine, events, self.world.now_ns, self)  # type: ignore[arg-type]

    def perform(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Persist(number=number) | WriteCheckpoint(number=number):
                    self.world.at(DELAY_NS, self, Persisted(number))
                case Send(event):
                    self._send(event)
                case SetPeer(peer) | ForgetPeer(peer):
                    (self.peers.add if isinstance(effect, SetPeer) else self.peers.discard)(peer)
                    self.world.join(self.node, peer)
                case DatabaseReply(request, outcome):
                    self.replies[request] = outcome
                case SendRun():
                    self._send(effect)

    def _send(self, event: Event) -> None:
        match event:
            case SendRun(to, channel, bodies):
                if channel == INTRODUCTION:
                    self.world.carry(self, to, Introduced(DeliverRun(self.node, channel, 1, list(bodies))))
                else:
                    self.world.carry(self, to, Arrived(self.node, channel, list(bodies)))
            case SendDatagram(to):
                self.world.carry(self, to, DatagramArrived(self.node, event.body))
            case Consumed():
                pass

    def wake_at(self, when_ns: int | None) -> None:
        if when_ns is not None and when_ns != self.timer_ns:
            self.timer_ns = when_ns
            self.world.at(max(0, when_ns - self.world.now_ns), self, None)


class World:
    def __init__(self) -> None:
        self.now_ns = S
        self.processes: dict[NodeId, Process] = {}
        self.sessions: set[tuple[NodeId, NodeId]] = set()
        self._heap: list[tuple[int, int, Process, Event | None]] = []
        self._count = 0

    def start(self, number: int, *, founder: bool = False, replica: bytes = b"", profile: Profile = LAN) -> Process:
        node, record = node_of(number), record_of(number)
        replica = replica or f"replica {number}".encode()
        members = {node: Member(replica, {LinkName("a"): record.addresses[0][1]})}
        database = DatabaseMachine(
            node=node, replica=ReplicaId(replica), profile=profile, rng=random.Random(number), procedures=PROCEDURES, cluster="c",
            bootstrap=Configuration((node,), members=members) if founder else None,
        )  # fmt: skip
        aam = AamMachine(node=node, host=record, database=database, codec=RenewalCodec("c", bytes(32)), profile=profile)
        addresses = {LinkName(link): address for link, address in record.addresses}
        first = {node_of(1): {LinkName("a"): "127.0.0.1:7400"}}
        machine = HostMachine(
            node=node,
            replica=ReplicaId(replica),
            addresses=addresses,
            aam=aam,
            primaries=first,
            founds=record if founder else None,
        )
        process = self.processes[node] = Process(self, node, machine)
        process.feed()
        return process

    def stop(self, number: int) -> None:
        del self.processes[node_of(number)]
        for one, other in sorted(self.sessions):
            if node_of(number) in (one, other):
                self.join(one, other)

    def join(self, one: NodeId, other: NodeId) -> None:
        """The session between two nodes comes up or goes, as their peers say."""
        ends = [self.processes.get(node) for node in (one, other)]
        stands = all(end is not None and peer in end.peers for end, peer in zip(ends, (other, one), strict=True))
        pair = (min(one, other), max(one, other))
        if stands == (pair in self.sessions):
            return
        (self.sessions.add if stands else self.sessions.discard)(pair)
        for end, peer in zip(ends, (other, one), strict=True):
            if end is not None:
                for event in (PeerUp(peer) if stands else PeerDown(peer), PeerReached(peer, stands)):
                    self.at(DELAY_NS, end, event)

    def carry(self, sender: Process, to: NodeId, event: Event) -> None:
        receiver = self.processes.get(to)
        if receiver is not None and (min(sender.node, to), max(sender.node, to)) in self.sessions:
            self.at(DELAY_NS, receiver, event)

    def at(self, delay_ns: int, process: Process, event: Event | None) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self.now_ns + delay_ns, self._count, process, event))

    def until(self, condition: Callable[[], object], limit_s: float = 20.0) -> None:
        end = self.now_ns + round(limit_s * S)
        while not condition():
            self.now_ns, _, process, event = heapq.heappop(self._heap)
            assert self.now_ns < end, "it did not happen in time"
            if self.processes.get(process.node) is not process:
                continue
            if event is not None:
                process.feed(event)
            elif process.timer_ns is not None and process.timer_ns <= self.now_ns:
                process.timer_ns = None
                process.feed()

    def run_for(self, seconds: float) -> None:
        end = self.now_ns + round(seconds * S)
        self.until(lambda: self._heap[0][0] > end, seconds + 1)

    def leader(self) -> Process | None:
        return next((one for one in self.processes.values() if one.machine.aam.coordinating), None)

    def voters(self) -> set[str]:
        leader = self.leader()
        configuration = leader.machine.aam.database.configuration if leader is not None else None
        return {node.split("@")[1].split(".")[0] for node in configuration.voters} if configuration else set()

    def members(self) -> int:
        leader = self.leader()
        configuration = leader.machine.aam.database.configuration if leader is not None else None
        return len(configuration.members) if configuration else 0

    def call(self, command: Command) -> None:
        """Through the leader, until it is committed."""
        self.until(self.leader)
        leader = self.leader()
        assert leader is not None
        request = len(leader.replies) + 1
        leader.feed(DatabaseRequest(request, Call(command.name, command.args()), 5 * S))
        self.until(lambda: request in leader.replies)
        outcome = leader.replies[request]
        assert isinstance(outcome, Called), outcome
        assert outcome.value[0], outcome  # type: ignore[index]

    def register(self, *numbers: int) -> None:
        for number in numbers:
            self.call(RegisterHost.of(record_of(number)))


def cluster(hosts: int) -> World:
    world = World()
    world.start(1, founder=True)
    for number in range(2, hosts + 1):
        world.start(number)
    world.register(*range(2, hosts + 1))
    world.until(lambda: world.members() == hosts and len(world.voters()) == max(hosts - (hosts % 2 == 0), 2))
    return world


def test_hosts_that_are_registered_become_primaries() -> None:
    world = cluster(3)

    assert world.voters() == {"h1", "h2", "h3"}


@pytest.mark.parametrize("profile", [LAN, FAST, AAM])
def test_leases_are_as_the_founders_profile_has_them(profile: Profile) -> None:
    world = World()
    inventory = world.start(1, founder=True, profile=profile).machine.aam.inventory
    world.until(lambda: inventory.hosts)

    settings = inventory.settings
    assert (settings.lease_ns, settings.margin_ns, settings.renewal_ns) == (
        ns(profile.lease_s), ns(profile.margin_s), ns(profile.renewal_s),
    )  # fmt: skip


def test_a_host_that_nobody_registered_stays_outside() -> None:
    world = World()
    world.start(1, founder=True)
    world.start(2)
    world.run_for(5.0)

    assert world.voters() == {"h1"}
    assert not world.sessions


def test_a_host_that_gets_the_records_as_a_snapshot_corrects_what_they_say_of_it() -> None:
    world = World()
    leader = world.start(1, founder=True)
    world.until(lambda: leader.machine.aam.inventory.hosts)
    database = leader.machine.aam.database
    database._checkpoint_min_bytes = 1
    database.raft.core.log.limits = Limits(tail_entries=0)
    world.call(RegisterHost.of(attrs.evolve(record_of(2), cpu_mhz=1)))
    for _ in range(10):
        world.call(RegisterHost.of(record_of(1)))

    joined = world.start(2)
    world.run_for(5)

    assert joined.machine.aam.database.raft.core.log.snapshot.index
    assert leader.machine.aam.inventory.hosts[HostName("h2.example")].cpu_mhz == 8000


@pytest.mark.parametrize("hosts", [2, 3])
def test_a_removed_host_leaves_the_voters_and_the_rest_goes_on(hosts: int) -> None:
    """Its session is kept until it votes no more: two voters could not remove one of them otherwise."""
    world = cluster(hosts)
    world.call(RemoveHost(HostName(f"h{hosts}.example")))
    world.until(lambda: len(world.voters()) == hosts - 1)
    world.run_for(2.0)

    assert f"h{hosts}" not in world.voters()
    assert not [pair for pair in world.sessions if node_of(hosts) in pair]
    world.register(hosts)


@pytest.mark.parametrize("hosts", [2, 3])
def test_a_leader_whose_host_is_removed_hands_over_and_goes(hosts: int) -> None:
    world = cluster(hosts)
    leader = world.leader()
    assert leader is not None
    assert leader.node == node_of(1)
    world.call(RemoveHost(HostName("h1.example")))
    world.until(lambda: world.leader() not in (None, leader) and "h1" not in world.voters())
    world.run_for(2.0)
    world.stop(1)
    world.run_for(2.0)

    assert len(world.voters()) == hosts - 1
    world.register(4)


def test_a_host_that_comes_back_with_an_empty_store_votes_again_only_as_another() -> None:
    world = cluster(3)
    world.stop(3)
    world.run_for(1.0)
    world.start(3, replica=b"another replica")
    world.run_for(3.0)
    leader = world.leader()
    assert leader is not None
    configuration = leader.machine.aam.database.configuration

    assert configuration is not None
    assert world.voters() == {"h1", "h2", "h3"}
    assert configuration.members[node_of(3)].replica == b"another replica"
    assert b"replica 3" in configuration.retired
