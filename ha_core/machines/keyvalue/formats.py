"""Replies and snapshots as bytes; what is decoded is checked."""

from __future__ import annotations

import hashlib
from typing import NoReturn, cast

import attrs

from ha_core.errors import CorruptRecordError, DecodeError
from ha_core.ids import LeaseToken, LogIndex, Revision
from ha_core.machines.keyvalue.codec import limits_from
from ha_core.machines.keyvalue.model import (
    Called,
    ClientSession,
    Granted,
    KeyEvent,
    LeaseState,
    Outcome,
    Plain,
    Record,
    Refusal,
    Refused,
    Reply,
    RevisionEvents,
    SessionOpened,
    Snapshot,
)
from ha_core.machines.keyvalue.plain import pack, unpack

_SNAPSHOT_MAGIC = b"HAKV\x01"
_HASH_BYTES = 16


def _bad(text: str) -> NoReturn:
    raise DecodeError(text, code="reply")


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
    body = pack(
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
            index, revision, compacted, digest, limits_from(limits),
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
