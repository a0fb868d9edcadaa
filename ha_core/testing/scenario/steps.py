"""What each step of a scenario does to the cluster."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

import attrs

from ha_core.config import ns
from ha_core.guard import events as guard_events
from ha_core.ids import HostName, VmName
from ha_core.machines.failover import commands as c
from ha_core.machines.failover.records import HostState, Mode, Wanted
from ha_core.testing.campaigns.cluster_hosts import ToGuard
from ha_core.testing.scenario.agents import Agents
from ha_core.testing.scenario.disks import Disks
from ha_core.testing.scenario.model import Step
from ha_core.testing.scenario.record import HARMFUL, MENDING
from ha_core.testing.scenario.world import ScenarioWorld, vm_of
from ha_core.testing.simulator import MILLISECOND, SECOND

LEAVE_NS: Final = 10 * SECOND
"""How long a host that goes down waits for its VMs to leave, beside the longest of their shutdowns."""
FORGET_NS: Final = 30 * SECOND
"""How long a removed host's agents stay for the members to let it go."""
LOOK_NS: Final = 100 * MILLISECOND


class Steps:
    def __init__(self, world: ScenarioWorld, disks: Disks) -> None:
        self.world = world
        self.sim = world.sim
        self.record = world.record
        self.disks = disks
        self.agents = {name: Agents(world.sim, host, world.record) for name, host in world.hosts.items()}
        for name in world.later:
            self.agents[name].absent = True

    def play(self, step: Step) -> None:
        words = step.words
        self.record.note(f"step {step.number}", step.text)
        if words[0] in HARMFUL and words[-1] not in MENDING:
            for word in words[1:]:
                if word in self.world.hosts:
                    self.record.harmed(word, step.text)
        match words[0]:
            case "network" | "path" | "link" | "isolation-address":
                self._wires(words)
            case "power" | "shutdown" | "reboot" | "freeze" | "agent" | "clock" | "host" | "maintenance":
                self._host(words)
            case "disk":
                self.disks.change(words[1], words[2], float(words[3]) if len(words) > 3 else 0.0)
            case "vm" | "crash-vm":
                self._vm(words)
            case _:
                self._cluster(words)

    # -- wires --

    def _wires(self, words: Sequence[str]) -> None:
        wires = self.world.wires
        match words:
            case ["network", host, ("on" | "off") as state]:
                wires.all_paths(host, state == "on")
            case ["network", host, "clear"]:
                wires.clear(host)
            case ["network", host, kind, amount]:
                wires.worsen(host, kind, float(amount))
            case ["path", host, number, ("on" | "off") as state]:
                wires.path(host, int(number), state == "on")
            case ["path", host, number, way, "off"]:
                wires.path(host, int(number), False, inward=way == "in", outward=way == "out")
            case ["link", one, "->", other, state]:
                wires.link(one, other, state == "on")
            case ["link", one, other, state]:
                wires.link(one, other, state == "on")
                wires.link(other, one, state == "on")
            case ["isolation-address", host, state]:
                self.world.pingable[host] = state == "on"

    # -- hosts --

    def _host(self, words: Sequence[str]) -> None:
        host, agents = self.world.hosts[words[1]], self.agents[words[1]]
        match words:
            case ["power", _, "off"]:
                self._power_off(words[1])
            case ["power", _, "on"]:
                self._power_on(words[1])
            case ["freeze", _, seconds]:
                agents.freeze(ns(float(seconds)))
            case ["agent", _, which, "kill"]:
                agents.kill(which)
            case ["agent", _, which, "stop"]:
                agents.stop(which)
            case ["agent", _, which, "continue"]:
                agents.go_on(which)
            case ["clock", _, "jump", _]:
                self.record.note(host.name, "its wall clock jumps; no decision reads it")
            case ["clock", _, "rate", rate]:
                host.host.clock.set_rate(round((float(rate) - 1.0) * 1e6))
                host.hypervisor.rearm()
            case ["maintenance", _, state]:
                wanted = HostState.MAINTENANCE if state == "on" else HostState.ONLINE
                self.world.give(host.name, c.SetHostState(host.name, wanted))
            case ["shutdown", _]:
                self._go_down(words[1], reboot=False)
            case ["reboot", _]:
                self._go_down(words[1], reboot=True)
            case ["host", _, "add"]:
                self.world.give(host.name, c.RegisterHost.of(self.world.record_of(host)), done=lambda: self._join(words[1]))
            case ["host", _, "remove"]:
                self.world.give(host.name, c.RemoveHost(host.name), done=lambda: self._leave(words[1], self.sim.now_ns))

    def _power_off(self, name: str) -> None:
        if self.world.hosts[name].host.powered:
            self.agents[name].forget()
            self.world.hosts[name].power_off()

    def _power_on(self, name: str) -> None:
        host = self.world.hosts[name]
        if host.host.powered:
            return
        host.power_on()
        if self.agents[name].absent:
            self.sim.after(host.plan.boot_ns, self._stay_silent, name)

    def _stay_silent(self, name: str) -> None:
        """A host that is not of the cluster runs nothing of it."""
        for process in self.world.hosts[name].agents:
            process.end()

    def _join(self, name: str) -> None:
        self.agents[name].absent = False
        if self.world.hosts[name].booted:
            self.world.hosts[name].start()

    def _leave(self, name: str, since_ns: int) -> None:
        """It was removed: its agents end once the members have let it go."""
        leader = next((host for host in self.world.hosts.values() if self.world.leads(host)), None)
        aam = self.world.aam_of(leader) if leader is not None else None
        members = aam.database.configuration if aam is not None else None
        gone = members is not None and f"aam@{name}" not in members.members
        if gone or self.sim.now_ns - since_ns > FORGET_NS:
            self.agents[name].absent = True
            self._stay_silent(name)
        else:
            self.sim.after(LOOK_NS, self._leave, name, since_ns)

    # -- orderly ends --

    def _go_down(self, name: str, *, reboot: bool) -> None:
        policy = self.world.scenario.shutdown
        freezes = policy == "freeze" or (policy == "conditional" and reboot)
        state = HostState.FREEZE if freezes else HostState.SHUTDOWN
        host = self.world.hosts[name]
        if not host.booted:
            self.record.note(host.name, "is not up: there is nothing to shut down")
            return
        self.world.give(host.name, c.SetHostState(host.name, state))
        longest_ns = max([ns(vm.shutdown_s) for vm in self.world.scenario.vms], default=0)
        self._await_departure(name, self.sim.now_ns + longest_ns + LEAVE_NS, host.host.boots, reboot)

    def _await_departure(self, name: str, until_ns: int, boots: int, reboot: bool) -> None:
        """Until none of its VMs is left, or it has waited long enough: then its guard ends them."""
        host = self.world.hosts[name]
        if not host.host.powered or host.host.boots != boots:
            return
        truth = self.world.checker.truth
        going = (
            truth.hosts[HostName(name)].state in (HostState.SHUTDOWN, HostState.FREEZE)
            if HostName(name) in truth.hosts
            else True
        )
        busy = any(not shim.state.reaped for shim in host.hypervisor.shims.values())
        held = any(run.held and run.host == name for run in truth.runs.values())
        if (not going or busy or held) and self.sim.now_ns < until_ns:
            self.sim.after(LOOK_NS, self._await_departure, name, until_ns, boots, reboot)
            return
        host.hypervisor.shutting_down = True
        host.on_ended = partial(self._end_host, name, boots, reboot)
        if host.guard.alive:
            host.guard.post(ToGuard(guard_events.EndAsked(stop_vms=True)))
        else:
            self._end_host(name, boots, reboot)

    def _end_host(self, name: str, boots: int, reboot: bool) -> None:
        """Once its agents have done what they were doing."""
        self.sim.after(LOOK_NS, self._stop_host, name, boots, reboot)

    def _stop_host(self, name: str, boots: int, reboot: bool) -> None:
        host = self.world.hosts[name]
        if host.host.powered and host.host.boots == boots:
            self.record.note(host.name, "is down" + (", and boots again" if reboot else ""))
            for process in host.agents:
                process.end()
            self._power_off(name)
            if reboot:
                self._power_on(name)

    # -- VMs --

    def _vm(self, words: Sequence[str]) -> None:
        vm, give = VmName(words[1]), self.world.give
        match words[2:]:
            case []:
                if not any(host.hypervisor.crash(vm) for host in self.world.hosts.values()):
                    self.record.note(vm, "does not run: there is nothing to crash")
            case ["start"]:
                give(vm, c.WantVm(vm, Wanted.STARTED))
            case ["stop"]:
                give(vm, c.WantVm(vm, Wanted.STOPPED))
            case ["stop", "after", seconds]:
                give(vm, c.WantVm(vm, Wanted.STOPPED, ns(float(seconds))))
            case ["ignore"]:
                give(vm, c.WantVm(vm, Wanted.IGNORED))
            case ["add"]:
                give(vm, c.DefineVm.of(vm_of(self.world.fates[vm].spec)))
            case ["remove"]:
                give(vm, c.RemoveVm(vm))
            case ["relocate", host]:
                give(vm, c.MoveVm(vm, HostName(host)))

    # -- the whole cluster --

    def _cluster(self, words: Sequence[str]) -> None:
        world = self.world
        match words:
            case ["disarm", _]:
                world.give("cluster", c.SetSettings.of(attrs.evolve(world.settings, mode=Mode.DISARMED)), again=True)
            case ["arm"]:
                world.give("cluster", c.SetSettings.of(attrs.evolve(world.settings, mode=Mode.ARMED)))
            case ["center", state]:
                world.center_on = state == "on"
            case _:
                raise AssertionError(f"{' '.join(words)}: a step that playable.py lets pass has no meaning here")
