"""The VMs of a simulated host and the shims that hold their deadlines: they live on when agents die, and end with the power.

What a VM does by itself (how long it takes to begin and to shut down, whether it fails) is its ``VmNature``.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import attrs

from ha_core.guard import events as guard_events
from ha_core.guard.control import StartRequest
from ha_core.ids import FencingToken, HostName, LeaseToken, VmName
from ha_core.testing.campaigns.cluster_checker import ClusterChecker, Execution
from ha_core.testing.simulator import MILLISECOND, SimHost, Simulation, Timer


class VmNature:
    """VMs that begin soon, shut down at some time within what they are allowed, and fail to start with a probability."""

    def __init__(self, sim: Simulation, rng: random.Random) -> None:
        self.sim = sim
        self.rng = rng
        self.fail_starts = 0.0

    def begin_ns(self, vm: VmName) -> int:
        """From the guard's order until it executes."""
        return int(self.rng.uniform(1, 40) * MILLISECOND)

    def start_error(self, vm: VmName) -> str:
        """Why it cannot start this time; empty: it can."""
        if self.rng.random() < self.fail_starts:
            self.sim.fault("fail-start")
            return "it cannot start"
        return ""

    def shutdown_ns(self, vm: VmName, token: FencingToken, allowed_ns: int) -> int | None:
        """How long its orderly shutdown takes; None: it does not heed it, and is killed after ``allowed_ns``."""
        return int(allowed_ns * self.rng.random())


@attrs.define
class Shim:
    """The mapping of one VM: what a new guard finds, and the timer that ends it whatever becomes of the guard."""

    vm: VmName
    token: FencingToken
    lease: LeaseToken
    deadline_ns: int = 0
    shutdown_ns: int = 0
    stop_by_ns: int = 0
    state: guard_events.RunState = guard_events.RunState.STARTING
    text: str = ""
    exit_code: int | None = None
    executes: bool = False
    ending: bool = False
    asked: bool = False
    """Told to shut down, because the host's deadline was reached."""
    timer: Timer | None = None
    shutdown_timer: Timer | None = None


