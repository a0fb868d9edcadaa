"""The words of the key-value machine: records, changes, outcomes. Public ones are re-exported by ``ha_core``.

Records, events and revisions are tuples by name, not attrs classes: they are what a snapshot packs, millions of them, and a
tuple is made in half the time.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import attrs

from ha_core.ids import LeaseToken, LogIndex, Revision

RESERVED = b"\x00ha/"
"""Keys under this prefix are written by procedures only; everybody may read and watch them."""

Plain: TypeAlias = None | bool | int | str | bytes | tuple["Plain", ...]
"""What a procedure takes and gives: plain values, equal on every replica."""


# -- what is stored --


class Record(NamedTuple):
    """A key as it is: ``version`` counts its writes since it was created, ``lease`` is the token it hangs on, 0 for none."""

    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int


class KeyEvent(NamedTuple):
    """One key's change in one revision: ``record`` is None if it was deleted, ``previous`` None if it was not there."""

    key: bytes
    record: Record | None
    previous: Record | None


class RevisionEvents(NamedTuple):
    """All that one transaction changed: a watcher sees it whole or not at all."""

    revision: int
    events: tuple[KeyEvent, ...]


@attrs.frozen
class Page:
    """A part of a range, in key order, as it was at ``revision``; ``more``: there are records behind the last one."""

    records: Sequence[Record]
    revision: Revision
    more: bool


# -- what a transaction does --


@attrs.frozen
class Put:
    key: bytes
    value: bytes
    lease: int = 0


@attrs.frozen
class Delete:
    key: bytes


@attrs.frozen
class DeletePrefix:
    """Delete every key that starts with ``prefix``."""

    prefix: bytes


@attrs.frozen
class Get:
    """Read one key; inside a transaction it sees the transaction's own earlier writes."""

    key: bytes


Step: TypeAlias = Put | Delete | DeletePrefix | Get


class Target(enum.IntEnum):
    """What of a key is compared. A key that is not there has an empty value and zeros."""

    VALUE = 0
    VERSION = 1
    CREATE_REVISION = 2
    MOD_REVISION = 3
    LEASE = 4


class Relation(enum.IntEnum):
    EQUAL = 0
    NOT_EQUAL = 1
    LESS = 2
    GREATER = 3


@attrs.frozen
class Compare:
    """``key``'s ``target`` stands in ``relation`` to ``operand`` (bytes for VALUE, else a whole number)."""

    key: bytes
    target: Target
    relation: Relation
    operand: int | bytes

    @classmethod
    def missing(cls, key: bytes) -> Compare:
        return cls(key, Target.VERSION, Relation.EQUAL, 0)

    @classmethod
    def exists(cls, key: bytes) -> Compare:
        return cls(key, Target.VERSION, Relation.GREATER, 0)

    @classmethod
    def value(cls, key: bytes, value: bytes) -> Compare:
        return cls(key, Target.VALUE, Relation.EQUAL, value)

    @classmethod
    def unchanged(cls, key: bytes, since: int) -> Compare:
        """Nobody wrote the key after revision ``since``, its ``mod_revision`` when it was read (0: it was not there)."""
        return cls(key, Target.MOD_REVISION, Relation.EQUAL, since)


@attrs.frozen
class Change:
    """One transaction: if every ``compare`` holds the steps of ``then`` are done, else those of ``otherwise``; all of its
    writes share one revision, and a key written twice keeps the last."""

    compare: Sequence[Compare] = ()
    then: Sequence[Step] = ()
    otherwise: Sequence[Step] = ()


@attrs.frozen
class Grant:
    """A new lease of ``ttl_ns``; its token is the log index of this command."""

    ttl_ns: int


@attrs.frozen
class Revoke:
    """End a lease and delete the keys that hang on it, in one revision."""

    token: LeaseToken


@attrs.frozen
class Call:
    """Run the procedure ``name``; all that it writes shares one revision."""

    name: str
    args: tuple[Plain, ...]


@attrs.frozen
class OpenSession:
    """A new client session; its id is the log index of this command."""


