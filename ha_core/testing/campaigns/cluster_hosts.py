"""The simulated hosts of the cluster campaign: guard, host agent and AAM as processes, and a hypervisor that outlives them.

The machines are the real ones; simulated are the wires between them, the shims with their kernel timers, and the VMs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import cast

import attrs

from ha_core.config import Profile, ns
from ha_core.guard import rules
from ha_core.guard.control import RunReport, StartRequest, StopRequest
from ha_core.guard.renewal import RenewalCodec, RenewalError
from ha_core.ids import FencingToken, HostName, LeaseToken, VmName
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
from ha_core.testing.campaigns.cluster_checker import ClusterChecker, Execution
from ha_core.testing.simulator import MICROSECOND, MILLISECOND, SimHost, SimProcess, Simulation, Timer

LOCAL_NS = 100 * MICROSECOND
"""Between two processes of one host."""
BOOT_NS = 400 * MILLISECOND


# -- the guard, as a machine of the contract --


@attrs.frozen
class ToGuard(Event):
    event: rules.Event


@attrs.frozen
class FromGuard(Effect):
    effect: rules.Effect


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


# -- shims and VMs --


@attrs.define
class Shim:
    """The mapping of one VM: what a new guard finds, and the timer that ends it whatever becomes of the guard."""

    vm: VmName
    token: FencingToken
    lease: LeaseToken
    deadline_ns: int = 0
    shutdown_ns: int = 0
    stop_by_ns: int = 0
    state: rules.RunState = rules.RunState.STARTING
    text: str = ""
    exit_code: int | None = None
    executes: bool = False
    ending: bool = False
    asked: bool = False
    """Told to shut down, because the host's deadline was reached."""
    timer: Timer | None = None
    shutdown_timer: Timer | None = None


class Hypervisor:
    """The VMs of one host: they live on when agents die, and end with the power."""

    def __init__(self, sim: Simulation, host: SimHost, checker: ClusterChecker, kill_ns: int) -> None:
        self.sim = sim
        self.host = host
        self.name = HostName(host.name)
        self.shims: dict[str, Shim] = {}
        self.tell: Callable[[rules.Event], None] = lambda event: None
        self.lease_covers: Callable[[Shim], bool] = lambda shim: False
        self.fail_starts = 0.0
        self._checker = checker
        self._kill_ns = kill_ns
        self._rng = sim.stream(f"hypervisor/{host.name}")
        self._life = 0

    # -- by the guard --

    def perform(self, effect: rules.Effect) -> None:
        match effect:
            case rules.StartRun(order, deadline_ns, shutdown_ns, _):
                self._start(order, deadline_ns, shutdown_ns)
            case rules.WriteRun(vm, token, lease_token, deadline_ns, _):
                shim = self._shim(vm, token)
                if shim is not None:
                    shim.lease = LeaseToken(lease_token)
                    self._checker.restamped(self.name, shim.vm, shim.token, shim.lease)
                    self._arm(shim, deadline_ns)
            case rules.StopRun(vm, token, stop_by_ns):
                shim = self._shim(vm, token)
                if shim is not None and not shim.state.reaped:
                    self._checker.stopped_by_guard(shim.vm, self.name, shim.token)
                    shim.stop_by_ns = stop_by_ns
                    left_ns = max(0, stop_by_ns - self.host.clock.now_ns())
                    self._end_after(shim, int(left_ns * self._rng.random()), "stopped")
            case rules.KillRun(vm, token):
                shim = self._shim(vm, token)
                if shim is not None and not shim.state.reaped:
                    self._checker.stopped_by_guard(shim.vm, self.name, shim.token)
                    self._end_after(shim, 0, "killed")
            case rules.KeepTombstone(vm, token, lease_token):
                stopped = rules.RunState.STOPPED
                self.shims[vm] = Shim(VmName(vm), FencingToken(token), LeaseToken(lease_token), state=stopped, text="never")
            case _:
                raise TypeError(f"the hypervisor cannot do {effect}")

    def found(self) -> list[rules.RunFound]:
        """What an earlier guard left."""
        return [
            rules.RunFound(
                shim.vm, shim.token, shim.lease, shim.deadline_ns, shim.shutdown_ns, shim.stop_by_ns, shim.state,
                shim.exit_code, shim.text,
            )
            for _, shim in sorted(self.shims.items())
        ]  # fmt: skip

    # -- by fate --

    def power_off(self) -> None:
        self._life += 1
        for _, shim in sorted(self.shims.items()):
            if shim.timer is not None:
                shim.timer.cancel()
            if shim.executes:
                self._checker.end(shim.vm, self.name, shim.token, "power off")
        self.shims.clear()

    def crash_one(self, rng: random.Random) -> bool:
        """A VM dies by itself."""
        running = [shim for _, shim in sorted(self.shims.items()) if shim.executes and not shim.ending]
        if not running:
            return False
        self._end_after(rng.choice(running), 0, "crashed")
        return True

    # -- inside --

    def _shim(self, vm: str, token: int) -> Shim | None:
        shim = self.shims.get(vm)
        return shim if shim is not None and shim.token == token else None

    def _start(self, order: StartRequest, deadline_ns: int, shutdown_ns: int) -> None:
        shim = Shim(VmName(order.vm), FencingToken(order.token), LeaseToken(order.lease), shutdown_ns=shutdown_ns)
        self.shims[order.vm] = shim
        self._arm(shim, deadline_ns)
        delay_ns = int(self._rng.uniform(1, 40) * MILLISECOND)
        self.sim.after(delay_ns, self._begin, self._life, shim)

    def _begin(self, life: int, shim: Shim) -> None:
        if life != self._life or shim.ending:
            return
        if self._rng.random() < self.fail_starts:
            self.sim.fault("fail-start")
            shim.ending = True
            self._gone(life, shim, "it cannot start", started=False)
            return
        shim.executes = True
        shim.state = rules.RunState.RUNNING
        self._checker.begin(Execution(shim.vm, self.name, shim.token, shim.lease, self.sim.now_ns))
        self.tell(rules.RunUp(shim.vm, shim.token))

    def _arm(self, shim: Shim, deadline_ns: int) -> None:
        shim.deadline_ns = deadline_ns
        if shim.timer is not None:
            shim.timer.cancel()
        shim.timer = None
        if shim.shutdown_timer is not None:
            shim.shutdown_timer.cancel()
        shim.shutdown_timer = None
        if deadline_ns < rules.NEVER and shim.shutdown_ns:
            asked_ns = self.host.clock.virtual(deadline_ns - shim.shutdown_ns)
            shim.shutdown_timer = self.sim.at(asked_ns, self._shut_down, self._life, shim)
        if deadline_ns < rules.NEVER:
            shim.timer = self.sim.at(self.host.clock.virtual(deadline_ns), self._deadline, self._life, shim)

    def _deadline(self, life: int, shim: Shim) -> None:
        if life == self._life and not shim.ending:
            self._checker.deadline_passed(shim.vm, self.name, shim.token, self.lease_covers(shim))
            self._end_after(shim, 0, "deadline")

    def _shut_down(self, life: int, shim: Shim) -> None:
        """The host's deadline: the shim asks the VM to end, and kills it at its own deadline, ``shutdown_ns`` later."""
        if life == self._life and not shim.ending and not shim.asked:
            shim.asked = True
            self._end_after(shim, 1 + int(shim.shutdown_ns * self._rng.random()), "shut down at the deadline")

    def _end_after(self, shim: Shim, delay_ns: int, why: str) -> None:
        if delay_ns == 0:
            shim.ending = True
            delay_ns = int(self._kill_ns * self._rng.random())
        self.sim.after(delay_ns, self._gone, self._life, shim, why)

    def _gone(self, life: int, shim: Shim, why: str, started: bool = True) -> None:
        if life != self._life or shim.state.reaped:
            return
        began = shim.executes
        shim.ending, shim.executes = True, False
        if shim.timer is not None:
            shim.timer.cancel()
        shim.state = rules.RunState.STOPPED if started else rules.RunState.FAILED
        shim.text = why
        shim.exit_code = -9
        if began:
            self._checker.end(shim.vm, self.name, shim.token, why)
        self.tell(rules.RunGone(shim.vm, shim.token, -9, why, started))


