"""The channel "database": requests to a replica, replies, and watches. Each message is a msgpack array that begins with its
kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn, TypeAlias, cast

import attrs

from ha_core.errors import DecodeError
from ha_core.ids import LeaseToken, LinkName, NodeId, Revision
from ha_core.machines.database_events import (
    Confirmed,
    DatabaseOutcome,
    Done,
    Found,
    Range,
    Reconfigure,
    Renew,
    Renewed,
    Transfer,
)
from ha_core.machines.keyvalue.codec import MAX_KEY_BYTES, decode_command
from ha_core.machines.keyvalue.formats import events_from, record_from, reply_fields, reply_from
from ha_core.machines.keyvalue.model import Command, Get, Page, RevisionEvents
from ha_core.machines.keyvalue.plain import pack, unpack
from ha_core.machines.raft.types import AddLearner, Promote, Remove

RUN_BYTES = 48 << 10
"""Requests and replies share a message up to this."""


@attrs.frozen
class WriteRequest:
    """A command as it will stand in the log, decoded and as it came."""

    command: Command
    packed: bytes


WireRequest: TypeAlias = WriteRequest | Get | Range | Renew | Reconfigure | Transfer


@attrs.frozen
class Requests:
    requests: Sequence[tuple[int, WireRequest]]


@attrs.frozen
class Replies:
    replies: Sequence[tuple[int, DatabaseOutcome]]


@attrs.frozen
class WatchOpen:
    watch: int
    prefix: bytes
    after: int | None


@attrs.frozen
class WatchClose:
    watch: int


@attrs.frozen
class WatchTake:
    watch: int
    count: int


@attrs.frozen
class WatchDeliver:
    watch: int
    revision: int
    changes: Sequence[RevisionEvents]


@attrs.frozen
class WatchEnd:
    watch: int
    resume: int
    compacted: int


WireMessage: TypeAlias = Requests | Replies | WatchOpen | WatchClose | WatchTake | WatchDeliver | WatchEnd


# -- encode --


def encode_requests(requests: Sequence[tuple[int, WireRequest]]) -> list[bytes]:
    """Any number of requests as messages of about ``RUN_BYTES``."""
    return _runs(1, [pack((number, *_request_fields(request))) for number, request in requests])


def encode_replies(replies: Sequence[tuple[int, DatabaseOutcome]]) -> list[bytes]:
    return _runs(2, [pack((number, *_outcome_fields(outcome))) for number, outcome in replies])


def _runs(kind: int, items: Sequence[bytes]) -> list[bytes]:
    """Messages (kind, item, item, ...)."""
    out: list[bytes] = []
    run: list[bytes] = []
    size = 0
    for item in items:
        if run and (size + len(item) > RUN_BYTES or len(run) == 0xFFFE):
            out.append(_array(kind, run))
            run, size = [], 0
        run.append(item)
        size += len(item)
    if run:
        out.append(_array(kind, run))
    return out


def _array(kind: int, items: Sequence[bytes]) -> bytes:
    return b"".join((b"\xdc", (len(items) + 1).to_bytes(2, "big"), bytes((kind,)), *items))


def encode_watch(message: WatchOpen | WatchClose | WatchTake | WatchDeliver | WatchEnd) -> bytes:
    match message:
        case WatchOpen(watch, prefix, after):
            return pack((3, watch, prefix, after))
        case WatchClose(watch):
            return pack((4, watch))
        case WatchTake(watch, count):
            return pack((5, watch, count))
        case WatchDeliver(watch, revision, changes):
            return pack((6, watch, revision, tuple(changes)))
        case WatchEnd(watch, resume, compacted):
            return pack((7, watch, resume, compacted))


def _request_fields(request: WireRequest) -> tuple[object, ...]:
    match request:
        case WriteRequest(_, packed):
            return (1, packed)
        case Get(key):
            return (2, key)
        case Range(prefix, limit, after, at):
            return (3, prefix, limit, after, at)
        case Renew(token):
            return (4, token)
        case Reconfigure(change):
            match change:
                case AddLearner(node, replica, addresses):
                    return (5, 1, node, replica, tuple(sorted(addresses.items())))
                case Promote(node):
                    return (5, 2, node)
                case Remove(node):
                    return (5, 3, node)
        case Transfer(to):
            return (6, to)


def _outcome_fields(outcome: DatabaseOutcome) -> tuple[object, ...]:
    match outcome:
        case Found(record, revision):
            return (6, record, revision)
        case Page(records, revision, more):
            return (7, tuple(records), revision, more)
        case Renewed(token, ttl_ns):
            return (8, token, ttl_ns)
        case Confirmed(term):
            return (9, term)
        case Done():
            return (10,)
        case _:
            return reply_fields(outcome)


# -- decode --


def _bad(text: str) -> NoReturn:
    raise DecodeError(f"channel 'database': {text}", code="database")


def decode_message(body: bytes) -> WireMessage:
    """One message of the channel, checked.

    Raises:
        DecodeError: it is none.
    """
    plain = unpack(body)
    if type(plain) is not tuple or not plain:
        _bad("a message is an array")
    kind, *rest = plain
    try:
        match kind:
            case 1:
                return Requests([_request(one) for one in rest])
            case 2:
                return Replies([_reply(one) for one in rest])
            case 3:
                watch, prefix, after = rest
                if type(prefix) is not bytes or len(prefix) > MAX_KEY_BYTES or not (after is None or _is_count(after)):
                    _bad("a watch has a prefix and a revision")
                return WatchOpen(_count(watch), prefix, after)
            case 4:
                (watch,) = rest
                return WatchClose(_count(watch))
            case 5:
                watch, count = rest
                return WatchTake(_count(watch), _count(count))
            case 6:
                watch, revision, changes = rest
                return WatchDeliver(_count(watch), _count(revision), [events_from(one) for one in changes])
            case 7:
                watch, resume, compacted = rest
                return WatchEnd(_count(watch), _count(resume), _count(compacted))
    except (TypeError, ValueError) as exc:
        raise DecodeError(f"channel 'database': message of kind {kind!r} has the wrong shape", code="database") from exc
    _bad(f"unknown kind of message {kind!r}")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        _bad("expected a whole number")
    return value


def _key(value: object) -> bytes:
    if type(value) is not bytes or len(value) > MAX_KEY_BYTES:
        _bad(f"a key is at most {MAX_KEY_BYTES} bytes")
    return value


def _request(plain: object) -> tuple[int, WireRequest]:
    number, kind, *rest = cast("tuple[int, int, object]", plain)
    match kind:
        case 1:
            (packed,) = rest
            if type(packed) is not bytes:
                _bad("a write is bytes")
            return _count(number), WriteRequest(decode_command(packed), packed)
        case 2:
            (key,) = rest
            return _count(number), Get(_key(key))
        case 3:
            prefix, limit, after, at = rest
            return _count(number), Range(_key(prefix), _count(limit), _key(after), _count(at))
        case 4:
            (token,) = rest
            return _count(number), Renew(LeaseToken(_count(token)))
        case 5:
            return _count(number), Reconfigure(_member_change(rest))
        case 6:
            (to,) = rest
            return _count(number), Transfer(_node(to))
    _bad(f"unknown kind of request {kind!r}")


def _node(value: object) -> NodeId:
    if type(value) is not str:
        _bad("a node is named by a string")
    return NodeId(value)


def _member_change(fields: Sequence[object]) -> AddLearner | Promote | Remove:
    kind, node, *rest = fields
    match kind:
        case 1:
            replica, addresses = cast("tuple[bytes, tuple[tuple[str, str], ...]]", tuple(rest))
            if type(replica) is not bytes or not all(type(text) is str for pair in addresses for text in pair):
                _bad("a learner has a replica of bytes and addresses of text")
            return AddLearner(_node(node), replica, {LinkName(link): address for link, address in addresses})
        case 2:
            return Promote(_node(node))
        case 3:
            return Remove(_node(node))
    _bad(f"unknown change of members {kind!r}")


def _reply(plain: object) -> tuple[int, DatabaseOutcome]:
    number, kind, *rest = cast("tuple[int, int, object]", plain)
    fields = tuple(rest)
    outcome: DatabaseOutcome
    match kind:
        case 6:
            record, revision = fields
            outcome = Found(None if record is None else record_from(record), Revision(_count(revision)))
        case 7:
            records, revision, more = cast("tuple[tuple[object, ...], int, bool]", fields)
            outcome = Page([record_from(one) for one in records], Revision(revision), more)
        case 8:
            token, ttl_ns = fields
            outcome = Renewed(LeaseToken(_count(token)), _count(ttl_ns))
        case 9:
            (term,) = fields
            outcome = Confirmed(_count(term))
        case 10:
            outcome = Done()
        case _:
            outcome = reply_from((kind, *fields))
    return _count(number), outcome
