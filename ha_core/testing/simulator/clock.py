"""The clock of a simulated host: it counts suspend like CLOCK_BOOTTIME, begins at its boot, may run too fast or slow."""

from __future__ import annotations

from ha_core.testing.simulator.core import Simulation

_MILLION = 1_000_000


class SimClock:
    """Converts between a host's nanoseconds and virtual ones. ``rate_ppm`` is how much faster it runs, in parts per million."""

    def __init__(self, sim: Simulation, *, start_ns: int = 0, rate_ppm: int = 0) -> None:
        self._sim = sim
        self._base_ns = sim.now_ns
        self._local_ns = start_ns
        self._rate = _MILLION + rate_ppm

    def now_ns(self) -> int:
        return self._local_ns + (self._sim.now_ns - self._base_ns) * self._rate // _MILLION

    def virtual(self, local_ns: int) -> int:
        """The first virtual instant at which this clock shows at least ``local_ns``."""
        return self._base_ns - (-(local_ns - self._local_ns) * _MILLION // self._rate)

    def set_rate(self, rate_ppm: int) -> None:
        """Run at another speed from now on."""
        self._local_ns, self._base_ns = self.now_ns(), self._sim.now_ns
        self._rate = _MILLION + rate_ppm

    def reboot(self, start_ns: int = 0) -> None:
        """The host booted: its clock begins anew."""
        self._local_ns, self._base_ns = start_ns, self._sim.now_ns
