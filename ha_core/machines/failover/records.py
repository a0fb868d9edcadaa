"""What high availability keeps in the replicated database: one record a key, under ``\\x00ha/``, written by procedures only.

A record is a frozen attrs class; its value in the database is the msgpack array of its fields in order. Fields are only ever
added at the end, with a default: an older reader ignores what it does not know, a newer one fills in what is missing. Times are
integer nanoseconds, numbers of the log are log indexes.

Do not confuse: a *lease token* is the index of a Grant (one host's right to run VMs), a *fencing token* the index of an Assign
(one run of one VM); both only grow (I44).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import ClassVar, Final, Protocol, TypeVar, cast

import attrs
import msgpack

from ha_core.errors import StorageError
from ha_core.ids import FencingToken, HostName, LeaseToken, LinkName, LogIndex, VmName
from ha_core.machines.keyvalue.model import RESERVED, Plain

PREFIX: Final = RESERVED


class KvTransaction(Protocol):
    """The key-value machine as a procedure sees it: reads its own writes, all or nothing."""

    def get(self, key: bytes) -> bytes | None: ...
    def range(self, prefix: bytes) -> Sequence[tuple[bytes, bytes]]: ...
    def put(self, key: bytes, value: bytes) -> None: ...
    def delete(self, key: bytes) -> None: ...


class HostState(enum.Enum):
    ONLINE = "online"
    MAINTENANCE = "maintenance"
    """Evacuated and kept empty; survives a reboot."""
    SHUTDOWN = "shutdown"
    """Going down in an orderly way: evacuated, what cannot move is stopped; ends with the next boot."""
    FREEZE = "freeze"
    """Going down: its VMs are stopped and wait for it; ends with the next boot."""


class Role(enum.Enum):
    PRIMARY = "primary"
    SECONDARY = "secondary"
    WITNESS = "witness"
    """Votes; runs no VMs and never leads."""


class Priority(enum.IntEnum):
    """Restart order: lower numbers first."""

    HIGHEST = 0
    HIGH = 1
    MEDIUM = 2
    LOW = 3
    LOWEST = 4
    DISABLED = 5
    """Runs under a lease, but is never restarted by itself."""


class Safety(enum.Enum):
    LEASE = "lease"
    """Killed at the host's deadline."""
    FENCE = "fence"
    """Left running; restarted elsewhere only after confirmed fencing."""


class Wanted(enum.Enum):
    STARTED = "started"
    STOPPED = "stopped"
    IGNORED = "ignored"
    """Neither restarted nor moved; keeps its lease and deadline."""


class RunState(enum.Enum):
    ASSIGNED = "assigned"
    """Committed; the host may start it at any moment."""
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    RELEASED = "released"
    """The holder's guard says: reaped, and this Assign will never be started."""
    LOST = "lost"
    """Its lease was revoked: it ended at the host's deadline."""
    UNFENCED = "unfenced"
    """Its lease was revoked, but it may outlive that: waits for a stop report, fencing or an administrator."""


class RuleKind(enum.Enum):
    TOGETHER = "together"
    APART = "apart"
    PREFER = "prefer"
    REQUIRE = "require"


class Mode(enum.Enum):
    ARMED = "armed"
    DISARMED = "disarmed"
    """Leases without a deadline, no restarts, nothing is revoked."""


class AdmissionPolicy(enum.Enum):
    NONE = "none"
    HOST_FAILURES = "host-failures"
    """What runs must fit on the hosts that are left when the ``tolerate`` largest have failed."""
    PERCENTAGE = "percentage"
    """``tolerate`` percent of the capacity stay free."""
    FAILOVER_HOSTS = "failover-hosts"
    """Named hosts stay empty until a failover needs them."""


R = TypeVar("R", bound="Record")


def _texts(value: Iterable[object]) -> tuple[str, ...]:
    return tuple(str(item) for item in value)


def _pairs(value: Iterable[Sequence[object]]) -> tuple[tuple[str, str], ...]:
    return tuple((str(key), str(item)) for key, item in value)


def _weights(value: Iterable[Sequence[object]]) -> tuple[tuple[str, int], ...]:
    return tuple((str(key), int(cast(int, weight))) for key, weight in value)


