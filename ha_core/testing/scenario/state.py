"""How the cluster stands at this moment, in the words of scenario files."""

from __future__ import annotations

from collections.abc import Sequence

from ha_core.ids import HostName, NodeId, VmName
from ha_core.machines.failover.records import HostState, Priority, Rule, Wanted
from ha_core.testing.scenario.result import HostResult, MessagesResult, VmResult
from ha_core.testing.scenario.stream import Stream
from ha_core.testing.scenario.world import ScenarioWorld


class State:
    def __init__(self, world: ScenarioWorld, stream: Stream | None) -> None:
        self.world = world
        self.until_s = world.scenario.until_s
        self._stream = stream

    def vm_state(self, name: str) -> str:
        """started, stopped, failed or ignored; or waiting: it should run and does not (yet)."""
        truth = self.world.checker.truth
        vm, run = truth.vms.get(VmName(name)), truth.runs.get(VmName(name))
        executes = bool(self.world.checker.executing.get(VmName(name)))
        if vm is None:
            return "unmanaged" if executes else "unknown"
        if vm.wanted is Wanted.IGNORED:
            return "ignored"
        if run is not None and run.failed:
            return "failed"
        if executes:
            return "started"
        idle = vm.wanted is Wanted.STOPPED or (vm.priority is Priority.DISABLED and run is not None)
        return "stopped" if idle else "waiting"

    def host_state(self, name: str) -> str:
        """online, maintenance, shutdown, freeze; absent: it holds no lease; unknown: it is not registered."""
        truth = self.world.checker.truth
        host = truth.hosts.get(HostName(name))
        if host is None:
            return "unknown"
        if host.state is HostState.ONLINE and not truth.lease(HostName(name)):
            return "absent"
        return host.state.value

    def leader(self) -> str | None:
        """The active primary, of the latest term if an old one has not noticed yet."""
        leading = [(self.world.aam_of(host), name) for name, host in self.world.hosts.items() if self.world.leads(host)]
        terms = [(aam.database.term, name) for aam, name in leading if aam is not None]
        return max(terms)[1] if terms else None

    def role(self, name: str) -> str:
        if name == self.leader():
            return "active primary"
        members = self.world.members
        if members is None or NodeId(f"aam@{name}") not in members.members:
            return "none"
        return "primary" if members.is_voter(NodeId(f"aam@{name}")) else "secondary"

    def opening(self) -> Sequence[str]:
        """How it stands at t = 0, in lines."""
        lines = [f"{self.leader() or 'nobody'} leads"]
        for host in self.world.scenario.hosts:
            running = [vm.name for vm in self.world.scenario.vms if self.world.record.host_at(vm.name, 0) == host.name]
            power = "on" if self.world.hosts[host.name].host.powered else "off"
            lines.append(f"{host.name} ({self.role(host.name)}, {power}): {', '.join(running) or 'no VMs'}")
        return lines

    def overlaps(self) -> int:
        return sum(violation.invariant == "I42" for violation in self.world.sim.violations)

    def rules(self) -> Sequence[Rule]:
        return [rule for _, rule in sorted(self.world.checker.truth.rules.items())]

    def messages(self) -> MessagesResult:
        return self._stream.result() if self._stream is not None else MessagesResult()

    def vms(self) -> dict[str, VmResult]:
        record, now_ns = self.world.record, self.world.record.now_ns()
        return {
            vm.name: VmResult(record.host_at(vm.name, now_ns), self.vm_state(vm.name), record.of(vm.name))
            for vm in self.world.scenario.vms
        }

    def hosts(self) -> dict[str, HostResult]:
        fenced = self.world.record.fenced
        return {
            host.name: HostResult(
                self.host_state(host.name), self.role(host.name), [at_ns for at_ns, name in fenced if name == host.name]
            )
            for host in self.world.scenario.hosts
        }
