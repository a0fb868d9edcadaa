"""One replica's decoded view of the records, and since when it has seen what: what coordinator, host agent and names read.

The view follows the applied log and nothing else. The times are local observations (no clock enters the log): a replica that
was away sees things later than others, so whoever waits on them waits longer, never shorter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from ha_core.ids import FencingToken, HostName, LeaseToken, VmName
from ha_core.machines.failover.records import (
    PREFIX,
    Decision,
    Epoch,
    Host,
    Lease,
    Name,
    Record,
    Rule,
    Run,
    RunState,
    Settings,
    Vm,
)

K = TypeVar("K")
R = TypeVar("R", bound=Record)


class Inventory:
    def __init__(self) -> None:
        self.applied_index = 0
        self.settings = Settings()
        self.epoch = Epoch()
        self.hosts: dict[HostName, Host] = {}
        self.leases: dict[HostName, Lease] = {}
        self.vms: dict[VmName, Vm] = {}
        self.runs: dict[VmName, Run] = {}
        self.rules: dict[str, Rule] = {}
        self.names: dict[str, Name] = {}
        self.decisions: dict[int, Decision] = {}
        self._assigned: dict[VmName, tuple[FencingToken, int]] = {}
        self._since: dict[VmName, tuple[FencingToken, RunState, int]] = {}

    def apply(self, index: int, changes: Iterable[tuple[bytes, bytes | None]], now_ns: int) -> bool:
        """Follow the log up to ``index``: keys with their new value, None for a deleted one. True if a record changed.

        Raises:
            StorageError: a record cannot be read.
        """
        changed = False
        for key, value in changes:
            if key.startswith(PREFIX):
                self._change(key, value, now_ns)
                changed = True
        self.applied_index = max(self.applied_index, index)
        return changed

    def restore(self, index: int, items: Iterable[tuple[bytes, bytes]], now_ns: int) -> None:
        """Begin anew from the whole state after ``index`` (a snapshot); what was observed of runs that are still so is kept."""
        assigned, since = self._assigned, self._since
        self.__init__()  # type: ignore[misc]
        self._assigned, self._since = assigned, since
        self.apply(index, items, now_ns)
        for gone in [vm for vm in self._since if vm not in self.runs]:
            del self._since[gone], self._assigned[gone]

    def assigned_ns(self, vm: VmName, now_ns: int) -> int:
        """When this replica first saw the VM's last Assign."""
        return self._assigned[vm][1] if vm in self._assigned else now_ns

    def since_ns(self, vm: VmName, now_ns: int) -> int:
        """When this replica first saw the VM's run in its present state."""
        return self._since[vm][2] if vm in self._since else now_ns

    def lease(self, host: HostName) -> LeaseToken:
        """The host's lease token, 0 if it has none that is good."""
        lease = self.leases.get(host)
        return LeaseToken(0) if lease is None or lease.revoked else lease.token

    def _change(self, key: bytes, value: bytes | None, now_ns: int) -> None:
        table, _, name = key[len(PREFIX) :].partition(b"/")
        text = name.decode()
        if table == Run.table:
            self._change_run(VmName(text), value, now_ns)
        elif table == Lease.table:
            _put(self.leases, HostName(text), Lease, value)
        elif table == Vm.table:
            _put(self.vms, VmName(text), Vm, value)
        elif table == Host.table:
            _put(self.hosts, HostName(text), Host, value)
        elif table == Rule.table:
            _put(self.rules, text, Rule, value)
        elif table == Name.table:
            _put(self.names, text, Name, value)
        elif table == Settings.table:
            self.settings = Settings() if value is None else Settings.decode(value)
        elif table == Epoch.table:
            self.epoch = Epoch() if value is None else Epoch.decode(value)
        elif table == Decision.table:
            _put(self.decisions, int(text), Decision, value)

    def _change_run(self, vm: VmName, value: bytes | None, now_ns: int) -> None:
        _put(self.runs, vm, Run, value)
        run = self.runs.get(vm)
        if run is None:
            self._assigned.pop(vm, None)
            self._since.pop(vm, None)
            return
        if vm not in self._assigned or self._assigned[vm][0] != run.token:
            self._assigned[vm] = (run.token, now_ns)
        if vm not in self._since or self._since[vm][:2] != (run.token, run.state):
            self._since[vm] = (run.token, run.state, now_ns)


def _put(table: dict[K, R], key: K, kind: type[R], value: bytes | None) -> None:
    if value is None:
        table.pop(key, None)
    else:
        table[key] = kind.decode(value)
