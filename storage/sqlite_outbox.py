"""The outbox in app.db, as the store's thread sees it: numbers, digests, rows, and what there is room for.

Rules:

* A number is taken when a function sends and given back when that function is rolled back (M3); it becomes real with the
  group's commit. All that one group sends on a channel follows each other and is stored as runs, one row each.
* Admission is fair (I19, machines/durable_admission.py); replies are always taken.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Final

import attrs

from ha_core.errors import CorruptRecordError, ForkedError, LocalProtocolError, OutboxFullError
from ha_core.ids import ChannelName, NodeId
from ha_core.machines.durable_admission import MESSAGE_BYTES, admits
from ha_core.machines.durable_events import OutboxRun, OutgoingState
from ha_core.machines.durable_wire import (
    MAX_CHANNEL_BYTES,
    MAX_MESSAGE_BYTES,
    RUN_BYTES,
    RUN_COUNT,
    START_DIGEST,
    chain,
    pack_run,
    unpack_run,
)

RESERVED_PREFIX: Final = "ha."
SCHEMA: Final = (
    "CREATE TABLE ha_outgoing (id INTEGER PRIMARY KEY, peer TEXT NOT NULL, name TEXT NOT NULL, last INTEGER NOT NULL,"
    " digest BLOB NOT NULL, acked INTEGER NOT NULL, acked_digest BLOB NOT NULL, forked TEXT NOT NULL, UNIQUE (peer, name))",
    "CREATE TABLE ha_outbox (channel INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL, size INTEGER NOT NULL,"
    " before BLOB NOT NULL, digest BLOB NOT NULL, bodies BLOB NOT NULL, PRIMARY KEY (channel, first)) WITHOUT ROWID",
)


@attrs.define(eq=False)
class OutgoingRecord:
    """One channel: what is committed, and what the group that runs has sent on it."""

    to: NodeId
    name: ChannelName
    row: int = 0
    """Its row in ha_outgoing; 0: not there yet."""
    last: int = 0
    digest: bytes = START_DIGEST
    acked: int = 0
    acked_digest: bytes = START_DIGEST
    forked: str = ""
    used_bytes: int = 0
    """What it holds of the outbox, with what is pending."""
    pending: list[bytes] = attrs.field(factory=list)
    pending_bytes: int = 0
    wanted_bytes: int = 0
    """What was last refused for want of room."""
    touched: int = 0
    """The serial of the last function that sent on it."""


def check_name(name: str) -> None:
    """Refuse a channel's name that is empty, too long or ours."""
    if not name or len(name.encode()) > MAX_CHANNEL_BYTES - len("ha.reply/") or name.startswith(RESERVED_PREFIX):
        raise LocalProtocolError(f"channel {name[:40]!r}: expected 1 to 119 bytes that do not begin with 'ha.'")


