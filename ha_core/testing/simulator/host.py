"""A simulated host: several processes that share a clock, power and fate."""

from __future__ import annotations

from ha_core.testing.simulator.clock import SimClock
from ha_core.testing.simulator.core import Simulation
from ha_core.testing.simulator.process import SimProcess


class SimHost:
    """``power_off`` kills everything on it without a packet; ``power_on`` boots it: the clock begins anew."""

    def __init__(self, sim: Simulation, name: str, *, rate_ppm: int = 0, boot_ns: int = 0) -> None:
        """``boot_ns`` is how long it takes to boot."""
        self.sim = sim
        self.name = name
        self.clock = SimClock(sim, rate_ppm=rate_ppm)
        self.powered = True
        self.is_up = True
        """It has power and has booted: processes may run."""
        self.boots = 1
        self.processes: list[SimProcess] = []
        self._boot_ns = boot_ns

    def add(self, process: SimProcess) -> SimProcess:
        """Make ``process`` (built with ``clock=host.clock``) share the host's fate; it does not start while the host is down."""
        self.processes.append(process)
        process.host = self
        return process

    @property
    def alive(self) -> bool:
        return self.powered

    def power_off(self, *, kind: str = "power-loss") -> None:
        if self.powered:
            self.powered = self.is_up = False
            self.sim.fault(kind)
            self.sim.trace("power off", self.name)
            for process in self.processes:
                process.end(silent=True)

    def power_on(self) -> None:
        if not self.powered:
            self.powered = True
            self.boots += 1
            self.sim.trace("power on", self.name)
            self.sim.after(self._boot_ns, self._boot, self.boots)

    def _boot(self, boots: int) -> None:
        if self.powered and boots == self.boots:
            self.clock.reboot()
            self.is_up = True
            for process in self.processes:
                process.start()

    # -- the names that process faults use --

    def start(self) -> None:
        self.power_on()
        for process in self.processes:
            process.start()

    def crash(self, *, silent: bool = False, kind: str = "crash") -> None:
        """Every process killed; silent: the power is gone."""
        if silent:
            self.power_off(kind=kind)
        else:
            self.sim.fault(kind)
            for process in self.processes:
                process.end(silent=False)

    def crash_within(self, effect_count: int) -> None:
        for process in self.processes:
            process.crash_within(effect_count)

    def freeze(self, duration_ns: int) -> None:
        """The whole host stands still; its clock, which counts suspend, goes on."""
        for process in self.processes:
            process.freeze(duration_ns)

    def thaw(self) -> None:
        for process in self.processes:
            process.thaw()
