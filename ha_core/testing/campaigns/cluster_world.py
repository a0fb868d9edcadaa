"""A cluster in the simulator: hosts with their agents and VMs, the wires between them, and an administrator's orders.

The machines are the real ones. The cluster campaign (cluster.py) lets fate strike it at random; scenarios
(ha_core.testing.scenario) let happen what their file says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ha_core.config import Profile
from ha_core.guard.renewal import RenewalCodec
from ha_core.ids import NodeId, ReplicaId
from ha_core.machines.aam import AamMachine, AnswerGuard, GuardDatagram, Ping, RecordsChanged, VerdictChanged
from ha_core.machines.contract import Event, Machine
from ha_core.machines.database import DatabaseMachine
from ha_core.machines.database_events import (
    Arrived,
    DatabaseReply,
    DatabaseRequest,
    DatagramArrived,
    LeaderChanged,
    Leading,
    Operation,
    PeerDown,
    PeerUp,
    Send,
)
from ha_core.machines.failover.commands import Command, Outcome
from ha_core.machines.failover.host_agent import ProposalDone, Propose, RecordsSeen
from ha_core.machines.failover.records import PREFIX, Host, Settings
from ha_core.machines.keyvalue.model import Call, Called
from ha_core.machines.messages import SendDatagram, SendRun
from ha_core.machines.raft.configuration import Configuration, Member
from ha_core.machines.raft.types import ConfigurationChanged, MessageRefused
from ha_core.testing.campaigns.cluster_checker import ClusterChecker
from ha_core.testing.campaigns.cluster_hosts import LOCAL_NS, ClusterHost, HostPlan
from ha_core.testing.simulator import (
    MILLISECOND,
    SECOND,
    SimDisk,
    SimMessages,
    SimNetwork,
    SimProcess,
    Simulation,
)

CLUSTER = "campaign"
KEY = b"k" * 32


def nothing(effect: object) -> None:
    """An effect that only a shell would need."""


class World:
    """All hosts are built, none is started. Subclasses change single steps of the way: the hooks are marked."""

    def __init__(
        self,
        sim: Simulation,
        profile: Profile,
        plans: Sequence[HostPlan],
        settings: Settings,
        *,
        links: Sequence[str] = ("a", "b"),
        voters: int = 0,
        checker: ClusterChecker | None = None,
    ) -> None:
        """The first ``voters`` hosts (0: all) vote, the others learn. A host has the first ``paths`` of the links."""
        self.sim = sim
        self.rng = sim.stream("world orders")
        self.profile = profile
        self.settings = settings
        names = [plan.name for plan in plans]
        self.network = SimNetwork(sim, names, links=links)
        self.messages = SimMessages(self.network)
        self.checker = checker or ClusterChecker(sim)
        self.codec = RenewalCodec(CLUSTER, KEY)
        self.hosts = {plan.name: ClusterHost(sim, plan, profile, self.codec, self.checker) for plan in plans}
        self.disks: dict[str, SimDisk] = {}
        self._waiting: dict[int, tuple[SimProcess, int, Callable[[object], None]]] = {}
        self._last_request = 0
        self._orders: list[tuple[Command, Callable[[Outcome], bool]]] = []
        for host in self.hosts.values():
            self._add_aam(host)
        nodes = [NodeId(f"aam@{name}") for name in names]
        members = {node: Member(self.disks[node].incarnation) for node in nodes}
        first = tuple(sorted(nodes[: voters or len(nodes)]))
        learners = tuple(sorted(node for node in nodes if node not in first))
        self.bootstrap = Configuration(incoming=first, learners=learners, members=members)
        sim.every(100 * MILLISECOND, self._drop_lost_requests)

    # -- the AAMs and their wires --

    def _add_aam(self, host: ClusterHost) -> None:
        name = f"aam@{host.name}"
        disk = self.disks[name] = SimDisk(self.sim, name, flush_ns=host.plan.flush_ns)
        process = SimProcess(
            self.sim, name, lambda process: self._build_aam(host, process), disk=disk, clock=host.host.clock, start=False
        )
        host.aam = host.host.add(process)
        process.on(Send, lambda effect: self._send(name, effect))
        process.on(RecordsChanged, lambda effect: self.records_changed(host, effect))
        process.on(AnswerGuard, lambda effect: self._answer_guard(host, effect))
        process.on(DatabaseReply, lambda effect: self._replied(effect))
        for kind in (LeaderChanged, Leading, ConfigurationChanged, MessageRefused, Ping, VerdictChanged):
            process.on(kind, nothing)
        self.messages.attach(
            process,
            host=host.name,
            on_datagram=lambda sender, topic, body: process.post(DatagramArrived(NodeId(sender), _bytes(body))),
            on_message=lambda sender, channel, body: process.post(self.arrived(sender, channel, _bytes(body))),
            on_session=lambda peer, up: self.session_changed(process, peer, up),
        )
        host.send_renewal = lambda data: self._send_renewal(host, data)
        host.propose = lambda effect: self._agent_proposes(host, effect)
        host.connect_records = lambda: self.connect_records(host)

    def _build_aam(self, host: ClusterHost, process: SimProcess) -> Machine:
        node = NodeId(process.name)
        disk = self.disks[node]
        recovered = disk.recover()
        database = DatabaseMachine(
            node=node,
            replica=ReplicaId(disk.incarnation),
            profile=self.profile,
            rng=process.rng,
            recovered=recovered,
            bootstrap=self.bootstrap if self.bootstrap.knows(node, disk.incarnation) else None,
            procedures=self.checker.procedures(),
            cluster=CLUSTER,
            checkpoint_min_bytes=20_000,
        )
        self.sim.after(LOCAL_NS, self.connect_records, host)
        aam = AamMachine(
            node=node, host=self.record_of(host), database=database, codec=self.codec, profile=self.profile, joins=self.joins(),
            isolation_addresses=("gateway",),
        )  # fmt: skip
        return self.parent_of(aam, process)

    def record_of(self, host: ClusterHost) -> Host:
        """What the host registers as."""
        plan = host.plan
        addresses = tuple((link, f"{plan.name}:{number}") for number, link in enumerate(self.links_of(plan.name), 1))
        return Host(host.name, addresses, plan.cpu_mhz, plan.memory_mib, boot=host.boot_id)

    def links_of(self, host: str) -> Sequence[str]:
        return self.network.links[: self.hosts[host].plan.paths]

    def joins(self) -> bool:
        """Hook: whether hosts register themselves."""
        return True

    def parent_of(self, aam: AamMachine, process: SimProcess) -> Machine:
        """Hook: the machine that runs in the process; the AAM, or what it is a child of."""
        return aam

    def aam_of(self, host: ClusterHost) -> AamMachine | None:
        """Hook: the host's AAM; None while it is down."""
        machine = host.aam.machine if host.aam is not None else None
        return machine if isinstance(machine, AamMachine) else None

    def leads(self, host: ClusterHost) -> bool:
        """The host is the active primary and has taken over the leases."""
        aam = self.aam_of(host)
        return aam is not None and aam.coordinating

    def _send(self, name: str, effect: Send) -> None:
        match effect.event:
            case SendDatagram(to, topic, body):
                self.messages.send_datagram(name, to, body, topic)
            case SendRun():
                self.send_run(name, effect.event)

    def send_run(self, name: str, run: SendRun) -> None:
        """Hook: messages leave an AAM on a session."""
        for body in run.bodies:
            self.messages.send(name, run.to, run.channel, body)

    def arrived(self, sender: str, channel: str, body: bytes) -> Event:
        """Hook: what a message on a session is for the AAM."""
        return Arrived(NodeId(sender), channel, [body])  # type: ignore[arg-type]

    def session_changed(self, process: SimProcess, peer: str, up: bool) -> None:
        """Hook."""
        process.post(PeerUp(NodeId(peer)) if up else PeerDown(NodeId(peer)))

    # -- guards and primaries --

    def _send_renewal(self, host: ClusterHost, data: bytes) -> None:
        for name, target in self.hosts.items():
            if target is host:
                self.sim.after(LOCAL_NS, self._renewal_arrives, target, (host.name, "local"), data)
                continue
            for link in self.network.links:
                flow = self.network.flow(host.name, name, link)
                self.network.packet(flow, self._renewal_arrives, target, (host.name, link), data)

    @staticmethod
    def _renewal_arrives(target: ClusterHost, source: tuple[str, str], data: bytes) -> None:
        if target.aam is not None:
            target.aam.post(GuardDatagram(source, data))

    def _answer_guard(self, host: ClusterHost, effect: AnswerGuard) -> None:
        assert isinstance(effect.source, tuple)
        name, link = effect.source
        target = self.hosts[name]
        if link == "local":
            self.sim.after(LOCAL_NS, target.answer, effect.data)
        else:
            self.network.packet(self.network.flow(host.name, name, link), target.answer, effect.data)

    # -- host agents --

    def connect_records(self, host: ClusterHost) -> None:
        """The host agent and its AAM meet: it gets all records anew."""
        aam = self.aam_of(host)
        if aam is not None:
            records = aam.database.state.range(PREFIX)
            items = [(record.key, record.value) for record in records]
            host.agent.post(RecordsSeen(aam.database.state.index, items, restored=True))

    def records_changed(self, host: ClusterHost, effect: RecordsChanged) -> None:
        """Hook: the AAM tells its host's agent."""
        self.sim.after(LOCAL_NS, host.agent.post, RecordsSeen(effect.index, effect.changes, effect.restored))

    def _agent_proposes(self, host: ClusterHost, effect: Propose) -> None:
        life = host.agent.lives

        def answered(outcome: object) -> None:
            done = False
            if isinstance(outcome, Called):
                self.checker.heard_done(outcome.index)
                done = Outcome.decode(outcome.value).done
            if host.agent.lives == life:
                host.agent.post(ProposalDone(effect.number, done))

        assert host.aam is not None
        self.sim.after(self.report_delay_ns(), self.request, host.aam, effect.command, answered)

    def report_delay_ns(self) -> int:
        """Hook: how long a report of a host agent is under way to its AAM."""
        return 0

    # -- requests --

    def request(self, process: SimProcess, command: Command, answered: Callable[[object], None]) -> None:
        """``answered`` gets the outcome, None if the AAM died before it answered."""
        self.ask(process, Call(command.name, command.args()), answered)

    def ask(self, process: SimProcess, operation: Operation, answered: Callable[[object], None]) -> None:
        """The same for any operation of the database."""
        if not process.alive:
            self.sim.after(10 * MILLISECOND, answered, None)
            return
        self._last_request += 1
        self._waiting[self._last_request] = (process, process.lives, answered)
        process.post(DatabaseRequest(self._last_request, operation, timeout_ns=2 * SECOND))

    def _replied(self, effect: DatabaseReply) -> None:
        waiting = self._waiting.pop(effect.request, None)
        if waiting is not None:
            waiting[2](effect.outcome)

    def _drop_lost_requests(self) -> None:
        lost = [
            number for number, (process, life, _) in self._waiting.items() if not process.alive or process.lives != life
        ]  # fmt: skip
        for number in lost:
            self._waiting.pop(number)[2](None)

    # -- the administrator --

    def order(self, command: Command, answered: Callable[[Outcome], bool] = lambda outcome: True) -> None:
        """Ask until there is an answer that ``answered`` takes (by default any); one order after the other."""
        self._orders.append((command, answered))
        if len(self._orders) == 1:
            self._next_order()

    def entry(self) -> SimProcess:
        """Hook: the AAM that the administrator asks now."""
        return self.rng.choice([host.aam for host in self.hosts.values() if host.aam is not None])

    def _next_order(self) -> None:
        if self._orders:
            self.request(self.entry(), self._orders[0][0], self._ordered)

    def _ordered(self, outcome: object) -> None:
        if isinstance(outcome, Called):
            command, answered = self._orders[0]
            decoded = Outcome.decode(outcome.value)
            self.sim.trace("order", type(command).__name__, str(decoded.reason))
            if answered(decoded):
                self._orders.pop(0)
                self._next_order()
                return
        self.sim.after(50 * MILLISECOND, self._next_order)

    @property
    def orders_done(self) -> bool:
        return not self._orders


def _bytes(body: object) -> bytes:
    assert isinstance(body, bytes)
    return body
