"""The durable format of Raft: one record is one atomic step, hard state + truncate-from + entries (R2, R6).

``record     = version byte, msgpack [term, vote, commit, truncate_from, [run, ...]]``
``mark       = mark byte, which process life writes from here on``
``checkpoint = version byte, msgpack [index, term, configuration, state]``

``truncate_from`` is the first index that the step discards, 0 for none. ``commit`` is a hint: never more than what was
committed. A checkpoint is also, byte for byte, what a snapshot transfer carries.
"""

from __future__ import annotations

import attrs
import msgpack

from ha_core.errors import CorruptRecordError, DecodeError
from ha_core.ids import NodeId
from ha_core.machines.raft.configuration import Configuration, decode_configuration, encode_configuration
from ha_core.machines.raft.messages import decode_run, unpack_array
from ha_core.machines.raft.types import Entry, Recovered

VERSION = 1
MARK = 2


@attrs.frozen
class Snapshot:
    """The state machine after ``index``; ``payload`` is the encoded checkpoint."""

    index: int
    term: int
    configuration: Configuration | None
    state: bytes
    payload: bytes


EMPTY_SNAPSHOT = Snapshot(0, 0, None, b"", b"")


@attrs.define
class Durable:
    """What a restarted replica knows."""

    term: int = 0
    vote: NodeId | None = None
    commit: int = 0
    snapshot: Snapshot = EMPTY_SNAPSHOT
    entries: list[Entry] = attrs.field(factory=list)


def encode_record(term: int, vote: NodeId | None, commit: int, truncate_from: int, runs: list[bytes]) -> bytes:
    body: bytes = msgpack.packb((term, vote or "", commit, truncate_from, runs))
    return b"\x01" + body


def encode_mark(mark: bytes) -> bytes:
    """The record that a process life begins with; ``mark`` names it."""
    return b"\x02" + mark


def last_mark(recovered: Recovered) -> bytes:
    """The process life that wrote to a store last; empty if none left its mark."""
    for record in reversed(recovered.records):
        if record and record[0] == MARK:
            return record[1:]
    return b""


def encode_checkpoint(index: int, term: int, configuration: Configuration, state: bytes) -> Snapshot:
    body: bytes = msgpack.packb((index, term, encode_configuration(configuration), state))
    return Snapshot(index, term, configuration, state, b"\x01" + body)


def decode_checkpoint(payload: bytes) -> Snapshot:
    """Raises DecodeError."""
    if not payload or payload[0] != VERSION:
        raise DecodeError("raft: no checkpoint of this version", code="raft")
    match unpack_array(payload[1:]):
        case (int() as index, int() as term, bytes() as configuration, bytes() as state) if index > 0 and term > 0:
            return Snapshot(index, term, decode_configuration(configuration), state, payload)
    raise DecodeError("raft: a checkpoint of another form", code="raft")


def recover(recovered: Recovered) -> Durable:
    """Replay a store's checkpoint and records.

    Raises:
        CorruptRecordError: the store's checksums held, but what it returned is no history of this format.
    """
    durable = Durable()
    try:
        if recovered.checkpoint is not None:
            durable.snapshot = decode_checkpoint(recovered.checkpoint)
        durable.commit = durable.snapshot.index
        for number, record in enumerate(recovered.records):
            replay(durable, record, number)
    except DecodeError as exc:
        raise CorruptRecordError(f"raft records: {exc}: the store is damaged; rejoin with a new one") from exc
    return durable


def replay(durable: Durable, record: bytes, number: int) -> None:
    """Add what ``record`` holds. Raises DecodeError."""
    if record and record[0] == MARK:
        return
    if not record or record[0] != VERSION:
        raise DecodeError(f"record {number} has an unknown version", code="raft")
    match unpack_array(record[1:]):
        case (int() as term, str() as vote, int() as commit, int() as truncate_from, tuple() as runs):
            pass
        case _:
            raise DecodeError(f"record {number} has another form", code="raft")
    if term < durable.term or truncate_from < 0:
        raise DecodeError(f"record {number} goes back in time", code="raft")
    durable.term, durable.vote = term, NodeId(vote) if vote else None
    first = durable.snapshot.index + 1
    if truncate_from:
        del durable.entries[max(0, truncate_from - first) :]
    for run in runs:
        for entry in decode_run(run if type(run) is bytes else b""):
            expected = first + len(durable.entries)
            if entry.index < first:
                continue  # the checkpoint overtook it
            if entry.index != expected:
                raise DecodeError(f"record {number} has entry {entry.index} where {expected} comes next", code="raft")
            durable.entries.append(entry)
    durable.commit = max(durable.commit, min(commit, durable.snapshot.index + len(durable.entries)))