def _options(value: Iterable[Sequence[object]]) -> tuple[tuple[str, Plain], ...]:
    return tuple((str(key), cast(Plain, item)) for key, item in value)


def plain(value: object) -> Plain:
    """A record's field, or a command's argument, as msgpack can carry it."""
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, (tuple, list)):
        return tuple(plain(item) for item in value)
    if value is None or isinstance(value, (bool, int, str, bytes)):
        return value
    kind = type(value)
    if attrs.has(kind):
        return tuple(plain(getattr(value, field.name)) for field in attrs.fields(kind))
    raise StorageError(f"{value!r} cannot be kept in a record: use numbers, text, bytes, None or tuples of them")


class Record:
    """Base of all records: where it lies and how it is written."""

    table: ClassVar[bytes]

    def encode(self) -> bytes:
        return cast(bytes, msgpack.packb(plain(self), use_bin_type=True))

    @classmethod
    def decode(cls: type[R], value: bytes) -> R:
        """Raises StorageError for bytes that are no record of this class."""
        try:
            fields = msgpack.unpackb(value, use_list=False)
            return cls(*fields[: len(attrs.fields(cast(type[attrs.AttrsInstance], cls)))])
        except (ValueError, TypeError, msgpack.UnpackException) as exc:
            raise StorageError(f"a {cls.__name__} in the database cannot be read: {exc}") from exc

    @classmethod
    def key_of(cls, name: str) -> bytes:
        return PREFIX + cls.table + b"/" + name.encode()

    @classmethod
    def prefix(cls) -> bytes:
        return PREFIX + cls.table + b"/"

    @classmethod
    def get(cls: type[R], tx: KvTransaction, name: str) -> R | None:
        value = tx.get(cls.key_of(name))
        return None if value is None else cls.decode(value)

    @classmethod
    def all(cls: type[R], tx: KvTransaction) -> list[R]:
        """Every record of the table, by name."""
        return [cls.decode(value) for _, value in tx.range(cls.prefix())]

    def put(self, tx: KvTransaction) -> None:
        tx.put(self.key_of(self.key_name), self.encode())

    def delete(self, tx: KvTransaction) -> None:
        tx.delete(self.key_of(self.key_name))

    @property
    def key_name(self) -> str:
        raise NotImplementedError


@attrs.frozen
class Host(Record):
    """A machine that runs VMs (or votes), registered by its FQDN."""

    table: ClassVar[bytes] = b"host"
    name: HostName
    addresses: tuple[tuple[str, str], ...] = attrs.field(default=(), converter=_pairs)
    """Link name -> ``host:port`` of its AAM."""
    cpu_mhz: int = 0
    memory_mib: int = 0
    state: HostState = attrs.field(default=HostState.ONLINE, converter=HostState)
    role: Role = attrs.field(default=Role.PRIMARY, converter=Role)
    boot: bytes = b""
    """The kernel boot id that its AAM last registered under."""
    versions: tuple[tuple[str, str], ...] = attrs.field(default=(), converter=_pairs)
    management: str = ""
    """``host:port`` of its VPXA, for the center."""
    watchdog: bool = False
    """A hardware watchdog ends VMs that outlive the agents."""
    containment: str = ""
    """How its guard keeps VMs together: pid-namespace or subreaper; empty: whoever wrote this did not know."""

    @property
    def key_name(self) -> str:
        return self.name

    def taking_over(self, known: Host) -> Host:
        """This record in place of a ``known`` one: what administrators decided stays, and what this one does not say."""
        return attrs.evolve(self, state=known.state, role=known.role, containment=self.containment or known.containment)

    def address(self, link: LinkName) -> str | None:
        return dict(self.addresses).get(link)


