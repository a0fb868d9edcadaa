"""The log commands of high availability: ``Call(command.name, command.args())`` is what is proposed; procedures.py runs them.

Each names what its proposer saw (a token, the previous run), so that one that comes too late is refused instead of done twice:
any of them may be proposed again at any time, by any leader.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Generic, Self, TypeVar, cast

import attrs

from ha_core.errors import StorageError
from ha_core.ids import FencingToken, HostName, LeaseToken, VmName
from ha_core.machines.failover.records import (
    Host,
    HostState,
    Name,
    Record,
    Role,
    Rule,
    RunState,
    Settings,
    Vm,
    Wanted,
    plain,
)
from ha_core.machines.keyvalue.model import Plain

C = TypeVar("C", bound="Command")
R = TypeVar("R", bound=Record)


class Command:
    """Base of all commands."""

    name: ClassVar[str]

    def args(self) -> tuple[Plain, ...]:
        return cast(tuple[Plain, ...], plain(self))

    @classmethod
    def decode(cls: type[C], args: Sequence[Plain]) -> C:
        """Raises StorageError for arguments of another shape."""
        try:
            return cls(*args)
        except (TypeError, ValueError) as exc:
            raise StorageError(f"{cls.name}: wrong arguments: {exc}") from exc


@attrs.frozen
class RecordCommand(Command, Generic[R]):
    """Base of those that put a whole record; ``procedure`` refuses one of a wrong shape before anything looks at it."""

    kind: ClassVar[type[Record]]
    fields: tuple[Plain, ...]

    @classmethod
    def of(cls, record: R) -> Self:
        return cls(cast(tuple[Plain, ...], plain(record)))

    def record(self) -> R:
        return cast(R, self.kind(*self.fields))


@attrs.frozen
class Outcome:
    """What a procedure answers: ``value`` if it was done (or had been done before), else why not."""

    done: bool
    value: int = 0
    reason: str = ""

    def encode(self) -> tuple[Plain, ...]:
        return (self.done, self.value, self.reason)

    @classmethod
    def decode(cls, value: Plain) -> Outcome:
        if not isinstance(value, tuple) or len(value) < 3:
            raise StorageError("a procedure's outcome cannot be read")
        return cls(bool(value[0]), cast(int, value[1]), cast(str, value[2]))


# -- leases --


@attrs.frozen
class Lead(Command):
    """The leader of ``term`` takes over the leases: it confirms none before this is applied, and from then on no Revoke of an
    earlier term is."""

    name: ClassVar[str] = "ha.lead"
    term: int
    node: str = ""


@attrs.frozen
class Grant(Command):
    """A guard asks for a lease; answers its token (the one it has already, if that is still good)."""

    name: ClassVar[str] = "ha.grant"
    host: HostName
    boot: bytes
    instance: bytes
    created_ns: int
    """Boot-clock time of the ask."""


@attrs.frozen
class Confirm(Command):
    """The candidate's holder has renewed under its token: it lives, and the lease before ends."""

    name: ClassVar[str] = "ha.confirm"
    host: HostName
    token: LeaseToken


@attrs.frozen
class Revoke(Command):
    """The leader of ``term`` counted the lease out and will never confirm its token again."""

    name: ClassVar[str] = "ha.revoke"
    host: HostName
    token: LeaseToken
    term: int
    why: str = ""


@attrs.frozen
class Fenced(Command):
    """A fence device (or an administrator) vouches that the host ran nothing after ``token`` was its lease."""

    name: ClassVar[str] = "ha.fenced"
    host: HostName
    token: LeaseToken
    why: str = ""


# -- runs --


@attrs.frozen
class Assign(Command):
    """Run ``vm`` on ``host`` under its lease; ``previous`` is the fencing token of the run it follows (0: the first)."""

    name: ClassVar[str] = "ha.assign"
    vm: VmName
    host: HostName
    lease: LeaseToken
    previous: FencingToken
    why: str = ""


@attrs.frozen
class Recall(Command):
    """End the run and release it, to start elsewhere (``target``, if one is named) or not at all."""

    name: ClassVar[str] = "ha.recall"
    vm: VmName
    token: FencingToken
    why: str = ""
    target: str = ""
    home: str = ""


@attrs.frozen
class ReportVm(Command):
    """What the holder's guard saw: starting, running or stopping."""

    name: ClassVar[str] = "ha.report"
    vm: VmName
    token: FencingToken
    instance: bytes
    event: int
    state: RunState = attrs.field(converter=RunState)
    text: str = ""


@attrs.frozen
class Released(Command):
    """The holder's guard says: the VM is reaped and this Assign will never be started."""

    name: ClassVar[str] = "ha.released"
    vm: VmName
    token: FencingToken
    instance: bytes
    event: int
    failed: bool = False
    """It could not be started."""
    exit_code: int | None = None
    text: str = ""


@attrs.frozen
class Settle(Command):
    """The run has lasted: its failed tries are forgotten."""

    name: ClassVar[str] = "ha.settle"
    vm: VmName
    token: FencingToken


# -- inventory, by administrators and agents --


@attrs.frozen
class RegisterHost(RecordCommand[Host]):
    """A host's AAM (or the center) says what it is; its state and role stay as they are if it is known."""

    name: ClassVar[str] = "ha.host"
    kind: ClassVar[type[Host]] = Host


@attrs.frozen
class RemoveHost(Command):
    name: ClassVar[str] = "ha.host.remove"
    host: HostName


@attrs.frozen
class SetHostState(Command):
    name: ClassVar[str] = "ha.host.state"
    host: HostName
    state: HostState = attrs.field(converter=HostState)


@attrs.frozen
class SetHostRole(Command):
    name: ClassVar[str] = "ha.host.role"
    host: HostName
    role: Role = attrs.field(converter=Role)


@attrs.frozen
class DefineVm(RecordCommand[Vm]):
    """Add a VM or change its definition; ``wanted`` of a known one is left to WantVm."""

    name: ClassVar[str] = "ha.vm"
    kind: ClassVar[type[Vm]] = Vm


@attrs.frozen
class RemoveVm(Command):
    """Forget the definition; a run that is there goes on, unmanaged, until it ends."""

    name: ClassVar[str] = "ha.vm.remove"
    vm: VmName


@attrs.frozen
class WantVm(Command):
    """An administrator's order: start, stop or ignore. A start ends ``failed`` and forgets failed tries."""

    name: ClassVar[str] = "ha.vm.want"
    vm: VmName
    wanted: Wanted = attrs.field(converter=Wanted)
    grace_ns: int = -1
    """With a stop: killed after so long; -1: as its definition says."""


@attrs.frozen
class MoveVm(Command):
    """An administrator's order to run it on ``host``: stopped where it is, then started there."""

    name: ClassVar[str] = "ha.vm.move"
    vm: VmName
    host: HostName


@attrs.frozen
class SetRule(RecordCommand[Rule]):
    name: ClassVar[str] = "ha.rule"
    kind: ClassVar[type[Rule]] = Rule


@attrs.frozen
class RemoveRule(Command):
    name: ClassVar[str] = "ha.rule.remove"
    rule: str


@attrs.frozen
class SetSettings(RecordCommand[Settings]):
    """The whole record; a change of ``mode`` arms or disarms the cluster."""

    name: ClassVar[str] = "ha.settings"
    kind: ClassVar[type[Settings]] = Settings


@attrs.frozen
class SetName(RecordCommand[Name]):
    """A managed name beside the hosts'; no addresses: forget it."""

    name: ClassVar[str] = "ha.name"
    kind: ClassVar[type[Name]] = Name
