"""What the cluster campaign knows better than any of its hosts: the log as it was applied first, and which VM really runs where.

Checks, at the moment at which each could break:

I42 a VM begins nowhere while it runs elsewhere        I43 what a revoked lease held has ended
I44 tokens only grow                                   I45 a VM ends only at its deadline or because the log says so
I46 in the liveness phase everything runs              I47 a VM begins only because of a committed Assign
I48 priority and dependency order                      I49 tries follow the schedule
I50 "done" is heard only after the commit
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from zlib import crc32

import attrs

from ha_core.ids import FencingToken, HostName, LeaseToken, LogIndex, VmName
from ha_core.machines.failover import commands
from ha_core.machines.failover.commands import Outcome
from ha_core.machines.failover.inventory import Inventory
from ha_core.machines.failover.planner import effective_priorities
from ha_core.machines.failover.procedures import PROCEDURES
from ha_core.machines.failover.records import Priority, Run, RunState, Wanted
from ha_core.machines.keyvalue.model import Plain
from ha_core.machines.keyvalue.transaction import KvTransaction, Procedure
from ha_core.testing.simulator import SECOND, Simulation

PLANS_NS = 1_500_000_000
"""A VM that became free so short a time ago may not be part of the plan that is being applied."""


def hash_of(name: str, args: Sequence[Plain]) -> int:
    return crc32(repr((name, args)).encode())


@attrs.define
class Execution:
    """A VM that really executes."""

    vm: VmName
    host: HostName
    token: FencingToken
    lease: LeaseToken
    since_ns: int


class ClusterChecker:
    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.truth = Inventory()
        self.executing: dict[VmName, list[Execution]] = {}
        self.assigns = 0
        self._assigned: dict[FencingToken, tuple[VmName, HostName]] = {}
        self._entries: dict[int, int] = {}
        self._began: dict[VmName, FencingToken] = {}
        self._up: dict[FencingToken, int] = {}
        """Runs that executed for their VM's ``start_ns``, as the log was told: token -> when."""
        self._failures: dict[VmName, list[int]] = {}
        """When the failing tries of the present series were assigned."""
        self._crashed: dict[VmName, bool] = {}
        self._lease_tokens: dict[HostName, int] = {}

    # -- the log --

    def procedures(self) -> Mapping[str, Procedure]:
        """The procedures, observed: whoever applies an index first shows it to us."""
        return {name: self._observed(name, procedure) for name, procedure in PROCEDURES.items()}

    def _observed(self, name: str, procedure: Procedure) -> Procedure:
        def run(tx: KvTransaction, index: LogIndex, args: Sequence[Plain]) -> Plain:
            first = index > self.truth.applied_index
            value = procedure(tx, index, args)
            entry = hash_of(name, args)
            if self._entries.setdefault(index, entry) != entry:
                self.sim.violate("I47", f"entry {index} was acted on before it was committed: it is now another {name}")
            if first:
                self._see(name, index, args, Outcome.decode(value), tx)
            return value

        return run

    def _see(self, name: str, index: int, args: Sequence[Plain], outcome: Outcome, tx: KvTransaction) -> None:
        before = dict(self.truth.runs)
        if outcome.done:
            self._before(name, args)
        changes = [(key, None if write is None else write[0]) for key, write in tx.writes.items()]
        self.truth.apply(index, changes, self.sim.now_ns)
        self.sim.trace("log", index, name, int(outcome.done), outcome.reason)
        if outcome.done:
            self._after(name, index, args, before)
        self.applied(name, outcome, before)

    def applied(self, name: str, outcome: Outcome, before: Mapping[VmName, Run]) -> None:
        """Hook: the truth is now that after one more command; ``before`` are the runs before it."""

    def _before(self, name: str, args: Sequence[Plain]) -> None:
        match name:
            case commands.Revoke.name:
                self._revoked(commands.Revoke.decode(args))
            case commands.Confirm.name:
                self._rebooted(commands.Confirm.decode(args))
            case commands.Assign.name:
                self._check_order(commands.Assign.decode(args))

    def _after(self, name: str, index: int, args: Sequence[Plain], before: Mapping[VmName, Run]) -> None:
        for host, lease in self.truth.leases.items():
            known = self._lease_tokens.get(host, 0)
            self.sim.checked("I44")
            if lease.token < known:
                self.sim.violate("I44", f"the lease of {host} went back from {known} to {lease.token}")
            self._lease_tokens[host] = lease.token
        match name:
            case commands.Assign.name:
                self._see_assign(commands.Assign.decode(args), index, before)
            case commands.Released.name:
                self._see_released(commands.Released.decode(args), before)
            case commands.ReportVm.name:
                report = commands.ReportVm.decode(args)
                if report.state in (RunState.STARTING, RunState.RUNNING):
                    self._see_starting(report)
                if report.state is RunState.RUNNING:
                    self._see_up(report)
            case commands.Settle.name:
                self._forget_tries(commands.Settle.decode(args).vm)
            case commands.WantVm.name:
                want = commands.WantVm.decode(args)
                if want.wanted is Wanted.STARTED:
                    self._forget_tries(want.vm)
            case commands.MoveVm.name:
                for run in self.truth.runs.values():
                    if run.target and not run.attempts:
                        self._forget_tries(run.vm)

    def _forget_tries(self, vm: VmName) -> None:
        self._failures.pop(vm, None)
        self._crashed.pop(vm, None)

    # -- leases --

    def _revoked(self, command: commands.Revoke) -> None:
        """At the instant of the Revoke nothing that the lease held still executes (orderly shutdowns apart)."""
        self.sim.checked("I43")
        for execution in self._on(command.host, command.token):
            run = self.truth.runs.get(execution.vm)
            shutdown_ns = run.shutdown_ns if run is not None else 0
            if run is not None and run.token == execution.token and (run.outlives or shutdown_ns):
                continue
            self.sim.violate("I43", f"{execution.vm} still runs on {command.host} when lease {command.token} is revoked")

    def _rebooted(self, command: commands.Confirm) -> None:
        lease = self.truth.leases.get(command.host)
        if lease is None or lease.candidate != command.token or lease.candidate_boot == lease.boot:
            return
        self.sim.checked("I43")
        for execution in self._on(command.host, lease.token):
            self.sim.violate("I43", f"{execution.vm} runs on {command.host}, whose other kernel boot was taken as proof")

    def _on(self, host: HostName, lease: LeaseToken) -> list[Execution]:
        found = [one for some in self.executing.values() for one in some if one.host == host]
        return [one for one in found if one.lease == lease]

    # -- runs --

    def _check_order(self, command: commands.Assign) -> None:
        vm = self.truth.vms[command.vm]
        for name in vm.after:
            other = VmName(name)
            run = self.truth.runs.get(other)
            if other in self.truth.vms and self.truth.vms[other].wanted is not Wanted.IGNORED:
                self.sim.checked("I48")
                if run is None or run.token not in self._up:
                    self.sim.violate("I48", f"{vm.name} is started before {other} is up")
        priorities = effective_priorities(self.truth.vms)
        for other, priority in sorted(priorities.items()):
            if priority < priorities[vm.name] and self._should_go_first(other, command.host):
                self.sim.violate("I48", f"{vm.name} is started before {other}, which has a higher priority")

    def _should_go_first(self, name: VmName, host: HostName) -> bool:
        """Whether it waits for nothing, and could have been placed on ``host`` instead."""
        vm, run = self.truth.vms[name], self.truth.runs.get(name)
        if vm.wanted is not Wanted.STARTED or vm.priority is Priority.DISABLED or run is None or run.state is not RunState.LOST:
            return False
        self.sim.checked("I48")
        waited_ns = self.sim.now_ns - self.truth.since_ns(name, self.sim.now_ns)
        ruled = any(name in rule.vms for rule in self.truth.rules.values())
        ready = all(other not in self.truth.vms or self._is_up(VmName(other)) for other in vm.after)
        simple = not run.shutdown_ns and not run.attempts and not run.failed and not ruled
        room = self.truth.hosts[host].memory_mib - sum(
            self.truth.vms[one.vm].memory_mib
            for one in self.truth.runs.values()
            if not one.free and one.host == host and one.vm in self.truth.vms
        )
        return simple and ready and waited_ns > PLANS_NS and room >= vm.memory_mib

    def _is_up(self, name: VmName) -> bool:
        run = self.truth.runs.get(name)
        return run is not None and run.up

    def _see_assign(self, command: commands.Assign, index: int, before: Mapping[VmName, Run]) -> None:
        self.assigns += 1
        token = FencingToken(index)
        self._assigned[token] = (command.vm, command.host)
        old = before.get(command.vm)
        self.sim.checked("I44")
        if old is not None and old.token >= token:
            self.sim.violate("I44", f"the fencing token of {command.vm} went back from {old.token} to {token}")
        self._check_schedule(command.vm)

    def _check_schedule(self, vm: VmName) -> None:
        failures = self._failures.get(vm)
        if not failures:
            return
        self.sim.checked("I49")
        definition, retries = self.truth.vms[vm], self.truth.settings.retries_ns
        tries = min(1 + definition.max_restart + definition.max_relocate, len(retries))
        if len(failures) >= tries:
            self.sim.violate("I49", f"{vm} is tried again after {len(failures)} failed tries")
            return
        gap_ns = (retries[len(failures)] - retries[len(failures) - 1]) * 98 // 100
        waited_ns = self.sim.now_ns - failures[-1]
        if waited_ns < gap_ns:
            text = f"{vm} is tried again after {waited_ns / SECOND:.3f} s instead of {gap_ns / SECOND:.3f} s"
            self.sim.violate("I49", text)

    def _see_released(self, command: commands.Released, before: Mapping[VmName, Run]) -> None:
        run = before.get(command.vm)
        if run is None or run.token != command.token or not run.held or run.recalled or command.vm not in self.truth.vms:
            return
        if run.state is RunState.STOPPING:
            return  # ended by its guard, with the lease
        if run.state is RunState.RUNNING and not command.failed and not self._crashed.get(command.vm):
            self._crashed[command.vm] = True
            return
        assigned_ns = self.truth.assigned_ns(command.vm, self.sim.now_ns)
        self._failures.setdefault(command.vm, []).append(assigned_ns)

    def _see_starting(self, report: commands.ReportVm) -> None:
        """Starts of lower priority follow upon this report: the VM must have begun to execute by then."""
        self.sim.checked("I48")
        if self._began.get(report.vm, FencingToken(0)) < report.token:
            self.sim.violate("I48", f"{report.vm} is reported {report.state.value} before it began to execute")

    def _see_up(self, report: commands.ReportVm) -> None:
        self._up[report.token] = self.sim.now_ns
        self.sim.checked("I48")
        for one in self.executing.get(report.vm, ()):
            start_ns = self.truth.vms[report.vm].start_ns if report.vm in self.truth.vms else 0
            if one.token == report.token and self.sim.now_ns - one.since_ns < start_ns * 98 // 100:
                self.sim.violate("I48", f"{report.vm} is reported up too early")

    # -- the world --

    def begin(self, execution: Execution) -> None:
        """A VM begins to execute."""
        vm, token = execution.vm, execution.token
        self.sim.trace("vm begins", vm, execution.host, token)
        self.sim.checked("I42")
        for other in self.executing.get(vm, ()):
            self.sim.violate(
                "I42", f"{vm} begins on {execution.host} (token {token}) while it runs on {other.host} (token {other.token})"
            )
        self.sim.checked("I47")
        if self._assigned.get(token) != (vm, execution.host):
            self.sim.violate("I47", f"{vm} begins on {execution.host} under {token}, which no committed Assign gave it")
        self.sim.checked("I44")
        if token <= self._began.get(vm, FencingToken(0)):
            self.sim.violate("I44", f"{vm} begins under {token} after {self._began[vm]}")
        self._began[vm] = token
        self.executing.setdefault(vm, []).append(execution)

    def end(self, vm: VmName, host: HostName, token: FencingToken, why: str) -> None:
        """A VM provably no longer executes."""
        self.sim.trace("vm ends", vm, host, token, why)
        self.executing[vm] = [one for one in self.executing.get(vm, ()) if (one.host, one.token) != (host, token)]

    def stopped_by_guard(self, vm: VmName, host: HostName, token: FencingToken) -> None:
        """The guard ends a VM before its deadline: the log must want it."""
        self.sim.checked("I45")
        run = self.truth.runs.get(vm)
        if run is not None and run.token == token and run.held and not run.recalled and vm in self.truth.vms:
            self.sim.violate("I45", f"{vm} is stopped on {host}, though it shall run there")

    def deadline_passed(self, vm: VmName, host: HostName, token: FencingToken, renewed: bool) -> None:
        """A shim's timer fired; ``renewed``: its host's guard holds a lease that covers it."""
        self.sim.checked("I45")
        if renewed:
            self.sim.violate("I45", f"{vm} (token {token}) ended at a deadline on {host}, though the lease was renewed")

    def heard_done(self, index: int) -> None:
        self.sim.checked("I50")
        if index > self.truth.applied_index:
            self.sim.violate("I50", f"done was heard for entry {index}, applied is {self.truth.applied_index}")

    def restamped(self, host: HostName, vm: VmName, token: FencingToken, lease: LeaseToken) -> None:
        for one in self.executing.get(vm, ()):
            if (one.host, one.token) == (host, token):
                one.lease = lease

    # -- the liveness phase --

    def missing(self) -> list[str]:
        """Why the cluster is not yet as it should be: empty once it is."""
        problems: list[str] = []
        for name, vm in sorted(self.truth.vms.items()):
            run = self.truth.runs.get(name)
            running = self.executing.get(name, [])
            if vm.wanted is Wanted.STARTED and vm.priority is not Priority.DISABLED:
                if run is not None and run.failed:
                    continue
                if any(self._gave_up(VmName(other)) for other in vm.after):
                    continue
                if not running or run is None or not run.up:
                    problems.append(f"{name} does not run ({run.state.value if run else 'never assigned'})")
            elif vm.wanted is Wanted.STOPPED and running:
                problems.append(f"{name} still runs")
        return problems

    def _gave_up(self, name: VmName) -> bool:
        run, vm = self.truth.runs.get(name), self.truth.vms.get(name)
        if vm is None:
            return False
        stopped = vm.wanted is not Wanted.STARTED or vm.priority is Priority.DISABLED or (run is not None and run.failed)
        return stopped or any(self._gave_up(VmName(other)) for other in vm.after)
