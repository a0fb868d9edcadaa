"""Log entries as bytes, and the rules of commands.

A log entry is a version byte and a msgpack array of commands, each (session, sequence, floor, kind, fields ...). Commands whose
reply is a log index (Grant, OpenSession, Call) stand alone in theirs, so that no two tokens are equal. What is decoded is
checked to the last type: an entry that breaks a rule is refused whole, on every replica alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, cast

import attrs
import msgpack

from ha_core.errors import DecodeError
from ha_core.ids import LeaseToken
from ha_core.machines.keyvalue.model import (
    Body,
    Call,
    Change,
    Command,
    Compact,
    Compare,
    Delete,
    DeletePrefix,
    ExpireLeases,
    ExpireSessions,
    Get,
    Grant,
    Limits,
    OpenSession,
    Plain,
    Put,
    Relation,
    Revoke,
    SetLimits,
    Step,
    Target,
)
from ha_core.machines.keyvalue.plain import is_number, is_plain, is_text, pack, unpack

VERSION = 1
MAX_KEY_BYTES = 4096
MAX_CHANGE_BYTES = 1 << 20
MAX_STEPS = 4096
MAX_ENTRY_BYTES = 4 << 20

_pack_array_header = cast("Callable[[int], bytes]", msgpack.Packer().pack_array_header)


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
            return pack((session, sequence, floor, 1, (), ((0, step.key, step.value, step.lease),), ()))
    return pack((session, sequence, floor, _KINDS[type(body)], *_fields(body)))


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
    if not (is_number(session) and is_number(sequence) and is_number(floor)):
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
    if kind != 0 or type(key) is not bytes or type(value) is not bytes or not is_number(lease):
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
                return SetLimits(limits_from(fields[0]))
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


def limits_from(plain: object) -> Limits:
    """Raises TypeError or ValueError."""
    names = [field.name for field in attrs.fields(Limits)]
    values = cast("tuple[int, ...]", plain)
    return Limits(**dict(zip(names, values, strict=True)))


# -- the rules of commands --


def is_key(value: object) -> bool:
    """Whether it may be asked for: a key, or what keys begin with."""
    return type(value) is bytes and len(value) <= MAX_KEY_BYTES


def problem_of(body: Body) -> str | None:
    """What is wrong with a command, or None; the same at the door and in the log."""
    if isinstance(body, Change):
        return _problem_of_change(body)
    match body:
        case Grant(ttl_ns):
            return None if is_number(ttl_ns) and ttl_ns >= 1_000_000 else "a lease's ttl is at least 1 ms"
        case Revoke(number) | Compact(number):
            return None if is_number(number) else "expected a whole number"
        case Call(name, args):
            if not is_text(name) or type(args) is not tuple or not is_plain(args):
                return "a call has a name and a tuple of plain values, nested at most 32 deep"
            return None if len(pack(args)) <= MAX_CHANGE_BYTES else f"a call carries at most {MAX_CHANGE_BYTES} bytes"
        case ExpireLeases(tokens):
            good = type(tokens) is tuple and all(is_number(token) for token in tokens)
            return None if good else "lease tokens are whole numbers"
        case ExpireSessions(sessions):
            good = type(sessions) is tuple and all(
                type(one) is tuple and len(one) == 2 and is_number(one[0]) and is_number(one[1]) for one in sessions
            )
            return None if good else "sessions are pairs of whole numbers"
        case SetLimits(limits):
            good = all(is_number(value) for value in attrs.astuple(limits)) and limits.max_sessions > 0
            return None if good else "limits are whole numbers, and one session at least may be open"
        case _:
            return None


def _problem_of_change(change: Change) -> str | None:
    size = 0
    count = len(change.compare)
    for compare in change.compare:
        if type(compare.key) is not bytes or not 0 < len(compare.key) <= MAX_KEY_BYTES:
            return f"a key is 1 to {MAX_KEY_BYTES} bytes"
        if type(compare.target) is not Target or type(compare.relation) is not Relation:
            return "a comparison is by a Target and a Relation"
        operand = compare.operand
        if type(operand) is bytes:
            size += len(operand)
        if (type(operand) is bytes) != (compare.target is Target.VALUE) or (
            type(operand) is not bytes and not is_number(operand)
        ):
            return "a value is compared with bytes, anything else with a whole number"
    for steps in (change.then, change.otherwise):
        count += len(steps)
        for step in steps:
            if type(step) is Put:
                if type(step.value) is not bytes or not is_number(step.lease):
                    return "a put has a value of bytes and a lease token"
                key = step.key
                size += len(step.value)
            elif type(step) is DeletePrefix:
                key = step.prefix if step.prefix != b"" else b"?"
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
