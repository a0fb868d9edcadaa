"""The agents of one host, as steps kill and stop them and as they watch each other: whoever is left brings back what is missing."""

from __future__ import annotations

from typing import Final

from ha_core.config import ns
from ha_core.testing.campaigns.cluster_hosts import ClusterHost
from ha_core.testing.scenario.record import Record
from ha_core.testing.simulator import MILLISECOND, SECOND, SimProcess, Simulation

NOTICE_NS: Final = MILLISECOND
"""A death is noticed by its pidfd; so is the state of a stopped guard."""
START_NS: Final = 100 * MILLISECOND
"""Until a process that is started anew does something."""
AGAIN_NS: Final = 100 * MILLISECOND
FOR_EVER_NS: Final = 1_000_000 * SECOND


class Agents:
    def __init__(self, sim: Simulation, host: ClusterHost, record: Record) -> None:
        assert host.aam is not None
        self.sim = sim
        self.host = host
        self.record = record
        self.parts = {"guard": host.guard, "aam": host.aam, "vpxa": host.agent}
        self.absent = False
        """The host is not of the cluster: nothing of it is started."""
        self._stopped: dict[str, int] = {}
        """What is stopped (SIGSTOP), and since when."""
        self._frozen_until_ns = 0
        self._looking = False

    # -- what steps do --

    def kill(self, which: str) -> None:
        for name in self._names(which):
            self._stopped.pop(name, None)
            self.parts[name].end()
        self._look_after(NOTICE_NS)

    def stop(self, which: str) -> None:
        for name in self._names(which):
            if self.parts[name].alive and name not in self._stopped:
                self._stopped[name] = self.sim.now_ns
                self.parts[name].freeze(FOR_EVER_NS)
        self._look_after(NOTICE_NS)

    def go_on(self, which: str) -> None:
        for name in self._names(which):
            if self._stopped.pop(name, None) is not None:
                self.parts[name].thaw()
                self._stand_still(self.parts[name])
        self._look_after(NOTICE_NS)

    def freeze(self, duration_ns: int) -> None:
        """The whole host stands still."""
        self._frozen_until_ns = max(self._frozen_until_ns, self.sim.now_ns + duration_ns)
        self.host.hypervisor.stand_still(duration_ns)
        for process in self.host.host.processes:
            self._stand_still(process)

    def forget(self) -> None:
        """The power is gone, and with it all of this."""
        self._stopped.clear()
        self._frozen_until_ns = 0

    # -- what the agents do --

    def _names(self, which: str) -> list[str]:
        return list(self.parts) if which == "all" else [which]

    def _stand_still(self, process: SimProcess) -> None:
        left_ns = self._frozen_until_ns - self.sim.now_ns
        if left_ns > 0 and process.alive:
            process.freeze(left_ns)

    def _look_after(self, delay_ns: int) -> None:
        if not self._looking:
            self._looking = True
            self.sim.after(delay_ns, self._look)

    def _look(self) -> None:
        self._looking = False
        if self.absent or not self.host.booted:
            return
        if self.sim.now_ns < self._frozen_until_ns:
            self._look_after(self._frozen_until_ns - self.sim.now_ns)
            return
        missing = False
        for name, process in self.parts.items():
            if not process.alive:
                missing = True
                if self._watched(name):
                    self.sim.after(START_NS, self._start, name, process.lives)
            elif name in self._stopped:
                missing = True
                if self._watched(name) and self.sim.now_ns - self._stopped[name] >= self._patience_ns(name):
                    self.record.note(self.host.name, f"its {name} hangs: it is killed and started anew")
                    del self._stopped[name]
                    process.end()
                    self.sim.after(START_NS, self._start, name, process.lives)
        if missing:
            self._look_after(AGAIN_NS)

    def _patience_ns(self, name: str) -> int:
        return NOTICE_NS if name == "guard" else ns(self.host.profile.agent_hang_s)

    def _watched(self, name: str) -> bool:
        """Another agent of the host lives and looks."""
        return any(
            process.alive and other not in self._stopped for other, process in self.parts.items() if other != name
        )  # fmt: skip

    def _start(self, name: str, lives: int) -> None:
        process = self.parts[name]
        if self.host.booted and not self.absent and not process.alive and process.lives == lives and self._watched(name):
            self.record.note(self.host.name, f"its {name} is started anew")
            process.start()
            self._stand_still(process)
