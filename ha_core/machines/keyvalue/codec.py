"""Bytes of the key-value machine: log entries, replies, snapshots.

A log entry is a version byte and a msgpack array of commands, each (session, sequence, floor, kind, fields ...). Commands whose
reply is a log index (Grant, OpenSession, Call) stand alone in theirs, so that no two tokens are equal. What is decoded is
checked to the last type: an entry that breaks a rule is refused whole, on every replica alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, cast

import attrs
import msgpack

from ha_core.errors import CorruptRecordError, DecodeError
from ha_core.ids import LeaseToken, LogIndex, Revision
from ha_core.machines.keyvalue.model import (
    Body,
    Call,
    Called,
    Change,
    ClientSession,
    Command,
    Compact,
    Compare,
    Delete,
    DeletePrefix,
    ExpireLeases,
    ExpireSessions,
    Get,
    Grant,
    Granted,
    KeyEvent,
    LeaseState,
    Limits,
    OpenSession,
    Outcome,
    Plain,
    Put,
    Record,
    Refusal,
    Refused,
    Relation,
    Reply,
    RevisionEvents,
    Revoke,
    SessionOpened,
    SetLimits,
    Snapshot,
    Step,
    Target,
)

VERSION = 1
MAX_KEY_BYTES = 4096
MAX_CHANGE_BYTES = 1 << 20
MAX_STEPS = 4096
MAX_ENTRY_BYTES = 4 << 20
_MAX_NUMBER = (1 << 63) - 1
_SNAPSHOT_MAGIC = b"HAKV\x01"
_HASH_BYTES = 16

_packer = msgpack.Packer()
_pack = cast("Callable[[object], bytes]", _packer.pack)
_pack_array_header = cast("Callable[[int], bytes]", msgpack.Packer().pack_array_header)


def pack(plain: object) -> bytes:
    return _pack(plain)


def unpack(data: bytes) -> object:
    """One msgpack value, arrays as tuples.

    Raises:
        DecodeError: it is none, or holds an extension type or too deep a nesting.
    """
    try:
        value: object = msgpack.unpackb(data, use_list=False, strict_map_key=False, ext_hook=_refuse_extension)
    except DecodeError:
        raise
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as exc:
        raise DecodeError(f"not a msgpack value: {exc}", code="msgpack") from exc
    return value


def _refuse_extension(code: int, data: bytes) -> NoReturn:
    raise DecodeError(f"msgpack extension type {code} is not used here", code="msgpack")


def _bad(text: str) -> NoReturn:
    raise DecodeError(text, code="command")


# -- commands --

_KINDS: Mapping[type[Body], int] = {
    Change: 1, Grant: 2, Revoke: 3, Call: 4, OpenSession: 5, ExpireLeases: 6, ExpireSessions: 7, Compact: 8, SetLimits: 9,
}  # fmt: skip
_ALONE = (Grant, OpenSession, Call)


def stands_alone(body: Body) -> bool:
    """Its reply is its log index, so it may not share an entry."""
    return isinstance(body, _ALONE)


def encode_command(command: Command) -> bytes:
    """A command as it stands in an entry; the caller has checked it with ``problem_of``."""
    session, sequence, floor, body = command
    if type(body) is Change and len(body.then) == 1 and not body.compare and not body.otherwise:
        (step,) = body.then
        if type(step) is Put:
            return _pack((session, sequence, floor, 1, (), ((0, step.key, step.value, step.lease),), ()))
    return _pack((session, sequence, floor, _KINDS[type(body)], *_fields(body)))


def encode_entry(commands: Sequence[bytes]) -> bytes:
    """Commands encoded before, as one entry of the log."""
    return b"".join((b"\x01", _pack_array_header(len(commands)), *commands))


def decode_entry(data: bytes) -> tuple[Command, ...]:
    """The commands of an entry.

    Raises:
        DecodeError: not an entry of this version, or one of its commands breaks a rule.
    """
    if not data or data[0] != VERSION:
        _bad(f"log entry of version {data[0] if data else 'none'}, expected {VERSION}")
    plain = unpack(data[1:])
    if type(plain) is not tuple or not plain:
        _bad("a log entry is an array of commands")
    commands = tuple([_command(one) for one in plain])
    if len(commands) > 1:
        for command in commands:
            if stands_alone(command.body):
                _bad(f"{type(command.body).__name__} must stand alone in its entry")
    return commands


def decode_command(data: bytes) -> Command:
    """One command, as ``encode_command`` made it; raises DecodeError."""
    return _command(unpack(data))


def _command(plain: object) -> Command:
    if type(plain) is not tuple or len(plain) < 4:
        _bad("a command is an array (session, sequence, floor, kind, ...)")
    session, sequence, floor, kind = plain[:4]
    if not (_is_number(session) and _is_number(sequence) and _is_number(floor)):
        _bad("session, sequence and floor are whole numbers")
    put = _single_put(plain) if kind == 1 else None
    if put is not None:
        return Command(session, sequence, floor, Change((), (put,), ()))
    body = _body(kind, plain[4:])
    problem = problem_of(body)
    if problem is not None:
        _bad(problem)
    return Command(session, sequence, floor, body)


def _single_put(plain: tuple[object, ...]) -> Put | None:
    """The put of a change that is one, the most frequent command of all, in a third of the time; None for everything else."""
    if len(plain) != 7 or plain[4] != () or plain[6] != ():
        return None
    steps = plain[5]
    if type(steps) is not tuple or len(steps) != 1 or type(steps[0]) is not tuple or len(steps[0]) != 4:
        return None
    kind, key, value, lease = steps[0]
    if kind != 0 or type(key) is not bytes or type(value) is not bytes or not _is_number(lease):
        return None
    good = 0 < len(key) <= MAX_KEY_BYTES and len(key) + len(value) <= MAX_CHANGE_BYTES
    return Put(key, value, lease) if good else None


def _fields(body: Body) -> tuple[object, ...]:
    match body:
        case Change(compare, then, otherwise):
            return (
                tuple([(c.key, int(c.target), int(c.relation), c.operand) for c in compare]) if compare else (),
                tuple([_step_fields(step) for step in then]),
                tuple([_step_fields(step) for step in otherwise]) if otherwise else (),
            )
        case Grant(number) | Revoke(number) | Compact(number):
            return (number,)
        case Call(name, args):
            return (name, args)
        case OpenSession():
            return ()
        case ExpireLeases(items) | ExpireSessions(items):
            return (items,)
        case SetLimits(limits):
            return (attrs.astuple(limits),)


def _step_fields(step: Step) -> tuple[object, ...]:
    match step:
        case Put(key, value, lease):
            return (0, key, value, lease)
        case Delete(key):
            return (1, key)
        case DeletePrefix(key):
            return (2, key)
        case Get(key):
            return (3, key)


def _body(kind: object, fields: tuple[object, ...]) -> Body:
    try:
        match kind:
            case 1:
                compare, then, otherwise = cast("tuple[tuple[object, ...], ...]", fields)
                return Change(
                    tuple([_compare(one) for one in compare]) if compare else (),
                    tuple([_step(one) for one in then]),
                    tuple([_step(one) for one in otherwise]) if otherwise else (),
                )
            case 2:
                return Grant(*cast("tuple[int]", fields))
            case 3:
                return Revoke(*cast("tuple[LeaseToken]", fields))
            case 4:
                return Call(*cast("tuple[str, tuple[Plain, ...]]", fields))
            case 5:
                return OpenSession(*cast("tuple[()]", fields))
            case 6:
                return ExpireLeases(*cast("tuple[tuple[int, ...]]", fields))
            case 7:
                return ExpireSessions(*cast("tuple[tuple[tuple[int, int], ...]]", fields))
            case 8:
                return Compact(*cast("tuple[int]", fields))
            case 9:
                return SetLimits(_limits(fields[0]))
    except (TypeError, ValueError, IndexError) as exc:
        raise DecodeError(f"a command of kind {kind!r} has the wrong shape: {exc}", code="command") from exc
    _bad(f"unknown kind of command {kind!r}")


def _compare(plain: object) -> Compare:
    key, target, relation, operand = cast("tuple[bytes, int, int, int | bytes]", plain)
    return Compare(key, Target(target), Relation(relation), operand)


def _step(plain: object) -> Step:
    kind, *fields = cast("tuple[int, bytes, bytes, int]", plain)
    if kind == 0:
        key, value, lease = cast("tuple[bytes, bytes, int]", tuple(fields))
        return Put(key, value, lease)
    (key,) = cast("tuple[bytes]", tuple(fields))
    if kind == 1:
        return Delete(key)
    if kind == 2:
        return DeletePrefix(key)
    if kind == 3:
        return Get(key)
    _bad(f"unknown kind of step {kind!r}")


def _limits(plain: object) -> Limits:
    names = [field.name for field in attrs.fields(Limits)]
    values = cast("tuple[int, ...]", plain)
    return Limits(**dict(zip(names, values, strict=True)))


# -- the rules of commands --


def problem_of(body: Body) -> str | None:
    """What is wrong with a command, or None; the same at the door and in the log."""
    if isinstance(body, Change):
        return _problem_of_change(body)
    match body:
        case Grant(ttl_ns):
            return None if _is_number(ttl_ns) and ttl_ns >= 1_000_000 else "a lease's ttl is at least 1 ms"
        case Revoke(number) | Compact(number):
            return None if _is_number(number) else "expected a whole number"
        case Call(name, args):
            if type(name) is not str or type(args) is not tuple or not is_plain(args):
                return "a call has a name and a tuple of plain values, nested at most 32 deep"
            return None if len(_pack(args)) <= MAX_CHANGE_BYTES else f"a call carries at most {MAX_CHANGE_BYTES} bytes"
        case ExpireLeases(tokens):
            good = type(tokens) is tuple and all(_is_number(token) for token in tokens)
            return None if good else "lease tokens are whole numbers"
        case ExpireSessions(sessions):
            good = type(sessions) is tuple and all(
                type(one) is tuple and len(one) == 2 and _is_number(one[0]) and _is_number(one[1]) for one in sessions
            )
            return None if good else "sessions are pairs of whole numbers"
        case SetLimits(limits):
            return None if all(_is_number(value) for value in attrs.astuple(limits)) else "limits are whole numbers"
        case _:
            return None


def _problem_of_change(change: Change) -> str | None:
    size = 0
    count = len(change.compare)
    for compare in change.compare:
        if type(compare.key) is not bytes or not 0 < len(compare.key) <= MAX_KEY_BYTES:
            return f"a key is 1 to {MAX_KEY_BYTES} bytes"
        operand = compare.operand
        if type(operand) is bytes:
            size += len(operand)
        if (type(operand) is bytes) != (compare.target is Target.VALUE) or (
            type(operand) is not bytes and not _is_number(operand)
        ):
            return "a value is compared with bytes, anything else with a whole number"
    for steps in (change.then, change.otherwise):
        count += len(steps)
        for step in steps:
            if type(step) is Put:
                if type(step.value) is not bytes or not _is_number(step.lease):
                    return "a put has a value of bytes and a lease token"
                key = step.key
                size += len(step.value)
            elif type(step) is DeletePrefix:
                key = step.prefix or b"?"
            elif type(step) is Delete or type(step) is Get:
                key = step.key
            else:
                return f"{type(step).__name__} is no step of a change"
            if type(key) is not bytes or not 0 < len(key) <= MAX_KEY_BYTES:
                return f"a key is 1 to {MAX_KEY_BYTES} bytes"
            size += len(key)
    if count > MAX_STEPS or size > MAX_CHANGE_BYTES:
        return f"a change has at most {MAX_STEPS} parts and {MAX_CHANGE_BYTES} bytes, this one {count} and {size}"
    return None


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_NUMBER


def is_plain(value: object, depth: int = 32) -> bool:
    """Whether a value may go into the log or a reply."""
    if value is None or type(value) in (bool, str, bytes):
        return True
    if type(value) is int:
        return -_MAX_NUMBER <= value <= _MAX_NUMBER
    return type(value) is tuple and depth > 0 and all(is_plain(item, depth - 1) for item in value)


# -- replies --


def reply_fields(reply: Reply) -> tuple[object, ...]:
    """A reply as a plain tuple, for the wire and for snapshots."""
    match reply:
        case Outcome(succeeded, revision, results):
            return (1, succeeded, revision, tuple(results))
        case Granted(token):
            return (2, token)
        case SessionOpened(session):
            return (3, session)
        case Called(value, index, revision):
            return (4, value, index, revision)
        case Refused(code, text, detail):
            return (5, int(code), text, detail)


def reply_from(plain: object) -> Reply:
    """The reply that ``reply_fields`` made plain.

    Raises:
        DecodeError: it is none.
    """
    try:
        kind, *rest = cast("tuple[int, object]", plain)
        fields = tuple(rest)
        match kind:
            case 1:
                succeeded, revision, results = cast("tuple[bool, Revision, tuple[object, ...]]", fields)
                return Outcome(succeeded, revision, tuple([_result(one) for one in results]))
            case 2:
                return Granted(*cast("tuple[LeaseToken]", fields))
            case 3:
                return SessionOpened(*cast("tuple[int]", fields))
            case 4:
                return Called(*cast("tuple[Plain, LogIndex, Revision]", fields))
            case 5:
                code, text, detail = cast("tuple[int, str, Plain]", fields)
                return Refused(Refusal(code), text, detail)
    except (TypeError, ValueError) as exc:
        raise DecodeError(f"a reply has the wrong shape: {exc}", code="reply") from exc
    _bad(f"unknown kind of reply {kind!r}")


def _result(plain: object) -> Record | int | None:
    if plain is None or isinstance(plain, int):
        return plain
    return record_from(plain)


def record_from(plain: object) -> Record:
    """Raises DecodeError."""
    if type(plain) is not tuple or len(plain) != 6 or type(plain[0]) is not bytes or type(plain[1]) is not bytes:
        _bad("a record is (key, value, create revision, mod revision, version, lease)")
    return Record(*plain)


def events_from(plain: object) -> RevisionEvents:
    """Raises DecodeError."""
    try:
        revision, events = cast("tuple[int, tuple[tuple[bytes, object, object], ...]]", plain)
        return RevisionEvents(
            revision,
            tuple(
                [
                    KeyEvent(
                        key,
                        None if record is None else record_from(record),
                        None if previous is None else record_from(previous),
                    )
                    for key, record, previous in events
                ]
            ),
        )
    except (TypeError, ValueError) as exc:
        raise DecodeError(f"a revision has the wrong shape: {exc}", code="events") from exc


# -- snapshots --


def encode_snapshot(snapshot: Snapshot) -> bytes:
    """The same bytes on every replica that is at the same index: sorted by key and by number."""
    body = _pack(
        (
            snapshot.index, snapshot.revision, snapshot.compacted, snapshot.digest, attrs.astuple(snapshot.limits),
            tuple(snapshot.records),
            tuple(snapshot.history),
            [(token, lease.ttl_ns, tuple(sorted(lease.keys))) for token, lease in sorted(snapshot.leases.items())],
            [
                (number, one.last_index, one.floor, [(seq, reply_fields(reply)) for seq, reply in sorted(one.replies.items())])
                for number, one in sorted(snapshot.sessions.items())
            ],
        )
    )  # fmt: skip
    return _SNAPSHOT_MAGIC + _hash(body) + body


def snapshot_hash(data: bytes) -> bytes:
    """The state hash inside an encoded snapshot."""
    return data[len(_SNAPSHOT_MAGIC) : len(_SNAPSHOT_MAGIC) + _HASH_BYTES]


def decode_snapshot(data: bytes) -> Snapshot:
    """Raises CorruptRecordError: not a snapshot of this version, or damaged."""
    start = len(_SNAPSHOT_MAGIC) + _HASH_BYTES
    body = data[start:]
    if not data.startswith(_SNAPSHOT_MAGIC) or _hash(body) != snapshot_hash(data):
        raise CorruptRecordError("the database's snapshot is damaged or of another version: refetch it from the leader")
    try:
        index, revision, compacted, digest, limits, records, history, leases, sessions = cast(
            "tuple[int, int, int, int, object, tuple[object, ...], tuple[object, ...],"
            " tuple[tuple[int, int, tuple[bytes, ...]], ...],"
            " tuple[tuple[int, int, int, tuple[tuple[int, object], ...]], ...]]",
            unpack(body),
        )
        return Snapshot(
            index, revision, compacted, digest, _limits(limits),
            [record_from(one) for one in records],
            [events_from(one) for one in history],
            {token: LeaseState(ttl_ns, dict.fromkeys(keys)) for token, ttl_ns, keys in leases},
            {
                number: ClientSession(last_index, floor, {seq: reply_from(one) for seq, one in replies})
                for number, last_index, floor, replies in sessions
            },
        )  # fmt: skip
    except (DecodeError, TypeError, ValueError) as exc:
        raise CorruptRecordError(f"the database's snapshot has the wrong shape: {exc}") from exc


def _hash(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_HASH_BYTES).digest()