@attrs.frozen
class Lease(Record):
    """One host's right to run VMs, bound to a kernel boot and a guard instance.

    A Grant to another kernel boot, or one that gives deadlines back to a disarmed lease, first becomes the *candidate*: its
    holder proves that it lives and uses the new numbers by renewing under the candidate's token, and only that ends the lease
    before. (A copy of an old request that the network delivers late can therefore not pass for a reboot.)
    """

    table: ClassVar[bytes] = b"lease"
    host: HostName
    token: LeaseToken
    boot: bytes
    instance: bytes
    created_ns: int
    """Boot-clock time at which the guard asked; a later ask of the same boot wins, an earlier one is refused."""
    lease_ns: int
    margin_ns: int
    hold_ns: int
    """How long the leader counts after a renewal: the longest ``lease_ns`` that a deadline of this boot may rest on."""
    armed: bool = True
    revoked: bool = False
    continued: LeaseToken = LeaseToken(0)
    """The first token of the unbroken chain that ends with this one (0: this one began it): what a guard holds under any
    token from there on goes on under this one."""
    candidate: LeaseToken = LeaseToken(0)
    candidate_boot: bytes = b""
    candidate_instance: bytes = b""
    candidate_created_ns: int = 0
    candidate_lease_ns: int = 0
    candidate_margin_ns: int = 0
    candidate_armed: bool = True

    @property
    def key_name(self) -> str:
        return self.host

    def holds(self, token: LeaseToken) -> bool:
        """Whether ``token`` is the one that may be renewed."""
        return token == self.token and not self.revoked


@attrs.frozen
class Epoch(Record):
    """Which leader's verdicts count: a Revoke of another term is refused, however late or by whomever it is proposed."""

    table: ClassVar[bytes] = b"epoch"
    term: int = 0
    node: str = ""
    index: int = 0
    """Of its Lead: leases granted later were granted under this leader."""

    @property
    def key_name(self) -> str:
        return "leader"


@attrs.frozen
class Vm(Record):
    """What to run, how important it is and what is wanted of it."""

    table: ClassVar[bytes] = b"vm"
    name: VmName
    driver: str = "process"
    options: tuple[tuple[str, Plain], ...] = attrs.field(default=(), converter=_options)
    priority: Priority = attrs.field(default=Priority.MEDIUM, converter=Priority)
    after: tuple[str, ...] = attrs.field(default=(), converter=_texts)
    """VMs that must be up before this one starts."""
    cpu_mhz: int = 500
    memory_mib: int = 512
    shutdown_ns: int = 0
    """How long its orderly shutdown may take; at the host's deadline it adds to both the deadline and the expiry."""
    start_ns: int = 1_000_000_000
    """It is up after running for so long; one that ends earlier counts as a failed start."""
    safety: Safety = attrs.field(default=Safety.LEASE, converter=Safety)
    max_restart: int = 1
    max_relocate: int = 1
    failback: bool = True
    wanted: Wanted = attrs.field(default=Wanted.STARTED, converter=Wanted)
    host: str = ""
    """Preferred for the first start; empty: anywhere."""
    outlives: bool = False
    """Its driver's VMs survive killed agents, and nothing else ends them: unfenced."""
    stop_ns: int = -1
    """How long an ordered stop may take (by an administrator, for a move or a maintenance); -1: ``shutdown_ns``. Nobody's
    lease waits for it, so a failover does not either."""

    @property
    def key_name(self) -> str:
        return self.name


@attrs.frozen
class Run(Record):
    """The last Assign of a VM and what became of it. Kept until it is released, even if the VM's definition is removed."""

    table: ClassVar[bytes] = b"run"
    vm: VmName
    token: FencingToken
    host: HostName
    lease: LeaseToken
    state: RunState = attrs.field(default=RunState.ASSIGNED, converter=RunState)
    recalled: bool = False
    """The holder shall end it and release it."""
    grace_ns: int = -1
    """How long the recalled VM may take to shut down; -1: as its definition says."""
    target: str = ""
    """Where to start it next, if a host was named by whoever recalled it."""
    home: str = ""
    """Where it goes back to after a maintenance or shutdown of that host."""
    why: str = ""
    shutdown_ns: int = 0
    """As it was when assigned: its holder's deadline and the leader's expiry both rest on it."""
    outlives: bool = False
    attempts: int = 0
    """Starts that failed since it last ran well; counted here, so that no coordinator's death forgets them (H7)."""
    crashed: bool = False
    """It was up and ended by itself: the first time it restarts at once, then by the schedule, until it has settled."""
    avoid: tuple[str, ...] = attrs.field(default=(), converter=_texts)
    """Hosts on which a start failed since an administrator's last order: chosen last, never for failback (H15)."""
    failed: bool = False
    """Given up until an administrator acts."""
    ordered: bool = False
    """An administrator ordered the next start: even a VM that is never restarted by itself starts."""
    instance: bytes = b""
    """The guard instance whose report was accepted last, and the report's number: older ones are dropped (L7, H21)."""
    event: int = 0
    exit_code: int | None = None
    text: str = ""

    @property
    def key_name(self) -> str:
        return self.vm

    @property
    def held(self) -> bool:
        """The VM may be running on ``host`` under the lease."""
        return self.state in _HELD

    @property
    def free(self) -> bool:
        """It certainly runs nowhere: another Assign is allowed (L3)."""
        return self.state in (RunState.RELEASED, RunState.LOST)

    @property
    def up(self) -> bool:
        return self.state is RunState.RUNNING and not self.recalled