class Hypervisor:
    def __init__(self, sim: Simulation, host: SimHost, checker: ClusterChecker, kill_ns: int) -> None:
        self.sim = sim
        self.host = host
        self.name = HostName(host.name)
        self.shims: dict[str, Shim] = {}
        self.tell: Callable[[guard_events.Event], None] = lambda event: None
        self.lease_covers: Callable[[Shim], bool] = lambda shim: False
        self.on_issued: Callable[[VmName, FencingToken], None] = lambda vm, token: None
        """The guard has told a shim to start the VM."""
        self.shutting_down = False
        """An administrator ends the host: its guard may stop VMs whatever the log says."""
        self._checker = checker
        self._kill_ns = kill_ns
        self._rng = sim.stream(f"hypervisor/{host.name}")
        self.nature = VmNature(sim, self._rng)
        self._life = 0
        self._still_until_ns = 0

    # -- by the guard --

    def perform(self, effect: guard_events.Effect) -> None:
        match effect:
            case guard_events.StartRun(order, deadline_ns, shutdown_ns, _):
                self._start(order, deadline_ns, shutdown_ns)
            case guard_events.WriteRun(vm, token, lease_token, deadline_ns, _):
                shim = self._shim(vm, token)
                if shim is not None:
                    shim.lease = LeaseToken(lease_token)
                    self._checker.restamped(self.name, shim.vm, shim.token, shim.lease)
                    self._arm(shim, deadline_ns)
            case guard_events.StopRun(vm, token, stop_by_ns):
                shim = self._shim(vm, token)
                if shim is not None and not shim.state.reaped:
                    self._judge_stop(shim)
                    shim.stop_by_ns = stop_by_ns
                    self._end_within(shim, max(0, stop_by_ns - self.host.clock.now_ns()), "stopped")
            case guard_events.KillRun(vm, token):
                shim = self._shim(vm, token)
                if shim is not None and not shim.state.reaped:
                    self._judge_stop(shim)
                    self._end_after(shim, 0, "killed")
            case guard_events.KeepTombstone(vm, token, lease_token):
                stopped = guard_events.RunState.STOPPED
                self.shims[vm] = Shim(VmName(vm), FencingToken(token), LeaseToken(lease_token), state=stopped, text="never")
            case _:
                raise TypeError(f"the hypervisor cannot do {effect}")

    def found(self) -> list[guard_events.RunFound]:
        """What an earlier guard left."""
        return [
            guard_events.RunFound(
                shim.vm, shim.token, shim.lease, shim.deadline_ns, shim.shutdown_ns, shim.stop_by_ns, shim.state,
                shim.exit_code, shim.text,
            )
            for _, shim in sorted(self.shims.items())
        ]  # fmt: skip

    # -- by fate --

    def power_off(self) -> None:
        self._life += 1
        self._still_until_ns = 0
        self.shutting_down = False
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

    def crash(self, vm: str) -> bool:
        """This VM dies by itself; False if it does not run here."""
        shim = self.shims.get(vm)
        if shim is None or not shim.executes or shim.ending:
            return False
        self._end_after(shim, 0, "crashed")
        return True

    def stand_still(self, duration_ns: int) -> None:
        """The host is frozen: no VM begins meanwhile, and a deadline that passes is the first thing that happens afterwards."""
        self._still_until_ns = max(self._still_until_ns, self.sim.now_ns + duration_ns)

    def rearm(self) -> None:
        """The host's clock runs at another speed: its kernel timers come at other instants."""
        for _, shim in sorted(self.shims.items()):
            if not shim.state.reaped and not shim.ending:
                self._arm(shim, shim.deadline_ns)

    # -- inside --

    def _judge_stop(self, shim: Shim) -> None:
        if not self.shutting_down:
            self._checker.stopped_by_guard(shim.vm, self.name, shim.token)

    def _shim(self, vm: str, token: int) -> Shim | None:
        shim = self.shims.get(vm)
        return shim if shim is not None and shim.token == token else None

    def _start(self, order: StartRequest, deadline_ns: int, shutdown_ns: int) -> None:
        shim = Shim(VmName(order.vm), FencingToken(order.token), LeaseToken(order.lease), shutdown_ns=shutdown_ns)
        self.shims[order.vm] = shim
        self._arm(shim, deadline_ns)
        self.on_issued(shim.vm, shim.token)
        self.sim.after(self.nature.begin_ns(shim.vm), self._begin, self._life, shim)

    def _begin(self, life: int, shim: Shim) -> None:
        if life != self._life or shim.ending:
            return
        if self.sim.now_ns < self._still_until_ns:
            self.sim.at(self._still_until_ns, self._begin, life, shim)
            return
        error = self.nature.start_error(shim.vm)
        if error:
            shim.ending = True
            self._gone(life, shim, error, started=False)
            return
        shim.executes = True
        shim.state = guard_events.RunState.RUNNING
        self._checker.begin(Execution(shim.vm, self.name, shim.token, shim.lease, self.sim.now_ns))
        self.tell(guard_events.RunUp(shim.vm, shim.token))

    def _arm(self, shim: Shim, deadline_ns: int) -> None:
        shim.deadline_ns = deadline_ns
        if shim.timer is not None:
            shim.timer.cancel()
        shim.timer = None
        if shim.shutdown_timer is not None:
            shim.shutdown_timer.cancel()
        shim.shutdown_timer = None
        if deadline_ns < guard_events.NEVER and shim.shutdown_ns:
            asked_ns = self.host.clock.virtual(deadline_ns - shim.shutdown_ns)
            shim.shutdown_timer = self.sim.at(asked_ns, self._shut_down, self._life, shim)
        if deadline_ns < guard_events.NEVER:
            shim.timer = self.sim.at(self.host.clock.virtual(deadline_ns), self._deadline, self._life, shim)

    def _deadline(self, life: int, shim: Shim) -> None:
        if life == self._life and not shim.ending:
            self._checker.deadline_passed(shim.vm, self.name, shim.token, self.lease_covers(shim))
            self._end_after(shim, 0, "deadline")

    def _shut_down(self, life: int, shim: Shim) -> None:
        """The host's deadline: the shim asks the VM to end, and kills it at its own deadline, ``shutdown_ns`` later."""
        if life == self._life and not shim.ending and not shim.asked:
            shim.asked = True
            self._end_within(shim, shim.shutdown_ns, "shut down at the deadline", least_ns=1)

    def _end_within(self, shim: Shim, allowed_ns: int, why: str, *, least_ns: int = 0) -> None:
        """An orderly end, or the shim's kill after ``allowed_ns``."""
        took_ns = self.nature.shutdown_ns(shim.vm, shim.token, allowed_ns)
        if took_ns is None or took_ns > allowed_ns:
            took_ns, why = allowed_ns, "killed: it did not shut down in time" if allowed_ns else "killed"
        self._end_after(shim, least_ns + took_ns, why)

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
        shim.state = guard_events.RunState.STOPPED if started else guard_events.RunState.FAILED
        shim.text = why
        shim.exit_code = -9
        if began:
            self._checker.end(shim.vm, self.name, shim.token, why)
        self.tell(guard_events.RunGone(shim.vm, shim.token, -9, why, started))