# -- a host --


class ClusterHost:
    """Three agents, their wires, and the VMs. The AAM process is built by the campaign."""

    def __init__(
        self, sim: Simulation, name: str, profile: Profile, codec: RenewalCodec, checker: ClusterChecker, rate_ppm: int
    ) -> None:
        self.sim = sim
        self.name = HostName(name)
        self.profile = profile
        self.host = SimHost(sim, name, rate_ppm=rate_ppm, boot_ns=BOOT_NS)
        kill_ns = (ns(profile.margin_s) - ns(profile.lease_s) // 50) // 3
        self.hypervisor = Hypervisor(sim, self.host, checker, kill_ns)
        self.hypervisor.tell = self._tell_guard
        self.hypervisor.lease_covers = self._covered
        self.send_renewal: Callable[[bytes], None] = lambda data: None
        self.propose: Callable[[Propose], None] = lambda effect: None
        self.connect_records: Callable[[], None] = lambda: None
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

    def start(self) -> None:
        """Power on, and every agent."""
        if not self.host.powered:
            self.host.power_on()
            self._booted_ns = self.sim.now_ns + BOOT_NS
        elif self.booted:
            for process in self.agents:
                process.start()

    # -- the guard's wires --

    def _tell_guard(self, event: rules.Event) -> None:
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
            self._tell_guard(rules.Answered(self._codec.decode_answer(data)))
        except RenewalError:
            pass

    def _guard_effect(self, wrapped: FromGuard) -> None:
        match wrapped.effect:
            case rules.SendRenewal(renewal):
                self.send_renewal(self._codec.encode_renewal(renewal))
            case rules.Reported(report):
                self.sim.after(LOCAL_NS, self.agent.post, GuardReports([_report(report)]))
            case rules.Replied(request, reply):
                life, order = self._asks.pop(request, (0, None))
                if reply.error and life == self.agent.lives and isinstance(order, StartVm):
                    refused = StartRefused(order.vm.name, order.token, reply.error, reply.text)
                    self.sim.after(LOCAL_NS, self.agent.post, refused)
            case rules.Noted(text):
                self.sim.trace("guard", self.name, text)
            case rules.Ended():
                pass
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
        self.sim.after(LOCAL_NS, self._tell_guard, rules.Asked(self._last_ask, order))


def _report(report: RunReport) -> GuardReport:
    return GuardReport(
        VmName(report.vm), FencingToken(report.token), report.state, report.event, bytes.fromhex(report.instance),
        report.exit_code, report.text,
    )  # fmt: skip
