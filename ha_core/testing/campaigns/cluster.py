"""A whole cluster: three to five hosts with their agents and VMs, under everything that can go wrong with hosts, agents, networks,
disks and clocks, while an administrator starts, stops and moves VMs.

A safety phase with faults (nothing runs twice, nothing is stopped without need), then everything heals and everything that
should run must run. The invariants are checked in cluster_checker.py, the hosts are in cluster_hosts.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import attrs

from ha_core.config import FAST, LAN, Profile, ns
from ha_core.guard.renewal import RenewalCodec
from ha_core.ids import HostName, NodeId, ReplicaId, VmName
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
    PeerDown,
    PeerUp,
    Send,
)
from ha_core.machines.failover import commands as c
from ha_core.machines.failover.commands import Command, Outcome
from ha_core.machines.failover.host_agent import ProposalDone, Propose, RecordsSeen
from ha_core.machines.failover.records import (
    PREFIX,
    Host,
    HostState,
    Mode,
    Priority,
    Rule,
    RuleKind,
    Settings,
    Vm,
    Wanted,
)
from ha_core.machines.keyvalue.model import Call, Called
from ha_core.machines.messages import SendDatagram, SendRun
from ha_core.machines.raft.configuration import Configuration, Member
from ha_core.machines.raft.types import ConfigurationChanged, MessageRefused
from ha_core.testing.campaigns.cluster_checker import ClusterChecker
from ha_core.testing.campaigns.cluster_hosts import LOCAL_NS, ClusterHost
from ha_core.testing.simulator import (
    MICROSECOND,
    MILLISECOND,
    SECOND,
    Chaos,
    Fault,
    SimDisk,
    SimMessages,
    SimNetwork,
    SimProcess,
    Simulation,
    disk_faults,
    network_faults,
    reset_faults,
)

CLUSTER = "campaign"
KEY = b"k" * 32
SETUP_NS = 12 * SECOND
SAFETY_NS = 10 * SECOND
LIVENESS_NS = 40 * SECOND
HOST_FAULTS = ("power-loss", "isolation", "agents-stop-all", "agents-crash-all")


def _nothing(effect: object) -> None:
    """An effect that only a shell would need."""


class World:
    def __init__(self, sim: Simulation, *, profile: Profile | None = None, size: int = 0) -> None:
        """The seed draws the profile and the number of hosts where they are not given."""
        self.sim = sim
        self.rng = rng = sim.stream("world")
        drawn = rng.choice([LAN, FAST, FAST]), rng.choice([3, 3, 4, 5])
        self.profile = profile or drawn[0]
        names = [f"h{number}" for number in range(1, (size or drawn[1]) + 1)]
        self.network = SimNetwork(sim, names, links=("a", "b"))
        self.messages = SimMessages(self.network)
        self.checker = ClusterChecker(sim)
        self.codec = RenewalCodec(CLUSTER, KEY)
        self.hosts = {
            name: ClusterHost(sim, name, self.profile, self.codec, self.checker, rng.randrange(-4900, 4901)) for name in names
        }
        self.disks: dict[str, SimDisk] = {}
        self._waiting: dict[int, tuple[SimProcess, int, Callable[[object], None]]] = {}
        self._last_request = 0
        self._orders: list[Command] = []
        self.host_rng = sim.stream("host faults")
        self.swarm: Mapping[str, float] = {}
        self.striking = False
        self._away: list[str] = []
        self._held: dict[str, list[tuple[str, str, bytes]]] = {}
        """Messages to AAMs whose streams are stalled."""
        self._backlogs: dict[str, list[RecordsSeen]] = {}
        """What lagging host agents have not been told yet."""
        for host in self.hosts.values():
            self._add_aam(host)
        nodes = [NodeId(f"aam@{name}") for name in names]
        members = {node: Member(self.disks[node].incarnation) for node in nodes}
        self._bootstrap = Configuration(incoming=tuple(nodes), members=members)
        sim.every(100 * MILLISECOND, self._drop_lost_requests)

    # -- the AAMs and their wires --

    def _add_aam(self, host: ClusterHost) -> None:
        name = f"aam@{host.name}"
        disk = self.disks[name] = SimDisk(self.sim, name, flush_ns=self.rng.choice([300, 3000]) * MICROSECOND)
        process = SimProcess(
            self.sim, name, lambda process: self._build_aam(host, process), disk=disk, clock=host.host.clock, start=False
        )
        host.aam = host.host.add(process)
        process.on(Send, lambda effect: self._send(name, effect))
        process.on(RecordsChanged, lambda effect: self._records(host, effect))
        process.on(AnswerGuard, lambda effect: self._answer_guard(host, effect))
        process.on(DatabaseReply, lambda effect: self._replied(effect))
        for kind in (LeaderChanged, Leading, ConfigurationChanged, MessageRefused, Ping, VerdictChanged):
            process.on(kind, _nothing)
        self.messages.attach(
            process,
            host=host.name,
            on_datagram=lambda sender, topic, body: process.post(DatagramArrived(NodeId(sender), _bytes(body))),
            on_message=lambda sender, channel, body: process.post(_arrived(sender, channel, body)),
            on_session=lambda peer, up: self._session(process, peer, up),
        )
        host.send_renewal = lambda data: self._send_renewal(host, data)
        host.propose = lambda effect: self._agent_proposes(host, effect)
        host.connect_records = lambda: self._connect_records(host)

    def _build_aam(self, host: ClusterHost, process: SimProcess) -> Machine:
        node = NodeId(process.name)
        disk = self.disks[node]
        database = DatabaseMachine(
            node=node,
            replica=ReplicaId(disk.incarnation),
            profile=self.profile,
            rng=process.rng,
            recovered=disk.recover(),
            bootstrap=self._bootstrap,
            procedures=self.checker.procedures(),
            cluster=CLUSTER,
            checkpoint_min_bytes=20_000,
        )
        record = Host(HostName(host.name), (("a", f"{host.name}:1"), ("b", f"{host.name}:2")), 8000, 8192, boot=host.boot_id)
        self.sim.after(LOCAL_NS, self._connect_records, host)
        return AamMachine(
            node=node, host=record, database=database, codec=self.codec, profile=self.profile, joins=True,
            isolation_addresses=("gateway",),
        )  # fmt: skip

    def _send(self, name: str, effect: Send) -> None:
        match effect.event:
            case SendDatagram(to, topic, body):
                self.messages.send_datagram(name, to, body, topic)
            case SendRun(to, channel, bodies):
                for body in bodies:
                    if to in self._held:
                        self._held[to].append((name, channel, body))
                    else:
                        self.messages.send(name, to, channel, body)

    def _session(self, process: SimProcess, peer: str, up: bool) -> None:
        for to, held in self._held.items():
            self._held[to] = [one for one in held if {one[0], to} != {process.name, peer}]
        process.post(PeerUp(NodeId(peer)) if up else PeerDown(NodeId(peer)))

    def _stall(self, name: str, duration_ns: int) -> None:
        """Streams to one AAM stand still while datagrams pass: its view falls behind."""
        if name not in self._held:
            self.sim.fault("stream-stall")
            self._held[name] = []
            self.sim.after(duration_ns, self._release, name)

    def _release(self, name: str) -> None:
        for sender, channel, body in self._held.pop(name, []):
            self.messages.send(sender, name, channel, body)

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

    def _connect_records(self, host: ClusterHost) -> None:
        """The host agent and its AAM meet: it gets all records anew."""
        assert host.aam is not None
        machine = host.aam.machine
        if isinstance(machine, AamMachine):
            self._backlogs.pop(host.name, None)
            records = machine.database.state.range(PREFIX)
            items = [(record.key, record.value) for record in records]
            host.agent.post(RecordsSeen(machine.database.state.index, items, restored=True))

    def _records(self, host: ClusterHost, effect: RecordsChanged) -> None:
        seen = RecordsSeen(effect.index, effect.changes, effect.restored)
        if host.name in self._backlogs:
            self._backlogs[host.name].append(seen)
        else:
            self.sim.after(LOCAL_NS, host.agent.post, seen)

    def _lag(self, host: ClusterHost, duration_ns: int) -> None:
        """What the host agent is told of the records waits for a while, then comes one by one."""
        if host.name not in self._backlogs:
            self.sim.fault("records-lag")
            self._backlogs[host.name] = []
            self.sim.after(duration_ns, self._catch_up, host)

    def _catch_up(self, host: ClusterHost) -> None:
        backlog = self._backlogs.get(host.name)
        if backlog:
            host.agent.post(backlog.pop(0))
            self.sim.after(2 * MILLISECOND, self._catch_up, host)
        elif backlog is not None:
            del self._backlogs[host.name]

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
        delay_ns = 0
        if self.swarm.get("late-report") and self.host_rng.random() < 0.2:
            self.sim.fault("late-report")
            delay_ns = int(ns(self.profile.lease_s) * self.host_rng.uniform(0.1, 2.0))
        self.sim.after(delay_ns, self.request, host.aam, effect.command, answered)

    # -- requests --

    def request(self, process: SimProcess, command: Command, answered: Callable[[object], None]) -> None:
        """``answered`` gets the outcome, None if the AAM died before it answered."""
        if not process.alive:
            self.sim.after(10 * MILLISECOND, answered, None)
            return
        self._last_request += 1
        self._waiting[self._last_request] = (process, process.lives, answered)
        call = Call(command.name, command.args())
        process.post(DatabaseRequest(self._last_request, call, timeout_ns=2 * SECOND))

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

    def order(self, command: Command) -> None:
        """Ask until there is an answer, whatever it is; one order after the other."""
        self._orders.append(command)
        if len(self._orders) == 1:
            self._next_order()

    def _next_order(self) -> None:
        if not self._orders:
            return
        process = self.rng.choice([host.aam for host in self.hosts.values() if host.aam is not None])
        self.request(process, self._orders[0], self._ordered)

    def _ordered(self, outcome: object) -> None:
        if isinstance(outcome, Called):
            self.sim.trace("order", type(self._orders[0]).__name__, str(Outcome.decode(outcome.value).reason))
            self._orders.pop(0)
            self._next_order()
        else:
            self.sim.after(50 * MILLISECOND, self._next_order)

    @property
    def orders_done(self) -> bool:
        return not self._orders

    def define(self) -> None:
        """Settings, VMs and rules of this seed."""
        rng = self.rng
        self.order(c.SetSettings.of(self.settings))
        names = [f"vm{number}" for number in range(rng.randrange(3, 8))]
        for number, name in enumerate(names):
            after = (rng.choice(names[:number]),) if number and rng.random() < 0.3 else ()
            vm = Vm(
                VmName(name),
                priority=rng.choice([Priority.HIGHEST, Priority.HIGH, Priority.MEDIUM, Priority.MEDIUM, Priority.LOW]),
                after=after,
                memory_mib=rng.choice([256, 512, 2048]),
                shutdown_ns=rng.choice([0, 0, 0, 300, 2000]) * MILLISECOND,
                start_ns=rng.choice([50, 100, 400]) * MILLISECOND,
                max_restart=rng.choice([0, 1, 1, 2]),
                max_relocate=rng.choice([0, 1, 1]),
            )
            self.order(c.DefineVm.of(vm))
        if rng.random() < 0.3:
            kind = rng.choice([RuleKind.APART, RuleKind.TOGETHER])
            self.order(c.SetRule.of(Rule("pair", kind, tuple(rng.sample(names, 2)))))
        if rng.random() < 0.3:
            weights = tuple((host, weight) for weight, host in enumerate(rng.sample(list(self.hosts), 2), 1))
            self.order(c.SetRule.of(Rule("near", RuleKind.PREFER, (rng.choice(names),), weights)))

    @property
    def settings(self) -> Settings:
        profile = self.profile
        return Settings(
            ns(profile.lease_s), ns(profile.margin_s), ns(profile.renewal_s),
            retries_ns=tuple(second * SECOND for second in (0, 1, 3, 6)), settle_ns=4 * SECOND,
        )  # fmt: skip

    def administer(self) -> None:
        """One turn of the administrator."""
        rng = self.rng
        if not self.checker.truth.vms or not self.orders_done:
            return
        vm = rng.choice(sorted(self.checker.truth.vms))
        host = HostName(rng.choice(list(self.hosts)))
        match rng.randrange(9):
            case 0 | 1:
                self.order(c.WantVm(vm, Wanted.STOPPED, rng.choice([-1, 0, 200 * MILLISECOND])))
            case 2 | 3:
                self.order(c.WantVm(vm, Wanted.STARTED))
            case 4 | 5:
                self.order(c.MoveVm(vm, host))
            case 6:
                self.order(c.SetHostState(host, HostState.MAINTENANCE))
            case 7:
                self.order(c.SetHostState(host, HostState.ONLINE))
            case _:
                mode = rng.choice([Mode.ARMED, Mode.ARMED, Mode.DISARMED])
                self.order(c.SetSettings.of(attrs.evolve(self.settings, mode=mode)))

    def restore_order(self) -> None:
        """The liveness phase wants every VM to run."""
        self.order(c.SetSettings.of(self.settings))
        for host in self.hosts:
            self.order(c.SetHostState(HostName(host), HostState.ONLINE))
        for vm in sorted(self.checker.truth.vms):
            self.order(c.WantVm(vm, Wanted.STARTED))

    # -- faults --

    def faults(self) -> list[Fault]:
        hosts = list(self.hosts.values())

        def agent_crash(rng: random.Random, amount: float) -> Callable[[], None] | None:
            process = rng.choice(rng.choice(hosts).agents)
            if not process.alive:
                return None
            if rng.random() < 0.5:
                process.crash_within(rng.randrange(0, 20))
            else:
                process.crash(kind="agent-crash")
            # A watchdog starts it again long before the fault "ends".
            self.sim.after(int(rng.uniform(1, 300) * MILLISECOND), self._restart, process)
            return lambda: self._restart(process)

        def agent_stop(rng: random.Random, amount: float) -> Callable[[], None] | None:
            host = rng.choice(hosts)
            process = rng.choice(host.agents)
            if not process.alive:
                return None
            self.sim.fault("agent-stop")
            process.freeze(5 * SECOND)
            hang_ns = ns(self.profile.guard_hang_s if process is host.guard else self.profile.agent_hang_s)
            self.sim.after(hang_ns, self._replace_hung, host, process, process.lives)
            return process.thaw

        def vm_crash(rng: random.Random, amount: float) -> None:
            if rng.choice(hosts).hypervisor.crash_one(rng):
                self.sim.fault("vm-crash")

        def fail_start(rng: random.Random, amount: float) -> Callable[[], None]:
            chosen = rng.sample(hosts, rng.randrange(1, len(hosts) + 1))
            for host in chosen:
                host.hypervisor.fail_starts = 0.3 + 0.6 * amount

            def end() -> None:
                for host in chosen:
                    host.hypervisor.fail_starts = 0.0

            return end

        return [
            Fault("agent-crash", agent_crash, 2.0),
            Fault("agent-stop", agent_stop, 2.0),
            Fault("vm-crash", vm_crash, 2.0),
            Fault("fail-start", fail_start, 2.0),
        ]

    # -- faults of whole hosts --

    def strike_host(self) -> None:
        """Take a host away for about as long as a lease, rarely more of them than leave a quorum: the corners are there."""
        rng = self.host_rng
        names = [name for name in self.hosts if name not in self._away]
        room = (len(self.hosts) - 1) // 2 - len(self._away)
        if names and (room > 0 or rng.random() < 0.1):
            leading = [name for name in names if self.leads(self.hosts[name])]
            victim = rng.choice(leading) if leading and rng.random() < 0.4 else rng.choice(names)
            duration_ns = int(ns(self.profile.lease_s) * rng.uniform(0.3, 2.5))
            kind = rng.choice([kind for kind in HOST_FAULTS if self.swarm.get(kind)] or ["quiet"])
            self._away.append(victim)
            self.sim.after(duration_ns, self._away.remove, victim)
            self._strike(kind, self.hosts[victim], duration_ns, rng)
        self.sim.after(int(ns(self.profile.lease_s) * rng.uniform(0.3, 1.5)), self._strike_again)

    def _strike_again(self) -> None:
        if self.striking:
            self.strike_host()

    def _strike(self, kind: str, host: ClusterHost, duration_ns: int, rng: random.Random) -> None:
        match kind:
            case "power-loss":
                host.power_off()
                self.sim.after(duration_ns, host.start)
            case "isolation":
                self._isolate(host, duration_ns, rng)
            case "agents-stop-all":
                self.sim.fault(kind)
                host.host.freeze(duration_ns)
            case "agents-crash-all":
                self.sim.fault(kind)
                for process in host.agents:
                    process.end(silent=False)
                self.sim.after(duration_ns, host.start)
            case _:
                pass

    def _isolate(self, host: ClusterHost, duration_ns: int, rng: random.Random) -> None:
        """Cut a host off, alone or with another, in one of several company: see each branch."""
        self.sim.fault("isolation")
        lease_ns = ns(self.profile.lease_s)
        group = {str(host.name), rng.choice(list(self.hosts))} if rng.random() < 0.3 else {str(host.name)}
        delay_ns = 0
        match rng.choice([0, 1, 1, 2, 3, 4]):
            case 0 if self.swarm.get("stream-stall"):
                # Its replica is behind before, and for a while after.
                delay_ns = int(duration_ns * rng.uniform(0.1, 1.0))
                self._stall(f"aam@{host.name}", delay_ns + int(duration_ns * rng.uniform(1.0, 2.0)))
            case 1 if self.swarm.get("records-lag"):
                # It gets a VM that its agent does not hear of in time, loses its lease, and hears of it under the next.
                duration_ns = int(lease_ns * rng.uniform(1.2, 2.0))
                delay_ns = int(lease_ns * rng.uniform(0.1, 0.5))
                self._lag(host, delay_ns + duration_ns + int(lease_ns * rng.uniform(0.1, 0.6)))
                self.order(c.MoveVm(rng.choice(sorted(self.checker.truth.vms)), host.name))
                group = {str(host.name)}
            case 2 if self.swarm.get("agent-crash"):
                # Its lease is gone, VMs still shut down, and a new guard comes that knows nothing of it.
                duration_ns = int(lease_ns * rng.uniform(1.0, 1.5))
                self.sim.after(duration_ns, self._new_guard, host)
            case 3:
                host.host.freeze(int(duration_ns * rng.uniform(0.1, 1.2)))
            case _:
                pass
        self.sim.after(delay_ns, self._cut, sorted(group), duration_ns)

    def _new_guard(self, host: ClusterHost) -> None:
        host.guard.crash(kind="agent-crash")
        self.sim.after(20 * MILLISECOND, self._restart, host.guard)

    def _cut(self, group: Sequence[str], duration_ns: int) -> None:
        self.sim.after(duration_ns, self.network.partition(group).heal)

    @staticmethod
    def leads(host: ClusterHost) -> bool:
        machine = host.aam.machine if host.aam is not None else None
        return isinstance(machine, AamMachine) and machine.coordinating

    def _restart(self, process: SimProcess) -> None:
        process.crash_within(-1)
        host = next(host for host in self.hosts.values() if process in host.agents)
        if host.booted:
            process.start()

    def _replace_hung(self, host: ClusterHost, process: SimProcess, life: int) -> None:
        """Another agent of the host sees no beats: it kills the hung one and starts it anew."""
        watched = any(other.alive and not other.frozen for other in host.agents if other is not process)
        if process.alive and process.frozen and process.lives == life and watched:
            process.end()
            process.start()

    def heal(self) -> None:
        self.network.heal_all()
        for name in list(self._held):
            self._release(name)
        for host in self.hosts.values():
            host.hypervisor.fail_starts = 0.0
            for process in host.agents:
                process.crash_within(-1)
            host.host.thaw()
            host.start()


def _bytes(body: object) -> bytes:
    assert isinstance(body, bytes)
    return body


def _arrived(sender: str, channel: str, body: object) -> Event:
    return Arrived(NodeId(sender), channel, [_bytes(body)])  # type: ignore[arg-type]


class ClusterCampaign:
    name = "cluster"
    invariants: Sequence[str] = ("I42", "I43", "I44", "I45", "I46", "I47", "I48", "I49", "I50")
    faults: Sequence[str] = (
        "loss", "delay", "reorder", "duplicate", "replay", "path-cut", "one-way-cut", "partition", "clog", "reset",
        "disk-slow", "disk-error", "disk-full", "disk-crash", "agent-crash", "agent-stop", "agents-stop-all",
        "isolation", "stream-stall", "records-lag", "late-report", "agents-crash-all", "power-loss", "vm-crash", "fail-start",
    )  # fmt: skip

    def play(self, sim: Simulation) -> None:
        world = World(sim)
        for host in world.hosts.values():
            host.start()
        world.define()
        settled = sim.run_for(SETUP_NS, stop=lambda: world.orders_done and not world.checker.missing())
        if not settled:
            sim.violate("I46", f"the cluster did not come up: {'; '.join(world.checker.missing())}")
        self._safety(sim, world)
        self._liveness(sim, world)

    def _safety(self, sim: Simulation, world: World) -> None:
        swarm = sim.swarm(self.faults)
        if world.rng.random() < 0.7:
            swarm |= dict.fromkeys(("partition", "one-way-cut", "path-cut"), 0.0)
        kinds = [
            *network_faults(world.network), *disk_faults([disk.device for disk in world.disks.values()]),
            *reset_faults(world.messages.reset, list(world.disks)), *world.faults(),
        ]  # fmt: skip
        chaos = Chaos(sim, kinds, swarm, mean_interval_ns=world.rng.choice([200, 600, 2000]) * MILLISECOND)
        if world.rng.random() < 0.7:
            interval_ns = world.rng.choice([200, 1000]) * MILLISECOND
            until_ns = sim.now_ns + SAFETY_NS

            def turn() -> None:
                if sim.now_ns < until_ns:
                    world.administer()
                    sim.after(interval_ns, turn)

            turn()
        chaos.start()
        world.swarm, world.striking = swarm, True
        world.strike_host()
        sim.run_for(SAFETY_NS)
        world.swarm, world.striking = {}, False
        chaos.stop()

    def _liveness(self, sim: Simulation, world: World) -> None:
        world.heal()
        world.restore_order()
        sim.checked("I46")
        if not sim.run_for(LIVENESS_NS, stop=lambda: world.orders_done and not world.checker.missing()):
            sim.violate("I46", f"after everything healed: {'; '.join(world.checker.missing()) or 'orders are not done'}")