_HELD = (RunState.ASSIGNED, RunState.STARTING, RunState.RUNNING, RunState.STOPPING)


@attrs.frozen
class Rule(Record):
    """An affinity: VMs together, apart, or on hosts with a weight (higher first; prefer bends, require does not)."""

    table: ClassVar[bytes] = b"rule"
    name: str
    kind: RuleKind = attrs.field(converter=RuleKind)
    vms: tuple[str, ...] = attrs.field(default=(), converter=_texts)
    hosts: tuple[tuple[str, int], ...] = attrs.field(default=(), converter=_weights)

    @property
    def key_name(self) -> str:
        return self.name


def _seconds(*values: int) -> tuple[int, ...]:
    return tuple(value * 1_000_000_000 for value in values)


def _numbers(value: Iterable[object]) -> tuple[int, ...]:
    return tuple(int(cast(int, item)) for item in value)


@attrs.frozen
class Settings(Record):
    """The numbers and policies of the whole cluster."""

    table: ClassVar[bytes] = b"settings"
    lease_ns: int = 2_000_000_000
    margin_ns: int = 300_000_000
    renewal_ns: int = 150_000_000
    mode: Mode = attrs.field(default=Mode.ARMED, converter=Mode)
    retries_ns: tuple[int, ...] = attrs.field(default=_seconds(0, 120, 360, 840, 1800), converter=_numbers)
    """When the tries of a failing start come, counted from the first."""
    settle_ns: int = 60_000_000_000
    """A run that lasted so long has worked: its failed tries are forgotten."""
    admission: AdmissionPolicy = attrs.field(default=AdmissionPolicy.NONE, converter=AdmissionPolicy)
    tolerate: int = 1
    """Hosts, or percent, by ``admission``."""
    failover_hosts: tuple[str, ...] = attrs.field(default=(), converter=_texts)
    starts_per_host: int = 32
    """Starts in progress on one host."""
    moves: int = 4
    """Planned moves in progress in the whole cluster."""

    @property
    def key_name(self) -> str:
        return "all"


@attrs.frozen
class Name(Record):
    """A managed name beside the hosts' own: for FT_HOSTS and the hosts file."""

    table: ClassVar[bytes] = b"name"
    fqdn: str
    addresses: tuple[str, ...] = attrs.field(default=(), converter=_texts)
    aliases: tuple[str, ...] = attrs.field(default=(), converter=_texts)

    @property
    def key_name(self) -> str:
        return self.fqdn


@attrs.frozen
class Decision(Record):
    """Why something was done: what ``ha-core explain`` tells. The last ``HISTORY`` of them are kept."""

    table: ClassVar[bytes] = b"decision"
    number: int
    """1, 2, 3, ... over the cluster's life."""
    index: LogIndex
    kind: str
    host: str = ""
    vm: str = ""
    token: int = 0
    why: str = ""

    @property
    def key_name(self) -> str:
        return f"{self.number % HISTORY:04d}"


HISTORY: Final = 1000


@attrs.frozen
class DecisionCount(Record):
    table: ClassVar[bytes] = b"decisions"
    last: int = 0

    @property
    def key_name(self) -> str:
        return "count"


TABLES: Final[tuple[type[Record], ...]] = (Host, Lease, Epoch, Vm, Run, Rule, Settings, Name, Decision, DecisionCount)
