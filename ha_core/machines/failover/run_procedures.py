"""Runs in the log: Assign, Recall, ReportVm, Released, Settle (rules L1, L3, L7 at the head of procedures.py)."""

from __future__ import annotations

from typing import Final

import attrs

from ha_core.errors import invariant
from ha_core.ids import FencingToken, LogIndex, VmName
from ha_core.machines.failover import commands as c
from ha_core.machines.failover.commands import Outcome
from ha_core.machines.failover.procedure_registry import DONE, decide, procedure, refuse, settings_of
from ha_core.machines.failover.records import (
    KvTransaction,
    Lease,
    Mode,
    Run,
    RunState,
    Safety,
    Settings,
    Vm,
    Wanted,
)


@procedure(c.Assign)
def assign(tx: KvTransaction, index: LogIndex, command: c.Assign) -> Outcome:
    vm = Vm.get(tx, command.vm)
    lease = Lease.get(tx, command.host)
    run = Run.get(tx, command.vm)
    if vm is None or vm.wanted is not Wanted.STARTED:
        return refuse("the VM is not to run")
    if settings_of(tx).mode is not Mode.ARMED:
        return refuse("the cluster is disarmed")
    if lease is None or not lease.holds(command.lease) or not lease.armed:
        return refuse("the host does not hold that lease")
    if (run.token if run else 0) != command.previous:
        return refuse("another run came between")
    if run is not None and not run.free:
        return refuse("the last run is neither released nor under a revoked lease")
    token = FencingToken(index)
    invariant(run is None or run.token < token, "a fencing token went back", vm=command.vm)
    outlives = vm.outlives or vm.safety is Safety.FENCE
    fresh = Run(vm.name, token, command.host, lease.token, why=command.why, shutdown_ns=vm.shutdown_ns, outlives=outlives)
    if run is not None:
        home = "" if run.home == command.host else run.home
        fresh = attrs.evolve(fresh, home=home, attempts=run.attempts, crashed=run.crashed, avoid=run.avoid)
    fresh.put(tx)
    decide(tx, index, "assigned", host=command.host, vm=vm.name, token=token, why=command.why)
    return Outcome(True, token)


def _run_of(tx: KvTransaction, vm: VmName, token: FencingToken) -> Run | None:
    run = Run.get(tx, vm)
    return run if run is not None and run.token == token else None


@procedure(c.Recall)
def recall(tx: KvTransaction, index: LogIndex, command: c.Recall) -> Outcome:
    run = _run_of(tx, command.vm, command.token)
    if run is None or not run.held:
        return refuse("no such run")
    if run.recalled:
        return DONE
    home = command.home or run.home
    attrs.evolve(run, recalled=True, target=command.target, home=home, text=command.why).put(tx)
    decide(tx, index, "recalled", host=run.host, vm=run.vm, token=run.token, why=command.why)
    return DONE


_REPORTED: Final = (RunState.ASSIGNED, RunState.STARTING, RunState.RUNNING, RunState.STOPPING)
"""In the order in which a run goes through them."""


@procedure(c.ReportVm)
def report_vm(tx: KvTransaction, index: LogIndex, command: c.ReportVm) -> Outcome:
    run = _run_of(tx, command.vm, command.token)
    if run is None or not run.held:
        return refuse("no such run")
    if command.state not in _REPORTED[1:]:
        return refuse("not a state that a guard reports")
    if (command.event, _REPORTED.index(command.state)) <= (run.event, _REPORTED.index(run.state)):
        return refuse("an older report")
    attrs.evolve(
        run, state=command.state, instance=command.instance, event=command.event, text=command.text
    ).put(tx)  # fmt: skip
    return DONE


@procedure(c.Released)
def released(tx: KvTransaction, index: LogIndex, command: c.Released) -> Outcome:
    run = _run_of(tx, command.vm, command.token)
    if run is None:
        return refuse("no such run")
    if run.state is RunState.RELEASED:
        return DONE
    if command.event < run.event:
        return refuse("an older report")
    vm = Vm.get(tx, command.vm)
    ended = attrs.evolve(
        run, state=RunState.RELEASED, instance=command.instance, event=command.event, exit_code=command.exit_code,
        text=command.text,
    )  # fmt: skip
    if vm is None:
        ended.delete(tx)
    elif run.recalled or not run.held or run.state is RunState.STOPPING:
        # Whoever stops a run that is not recalled is the guard, because of the lease: that is no fault of the VM's.
        ended.put(tx)
    else:
        ended = _count_failure(settings_of(tx), vm, ended, was_up=run.state is RunState.RUNNING and not command.failed)
        ended.put(tx)
    kind = "failed" if ended.failed else "released"
    decide(tx, index, kind, host=run.host, vm=run.vm, token=run.token, why=command.text)
    return DONE


def _count_failure(settings: Settings, vm: Vm, run: Run, was_up: bool) -> Run:
    """The run ended by itself: the first time after it was up it restarts at once, else it is a failed try (I49)."""
    if was_up and not run.crashed:
        return attrs.evolve(run, crashed=True)
    attempts = run.attempts + 1
    avoid = run.avoid if run.host in run.avoid else (*run.avoid, run.host)
    tries = min(1 + vm.max_restart + vm.max_relocate, len(settings.retries_ns))
    return attrs.evolve(run, attempts=attempts, avoid=avoid, failed=attempts >= tries)


@procedure(c.Settle)
def settle(tx: KvTransaction, index: LogIndex, command: c.Settle) -> Outcome:
    run = _run_of(tx, command.vm, command.token)
    if run is None or not run.up:
        return refuse("no such run")
    attrs.evolve(run, attempts=0, crashed=False).put(tx)
    return DONE
