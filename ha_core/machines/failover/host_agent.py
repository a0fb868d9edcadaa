"""From committed assignments of one host to driver calls, and from the guard's reports back to the log.

Rules:

* L7: a VM is started because of a committed Assign and of nothing else, under the lease that the Assign names, and only if that
  is the lease of this host in the same view. (The guard checks it against its own lease and fencing tokens once more.)
* Level-triggered: what is to be done follows from the records and the guard's list alone. After a restart both come anew, and
  nothing that happened meanwhile is lost or done twice (H3, H25).
* A run is Released only on the guard's word ``stopped`` or ``failed`` for that very token: reaped, and never to be started.
* A run is STARTING once the VM itself executes, and RUNNING once it has done so for its VM's ``start_ns``; one that ends
  earlier has failed to start.

The parent must answer each Propose with one ProposalDone, also when it was lost.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Final

import attrs

from ha_core.ids import FencingToken, HostName, LeaseToken, VmName
from ha_core.machines.contract import Effect, Event
from ha_core.machines.failover.commands import Command, Released, ReportVm
from ha_core.machines.failover.inventory import Inventory
from ha_core.machines.failover.records import Run, RunState, Vm

RETRY_NS: Final = 100_000_000
REPEAT_NS: Final = 1_000_000_000
LATER: Final = ("not-reaped", "no-lease", "other-lease", "ending", "lost")
"""Refusals of a start that may be gone a moment later."""
BEHIND: Final = "stale-token"
"""The guard knows a newer run than we do: our view lags."""


# -- told --


@attrs.frozen
class RecordsSeen(Event):
    """As ``RecordsChanged`` of machines/aam.py."""

    index: int
    changes: Sequence[tuple[bytes, bytes | None]]
    restored: bool = False


@attrs.frozen
class GuardReport:
    """A run as the host's guard sees it: starting, running, stopping, stopped, failed; ``event`` orders its reports."""

    vm: VmName
    token: FencingToken
    state: str
    event: int
    instance: bytes
    exit_code: int | None = None
    text: str = ""

    @property
    def over(self) -> bool:
        return self.state in ("stopped", "failed")


@attrs.frozen
class GuardReports(Event):
    """``complete``: all runs that the guard knows (after connecting to it); else changes."""

    reports: Sequence[GuardReport]
    complete: bool = False


@attrs.frozen
class GuardLost(Event):
    """The connection to the guard is gone; a complete list follows when it is back."""


@attrs.frozen
class StartRefused(Event):
    """``code``: one of the guard's errors, ``lost`` for a broken connection, else the driver cannot start it at all."""

    vm: VmName
    token: FencingToken
    code: str
    text: str


@attrs.frozen
class ProposalDone(Event):
    """``done``: applied, now or before; else refused, or its fate is open."""

    number: int
    done: bool


# -- asked for --


@attrs.frozen
class StartVm(Effect):
    vm: Vm
    lease: LeaseToken
    token: FencingToken
    shutdown_ns: int
    """As assigned: the host's deadline for this VM rests on it."""


@attrs.frozen
class StopVm(Effect):
    """End the run, or promise that it never begins."""

    vm: VmName
    driver: str
    token: FencingToken
    grace_ns: int


@attrs.frozen
class Propose(Effect):
    number: int
    command: Command


@attrs.define
class _Asked:
    """The last driver call for a VM, so that it is not repeated with every event."""

    call: Hashable
    again_ns: int


