"""A simulated host of a cluster: guard, host agent and AAM as processes, and a hypervisor that outlives them.

The machines are the real ones; simulated are the wires between them, the shims with their kernel timers, and the VMs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import attrs

from ha_core.config import Profile, ns
from ha_core.guard import events as guard_events
from ha_core.guard import rules
from ha_core.guard.control import RunReport, StartRequest, StopRequest
from ha_core.guard.renewal import RenewalCodec, RenewalError
from ha_core.ids import FencingToken, HostName, VmName
from ha_core.machines.contract import Effect, Event, Machine
from ha_core.machines.failover.host_agent import (
    GuardLost,
    GuardReport,
    GuardReports,
    HostAgent,
    Propose,
    StartRefused,
    StartVm,
    StopVm,
)
from ha_core.testing.campaigns.cluster_checker import ClusterChecker
from ha_core.testing.campaigns.cluster_hypervisor import Hypervisor, Shim
from ha_core.testing.simulator import MICROSECOND, MILLISECOND, SimHost, SimProcess, Simulation

LOCAL_NS = 100 * MICROSECOND
"""Between two processes of one host."""
BOOT_NS = 400 * MILLISECOND


@attrs.frozen(kw_only=True)
class HostPlan:
    """What a simulated host is."""

    name: str
    paths: int = 2
    cpu_mhz: int = 8000
    memory_mib: int = 8192
    rate_ppm: int = 0
    """How much faster its clock runs."""
    flush_ns: int = 300 * MICROSECOND
    """The mean time of a flush of its store."""
    boot_ns: int = BOOT_NS


# -- the guard, as a machine of the contract --


@attrs.frozen
class ToGuard(Event):
    event: guard_events.Event


@attrs.frozen
class FromGuard(Effect):
    effect: guard_events.Effect


class GuardMachine:
    """GuardRules speaks its own dataclasses, because the guard imports nothing of ours."""

    def __init__(self, guard: rules.GuardRules) -> None:
        self.rules = guard

    def receive(self, events: Sequence[Event], now_ns: int) -> None:
        self.rules.receive([cast(ToGuard, event).event for event in events], now_ns)

    def handle_timer(self, now_ns: int) -> None:
        self.rules.handle_timer(now_ns)

    def next_timer(self) -> int | None:
        return self.rules.next_timer()

    def take_effects(self) -> list[Effect]:
        return [FromGuard(effect) for effect in self.rules.take_effects()]

    def persisted(self, number: int, now_ns: int) -> None:
        raise NotImplementedError("the guard persists nothing")

    def persist_failed(self, number: int, error: str, now_ns: int) -> None:
        raise NotImplementedError("the guard persists nothing")

    def check(self) -> None:
        self.rules.check()


# -- a host --


class ClusterHost:
    """Three agents, their wires, and the VMs. The AAM process is built by the world that the host is in."""

    def __init__(self, sim: Simulation, plan: HostPlan, profile: Profile, codec: RenewalCodec, checker: ClusterChecker) -> None:
        self.sim = sim
        self.plan = plan
        name = plan.name
        self.name = HostName(name)
        self.profile = profile
        self.host = SimHost(sim, name, rate_ppm=plan.rate_ppm, boot_ns=plan.boot_ns)
        kill_ns = (ns(profile.margin_s) - ns(profile.lease_s) // 50) // 3
        self.hypervisor = Hypervisor(sim, self.host, checker, kill_ns)
        self.hypervisor.tell = self._tell_guard
        self.hypervisor.lease_covers = self._covered
        self.send_renewal: Callable[[bytes], None] = lambda data: None
        self.propose: Callable[[Propose], None] = lambda effect: None
        self.connect_records: Callable[[], None] = lambda: None
        self.on_ended: Callable[[], None] = lambda: None
        """The guard has ended its VMs, as it was asked to."""
        self.aam: SimProcess | None = None
        self._codec = codec
        self._rng = sim.stream(f"host/{name}")
        self._marked_boot = 0
        self._booted_ns = -1
        self._asks: dict[int, tuple[int, StartVm | StopVm]] = {}
        self._last_ask = 0
        self.guard = self.host.add(SimProcess(sim, f"guard@{name}", self._build_guard, clock=self.host.clock, start=False))
        self.agent = self.host.add(SimProcess(sim, f"vpxa@{name}", self._build_agent, clock=self.host.clock, start=False))
        self.guard.on(FromGuard, self._guard_effect)
        self.agent.on(StartVm, self._ask_guard)
        self.agent.on(StopVm, self._ask_guard)
        self.agent.on(Propose, lambda effect: self.propose(effect))
        self.guard.observe(self)

    @property
    def boot_id(self) -> bytes:
        return f"{self.name}/{self.host.boots}".encode().ljust(16, b".")[:16]

    @property
    def agents(self) -> list[SimProcess]:
        assert self.aam is not None
        return [self.guard, self.agent, self.aam]

    # -- processes --

    def _build_guard(self, process: SimProcess) -> Machine:
        instance = self._rng.getrandbits(128).to_bytes(16, "big")
        now_ns = process.now_ns()
        first = self._marked_boot != self.host.boots
        self._marked_boot = self.host.boots
        guard = rules.GuardRules(
            host=self.name, boot_id=self.boot_id, instance=instance, renewal_ns=ns(self.profile.renewal_s), now_ns=now_ns,
            fresh=first,
        )  # fmt: skip
        guard.receive(self.hypervisor.found(), now_ns)
        return GuardMachine(guard)

    def _build_agent(self, process: SimProcess) -> Machine:
        self.sim.after(LOCAL_NS, self._connect_guard, process.lives)
        self.sim.after(LOCAL_NS, self.connect_records)
        return HostAgent(self.name)

    def process_down(self, process: SimProcess, *, silent: bool) -> None:
        """The guard died: the agent's connection to it breaks."""
        self._asks.clear()
        self.sim.after(LOCAL_NS, self.agent.post, GuardLost())

    def process_up(self, process: SimProcess) -> None:
        self.sim.after(2 * LOCAL_NS, self._connect_guard, self.agent.lives)

    def _connect_guard(self, agent_life: int) -> None:
        """The agent subscribes: it gets the present state of all."""
        machine = self.guard.machine
        if agent_life == self.agent.lives and isinstance(machine, GuardMachine):
            reports = [_report(report) for report in machine.rules.reports()]
            self.sim.after(LOCAL_NS, self.agent.post, GuardReports(reports, complete=True))

    @property
    def booted(self) -> bool:
        return self.host.powered and self.sim.now_ns > self._booted_ns

    def power_off(self) -> None:
        if self.host.powered:
            self.host.power_off()
            self.hypervisor.power_off()

    def power_on(self) -> None:
        if not self.host.powered:
            self.host.power_on()
            self._booted_ns = self.sim.now_ns + self.plan.boot_ns

    def start(self) -> None:
        """Power on, and every agent."""
        if not self.host.powered:
            self.power_on()
        elif self.booted:
            for process in self.agents:
                process.start()

    # -- the guard's wires --

    def _tell_guard(self, event: guard_events.Event) -> None:
        self.guard.post(ToGuard(event))

    def _covered(self, shim: Shim) -> bool:
        machine = self.guard.machine
        if not isinstance(machine, GuardMachine):
            return False
        guard, now_ns = machine.rules, self.host.clock.now_ns()
        run = guard.runs.get(shim.vm)
        mine = run is not None and run.token == shim.token and run.lease_token == guard.lease_token and not run.lost
        return mine and guard.holds_lease(now_ns)

    def answer(self, data: bytes) -> None:
        """A packet from a primary reached the guard's socket."""
        try:
            self._tell_guard(guard_events.Answered(self._codec.decode_answer(data)))
        except RenewalError:
            pass

    def _guard_effect(self, wrapped: FromGuard) -> None:
        match wrapped.effect:
            case guard_events.SendRenewal(renewal):
                self.send_renewal(self._codec.encode_renewal(renewal))
            case guard_events.Reported(report):
                self.sim.after(LOCAL_NS, self.agent.post, GuardReports([_report(report)]))
            case guard_events.Replied(request, reply):
                life, order = self._asks.pop(request, (0, None))
                if reply.error and life == self.agent.lives and isinstance(order, StartVm):
                    refused = StartRefused(order.vm.name, order.token, reply.error, reply.text)
                    self.sim.after(LOCAL_NS, self.agent.post, refused)
            case guard_events.Noted(text):
                self.sim.trace("guard", self.name, text)
            case guard_events.Ended():
                self.on_ended()
            case effect:
                self.hypervisor.perform(effect)

    def _ask_guard(self, effect: StartVm | StopVm) -> None:
        self._last_ask += 1
        order: StartRequest | StopRequest
        if isinstance(effect, StartVm):
            order = StartRequest(
                effect.vm.name, effect.lease, effect.token, ("true",), shutdown_s=effect.shutdown_ns / 1e9
            )  # fmt: skip
        else:
            order = StopRequest(effect.vm, effect.token, effect.grace_ns / 1e9)
        self._asks[self._last_ask] = (self.agent.lives, effect)
        self.sim.after(LOCAL_NS, self._tell_guard, guard_events.Asked(self._last_ask, order))


def _report(report: RunReport) -> GuardReport:
    return GuardReport(
        VmName(report.vm), FencingToken(report.token), report.state, report.event, bytes.fromhex(report.instance),
        report.exit_code, report.text,
    )  # fmt: skip
