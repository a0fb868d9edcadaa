"""What happened in a play: every run of every VM, every fence and failover, and the story in lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import attrs

from ha_core.ids import FencingToken, HostName, VmName
from ha_core.machines.failover import commands
from ha_core.machines.failover.commands import Outcome
from ha_core.machines.failover.records import HISTORY, Decision, HostState, Run, RunState
from ha_core.testing.campaigns.cluster_checker import ClusterChecker, Execution
from ha_core.testing.simulator import Simulation, Violation

HARMFUL: Final = ("power", "network", "path", "link", "agent", "freeze", "disk", "shutdown", "reboot")
"""Steps that may be the cause of a failover of the host that they name ..."""
MENDING: Final = ("on", "continue", "ok", "clear", "add", "remove")
"""... unless they end so."""


@attrs.define
class RunSeen:
    """One execution of a VM; ``to_ns`` is None while it goes on."""

    vm: VmName
    host: HostName
    token: FencingToken
    why: str
    from_ns: int
    to_ns: int | None = None
    ended: str = ""

    def runs_at(self, when_ns: int) -> bool:
        return self.from_ns <= when_ns and (self.to_ns is None or when_ns < self.to_ns)


@attrs.frozen
class Issued:
    """A guard was told to start a VM."""

    vm: VmName
    host: HostName
    token: FencingToken
    at_ns: int


@attrs.define
class FailoverSeen:
    host: HostName
    cause: str
    fault_ns: int
    declared_ns: int
    vms: dict[VmName, int | None] = attrs.field(factory=dict)
    """When the start of each was issued; None: not yet."""


@attrs.frozen
class Line:
    at_ns: int
    subject: str
    text: str


class Record:
    """Times are virtual nanoseconds since t = 0; what was before is not told."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.lines: list[Line] = []
        self.runs: list[RunSeen] = []
        self.issued: list[Issued] = []
        self.fenced: list[tuple[int, HostName]] = []
        self.failovers: list[FailoverSeen] = []
        self.faults: dict[str, tuple[int, str]] = {}
        """The last step that may have harmed each host."""
        self.playing = False
        self._zero_ns = 0

    def begin(self) -> None:
        """Now is t = 0."""
        self._zero_ns = self.sim.now_ns
        self.playing = True
        self.lines.clear()
        self.issued.clear()
        self.fenced.clear()
        self.failovers.clear()
        self.runs = [run for run in self.runs if run.to_ns is None]
        for run in self.runs:
            run.from_ns = 0

    def now_ns(self) -> int:
        return self.sim.now_ns - self._zero_ns

    def note(self, subject: str, text: str) -> None:
        """One line of the story."""
        if self.playing:
            self.lines.append(Line(self.now_ns(), subject, text))

    def placed(self, violation: Violation) -> Violation:
        """The same with its time counted from t = 0."""
        return attrs.evolve(violation, at=round(violation.at - self._zero_ns / 1e9, 6))

    # -- what others ask --

    def of(self, vm: str) -> Sequence[RunSeen]:
        return [run for run in self.runs if run.vm == vm]

    def host_at(self, vm: str, when_ns: int) -> HostName | None:
        """Where it executes at that instant."""
        return next((run.host for run in self.runs if run.vm == vm and run.runs_at(when_ns)), None)

    def starts(self, vm: str, since_ns: int) -> Sequence[Issued]:
        return [start for start in self.issued if start.vm == vm and start.at_ns >= since_ns]

    # -- what is seen --

    def harmed(self, host: str, step: str) -> None:
        self.faults[host] = (self.now_ns(), step)

    def start_issued(self, host: HostName, vm: VmName, token: FencingToken) -> None:
        self.issued.append(Issued(vm, host, token, self.now_ns()))
        for failover in self.failovers:
            if failover.vms.get(vm, 0) is None:
                failover.vms[vm] = self.now_ns()

    def vm_begins(self, execution: Execution, why: str) -> None:
        self.runs.append(RunSeen(execution.vm, execution.host, execution.token, why, self.now_ns()))
        self.note(execution.vm, f"runs on {execution.host} (token {execution.token})")

    def vm_ends(self, vm: VmName, host: HostName, token: FencingToken, why: str) -> None:
        for run in self.runs:
            if (run.vm, run.host, run.token) == (vm, host, token) and run.to_ns is None:
                run.to_ns, run.ended = self.now_ns(), why
        self.note(vm, f"ended on {host}: {why}")

    def lost(self, host: HostName, vms: Sequence[VmName], why: str) -> None:
        """A host's lease was revoked, or its kernel booted anew: what it held is free to start elsewhere."""
        fault_ns, step = self.faults.get(host, (self.now_ns(), why))
        self.failovers.append(FailoverSeen(host, step, fault_ns, self.now_ns(), dict.fromkeys(vms)))


