"""The device that holds a host's stores, as steps slow it down, fill it, break it or lose it."""

from __future__ import annotations

from ha_core.config import ns
from ha_core.ids import NodeId, host_of
from ha_core.testing.scenario.stream import Stream
from ha_core.testing.scenario.world import ScenarioWorld
from ha_core.testing.simulator import MILLISECOND, SimProcess
from ha_core.testing.simulator.faults import Device

REPLACE_NS = 200 * MILLISECOND
"""Until the AAM of a host whose disk was replaced is back."""


class Disks:
    def __init__(self, world: ScenarioWorld, stream: Stream | None) -> None:
        """The messages' stores are on the same device."""
        self.world = world
        self._stream = stream
        self._failing: dict[str, bool] = {}
        self._told: dict[str, bool] = {}
        for host in world.hosts.values():
            assert host.aam is not None
            host.aam.observe(self)
        for application in stream.applications.values() if stream is not None else ():
            application.process.observe(self)

    def change(self, host: str, what: str, seconds: float) -> None:
        name = f"aam@{host}"
        match what:
            case "slow":
                for device in self._devices(host):
                    device.slow(ns(seconds))
            case "full":
                for device in self._devices(host):
                    device.set_full(True)
            case "fail":
                self._failing[host] = True
                for device in self._devices(host):
                    device.fail_next()
            case "lose":
                self._lose(host)
            case "ok":
                self._failing.pop(host, None)
                self._told.pop(name, None)
                for device in self._devices(host):
                    device.slow(0)
                    device.set_full(False)
                    device.fail_next("")

    def _devices(self, host: str) -> list[Device]:
        devices: list[Device] = [self.world.disks[f"aam@{host}"].device]
        if self._stream is not None:
            devices.append(self._stream.applications[host].store.device)
        return devices

    def _lose(self, host: str) -> None:
        process = self.world.hosts[host].aam
        assert process is not None
        was_alive = process.alive
        process.end()
        self.world.disks[process.name].lose()
        if was_alive:
            self.world.sim.after(REPLACE_NS, process.start)
        if self._stream is not None:
            self._stream.applications[host].lose_store()

    # -- as the observer of the AAMs --

    def process_up(self, process: SimProcess) -> None:
        host = host_of(NodeId(process.name))
        if self._failing.get(host):
            for device in self._devices(host):
                device.fail_next()

    def process_down(self, process: SimProcess, *, silent: bool) -> None:
        if process.failed and not self._told.get(process.name):
            self._told[process.name] = True
            self.world.record.note(host_of(NodeId(process.name)), f"its aam ends, and begins anew: {process.failed}")
