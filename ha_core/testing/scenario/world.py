"""The cluster of a scenario: what its file describes, with members that come and go, and nothing that happens by chance but
the small delays of networks, disks and processes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import attrs

from ha_core.config import ns
from ha_core.ids import ChannelName, FencingToken, NodeId, ReplicaId, VmName, host_of
from ha_core.machines.aam import AamMachine, PeerReached, Ping, PingAnswered, VerdictChanged
from ha_core.machines.contract import Effect, Event, Machine
from ha_core.machines.database_events import Send
from ha_core.machines.failover.commands import Command, Outcome
from ha_core.machines.failover.isolation import Verdict
from ha_core.machines.failover.records import (
    AdmissionPolicy,
    Priority,
    Rule,
    RuleKind,
    Safety,
    Settings,
    Vm,
    Wanted,
)
from ha_core.machines.host import INTRODUCTION, HostMachine, Introduced
from ha_core.machines.messages import Consumed, DeliverRun, ForgetPeer, SendDatagram, SendRun, SetPeer
from ha_core.machines.raft.configuration import Configuration
from ha_core.machines.raft.types import ConfigurationChanged
from ha_core.testing.campaigns.cluster_hosts import ClusterHost, HostPlan
from ha_core.testing.campaigns.cluster_hypervisor import VmNature
from ha_core.testing.campaigns.cluster_world import World
from ha_core.testing.scenario.model import Scenario, VmSpec
from ha_core.testing.scenario.record import PlayChecker, Record
from ha_core.testing.scenario.wires import Wires
from ha_core.testing.simulator import MICROSECOND, MILLISECOND, SECOND, SimProcess, Simulation

BOOT_NS: Final = 5 * SECOND
FLUSH_NS: Final = {"sqlite": 500 * MICROSECOND, "flash": 3 * MILLISECOND}
STOP_SLACK_NS: Final = 50 * MILLISECOND
"""A VM is killed so much later than its orderly shutdown takes."""
LOOK_NS: Final = 200 * MILLISECOND
"""How often it is looked who reaches whom."""


def link_names(scenario: Scenario) -> Sequence[str]:
    return [f"net{number}" for number in range(1, max(host.paths for host in scenario.hosts) + 1)]


class MemberMachine:
    """The host machine, which adds and removes members, as a machine of its own: what it tells the endpoint is sent."""

    def __init__(self, host: HostMachine) -> None:
        self.host = host

    @property
    def aam(self) -> AamMachine:
        return self.host.aam

    def receive(self, events: Sequence[Event], now_ns: int) -> None:
        self.host.receive(events, now_ns)

    def handle_timer(self, now_ns: int) -> None:
        self.host.handle_timer(now_ns)

    def next_timer(self) -> int | None:
        return self.host.next_timer()

    def take_effects(self) -> list[Effect]:
        effects: list[Effect] = []
        for effect in self.host.take_effects():
            if isinstance(effect, SendRun | SendDatagram | Consumed):
                effects.append(Send(effect))
            elif not isinstance(effect, SetPeer | ForgetPeer):
                assert isinstance(effect, Effect)
                effects.append(effect)
        return effects

    def persisted(self, number: int, now_ns: int) -> None:
        self.host.persisted(number, now_ns)

    def persist_failed(self, number: int, error: str, now_ns: int) -> None:
        self.host.persist_failed(number, error, now_ns)


class ScenarioNature(VmNature):
    """VMs that behave as their ``[[vm]]`` says. Failing starts and stops are counted once ``counting``."""

    def __init__(self, sim: Simulation, rng: random.Random, host: str, fates: Mapping[str, VmFate]) -> None:
        super().__init__(sim, rng)
        self._host = host
        self._fates = fates

    def start_error(self, vm: VmName) -> str:
        return self._fates[vm].start_error(self._host)

    def shutdown_ns(self, vm: VmName, token: FencingToken, allowed_ns: int) -> int | None:
        return self._fates[vm].shutdown_ns(token)


@attrs.define
class VmFate:
    spec: VmSpec
    counting: bool = False
    starts: int = 0
    starts_on: dict[str, int] = attrs.field(factory=dict)
    stops: dict[FencingToken, None] = attrs.field(factory=dict)

    def start_error(self, host: str) -> str:
        if not self.counting:
            return ""
        self.starts += 1
        tries = self.starts_on[host] = self.starts_on.get(host, 0) + 1
        limit = self.spec.fail_start_on.get(host, 0)
        fails = self.starts <= self.spec.fail_start or limit < 0 or tries <= limit
        return "the start failed, as the scenario wants it" if fails else ""

    def shutdown_ns(self, token: FencingToken) -> int | None:
        if self.counting:
            self.stops.setdefault(token)
            if list(self.stops).index(token) < self.spec.fail_stop:
                return None
        return ns(self.spec.shutdown_s)


class ScenarioWorld(World):
    """``scenario`` must be playable (playable.py)."""

    def __init__(self, sim: Simulation, scenario: Scenario, record: Record) -> None:
        self.scenario = scenario
        self.record = record
        self.later = {step.words[1] for step in scenario.steps if step.words[0] == "host" and step.words[2] == "add"}
        """Hosts that are not of the cluster until a step adds them."""
        self.fates = {vm.name: VmFate(vm) for vm in scenario.vms}
        self.center_on = True
        self.pingable = dict.fromkeys([host.name for host in scenario.hosts], True)
        self._verdicts: dict[str, Verdict] = {}
        self._waits: dict[VmName, str] = {}
        self._told_waits: dict[VmName, str] = {}
        self._silent_ns: dict[tuple[str, str], int] = {}
        self._reached: dict[tuple[str, str], tuple[int, bool]] = {}
        self._told_members: tuple[Sequence[NodeId], Sequence[NodeId]] = ((), ())
        plans = [
            HostPlan(
                name=host.name, paths=host.paths, cpu_mhz=host.cpu_mhz, memory_mib=host.memory_mib,
                flush_ns=FLUSH_NS[host.store], boot_ns=BOOT_NS,
            )
            for host in scenario.hosts
        ]  # fmt: skip
        super().__init__(
            sim, scenario.profile, plans, settings_of(scenario), links=link_names(scenario), checker=PlayChecker(sim, record)
        )
        self.wires = Wires(self.network, {host.name: host.paths for host in scenario.hosts})
        self.wires.apply()
        self.bootstrap = self._first_members()
        for host in self.hosts.values():
            self._prepare(host)

    def _first_members(self) -> Configuration:
        founders = [NodeId(f"aam@{host.name}") for host in self.scenario.hosts if host.name not in self.later]
        voters = tuple(sorted(founders[: self.scenario.voters]))
        learners = tuple(sorted(node for node in founders if node not in voters))
        members = {node: self.bootstrap.members[node] for node in founders}
        return Configuration(incoming=voters, learners=learners, members=members)

    def _prepare(self, host: ClusterHost) -> None:
        hypervisor, record = host.hypervisor, self.record
        hypervisor.nature = ScenarioNature(self.sim, self.sim.stream(f"vms/{host.name}"), host.name, self.fates)
        hypervisor.on_issued = lambda vm, token: record.start_issued(host.name, vm, token)
        assert host.aam is not None
        host.aam.on(Ping, lambda effect: self._ping(host, effect.address))
        host.aam.on(VerdictChanged, lambda effect: self._verdict(host, effect))
        host.aam.on(ConfigurationChanged, lambda effect: self._members_changed(host, effect.configuration))

    # -- members --

    def aam_of(self, host: ClusterHost) -> AamMachine | None:
        machine = host.aam.machine if host.aam is not None else None
        return machine.aam if isinstance(machine, MemberMachine) else None

    def joins(self) -> bool:
        return False

    def parent_of(self, aam: AamMachine, process: SimProcess) -> Machine:
        host = host_of(NodeId(process.name))
        member = HostMachine(
            node=NodeId(process.name), replica=ReplicaId(self.disks[process.name].incarnation),
            addresses=dict(self.record_of(self.hosts[host]).addresses),  # type: ignore[arg-type]
            aam=aam, primaries={}, max_primaries=self.scenario.voters,
        )  # fmt: skip
        return MemberMachine(member)

    def arrived(self, sender: str, channel: str, body: bytes) -> Event:
        if channel == INTRODUCTION:
            return Introduced(DeliverRun(NodeId(sender), ChannelName(channel), 0, [body]))
        return super().arrived(sender, channel, body)

    def watch_peers(self) -> None:
        """Tell each AAM, again and again, whom it reaches: the endpoint's part."""
        now_ns, down_ns = self.sim.now_ns, ns(self.profile.down_s)
        standing = {name: host.aam for name, host in self.hosts.items() if host.aam is not None and host.aam.alive}
        for one, process in standing.items():
            for other, peer in standing.items():
                if one != other and not peer.frozen and self.wires.two_way(one, other):
                    self._silent_ns[one, other] = now_ns
            for other in self.hosts:
                if one != other:
                    reached = now_ns - self._silent_ns.get((one, other), -down_ns) < down_ns
                    if self._reached.get((one, other)) != (process.lives, reached):
                        self._reached[one, other] = (process.lives, reached)
                        process.post(PeerReached(NodeId(f"aam@{other}"), reached))

    @property
    def members(self) -> Configuration | None:
        """As the leader has them, or else whoever knows."""
        aams = [(self.leads(host), self.aam_of(host)) for host in self.hosts.values()]
        known = [aam.database.configuration for _, aam in sorted(aams, key=lambda one: not one[0]) if aam is not None]
        return next((members for members in known if members is not None), None)

    def begin(self) -> None:
        """t = 0."""
        members = self.members
        if members is not None:
            self._told_members = (members.voters, members.learners)

    def _members_changed(self, host: ClusterHost, members: Configuration) -> None:
        now = (members.voters, members.learners)
        if self.leads(host) and now != self._told_members:
            self._told_members = now
            voters, learners = (", ".join(host_of(name) for name in names) for names in now)
            self.record.note("cluster", f"primaries: {voters}; secondaries: {learners or 'none'}")

    # -- what hosts say --

    def _ping(self, host: ClusterHost, address: str) -> None:
        self.sim.after(MILLISECOND, self._pinged, host, address)

    def _pinged(self, host: ClusterHost, address: str) -> None:
        if self.pingable[host.name] and self.wires.reaches_out(host.name) and host.aam is not None:
            host.aam.post(PingAnswered(address))

    def _verdict(self, host: ClusterHost, effect: VerdictChanged) -> None:
        """Told when it is another than the last one; an agent that begins anew says the same again."""
        if effect.verdict is Verdict.PINGING or effect.verdict is self._verdicts.get(host.name, Verdict.CONNECTED):
            return
        self._verdicts[host.name] = effect.verdict
        if effect.verdict is Verdict.CONNECTED:
            self.record.note(host.name, "sees a leader again")
        else:
            self.record.note(host.name, f"says that it is {effect.verdict.value}: {effect.reason}")

    def watch_waiting(self) -> None:
        """Tell why a VM waits, once it has done so for the same reason from one look to the next."""
        aam = next((self.aam_of(host) for host in self.hosts.values() if self.leads(host)), None)
        if aam is None:
            return
        waits = {waiting.vm: waiting.reason for waiting in aam.waiting}
        for vm, reason in waits.items():
            if self._waits.get(vm) == reason != self._told_waits.get(vm):
                self._told_waits[vm] = reason
                self.record.note(vm, f"waits: {reason}")
        self._waits = waits
        self._told_waits = {vm: reason for vm, reason in self._told_waits.items() if vm in waits}

    # -- the administrator --

    def entry(self) -> SimProcess:
        """Whoever leads; else anybody who listens."""
        listening = [host for host in self.hosts.values() if host.aam is not None and host.aam.alive and not host.aam.frozen]
        leading = [host for host in listening if self.leads(host)]
        chosen = leading or listening or list(self.hosts.values())
        process = chosen[0 if leading else self.rng.randrange(len(chosen))].aam
        assert process is not None
        return process

    def give(self, subject: str, command: Command, *, again: bool = False, done: Callable[[], None] = lambda: None) -> None:
        """An order, with ``again`` for as long as it is refused; a refusal is told once."""
        if not self.center_on:
            self.record.note(subject, "the order finds no center, and is given up")
            return
        told: list[str] = []

        def answered(outcome: Outcome) -> bool:
            if outcome.done:
                done()
                return True
            if outcome.reason not in told:
                told.append(outcome.reason)
                self.record.note(subject, f"the order {'must wait' if again else 'is refused'}: {outcome.reason}")
            return not again

        self.order(command, answered)


