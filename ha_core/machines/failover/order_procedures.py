"""What administrators and agents order or register: hosts, VMs, rules, settings, names."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from ha_core.ids import LogIndex, VmName
from ha_core.machines.failover import commands as c
from ha_core.machines.failover.commands import Outcome
from ha_core.machines.failover.placement import admission_problem, rule_problem, together_with
from ha_core.machines.failover.procedure_registry import DONE, decide, procedure, refuse, runs_on, settings_of
from ha_core.machines.failover.records import (
    Host,
    HostState,
    KvTransaction,
    Lease,
    Mode,
    Rule,
    Run,
    RunState,
    Vm,
    Wanted,
)

# -- hosts --


@procedure(c.RegisterHost)
def register_host(tx: KvTransaction, index: LogIndex, command: c.RegisterHost) -> Outcome:
    new = command.record()
    old = Host.get(tx, new.name)
    if old is None:
        decide(tx, index, "registered", host=new.name)
        new.put(tx)
        return DONE
    new.taking_over(old).put(tx)
    return DONE


@procedure(c.RemoveHost)
def remove_host(tx: KvTransaction, index: LogIndex, command: c.RemoveHost) -> Outcome:
    host = Host.get(tx, command.host)
    if host is None:
        return DONE
    if any(run.held or run.state is RunState.UNFENCED for run in runs_on(tx, command.host)):
        return refuse("VMs run there: set it to maintenance first, or wait until it is fenced")
    host.delete(tx)
    tx.delete(Lease.key_of(command.host))
    decide(tx, index, "removed", host=command.host)
    return DONE


@procedure(c.SetHostState)
def set_host_state(tx: KvTransaction, index: LogIndex, command: c.SetHostState) -> Outcome:
    host = Host.get(tx, command.host)
    if host is None:
        return refuse("unknown host")
    lease = Lease.get(tx, command.host)
    if command.state is not HostState.ONLINE and (lease is None or lease.revoked):
        return refuse("the host is absent")
    attrs.evolve(host, state=command.state).put(tx)
    decide(tx, index, command.state.value, host=command.host)
    return DONE


@procedure(c.SetHostRole)
def set_host_role(tx: KvTransaction, index: LogIndex, command: c.SetHostRole) -> Outcome:
    host = Host.get(tx, command.host)
    if host is None:
        return refuse("unknown host")
    attrs.evolve(host, role=command.role).put(tx)
    return DONE


# -- virtual machines, by administrators --


@procedure(c.DefineVm)
def define_vm(tx: KvTransaction, index: LogIndex, command: c.DefineVm) -> Outcome:
    new = command.record()
    vms = {vm.name: vm for vm in Vm.all(tx)}
    old = vms.get(new.name)
    vms[new.name] = new
    if _waits_for_itself(vms, new.name):
        return refuse("its dependencies form a circle")
    if old is not None:
        new = attrs.evolve(new, wanted=old.wanted)
    elif new.wanted is Wanted.STARTED:
        problem = _admission_problem(tx, new)
        if problem:
            return refuse(problem)
    new.put(tx)
    return DONE


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


@procedure(c.RemoveVm)
def remove_vm(tx: KvTransaction, index: LogIndex, command: c.RemoveVm) -> Outcome:
    tx.delete(Vm.key_of(command.vm))
    run = Run.get(tx, command.vm)
    if run is not None and run.state is RunState.LOST and run.shutdown_ns:
        # Its orderly shutdown may not be over: a VM that is added under this name waits for it. Nothing else is kept.
        attrs.evolve(run, failed=False, attempts=0, crashed=False, avoid=(), home="").put(tx)
    elif run is not None and run.free:
        run.delete(tx)
    return DONE


@procedure(c.WantVm)
def want_vm(tx: KvTransaction, index: LogIndex, command: c.WantVm) -> Outcome:
    vm = Vm.get(tx, command.vm)
    if vm is None:
        return refuse("unknown VM")
    run = Run.get(tx, command.vm)
    if command.wanted is Wanted.STARTED:
        if vm.wanted is Wanted.STOPPED:
            problem = _admission_problem(tx, vm)
            if problem:
                return refuse(problem)
        if run is not None:
            attrs.evolve(run, failed=False, attempts=0, crashed=False, avoid=(), ordered=True).put(tx)
    elif command.wanted is Wanted.STOPPED and run is not None and run.held:
        attrs.evolve(run, recalled=True, grace_ns=command.grace_ns, home="", target="").put(tx)
        decide(tx, index, "recalled", host=run.host, vm=vm.name, token=run.token, why="an administrator stops it")
    attrs.evolve(vm, wanted=command.wanted).put(tx)
    return DONE


@procedure(c.MoveVm)
def move_vm(tx: KvTransaction, index: LogIndex, command: c.MoveVm) -> Outcome:
    vm = Vm.get(tx, command.vm)
    host = Host.get(tx, command.host)
    if vm is None or host is None:
        return refuse("unknown VM or host")
    rules = Rule.all(tx)
    runs = {run.vm: run for run in Run.all(tx)}
    group = together_with(rules, vm.name)
    for name in group:
        problem = rule_problem(rules, runs, name, host.name, moving=group)
        if problem:
            return refuse(problem)
    for name in group:
        run = runs.get(name)
        if run is None or run.free:
            continue
        if run.held and run.host != host.name:
            attrs.evolve(run, recalled=True, target=host.name, home="", avoid=(), attempts=0, failed=False).put(tx)
            decide(
                tx, index, "recalled", host=run.host, vm=name, token=run.token, why=f"an administrator moves it to {host.name}"
            )
    if vm.name not in runs or runs[vm.name].free:
        attrs.evolve(vm, host=host.name).put(tx)
    return DONE


# -- rules, settings, names --


@procedure(c.SetRule)
def set_rule(tx: KvTransaction, index: LogIndex, command: c.SetRule) -> Outcome:
    command.record().put(tx)
    return DONE


@procedure(c.RemoveRule)
def remove_rule(tx: KvTransaction, index: LogIndex, command: c.RemoveRule) -> Outcome:
    tx.delete(Rule.key_of(command.rule))
    return DONE


@procedure(c.SetSettings)
def set_settings(tx: KvTransaction, index: LogIndex, command: c.SetSettings) -> Outcome:
    old, new = settings_of(tx), command.record()
    if new.margin_ns * 50 < new.lease_ns or new.margin_ns >= new.lease_ns:
        return refuse("margin_ns must be at least 2 % of lease_ns and less than it")
    if not new.retries_ns or list(new.retries_ns) != sorted(new.retries_ns):
        return refuse("retries_ns must be instants in order, at least one")
    if new.mode is not old.mode:
        if new.mode is Mode.DISARMED and _failover_in_progress(tx):
            return refuse("a failover is in progress: wait until its VMs are placed")
        decide(tx, index, new.mode.value, why="an administrator's order")
    new.put(tx)
    if new.mode is Mode.DISARMED:
        for lease in Lease.all(tx):
            attrs.evolve(lease, armed=False).put(tx)
    return DONE


def _failover_in_progress(tx: KvTransaction) -> bool:
    vms = {vm.name: vm for vm in Vm.all(tx)}
    return any(
        run.state is RunState.LOST and not run.failed and run.vm in vms and vms[run.vm].wanted is Wanted.STARTED
        for run in Run.all(tx)
    )


@procedure(c.SetName)
def set_name(tx: KvTransaction, index: LogIndex, command: c.SetName) -> Outcome:
    entry = command.record()
    if entry.addresses:
        entry.put(tx)
    else:
        entry.delete(tx)
    return DONE
