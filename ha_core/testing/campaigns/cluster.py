"""A whole cluster: three to five hosts with their agents and VMs, under everything that can go wrong with hosts, agents, networks,
disks and clocks, while an administrator starts, stops and moves VMs.

A safety phase with faults (nothing runs twice, nothing is stopped without need), then everything heals and everything that
should run must run. The invariants are checked in cluster_checker.py; cluster_world.py is the cluster, cluster_hosts.py and
cluster_hypervisor.py are its hosts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import attrs

from ha_core.config import FAST, LAN, Profile, ns
from ha_core.ids import HostName, VmName
from ha_core.machines.aam import RecordsChanged
from ha_core.machines.failover import commands as c
from ha_core.machines.failover.host_agent import RecordsSeen
from ha_core.machines.failover.records import HostState, Mode, Priority, Rule, RuleKind, Settings, Vm, Wanted
from ha_core.machines.messages import SendRun
from ha_core.testing.campaigns.cluster_hosts import ClusterHost, HostPlan
from ha_core.testing.campaigns.cluster_world import World
from ha_core.testing.simulator import (
    MICROSECOND,
    MILLISECOND,
    SECOND,
    Chaos,
    Fault,
    SimProcess,
    Simulation,
    disk_faults,
    network_faults,
    reset_faults,
)

SETUP_NS = 12 * SECOND
SAFETY_NS = 10 * SECOND
LIVENESS_NS = 40 * SECOND
HOST_FAULTS = ("power-loss", "isolation", "agents-stop-all", "agents-crash-all")


class CampaignWorld(World):
    """A cluster that the seed drew, and what befalls it."""

    def __init__(self, sim: Simulation, *, profile: Profile | None = None, size: int = 0) -> None:
        """The seed draws the profile and the number of hosts where they are not given."""
        rng = sim.stream("world")
        drawn = rng.choice([LAN, FAST, FAST]), rng.choice([3, 3, 4, 5])
        profile = profile or drawn[0]
        names = [f"h{number}" for number in range(1, (size or drawn[1]) + 1)]
        rates = [rng.randrange(-4900, 4901) for _ in names]
        flushes = [rng.choice([300, 3000]) * MICROSECOND for _ in names]
        plans = [
            HostPlan(name=name, rate_ppm=rate, flush_ns=flush) for name, rate, flush in zip(names, rates, flushes, strict=True)
        ]
        settings = Settings(
            ns(profile.lease_s), ns(profile.margin_s), ns(profile.renewal_s),
            retries_ns=tuple(second * SECOND for second in (0, 1, 3, 6)), settle_ns=4 * SECOND,
        )  # fmt: skip
        super().__init__(sim, profile, plans, settings)
        self.rng = rng
        self.host_rng = sim.stream("host faults")
        self.swarm: Mapping[str, float] = {}
        self.striking = False
        self._away: list[str] = []
        self._held: dict[str, list[tuple[str, str, bytes]]] = {}
        """Messages to AAMs whose streams are stalled."""
        self._backlogs: dict[str, list[RecordsSeen]] = {}
        """What lagging host agents have not been told yet."""

    # -- streams that stall, agents that lag --

    def send_run(self, name: str, run: SendRun) -> None:
        if run.to in self._held:
            self._held[run.to].extend((name, run.channel, body) for body in run.bodies)
        else:
            super().send_run(name, run)

    def session_changed(self, process: SimProcess, peer: str, up: bool) -> None:
        for to, held in self._held.items():
            self._held[to] = [one for one in held if {one[0], to} != {process.name, peer}]
        super().session_changed(process, peer, up)

    def _stall(self, name: str, duration_ns: int) -> None:
        """Streams to one AAM stand still while datagrams pass: its view falls behind."""
        if name not in self._held:
            self.sim.fault("stream-stall")
            self._held[name] = []
            self.sim.after(duration_ns, self._release, name)

    def _release(self, name: str) -> None:
        for sender, channel, body in self._held.pop(name, []):
            self.messages.send(sender, name, channel, body)

    def connect_records(self, host: ClusterHost) -> None:
        if self.aam_of(host) is not None:
            self._backlogs.pop(host.name, None)
        super().connect_records(host)

    def records_changed(self, host: ClusterHost, effect: RecordsChanged) -> None:
        if host.name in self._backlogs:
            self._backlogs[host.name].append(RecordsSeen(effect.index, effect.changes, effect.restored))
        else:
            super().records_changed(host, effect)

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

    def report_delay_ns(self) -> int:
        if self.swarm.get("late-report") and self.host_rng.random() < 0.2:
            self.sim.fault("late-report")
            return int(ns(self.profile.lease_s) * self.host_rng.uniform(0.1, 2.0))
        return 0

    # -- the administrator --

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
                host.hypervisor.nature.fail_starts = 0.3 + 0.6 * amount

            def end() -> None:
                for host in chosen:
                    host.hypervisor.nature.fail_starts = 0.0

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
            host.hypervisor.nature.fail_starts = 0.0
            for process in host.agents:
                process.crash_within(-1)
            host.host.thaw()
            host.start()


class ClusterCampaign:
    name = "cluster"
    invariants: Sequence[str] = ("I42", "I43", "I44", "I45", "I46", "I47", "I48", "I49", "I50")
    faults: Sequence[str] = (
        "loss", "delay", "reorder", "duplicate", "replay", "path-cut", "one-way-cut", "partition", "clog", "reset",
        "disk-slow", "disk-error", "disk-full", "disk-crash", "agent-crash", "agent-stop", "agents-stop-all",
        "isolation", "stream-stall", "records-lag", "late-report", "agents-crash-all", "power-loss", "vm-crash", "fail-start",
    )  # fmt: skip

    def play(self, sim: Simulation) -> None:
        world = CampaignWorld(sim)
        for host in world.hosts.values():
            host.start()
        world.define()
        settled = sim.run_for(SETUP_NS, stop=lambda: world.orders_done and not world.checker.missing())
        if not settled:
            sim.violate("I46", f"the cluster did not come up: {'; '.join(world.checker.missing())}")
        self._safety(sim, world)
        self._liveness(sim, world)

    def _safety(self, sim: Simulation, world: CampaignWorld) -> None:
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

    def _liveness(self, sim: Simulation, world: CampaignWorld) -> None:
        world.heal()
        world.restore_order()
        sim.checked("I46")
        if not sim.run_for(LIVENESS_NS, stop=lambda: world.orders_done and not world.checker.missing()):
            sim.violate("I46", f"after everything healed: {'; '.join(world.checker.missing()) or 'orders are not done'}")
