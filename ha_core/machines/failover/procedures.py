"""The log commands at work: deterministic functions over the records, run at their log index on every replica.

Rules (the letters are those of docs/guarantees.md):

* A token is the log index of its Grant or Assign, so none ever goes back (I44).
* L1: only a changed *kernel boot* proves that VMs are gone. A Grant to another guard of the same boot retires the old token and
  re-stamps its runs in the same entry; its answer names the chain that it continues.
* L3: a run is assigned again only after it was released, or after its lease was revoked.
* L7, H21: reports are numbered by the guard; what is older than the newest one taken is dropped.
* What comes too late is refused, never done twice: every command names the token that its proposer saw.

A procedure never raises for what a command asks; it answers an Outcome with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar

import attrs

from ha_core.errors import invariant
from ha_core.ids import FencingToken, HostName, LeaseToken, LogIndex, VmName
from ha_core.machines.failover import commands as c
from ha_core.machines.failover.commands import Command, Outcome
from ha_core.machines.failover.placement import admission_problem, rule_problem, together_with
from ha_core.machines.failover.records import (
    Decision,
    DecisionCount,
    Epoch,
    Host,
    HostState,
    KvTransaction,
    Lease,
    Mode,
    Rule,
    Run,
    RunState,
    Safety,
    Settings,
    Vm,
    Wanted,
)
from ha_core.machines.keyvalue.model import Plain

C = TypeVar("C", bound=Command)
Procedure = Callable[[KvTransaction, LogIndex, Sequence[Plain]], Plain]

PROCEDURES: Final[dict[str, Procedure]] = {}
"""Name -> procedure: what the key-value machine is given."""


def _procedure(kind: type[C]) -> Callable[[Callable[[KvTransaction, LogIndex, C], Outcome]], Procedure]:
    def register(function: Callable[[KvTransaction, LogIndex, C], Outcome]) -> Procedure:
        def run(tx: KvTransaction, index: LogIndex, args: Sequence[Plain]) -> Plain:
            return function(tx, index, kind.decode(args)).encode()

        PROCEDURES[kind.name] = run
        return run

    return register


def _refuse(reason: str) -> Outcome:
    return Outcome(False, 0, reason)


_DONE = Outcome(True)


def settings_of(tx: KvTransaction) -> Settings:
    return Settings.get(tx, "all") or Settings()


def _decide(
    tx: KvTransaction, index: LogIndex, kind: str, *, host: str = "", vm: str = "", token: int = 0, why: str = ""
) -> None:
    """Keep for ``explain`` what was done and why; the oldest decision makes room."""
    number = (DecisionCount.get(tx, "count") or DecisionCount()).last + 1
    DecisionCount(number).put(tx)
    Decision(number, index, kind, host, vm, token, why).put(tx)


def _runs_on(tx: KvTransaction, host: HostName) -> list[Run]:
    return [run for run in Run.all(tx) if run.host == host]


# -- leases: L1, L3, L5 --


@_procedure(c.Lead)
def lead(tx: KvTransaction, index: LogIndex, command: c.Lead) -> Outcome:
    epoch = Epoch.get(tx, "leader") or Epoch()
    if command.term < epoch.term:
        return _refuse("a later leader took over")
    if command.term > epoch.term:
        Epoch(command.term, command.node, index).put(tx)
        _decide(tx, index, "leading", host=command.node, token=command.term, why="elected")
    return _DONE


@_procedure(c.Grant)
def grant(tx: KvTransaction, index: LogIndex, ask: c.Grant) -> Outcome:
    if Host.get(tx, ask.host) is None:
        return _refuse("unknown host")
    settings = settings_of(tx)
    lease = Lease.get(tx, ask.host)
    token = LeaseToken(index)
    fresh = Lease(
        ask.host, token, ask.boot, ask.instance, ask.created_ns, settings.lease_ns, settings.margin_ns,
        hold_ns=settings.lease_ns, armed=settings.mode is Mode.ARMED,
    )  # fmt: skip
    if lease is None:
        fresh.put(tx)
        _decide(tx, index, "granted", host=ask.host, token=token, why="first lease of the host")
        return Outcome(True, token)
    invariant(lease.token < token and lease.candidate < token, "a lease token went back", host=ask.host)
    if ask.boot == lease.boot and ask.created_ns < lease.created_ns:
        return _refuse("an older ask of the same boot")
    if ask.boot != lease.boot or (fresh.armed and not lease.armed):
        return _grant_candidate(tx, index, lease, ask)
    if lease.revoked:
        return _grant_after_revoke(tx, index, lease, fresh)
    if ask.instance == lease.instance and _same_numbers(lease, settings):
        return Outcome(True, lease.token)
    _continue(tx, index, lease, fresh)
    return Outcome(True, token)


def _same_numbers(lease: Lease, settings: Settings) -> bool:
    armed = settings.mode is Mode.ARMED
    return (lease.lease_ns, lease.margin_ns, lease.armed) == (settings.lease_ns, settings.margin_ns, armed)


def _grant_after_revoke(tx: KvTransaction, index: LogIndex, lease: Lease, fresh: Lease) -> Outcome:
    # L5: the old token is dead for ever, and the chain begins anew. What outlives its lease is still there, though, and held
    # again, because the kernel is the same.
    fresh.put(tx)
    for run in _runs_on(tx, lease.host):
        if run.state is RunState.UNFENCED:
            attrs.evolve(run, lease=fresh.token, state=RunState.RUNNING).put(tx)
    _decide(tx, index, "granted", host=lease.host, token=fresh.token, why="the lease before was revoked")
    return Outcome(True, fresh.token)


def _grant_candidate(tx: KvTransaction, index: LogIndex, lease: Lease, ask: c.Grant) -> Outcome:
    settings = settings_of(tx)
    numbers = (settings.lease_ns, settings.margin_ns, settings.mode is Mode.ARMED)
    known = (lease.candidate_boot, lease.candidate_instance)
    known_numbers = (lease.candidate_lease_ns, lease.candidate_margin_ns, lease.candidate_armed)
    if lease.candidate and (known, known_numbers) == ((ask.boot, ask.instance), numbers):
        return Outcome(True, lease.candidate)
    if lease.candidate_boot == ask.boot and ask.created_ns < lease.candidate_created_ns:
        return _refuse("an older ask of the same boot")
    attrs.evolve(
        lease, candidate=LeaseToken(index), candidate_boot=ask.boot, candidate_instance=ask.instance,
        candidate_created_ns=ask.created_ns, candidate_lease_ns=settings.lease_ns, candidate_margin_ns=settings.margin_ns,
        candidate_armed=settings.mode is Mode.ARMED,
    ).put(tx)  # fmt: skip
    return Outcome(True, index)


def _continue(tx: KvTransaction, index: LogIndex, lease: Lease, fresh: Lease) -> None:
    # L1: one entry retires the old token and re-stamps what stood under it; no instant in between has neither.
    chain = lease.continued or lease.token
    attrs.evolve(fresh, continued=chain, hold_ns=max(fresh.hold_ns, lease.hold_ns)).put(tx)
    for run in _runs_on(tx, lease.host):
        if run.lease == lease.token and run.held:
            attrs.evolve(run, lease=fresh.token).put(tx)
    _decide(tx, index, "continued", host=lease.host, token=fresh.token, why="another guard of the same kernel boot")


@_procedure(c.Confirm)
def confirm(tx: KvTransaction, index: LogIndex, command: c.Confirm) -> Outcome:
    lease = Lease.get(tx, command.host)
    if lease is None or not command.token or lease.candidate != command.token:
        return _refuse("no such candidate")
    armed = lease.candidate_armed and settings_of(tx).mode is Mode.ARMED
    fresh = Lease(
        lease.host, lease.candidate, lease.candidate_boot, lease.candidate_instance, lease.candidate_created_ns,
        lease.candidate_lease_ns, lease.candidate_margin_ns, hold_ns=lease.candidate_lease_ns, armed=armed,
    )  # fmt: skip
    if lease.boot == fresh.boot:
        if lease.revoked:
            return _grant_after_revoke(tx, index, lease, fresh)
        _continue(tx, index, lease, fresh)
        return Outcome(True, fresh.token)
    # L1: the other kernel boot has proved that it lives, so everything of the one before is gone.
    fresh.put(tx)
    host = Host.get(tx, lease.host)
    if host is not None and host.state in (HostState.SHUTDOWN, HostState.FREEZE):
        attrs.evolve(host, state=HostState.ONLINE).put(tx)
    for run in _runs_on(tx, lease.host):
        if run.held or run.state is RunState.UNFENCED:
            attrs.evolve(run, state=RunState.LOST, text="the host booted anew").put(tx)
    _decide(tx, index, "rebooted", host=lease.host, token=fresh.token, why="another kernel boot: its VMs are gone")
    return Outcome(True, fresh.token)


@_procedure(c.Revoke)
def revoke(tx: KvTransaction, index: LogIndex, command: c.Revoke) -> Outcome:
    lease = Lease.get(tx, command.host)
    if lease is None or lease.token != command.token:
        return _refuse("not the host's lease")
    if lease.revoked:
        return _DONE
    if not lease.armed:
        return _refuse("the cluster is disarmed: leases have no deadline")
    # L3: a leader that confirms renewals has seen its own Lead applied, so only its own verdict on them can be meant.
    if command.term != (Epoch.get(tx, "leader") or Epoch()).term:
        return _refuse("the verdict of another leader")
    attrs.evolve(lease, revoked=True).put(tx)
    for run in _runs_on(tx, lease.host):
        if run.lease == lease.token and run.held:
            lost = RunState.UNFENCED if run.outlives else RunState.LOST
            attrs.evolve(run, state=lost, text="the lease was revoked").put(tx)
    _decide(tx, index, "revoked", host=lease.host, token=lease.token, why=command.why)
    return _DONE


@_procedure(c.Fenced)
def fenced(tx: KvTransaction, index: LogIndex, command: c.Fenced) -> Outcome:
    lease = Lease.get(tx, command.host)
    if lease is None or lease.token != command.token:
        return _refuse("not the host's lease")
    attrs.evolve(lease, revoked=True).put(tx)
    for run in _runs_on(tx, lease.host):
        if run.held or run.state is RunState.UNFENCED:
            attrs.evolve(run, state=RunState.LOST, text="the host was fenced").put(tx)
    _decide(tx, index, "fenced", host=lease.host, token=lease.token, why=command.why)
    return _DONE


# -- runs: L1, L3, L7 --


@_procedure(c.Assign)
def assign(tx: KvTransaction, index: LogIndex, command: c.Assign) -> Outcome:
    vm = Vm.get(tx, command.vm)
    lease = Lease.get(tx, command.host)
    run = Run.get(tx, command.vm)
    if vm is None or vm.wanted is not Wanted.STARTED:
        return _refuse("the VM is not to run")
    if settings_of(tx).mode is not Mode.ARMED:
        return _refuse("the cluster is disarmed")
    if lease is None or not lease.holds(command.lease) or not lease.armed:
        return _refuse("the host does not hold that lease")
    if (run.token if run else 0) != command.previous:
        return _refuse("another run came between")
    if run is not None and not run.free:
        return _refuse("the last run is neither released nor under a revoked lease")
    token = FencingToken(index)
    invariant(run is None or run.token < token, "a fencing token went back", vm=command.vm)
    outlives = vm.outlives or vm.safety is Safety.FENCE
    fresh = Run(vm.name, token, command.host, lease.token, why=command.why, shutdown_ns=vm.shutdown_ns, outlives=outlives)
    if run is not None:
        home = "" if run.home == command.host else run.home
        fresh = attrs.evolve(fresh, home=home, attempts=run.attempts, crashed=run.crashed, avoid=run.avoid)
    fresh.put(tx)
    _decide(tx, index, "assigned", host=command.host, vm=vm.name, token=token, why=command.why)
    return Outcome(True, token)


def _run_of(tx: KvTransaction, vm: VmName, token: FencingToken) -> Run | None:
    run = Run.get(tx, vm)
    return run if run is not None and run.token == token else None


@_procedure(c.Recall)
def recall(tx: KvTransaction, index: LogIndex, command: c.Recall) -> Outcome:
    run = _run_of(tx, command.vm, command.token)
    if run is None or not run.held:
        return _refuse("no such run")
    if run.recalled:
        return _DONE
    home = command.home or run.home
    attrs.evolve(run, recalled=True, target=command.target, home=home, text=command.why).put(tx)
    _decide(tx, index, "recalled", host=run.host, vm=run.vm, token=run.token, why=command.why)
    return _DONE


_REPORTED: Final = (RunState.ASSIGNED, RunState.STARTING, RunState.RUNNING, RunState.STOPPING)
"""In the order in which a run goes through them."""


@_procedure(c.ReportVm)
def report_vm(tx: KvTransaction, index: LogIndex, command: c.ReportVm) -> Outcome:
    run = _run_of(tx, command.vm, command.token)
    if run is None or not run.held:
        return _refuse("no such run")
    if command.state not in _REPORTED[1:]:
        return _refuse("not a state that a guard reports")
    if (command.event, _REPORTED.index(command.state)) <= (run.event, _REPORTED.index(run.state)):
        return _refuse("an older report")
    attrs.evolve(
        run, state=command.state, instance=command.instance, event=command.event, text=command.text
    ).put(tx)  # fmt: skip
    return _DONE


@_procedure(c.Released)
def released(tx: KvTransaction, index: LogIndex, command: c.Released) -> Outcome:
    run = _run_of(tx, command.vm, command.token)
    if run is None:
        return _refuse("no such run")
    if run.state is RunState.RELEASED:
        return _DONE
    if command.event < run.event:
        return _refuse("an older report")
    vm = Vm.get(tx, command.vm)
    ended = attrs.evolve(
        run, state=RunState.RELEASED, instance=command.instance, event=command.event, exit_code=command.exit_code,
        text=command.text,
    )  # fmt: skip
    if vm is None:
        ended.delete(tx)
    elif run.recalled or not run.held:
        ended.put(tx)
    else:
        # A run that was being ended (by its lease's deadline, say) had been up: that is no failed try.
        was_up = run.state in (RunState.RUNNING, RunState.STOPPING) and not command.failed
        ended = _count_failure(settings_of(tx), vm, ended, was_up)
        ended.put(tx)
    kind = "failed" if ended.failed else "released"
    _decide(tx, index, kind, host=run.host, vm=run.vm, token=run.token, why=command.text)
    return _DONE


def _count_failure(settings: Settings, vm: Vm, run: Run, was_up: bool) -> Run:
    """The run ended by itself: the first time after it was up it restarts at once, else it is a failed try (I49)."""
    if was_up and not run.crashed:
        return attrs.evolve(run, crashed=True)
    attempts = run.attempts + 1
    avoid = run.avoid if run.host in run.avoid else (*run.avoid, run.host)
    tries = min(1 + vm.max_restart + vm.max_relocate, len(settings.retries_ns))
    return attrs.evolve(run, attempts=attempts, avoid=avoid, failed=attempts >= tries)


@_procedure(c.Settle)
def settle(tx: KvTransaction, index: LogIndex, command: c.Settle) -> Outcome:
    run = _run_of(tx, command.vm, command.token)
    if run is None or not run.up:
        return _refuse("no such run")
    attrs.evolve(run, attempts=0, crashed=False).put(tx)
    return _DONE


# -- hosts --


@_procedure(c.RegisterHost)
def register_host(tx: KvTransaction, index: LogIndex, command: c.RegisterHost) -> Outcome:
    new = command.host()
    old = Host.get(tx, new.name)
    if old is None:
        _decide(tx, index, "registered", host=new.name)
        new.put(tx)
        return _DONE
    attrs.evolve(new, state=old.state, role=old.role).put(tx)
    return _DONE


@_procedure(c.RemoveHost)
def remove_host(tx: KvTransaction, index: LogIndex, command: c.RemoveHost) -> Outcome:
    host = Host.get(tx, command.host)
    if host is None:
        return _DONE
    if any(run.held or run.state is RunState.UNFENCED for run in _runs_on(tx, command.host)):
        return _refuse("VMs run there: set it to maintenance first, or wait until it is fenced")
    host.delete(tx)
    tx.delete(Lease.key_of(command.host))
    _decide(tx, index, "removed", host=command.host)
    return _DONE


@_procedure(c.SetHostState)
def set_host_state(tx: KvTransaction, index: LogIndex, command: c.SetHostState) -> Outcome:
    host = Host.get(tx, command.host)
    if host is None:
        return _refuse("unknown host")
    lease = Lease.get(tx, command.host)
    if command.state is not HostState.ONLINE and (lease is None or lease.revoked):
        return _refuse("the host is absent")
    attrs.evolve(host, state=command.state).put(tx)
    _decide(tx, index, command.state.value, host=command.host)
    return _DONE


@_procedure(c.SetHostRole)
def set_host_role(tx: KvTransaction, index: LogIndex, command: c.SetHostRole) -> Outcome:
    host = Host.get(tx, command.host)
    if host is None:
        return _refuse("unknown host")
    attrs.evolve(host, role=command.role).put(tx)
    return _DONE


# -- virtual machines, by administrators --


@_procedure(c.DefineVm)
def define_vm(tx: KvTransaction, index: LogIndex, command: c.DefineVm) -> Outcome:
    new = command.vm()
    vms = {vm.name: vm for vm in Vm.all(tx)}
    old = vms.get(new.name)
    vms[new.name] = new
    if _waits_for_itself(vms, new.name):
        return _refuse("its dependencies form a circle")
    if old is not None:
        new = attrs.evolve(new, wanted=old.wanted)
    elif new.wanted is Wanted.STARTED:
        problem = _admission_problem(tx, new)
        if problem:
            return _refuse(problem)
    new.put(tx)
    return _DONE


def _waits_for_itself(vms: Mapping[VmName, Vm], name: VmName) -> bool:
    seen: set[str] = set()
    queue = list(vms[name].after)
    while queue:
        other = VmName(queue.pop())
        if other == name:
            return True
        if other not in seen:
            seen.add(other)
            queue.extend(vms[other].after if other in vms else ())
    return False


def _admission_problem(tx: KvTransaction, vm: Vm) -> str:
    up = {lease.host for lease in Lease.all(tx) if not lease.revoked}
    hosts = [host for host in Host.all(tx) if host.name in up]
    return admission_problem(settings_of(tx), hosts, [other for other in Vm.all(tx) if other.name != vm.name], vm)


@_procedure(c.RemoveVm)
def remove_vm(tx: KvTransaction, index: LogIndex, command: c.RemoveVm) -> Outcome:
    tx.delete(Vm.key_of(command.vm))
    run = Run.get(tx, command.vm)
    if run is not None and run.free:
        run.delete(tx)
    return _DONE


@_procedure(c.WantVm)
def want_vm(tx: KvTransaction, index: LogIndex, command: c.WantVm) -> Outcome:
    vm = Vm.get(tx, command.vm)
    if vm is None:
        return _refuse("unknown VM")
    run = Run.get(tx, command.vm)
    if command.wanted is Wanted.STARTED:
        if vm.wanted is Wanted.STOPPED:
            problem = _admission_problem(tx, vm)
            if problem:
                return _refuse(problem)
        if run is not None:
            attrs.evolve(run, failed=False, attempts=0, crashed=False, avoid=(), ordered=True).put(tx)
    elif command.wanted is Wanted.STOPPED and run is not None and run.held:
        attrs.evolve(run, recalled=True, grace_ns=command.grace_ns, home="", target="").put(tx)
        _decide(tx, index, "recalled", host=run.host, vm=vm.name, token=run.token, why="an administrator stops it")
    attrs.evolve(vm, wanted=command.wanted).put(tx)
    return _DONE


@_procedure(c.MoveVm)
def move_vm(tx: KvTransaction, index: LogIndex, command: c.MoveVm) -> Outcome:
    vm = Vm.get(tx, command.vm)
    host = Host.get(tx, command.host)
    if vm is None or host is None:
        return _refuse("unknown VM or host")
    rules = Rule.all(tx)
    runs = {run.vm: run for run in Run.all(tx)}
    group = together_with(rules, vm.name)
    for name in group:
        problem = rule_problem(rules, runs, name, host.name, moving=group)
        if problem:
            return _refuse(problem)
    for name in group:
        run = runs.get(name)
        if run is None or run.free:
            continue
        if run.held and run.host != host.name:
            attrs.evolve(run, recalled=True, target=host.name, home="", avoid=(), attempts=0, failed=False).put(tx)
            _decide(
                tx, index, "recalled", host=run.host, vm=name, token=run.token, why=f"an administrator moves it to {host.name}"
            )
    if vm.name not in runs or runs[vm.name].free:
        attrs.evolve(vm, host=host.name).put(tx)
    return _DONE


# -- rules, settings, names --


@_procedure(c.SetRule)
def set_rule(tx: KvTransaction, index: LogIndex, command: c.SetRule) -> Outcome:
    command.rule().put(tx)
    return _DONE


@_procedure(c.RemoveRule)
def remove_rule(tx: KvTransaction, index: LogIndex, command: c.RemoveRule) -> Outcome:
    tx.delete(Rule.key_of(command.rule))
    return _DONE


@_procedure(c.SetSettings)
def set_settings(tx: KvTransaction, index: LogIndex, command: c.SetSettings) -> Outcome:
    old, new = settings_of(tx), command.settings()
    if new.margin_ns * 50 < new.lease_ns or new.margin_ns >= new.lease_ns:
        return _refuse("margin_ns must be at least 2 % of lease_ns and less than it")
    if not new.retries_ns or list(new.retries_ns) != sorted(new.retries_ns):
        return _refuse("retries_ns must be instants in order, at least one")
    if new.mode is not old.mode:
        if new.mode is Mode.DISARMED and _failover_in_progress(tx):
            return _refuse("a failover is in progress: wait until its VMs are placed")
        _decide(tx, index, new.mode.value, why="an administrator's order")
    new.put(tx)
    if new.mode is Mode.DISARMED:
        for lease in Lease.all(tx):
            attrs.evolve(lease, armed=False).put(tx)
    return _DONE


def _failover_in_progress(tx: KvTransaction) -> bool:
    vms = {vm.name: vm for vm in Vm.all(tx)}
    return any(
        run.state is RunState.LOST and not run.failed and run.vm in vms and vms[run.vm].wanted is Wanted.STARTED
        for run in Run.all(tx)
    )


@_procedure(c.SetName)
def set_name(tx: KvTransaction, index: LogIndex, command: c.SetName) -> Outcome:
    entry = command.entry()
    if entry.addresses:
        entry.put(tx)
    else:
        entry.delete(tx)
    return _DONE