class PlayChecker(ClusterChecker):
    """The checks of the cluster campaign, and the record of what they saw."""

    def __init__(self, sim: Simulation, record: Record) -> None:
        super().__init__(sim)
        self.record = record
        self._told = 0
        """The number of the last decision that was told."""

    def begin(self, execution: Execution) -> None:
        run = self.truth.runs.get(execution.vm)
        self.record.vm_begins(execution, run.why if run is not None and run.token == execution.token else "")
        super().begin(execution)

    def end(self, vm: VmName, host: HostName, token: FencingToken, why: str) -> None:
        super().end(vm, host, token, why)
        self.record.vm_ends(vm, host, token, why)

    def applied(self, name: str, outcome: Outcome, before: Mapping[VmName, Run]) -> None:
        decisions = self.truth.decisions
        while (decision := decisions.get((self._told + 1) % HISTORY)) is not None and decision.number > self._told:
            self._told = decision.number
            self._decided(decision, before)
        if name == commands.ReportVm.name and outcome.done:
            self._came_up(before)

    def _came_up(self, before: Mapping[VmName, Run]) -> None:
        awaited = {other for vm in self.truth.vms.values() for other in vm.after}
        for vm, run in self.truth.runs.items():
            was = before.get(vm)
            if run.up and was is not None and was.token == run.token and not was.up and vm in awaited:
                self.record.note(vm, f"is up on {run.host}")

    def _decided(self, decision: Decision, before: Mapping[VmName, Run]) -> None:
        host, record = HostName(decision.host), self.record
        if decision.kind in ("revoked", "rebooted"):
            lost = [
                vm
                for vm, run in sorted(self.truth.runs.items())
                if run.host == host and run.state is RunState.LOST and vm in before and before[vm].held
            ]
            known = self.truth.hosts.get(host)
            leaving = known is not None and known.state in (HostState.SHUTDOWN, HostState.FREEZE) and not lost
            if decision.kind == "revoked" and not leaving:
                record.fenced.append((record.now_ns(), host))
            if lost or (decision.kind == "revoked" and not leaving):
                record.lost(host, lost, decision.why)
            text = f"its lease is revoked: {decision.why}" if decision.kind == "revoked" else "has booted anew"
            record.note(host, text + (f"; lost: {', '.join(lost)}" if lost else ""))
        elif (text := _TEXTS.get(decision.kind, "")) and decision.kind != "granted":
            record.note(
                decision.vm or host.removeprefix("aam@") or "cluster",
                text.format(host=decision.host, why=decision.why).removesuffix(": "),
            )
        elif decision.kind == "granted" and "revoked" in decision.why:
            record.note(host, f"holds a lease again: {decision.why}")


_TEXTS: Final = {
    "leading": "leads from now on",
    "continued": "its lease goes on: {why}",
    "registered": "is registered",
    "removed": "is no longer registered",
    "online": "is open for VMs",
    "maintenance": "is in maintenance",
    "shutdown": "is to go down",
    "freeze": "is to go down and come back",
    "assigned": "shall run on {host}: {why}",
    "recalled": "shall end on {host}: {why}",
    "released": "is released by {host}: {why}",
    "failed": "failed on {host}, and every try is used up: {why}",
    "armed": "high availability is armed",
    "disarmed": "high availability is disarmed",
}