# -- records of what the file says --


def settings_of(scenario: Scenario) -> Settings:
    profile = scenario.profile
    policy, tolerate, hosts = scenario.admission
    return Settings(
        ns(profile.lease_s), ns(profile.margin_s), ns(profile.renewal_s),
        retries_ns=tuple(ns(second) for second in scenario.retries_s), admission=AdmissionPolicy(policy), tolerate=tolerate,
        failover_hosts=hosts,
    )  # fmt: skip


def vm_of(spec: VmSpec) -> Vm:
    return Vm(
        VmName(spec.name), priority=Priority[spec.priority.upper()], after=spec.after, cpu_mhz=spec.cpu_mhz,
        memory_mib=spec.memory_mib, start_ns=ns(spec.start_s), safety=Safety(spec.safety), max_restart=spec.max_restart,
        max_relocate=spec.max_relocate, failback=spec.failback, wanted=Wanted(spec.state), host=spec.host,
        stop_ns=ns(spec.shutdown_s) + STOP_SLACK_NS,
    )  # fmt: skip


def rules_of(scenario: Scenario) -> Sequence[Rule]:
    return [
        Rule(f"rule {number}", RuleKind(rule.kind), tuple(rule.vms), tuple(rule.hosts.items()))
        for number, rule in enumerate(scenario.rules, 1)
    ]
