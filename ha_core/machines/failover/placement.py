"""Where a VM may run and where it runs best: capacity, rules, admission. Pure functions, equal answers on every replica."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import attrs

from ha_core.ids import HostName, VmName
from ha_core.machines.failover.records import (
    AdmissionPolicy,
    Host,
    HostState,
    Role,
    Rule,
    RuleKind,
    Run,
    Settings,
    Vm,
    Wanted,
)


@attrs.define
class Room:
    """What is free on one host, and which VMs are there or on their way."""

    host: Host
    cpu_mhz: int
    memory_mib: int
    vms: list[VmName] = attrs.field(factory=list)
    starting: int = 0

    @classmethod
    def of(cls, host: Host) -> Room:
        return cls(host, host.cpu_mhz, host.memory_mib)

    def fits(self, vms: Sequence[Vm]) -> bool:
        return self.cpu_mhz >= sum(vm.cpu_mhz for vm in vms) and self.memory_mib >= sum(vm.memory_mib for vm in vms)

    def take(self, vm: Vm) -> None:
        self.cpu_mhz -= vm.cpu_mhz
        self.memory_mib -= vm.memory_mib
        self.vms.append(vm.name)

    def free_share(self, vm: Vm) -> int:
        """The scarcer resource's free part after placing ``vm``, in millionths: whole numbers compare alike everywhere."""
        cpu = (self.cpu_mhz - vm.cpu_mhz) * 1_000_000 // max(1, self.host.cpu_mhz)
        memory = (self.memory_mib - vm.memory_mib) * 1_000_000 // max(1, self.host.memory_mib)
        return min(cpu, memory)


def together_with(rules: Collection[Rule], vm: VmName) -> list[VmName]:
    """The VMs that must be on one host with ``vm``, itself included, over all ``together`` rules, by name."""
    group = {vm}
    grown = True
    while grown:
        grown = False
        for rule in rules:
            if rule.kind is RuleKind.TOGETHER and not group.isdisjoint(rule.vms) and not group.issuperset(rule.vms):
                group.update(VmName(name) for name in rule.vms)
                grown = True
    return sorted(group)


def apart_from(rules: Collection[Rule], vm: VmName) -> list[VmName]:
    """The VMs that may not be on one host with ``vm``, by name."""
    others = {VmName(name) for rule in rules if rule.kind is RuleKind.APART and vm in rule.vms for name in rule.vms}
    return sorted(others - {vm})


def weight_of(rules: Collection[Rule], kind: RuleKind, vm: VmName, host: HostName) -> int | None:
    """The host's weight by the rules of ``kind`` that name the VM: 0 if none does, None if one leaves the host out."""
    total = 0
    for rule in rules:
        if rule.kind is kind and vm in rule.vms:
            weights = dict(rule.hosts)
            if host not in weights:
                return None
            total += weights[host]
    return total


def rule_problem(
    rules: Collection[Rule], runs: Mapping[VmName, Run], vm: VmName, host: HostName, moving: Collection[VmName] = ()
) -> str:
    """Why a rule forbids ``vm`` on ``host``, beside what runs there and is not ``moving``; empty: none does."""
    if weight_of(rules, RuleKind.REQUIRE, vm, host) is None:
        return f"a require rule keeps {vm} off {host}"
    for other in apart_from(rules, vm):
        run = runs.get(other)
        if other in moving or (run is not None and not run.free and run.host == host):
            return f"an apart rule keeps {vm} off {host}, where {other} is"
    return ""


def usable(host: Host) -> bool:
    """Whether VMs may be placed there, as far as its record says (H12, H14: not during maintenance)."""
    return host.state is HostState.ONLINE and host.role is not Role.WITNESS


def admission_problem(settings: Settings, hosts: Sequence[Host], vms: Sequence[Vm], new: Vm) -> str:
    """Why starting ``new`` beside ``vms`` would take what is kept for failovers; empty: it may start."""
    if settings.admission is AdmissionPolicy.NONE:
        return ""
    serving = [host for host in hosts if usable(host)]
    if settings.admission is AdmissionPolicy.FAILOVER_HOSTS:
        serving = [host for host in serving if host.name not in settings.failover_hosts]
    wanted = [vm for vm in vms if vm.wanted is not Wanted.STOPPED] + [new]
    for unit, capacities, need in (
        ("MHz", [host.cpu_mhz for host in serving], sum(vm.cpu_mhz for vm in wanted)),
        ("MiB", [host.memory_mib for host in serving], sum(vm.memory_mib for vm in wanted)),
    ):
        available = _available(settings, sorted(capacities))
        if need > available:
            return f"admission ({settings.admission.value}): {need} {unit} would be needed, {available} may be used"
    return ""


def _available(settings: Settings, capacities: Sequence[int]) -> int:
    if settings.admission is AdmissionPolicy.HOST_FAILURES:
        return sum(capacities[: max(0, len(capacities) - settings.tolerate)])
    if settings.admission is AdmissionPolicy.PERCENTAGE:
        return sum(capacities) * (100 - settings.tolerate) // 100
    return sum(capacities)
