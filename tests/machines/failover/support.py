"""A log of commands over a plain dict, with the inventory of a replica that follows it."""

from __future__ import annotations

from ha_core.ids import FencingToken, HostName, LeaseToken, LogIndex, VmName
from ha_core.machines.failover import commands as c
from ha_core.machines.failover.commands import Command, Outcome
from ha_core.machines.failover.inventory import Inventory
from ha_core.machines.failover.procedures import PROCEDURES
from ha_core.machines.failover.records import Host, Lease, Run, RunState, Settings, Vm

SECOND = 1_000_000_000


class Log:
    """Applies commands one after the other; index 10, 11, ... ``now_ns`` is what the replica's clock says."""

    def __init__(self, hosts: int = 0, settings: Settings | None = None) -> None:
        self.keys: dict[bytes, bytes] = {}
        self.index = 9
        self.now_ns = 0
        self.inventory = Inventory()
        self.history: list[Command] = []
        self._changes: dict[bytes, bytes | None] = {}
        self._event = 0
        if settings is not None:
            self.run(c.SetSettings.of(settings))
        for number in range(1, hosts + 1):
            self.add_host(f"h{number}")

    # -- the transaction that procedures see --

    def get(self, key: bytes) -> bytes | None:
        return self.keys.get(key)

    def range(self, prefix: bytes) -> list[tuple[bytes, bytes]]:
        return sorted((key, value) for key, value in self.keys.items() if key.startswith(prefix))

    def put(self, key: bytes, value: bytes) -> None:
        self.keys[key] = value
        self._changes[key] = value

    def delete(self, key: bytes) -> None:
        self.keys.pop(key, None)
        self._changes[key] = None

    # -- what tests do --

    def run(self, command: Command) -> Outcome:
        self.index += 1
        self.history.append(command)
        self._changes = {}
        value = PROCEDURES[command.name](self, LogIndex(self.index), command.args())
        self.inventory.apply(self.index, self._changes.items(), self.now_ns)
        return Outcome.decode(value)

    def done(self, command: Command) -> int:
        outcome = self.run(command)
        assert outcome.done, outcome.reason
        return outcome.value

    def add_host(self, name: str, cpu_mhz: int = 8000, memory_mib: int = 16384, lease: bool = True) -> None:
        self.done(c.RegisterHost.of(Host(HostName(name), (("a", f"{name}:7400"),), cpu_mhz, memory_mib)))
        if lease:
            self.grant(name)

    def grant(self, host: str, boot: int = 1, instance: int = 1, created_ns: int = 0) -> int:
        ask = c.Grant(HostName(host), bytes([boot]) * 16, bytes([instance]) * 16, created_ns or self.index)
        return self.done(ask)

    def add_vm(self, name: str, **fields: object) -> None:
        self.done(c.DefineVm.of(Vm(VmName(name), **fields)))  # type: ignore[arg-type]

    def assign(self, vm: str, host: str) -> int:
        lease = self.lease(host).token
        run = Run.get(self, vm)
        return self.done(c.Assign(VmName(vm), HostName(host), lease, run.token if run else FencingToken(0), "test"))

    def report(self, vm: str, state: RunState = RunState.RUNNING) -> None:
        self._event += 1
        self.done(c.ReportVm(VmName(vm), self.runs(vm).token, b"\1" * 16, self._event, state))

    def start(self, vm: str, host: str, **fields: object) -> None:
        """Define it, assign it and report it running."""
        self.add_vm(vm, **fields)
        self.assign(vm, host)
        self.report(vm)

    def release(self, vm: str, failed: bool = False, text: str = "") -> None:
        self._event += 1
        self.done(c.Released(VmName(vm), self.runs(vm).token, b"\1" * 16, self._event, failed, None, text))

    def revoke(self, host: str) -> Outcome:
        return self.run(c.Revoke(HostName(host), self.lease(host).token, self.inventory.epoch.term, "silent"))

    def lease(self, host: str) -> Lease:
        lease = Lease.get(self, host)
        assert lease is not None
        return lease

    def runs(self, vm: str) -> Run:
        run = Run.get(self, vm)
        assert run is not None
        return run

    def token(self, host: str) -> LeaseToken:
        return self.lease(host).token