@attrs.frozen
class ExpireLeases:
    """The leader counted these leases out: deleted together, in one revision."""

    tokens: tuple[int, ...]


@attrs.frozen
class ExpireSessions:
    """Forget sessions, each only if its last command is still the one at this log index."""

    sessions: tuple[tuple[int, int], ...]


@attrs.frozen
class Compact:
    """Drop the history up to and including ``revision``."""

    revision: int


@attrs.frozen(kw_only=True)
class Limits:
    """Part of the replicated state and changed only through the log, so that every replica refuses the same commands."""

    max_bytes: int = 256 << 20
    """Keys, values and 64 bytes a record."""
    reserve_bytes: int = 32 << 20
    """The last part of ``max_bytes``, kept for procedures; deletes, leases and revocations always pass."""
    history_revisions: int = 16384
    """Revisions kept for watches and reads of the past ..."""
    history_bytes: int = 4 << 20
    """... and their bytes, whichever is reached first."""
    max_sessions: int = 10_000
    """When one more is opened the one longest unused is forgotten."""
    max_leases: int = 100_000


@attrs.frozen
class SetLimits:
    limits: Limits


Body: TypeAlias = (
    Change | Grant | Revoke | Call | OpenSession | ExpireLeases | ExpireSessions | Compact | SetLimits
)  # fmt: skip


class Command(NamedTuple):
    """What the log carries. ``session`` 0: applied each time it stands in the log. Else it is applied once for each
    (session, sequence), and every sequence below ``floor`` is settled: its reply will never be asked for again."""

    session: int
    sequence: int
    floor: int
    body: Body


@attrs.frozen(order=True)
class RequestId:
    """Names one request of one client session for ever: repeating the request under it is applied once."""

    session: int
    sequence: int


# -- replies --


@attrs.frozen
class Outcome:
    """``succeeded``: every compare held. ``results``, one a step: Get gives a Record or None, a delete the number of deleted
    keys, Put None. ``revision``: of the database after the change."""

    succeeded: bool
    revision: Revision
    results: Sequence[Record | int | None] = ()


@attrs.frozen
class Granted:
    token: LeaseToken


@attrs.frozen
class SessionOpened:
    session: int


@attrs.frozen
class Called:
    """What the procedure returned, and the log index and revision at which it ran."""

    value: Plain
    index: LogIndex
    revision: Revision


class Refusal(enum.IntEnum):
    """Why nothing was done."""

    BAD = 1
    """The command breaks a rule; it will never be accepted."""
    RESERVED = 2
    QUOTA = 3
    LEASE_NOT_FOUND = 4
    SESSION_EXPIRED = 5
    """The session is forgotten: whether the request was applied before cannot be told any more."""
    SETTLED = 6
    """The client itself declared this sequence settled."""
    PROCEDURE = 7
    """The procedure raised; nothing of it was kept."""
    COMPACTED = 8
    TOO_MANY = 9
    NOT_LEADER = 10
    """Asked of a replica that does not lead; ``detail`` names the leader, if known."""
    UNAVAILABLE = 11
    """No leader in time; the request certainly was not carried out."""
    UNKNOWN = 12
    """No answer in time, or not any more: the request may have been carried out."""
    MEMBERS = 13
    """The change of members is not possible now; the text says why."""


@attrs.frozen
class Refused:
    code: Refusal
    text: str
    detail: Plain = None


Reply: TypeAlias = Outcome | Granted | SessionOpened | Called | Refused


# -- snapshots --


@attrs.define
class ClientSession:
    last_index: int
    floor: int = 0
    replies: dict[int, Reply] = attrs.field(factory=dict)


@attrs.define
class LeaseState:
    """``keys`` is a dict for its order: a set has none that every replica shares."""

    ttl_ns: int
    keys: dict[bytes, None] = attrs.field(factory=dict)


@attrs.frozen
class Snapshot:
    """Everything that a replica must agree on at ``index``."""

    index: int
    revision: int
    compacted: int
    digest: int
    limits: Limits
    records: Sequence[Record]
    history: Sequence[RevisionEvents]
    leases: Mapping[int, LeaseState]
    sessions: Mapping[int, ClientSession]
