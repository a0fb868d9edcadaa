"""Messages between replicas: a version byte, then a msgpack array
``[code, cluster, sender's replica, receiver's replica, term, *fields]``.

``cluster`` is a digest of the cluster's name. The receiver's replica is empty while the sender does not know it. A run is the
msgpack array of consecutive entries ``[index, term, kind, data]``; it is encoded once, by the leader, and its bytes are what
followers and all records carry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import attrs
import msgpack

from ha_core.errors import DecodeError
from ha_core.machines.raft.types import Entry, EntryKind

VERSION = 1
MAX_MESSAGE_BYTES = 8 << 20
_KINDS = tuple(EntryKind)


@attrs.frozen
class VoteRequest:
    """``term`` is the one that the candidate has (or, in a pre-vote, would have). ``attempt`` comes back in the answer."""

    term: int
    pre: bool
    attempt: int
    last_index: int
    last_term: int
    transfer: bool


@attrs.frozen
class VoteAnswer:
    """``term`` is the voter's, in a granted pre-vote the candidate's. ``age_ns``: see rule L6; only in a granted vote."""

    term: int
    pre: bool
    attempt: int
    granted: bool
    age_ns: int


@attrs.frozen
class Heartbeat:
    """``round`` counts up within a term: the nonce of ReadIndex and lease rounds."""

    term: int
    round: int
    commit: int


@attrs.frozen
class HeartbeatAnswer:
    term: int
    round: int


@attrs.frozen
class Append:
    term: int
    previous_index: int
    previous_term: int
    commit: int
    runs: tuple[bytes, ...]


@attrs.frozen
class AppendAnswer:
    """Matched: durable and equal to the leader's log up to ``index``. Else ``index`` is the refused ``previous_index`` and
    (``hint_index``, ``hint_term``) the newest place at which the logs may still agree."""

    term: int
    matched: bool
    index: int
    hint_index: int
    hint_term: int


@attrs.frozen
class SnapshotChunk:
    """Bytes ``offset``.. of the checkpoint at (``index``, ``index_term``); ``digest`` is that of all its ``total_bytes``,
    ``chunk_digest`` that of ``data``."""

    term: int
    index: int
    index_term: int
    digest: bytes
    total_bytes: int
    offset: int
    chunk_digest: bytes
    data: bytes


@attrs.frozen
class SnapshotAnswer:
    """The chunks before ``offset`` of the snapshot at ``index`` are staged; the whole of it is answered by AppendAnswer."""

    term: int
    index: int
    offset: int


@attrs.frozen
class TimeoutNow:
    """Leadership transfer: campaign at once."""

    term: int


@attrs.frozen
class ReadRequest:
    term: int
    nonce: int


@attrs.frozen
class ReadAnswer:
    """``confirmed`` False: the leader cannot serve reads now."""

    term: int
    nonce: int
    confirmed: bool
    index: int


@attrs.frozen
class Removed:
    """The receiver's incarnation was removed for good, and that is committed: what it asked for is never granted."""

    term: int


Message = (
    VoteRequest | VoteAnswer | Heartbeat | HeartbeatAnswer | Append | AppendAnswer
    | SnapshotChunk | SnapshotAnswer | TimeoutNow | ReadRequest | ReadAnswer | Removed
)  # fmt: skip


@attrs.frozen
class Envelope:
    cluster: bytes
    sender: bytes
    receiver: bytes
    message: Message


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_bool(value: object) -> bool:
    return type(value) is bool


def _is_bytes(value: object) -> bool:
    return type(value) is bytes


def _is_runs(value: object) -> bool:
    return type(value) is tuple and all(type(run) is bytes for run in value)


_CHECKS: dict[str, Callable[[object], bool]] = {
    "int": _is_count,
    "bool": _is_bool,
    "bytes": _is_bytes,
    "tuple[bytes, ...]": _is_runs,
}
_TYPES: tuple[type[Message], ...] = (
    VoteRequest, VoteAnswer, Heartbeat, HeartbeatAnswer, Append, AppendAnswer,
    SnapshotChunk, SnapshotAnswer, TimeoutNow, ReadRequest, ReadAnswer, Removed,
)  # fmt: skip
_CODES = {kind: code for code, kind in enumerate(_TYPES, 1)}


def _getter(kind: type[Message]) -> Callable[[Message], tuple[object, ...]]:
    names = [field.name for field in attrs.fields(kind)]
    if len(names) == 1:
        one = attrgetter(names[0])
        return lambda message: (one(message),)
    return attrgetter(*names)


_GETTERS = {kind: _getter(kind) for kind in _TYPES}
_FIELD_CHECKS = {kind: tuple(_CHECKS[str(field.type)] for field in attrs.fields(kind)) for kind in _TYPES}


def encode(cluster: bytes, sender: bytes, receiver: bytes, message: Message) -> bytes:
    kind = type(message)
    body: bytes = msgpack.packb((_CODES[kind], cluster, sender, receiver, *_GETTERS[kind](message)))
    return b"\x01" + body


def decode(body: bytes) -> Envelope:
    """Raises DecodeError for anything that ``encode`` does not make, in time and memory bounded by ``len(body)``."""
    if not body or body[0] != VERSION or len(body) > MAX_MESSAGE_BYTES:
        raise DecodeError("raft: no message of this version", code="raft")
    fields = unpack_array(body[1:])
    if len(fields) < 5 or not _is_count(fields[0]) or not 1 <= fields[0] <= len(_TYPES):
        raise DecodeError("raft: no such message", code="raft")
    kind = _TYPES[fields[0] - 1]
    checks = _FIELD_CHECKS[kind]
    head, values = fields[1:4], fields[4:]
    if not all(map(_is_bytes, head)) or len(values) != len(checks):
        raise DecodeError(f"raft: a {kind.__name__} of another form", code="raft")
    for check, value in zip(checks, values, strict=True):
        if not check(value):
            raise DecodeError(f"raft: a {kind.__name__} of another form", code="raft")
    return Envelope(head[0], head[1], head[2], kind(*values))


def unpack_array(data: bytes) -> tuple[Any, ...]:
    """Raises DecodeError. Nothing is known of the types within: the caller checks."""
    try:
        value = msgpack.unpackb(data, use_list=False)
    except (ValueError, TypeError, RecursionError) as exc:
        raise DecodeError(f"raft: malformed bytes: {exc}", code="raft") from exc
    if type(value) is not tuple:
        raise DecodeError("raft: expected an array", code="raft")
    return value


def encode_run(entries: Sequence[Entry]) -> bytes:
    run: bytes = msgpack.packb(entries)
    return run


def decode_run(run: bytes) -> list[Entry]:
    """At least one entry, of consecutive indexes and terms that never fall. Raises DecodeError."""
    entries: list[Entry] = []
    expected = last_term = -1
    try:
        for index, term, kind, data in unpack_array(run):
            if type(index) is not int or type(term) is not int or type(kind) is not int or type(data) is not bytes:
                raise DecodeError("raft: an entry of another form", code="raft")
            if (index != expected and expected >= 0) or index < 1 or term < last_term or term < 1 or not 0 <= kind < 3:
                raise DecodeError("raft: entries out of order", code="raft")
            entries.append(Entry(index, term, _KINDS[kind], data))
            expected, last_term = index + 1, term
    except (ValueError, TypeError) as exc:
        raise DecodeError(f"raft: an entry of another form: {exc}", code="raft") from exc
    if not entries:
        raise DecodeError("raft: an empty run", code="raft")
    return entries