class Outbox:
    """All outgoing channels; used on the store's thread only, but for ``peers`` and ``has_room``."""

    def __init__(self, database: sqlite3.Connection, mark: str, limit_bytes: int) -> None:
        """``mark``: begins every statement of ours, so that no application can have prepared the same text."""
        self._database = database
        self._mark = mark
        self._limit_bytes = limit_bytes
        self.total_bytes = 0
        self.records: dict[tuple[NodeId, ChannelName], OutgoingRecord] = {}
        self.peers: frozenset[NodeId] | None = None
        """Nodes to which may be sent; None: all."""
        self._active: dict[tuple[NodeId, ChannelName], OutgoingRecord] = {}
        self._freed: list[tuple[OutgoingRecord, int, bytes, int]] = []
        self._load()

    def _execute(self, sql: str, parameters: Sequence[object] = ()) -> sqlite3.Cursor:
        return self._database.execute(self._mark + sql, parameters)

    def _load(self) -> None:
        query = "SELECT id, peer, name, last, digest, acked, acked_digest, forked FROM ha_outgoing"
        used = dict(self._execute("SELECT channel, sum(size) FROM ha_outbox GROUP BY channel"))
        for row, peer, name, last, digest, acked, acked_digest, forked in self._execute(query):
            record = OutgoingRecord(peer, name, row, last, digest, acked, acked_digest, forked, used.get(row, 0))
            self.records[record.to, record.name] = record
            self.total_bytes += record.used_bytes

    def states(self) -> list[OutgoingState]:
        return [
            OutgoingState(record.to, record.name, record.last, record.acked, record.acked_digest, record.forked)
            for record in self.records.values()
        ]

    # -- sending --

    def open(self, to: NodeId, name: ChannelName) -> OutgoingRecord:
        """The channel's record, made if need be; it gets its row with the first commit.

        Raises:
            LocalProtocolError: nobody knows the node, or its addresses.
            ForkedError: the histories of the two ends differ.
        """
        record = self.records.get((to, name))
        if record is None:
            if self.peers is not None and to not in self.peers:
                raise LocalProtocolError(f"{to}: unknown node: name it and its addresses in bootstrap, or add it as a peer")
            record = self.records[to, name] = OutgoingRecord(to, name)
        if record.forked:
            raise ForkedError(f"{to}, channel {name!r}: stopped: {record.forked}")
        return record

    def has_room(self, to: NodeId, name: ChannelName) -> bool:
        """Whether what was refused last would be admitted now; also from the trio thread."""
        record = self.records.get((to, name))
        used, wanted = (0, 0) if record is None else (record.used_bytes, record.wanted_bytes)
        return admits(used, max(wanted, 1024), self.total_bytes, self._limit_bytes)

    def add(self, record: OutgoingRecord, body: bytes, *, admit: bool = True) -> int:
        """Take a message; its number.

        Raises:
            OutboxFullError: the channel has no room.
        """
        size = len(body) + MESSAGE_BYTES
        if admit and not admits(record.used_bytes, size, self.total_bytes, self._limit_bytes):
            raise OutboxFullError(
                f"{record.to}, channel {record.name!r}: the outbox has no room (it holds {self.total_bytes} of "
                f"{self._limit_bytes} bytes, {record.used_bytes} of them for this channel): wait_for_room, then call again",
                to=record.to,
                channel=record.name,
            )
        if size > MAX_MESSAGE_BYTES:
            raise LocalProtocolError(f"a message of {len(body)} bytes: at most {MAX_MESSAGE_BYTES - MESSAGE_BYTES} are taken")
        pending = record.pending
        if not pending:
            self._active[record.to, record.name] = record
        pending.append(body)
        record.pending_bytes += size
        record.used_bytes += size
        self.total_bytes += size
        return record.last + len(pending)

    def refused(self, record: OutgoingRecord, start: int, byte_count: int) -> None:
        """Note what a function wanted, which has sent ``pending[start:]`` and was refused ``byte_count`` more.

        Raises:
            LocalProtocolError: it would not fit into an empty outbox either.
        """
        wanted = sum(len(body) + MESSAGE_BYTES for body in record.pending[start:]) + byte_count + MESSAGE_BYTES
        record.wanted_bytes = wanted
        if 2 * wanted > self._limit_bytes:
            raise LocalProtocolError(
                f"{record.to}, channel {record.name!r}: one transaction sends {wanted} bytes and more, the outbox takes "
                f"{self._limit_bytes // 2} on a channel: send less at once or raise outbox_max_bytes"
            )

    def truncate(self, record: OutgoingRecord, count: int) -> None:
        """Give back what a function sent that is rolled back."""
        size = sum(len(body) + MESSAGE_BYTES for body in record.pending[count:])
        del record.pending[count:]
        record.pending_bytes -= size
        record.used_bytes -= size
        self.total_bytes -= size

    # -- the group --

    def write(self) -> list[OutboxRun]:
        """Store what the group sent, within its transaction."""
        runs: list[OutboxRun] = []
        for record in self._active.values():
            if not record.pending:
                continue
            if not record.row:
                insert = (
                    "INSERT INTO ha_outgoing (peer, name, last, digest, acked, acked_digest, forked) VALUES (?,?,0,?,0,?,'')"
                )
                cursor = self._execute(insert, (record.to, record.name, START_DIGEST, START_DIGEST))
                record.row = cursor.lastrowid or 0
            made = _runs(record)
            self._database.executemany(
                self._mark + "INSERT INTO ha_outbox VALUES (?,?,?,?,?,?,?)",
                [(record.row, run.first, run.last, run.size, run.before, run.digest, run.blob) for run in made],
            )
            last = made[-1]
            self._execute("UPDATE ha_outgoing SET last=?, digest=? WHERE id=?", (last.last, last.digest, record.row))
            runs.extend(made)
        return runs

    def committed(self, runs: Sequence[OutboxRun]) -> None:
        for run in runs:
            record = self.records[run.to, run.name]
            record.last = run.last
            record.digest = run.digest
        for record in self._active.values():
            record.pending.clear()
            record.pending_bytes = 0
        self._active.clear()
        for record, acked, digest, size in self._freed:
            record.acked = acked
            record.acked_digest = digest
            record.used_bytes -= size
            self.total_bytes -= size
        self._freed.clear()

    def rolled_back(self) -> None:
        """Nothing of the group happened."""
        for record in self._active.values():
            self.truncate(record, 0)
            if record.last == 0 and record.acked == 0:
                record.row = 0  # its row, if any, was of this group
        self._active.clear()
        self._freed.clear()

    # -- what the peer has --

    def forget(self, acked: Mapping[tuple[NodeId, ChannelName], tuple[int, bytes]]) -> None:
        """Delete acknowledged rows, within the group's transaction."""
        for key, (cursor, digest) in acked.items():
            record = self.records[key]
            where = "FROM ha_outbox WHERE channel=? AND first<=? AND last<=?"
            keys = (record.row, cursor, cursor)
            size = self._execute(f"SELECT coalesce(sum(size), 0) {where}", keys).fetchone()[0]
            self._execute(f"DELETE {where}", keys)
            self._execute("UPDATE ha_outgoing SET acked=?, acked_digest=? WHERE id=?", (cursor, digest, record.row))
            self._freed.append((record, cursor, digest, size))

    def load(self, to: NodeId, name: ChannelName, start: int, byte_count: int) -> list[OutboxRun]:
        """Rows from the one that holds ``start`` on, checked against their digests.

        Raises:
            CorruptRecordError: a row is damaged.
        """
        record = self.records[to, name]
        runs: list[OutboxRun] = []
        size = 0
        rows = self._execute(
            "SELECT first, last, size, before, digest, bodies FROM ha_outbox WHERE channel=? AND first>="
            "(SELECT coalesce(max(first), 0) FROM ha_outbox WHERE channel=? AND first<=?) ORDER BY first",
            (record.row, record.row, start),
        )
        for first, last, row_size, before, digest, blob in rows:
            bodies = unpack_run(blob)
            if len(bodies) != last - first + 1 or chain(before, first, bodies)[-1] != digest:
                raise CorruptRecordError(
                    f"outbox to {to}, channel {name!r}: messages {first}..{last} do not match their digest"
                )
            runs.append(OutboxRun(to, name, first, last, row_size, before, digest, blob))
            size += row_size
            if size >= byte_count:
                break
        rows.close()
        return runs

    def fork(self, to: NodeId, name: ChannelName, text: str) -> None:
        """Remember that the channel stands still, within a function's transaction."""
        insert = "INSERT INTO ha_outgoing (peer, name, last, digest, acked, acked_digest, forked) VALUES (?,?,0,?,0,?,?)"
        conflict = " ON CONFLICT (peer, name) DO UPDATE SET forked=excluded.forked RETURNING id"
        row = self._execute(insert + conflict, (to, name, START_DIGEST, START_DIGEST, text)).fetchone()[0]
        record = self.records.setdefault((to, name), OutgoingRecord(to, name))
        record.row = row
        record.forked = text


def _runs(record: OutgoingRecord) -> list[OutboxRun]:
    """What is pending on a channel, cut into rows."""
    runs: list[OutboxRun] = []
    bodies = record.pending
    before = record.digest
    first = record.last + 1
    at = 0
    while at < len(bodies):
        end, size = at, 0
        if record.pending_bytes <= RUN_BYTES and len(bodies) <= RUN_COUNT:
            end, size = len(bodies), record.pending_bytes
        else:
            while end < len(bodies) and end - at < RUN_COUNT:
                more = len(bodies[end]) + MESSAGE_BYTES
                if end > at and size + more > RUN_BYTES:
                    break
                size += more
                end += 1
        part = bodies[at:end]
        digest = chain(before, first, part)[-1]
        last = first + len(part) - 1
        runs.append(OutboxRun(record.to, record.name, first, last, size, before, digest, pack_run(part)))
        before, first, at = digest, last + 1, end
    return runs