class HostAgent:
    """A machine by the contract; it persists nothing."""

    def __init__(self, host: HostName) -> None:
        self.inventory = Inventory()
        self._host = host
        self._reports: dict[VmName, GuardReport] = {}
        self._complete = False
        self._seen_running: dict[VmName, tuple[FencingToken, int]] = {}
        self._errors: dict[VmName, tuple[FencingToken, str]] = {}
        self._asked: dict[VmName, _Asked] = {}
        self._proposed: dict[Hashable, int | None] = {}
        """What was proposed, and when it may be again; None: it is under way."""
        self._proposals: dict[int, Hashable] = {}
        self._last_proposal = 0
        self._timer_ns: int | None = None
        self._effects: list[Effect] = []

    # -- the contract --

    def receive(self, events: Sequence[Event], now_ns: int) -> None:
        for event in events:
            match event:
                case RecordsSeen(index, changes, restored):
                    self._records(index, changes, restored, now_ns)
                case GuardReports(reports, complete):
                    self._guard_reports(reports, complete, now_ns)
                case GuardLost():
                    self._complete = False
                    self._asked.clear()
                case StartRefused():
                    self._refused(event, now_ns)
                case ProposalDone(number, done):
                    self._decided(number, done, now_ns)
        self._act(now_ns)

    def handle_timer(self, now_ns: int) -> None:
        self._act(now_ns)

    def next_timer(self) -> int | None:
        return self._timer_ns

    def take_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    def persisted(self, number: int, now_ns: int) -> None:
        raise NotImplementedError("the host agent persists nothing")

    def persist_failed(self, number: int, error: str, now_ns: int) -> None:
        raise NotImplementedError("the host agent persists nothing")

    # -- what it learns --

    def _records(self, index: int, changes: Sequence[tuple[bytes, bytes | None]], restored: bool, now_ns: int) -> None:
        if restored:
            self.inventory.restore(index, [(key, value) for key, value in changes if value is not None], now_ns)
        else:
            self.inventory.apply(index, changes, now_ns)

    def _guard_reports(self, reports: Sequence[GuardReport], complete: bool, now_ns: int) -> None:
        if complete:
            self._reports = {}
            self._complete = True
        for report in reports:
            known = self._reports.get(report.vm)
            if known is not None and (report.token, report.event) < (known.token, known.event):
                continue
            self._reports[report.vm] = report
            if report.state != "running":
                self._seen_running.pop(report.vm, None)
            elif self._seen_running.get(report.vm, (0, 0))[0] != report.token:
                self._seen_running[report.vm] = (report.token, now_ns)

    def _refused(self, refused: StartRefused, now_ns: int) -> None:
        again_ns = now_ns + (RETRY_NS if refused.code in LATER else REPEAT_NS)
        if refused.code not in LATER and refused.code != BEHIND:
            self._errors[refused.vm] = (refused.token, refused.text)
            again_ns = now_ns
        if refused.vm in self._asked:
            self._asked[refused.vm].again_ns = again_ns

    def _decided(self, number: int, done: bool, now_ns: int) -> None:
        key = self._proposals.pop(number)
        # Done: the record is about to show it. Refused or lost: the view lags, or there is no leader just now.
        self._proposed[key] = now_ns + (REPEAT_NS if done else RETRY_NS)

    # -- what it does --

    def _act(self, now_ns: int) -> None:
        self._timer_ns = None
        for key in [key for key, again_ns in self._proposed.items() if again_ns is not None and again_ns <= now_ns]:
            del self._proposed[key]
        for _, run in sorted(self.inventory.runs.items()):
            if run.host == self._host:
                self._act_on_run(run, now_ns)
        if self._complete:
            for name, report in sorted(self._reports.items()):
                self._end_what_moved_on(name, report, now_ns)

    def _act_on_run(self, run: Run, now_ns: int) -> None:
        report = self._reports.get(run.vm)
        if report is not None and report.token > run.token:
            return  # our view lags
        if report is None or report.token < run.token:
            if run.held and self._complete:
                self._begin_or_decline(run, now_ns)
        elif report.over:
            if run.state is not RunState.RELEASED:
                error = self._error(run)
                failed = report.state == "failed" or bool(error)
                self._propose(
                    run,
                    Released(
                        run.vm, run.token, report.instance, report.event, failed, report.exit_code, error or report.text
                    ),
                    now_ns,
                )  # fmt: skip
        elif run.held:
            self._follow(run, report, now_ns)

    def _begin_or_decline(self, run: Run, now_ns: int) -> None:
        """The guard does not know the run (yet)."""
        vm = self.inventory.vms.get(run.vm)
        if run.state is RunState.ASSIGNED and not run.recalled and vm is not None and not self._error(run):
            if run.lease == self.inventory.lease(self._host):
                self._call(run.vm, StartVm(vm, run.lease, run.token, run.shutdown_ns), now_ns)
            return
        # A guard that cannot see what an earlier one left counts this time, before it says that nothing is there.
        self._stop(run.vm, run.token, run.shutdown_ns, now_ns)

    def _follow(self, run: Run, report: GuardReport, now_ns: int) -> None:
        if run.recalled and report.state != "stopping":
            self._stop(run.vm, run.token, self._grace(run), now_ns)
        state = self._news(run, report, now_ns)
        if state is not None:
            self._propose(run, ReportVm(run.vm, run.token, report.instance, report.event, state, report.text), now_ns)

    def _news(self, run: Run, report: GuardReport, now_ns: int) -> RunState | None:
        """The state that the record does not show yet."""
        if report.state == "stopping":
            return RunState.STOPPING if run.state is not RunState.STOPPING else None
        # Seen stopping with its lease, and then held again by a new guard under a lease that goes on: it runs as before.
        resumed = run.state is RunState.STOPPING and not run.recalled and report.event > run.event
        if run.state not in (RunState.ASSIGNED, RunState.STARTING) and not resumed:
            return None
        token, since_ns = self._seen_running.get(run.vm, (FencingToken(0), 0))
        if token != run.token:
            return None  # its shim is being made; starts of lower priority wait for the VM itself (I48)
        vm = self.inventory.vms.get(run.vm)
        up_ns = since_ns + (vm.start_ns if vm is not None else 0)
        if now_ns >= up_ns:
            return RunState.RUNNING
        self._wake(up_ns)
        return RunState.STARTING if run.state is RunState.ASSIGNED else None

    def _grace(self, run: Run) -> int:
        vm = self.inventory.vms.get(run.vm)
        stop_ns = vm.stop_ns if vm is not None and vm.stop_ns >= 0 else run.shutdown_ns
        return run.grace_ns if run.grace_ns >= 0 else stop_ns

    def _end_what_moved_on(self, name: VmName, report: GuardReport, now_ns: int) -> None:
        """A run that the records have left behind: it must not go on here."""
        run = self.inventory.runs.get(name)
        if not report.over and run is not None and run.token > report.token:
            self._stop(name, report.token, 0, now_ns)

    def _error(self, run: Run) -> str:
        token, text = self._errors.get(run.vm, (FencingToken(0), ""))
        return text if token == run.token else ""

    def _stop(self, vm: VmName, token: FencingToken, grace_ns: int, now_ns: int) -> None:
        known = self.inventory.vms.get(vm)
        self._call(vm, StopVm(vm, known.driver if known is not None else "process", token, grace_ns), now_ns)

    def _call(self, vm: VmName, call: StartVm | StopVm, now_ns: int) -> None:
        asked = self._asked.get(vm)
        key = (type(call).__name__, call.token)
        if asked is not None and asked.call == key and now_ns < asked.again_ns:
            self._wake(asked.again_ns)
            return
        self._asked[vm] = _Asked(key, now_ns + REPEAT_NS)
        self._wake(now_ns + REPEAT_NS)
        self._effects.append(call)

    def _propose(self, run: Run, command: Released | ReportVm, now_ns: int) -> None:
        key = (command.name, command.vm, command.token, command.event, getattr(command, "state", None))
        if key in self._proposed:
            self._wake(self._proposed[key] or now_ns + REPEAT_NS)
            return
        self._last_proposal += 1
        self._proposed[key] = None
        self._proposals[self._last_proposal] = key
        self._effects.append(Propose(self._last_proposal, command))

    def _wake(self, when_ns: int) -> None:
        self._timer_ns = when_ns if self._timer_ns is None else min(self._timer_ns, when_ns)
