"""The multi-version map: records by key, and the last revisions' changes, from which watches and reads of the past are served.

Rules of this file:

* Revisions count up by one with each transaction that changes something; ``history`` holds every one in
  ``compacted`` + 1 .. ``revision`` without a gap.
* A key that one transaction writes several times has one event. A key created and deleted in one transaction has none.
* ``digest`` folds in every change ever made, so that replicas that disagree once disagree for ever.
"""

from __future__ import annotations

import bisect
import itertools
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from ha_core.errors import CompactedError, invariant
from ha_core.ids import Revision
from ha_core.machines.keyvalue.model import KeyEvent, Page, Record, RevisionEvents

RECORD_OVERHEAD_BYTES = 64
PAGE_BYTES = 256 << 10
"""A page ends once its values exceed this."""
_TRIM = 1024
"""Dropped revisions are cut off the list this many at a time."""

Writes: TypeAlias = Mapping[bytes, tuple[bytes, int] | None]
"""Key -> (value, lease), or None for a delete."""

_pack_pair = struct.Struct(">QQ").pack


class VersionedMap:
    __slots__ = ("_dropped", "_history", "_keys", "_records", "compacted", "digest", "history_bytes", "revision", "size_bytes")

    def __init__(self) -> None:
        self.revision = 0
        self.compacted = 0
        self.digest = 0
        self.size_bytes = 0
        self.history_bytes = 0
        self._records: dict[bytes, Record] = {}
        self._keys: list[bytes] = []
        self._history: list[RevisionEvents] = []
        self._dropped = 0
        """How many of the list's first entries are compacted but not yet cut off."""

    def __len__(self) -> int:
        return len(self._records)

    # -- reads --

    def get(self, key: bytes) -> Record | None:
        return self._records.get(key)

    def keys(self, prefix: bytes) -> Iterator[bytes]:
        """Present keys under ``prefix`` in order; the map must not change meanwhile."""
        keys = self._keys
        for at in range(bisect.bisect_left(keys, prefix), len(keys)):
            if not keys[at].startswith(prefix):
                return
            yield keys[at]

    def range(self, prefix: bytes, *, limit: int, after: bytes = b"", at: int = 0) -> Page:
        """Records under ``prefix`` whose keys are greater than ``after``, as of revision ``at`` (0: now).

        Raises:
            CompactedError: ``at`` is no longer held.
        """
        if at and at != self.revision:
            return self._range_of_the_past(prefix, limit, after, at)
        keys = self._keys
        first = bisect.bisect_right(keys, after) if after >= prefix and after else bisect.bisect_left(keys, prefix)
        records: list[Record] = []
        size = 0
        for index in range(first, len(keys)):
            key = keys[index]
            if not key.startswith(prefix):
                break
            if len(records) == limit or size > PAGE_BYTES:
                return Page(records, Revision(self.revision), True)
            record = self._records[key]
            records.append(record)
            size += len(record.value)
        return Page(records, Revision(self.revision), False)

    def _range_of_the_past(self, prefix: bytes, limit: int, after: bytes, at: int) -> Page:
        present: dict[bytes, Record | None] = {key: self._records[key] for key in self.keys(prefix)}
        for group in reversed(self.since(at)):
            for event in group.events:
                if event.key.startswith(prefix):
                    present[event.key] = event.previous
        found = [record for key, record in sorted(present.items()) if record is not None and (key > after or not after)]
        ends = itertools.accumulate((len(record.value) for record in found), initial=0)
        count = sum(1 for end in itertools.islice(ends, min(limit, len(found))) if end <= PAGE_BYTES)
        return Page(found[:count], Revision(at), len(found) > count)

    def since(self, revision: int) -> Sequence[RevisionEvents]:
        """Everything that changed after ``revision``, oldest first; empty for one that is still to come.

        Raises:
            CompactedError: some of it is no longer held.
        """
        if revision < self.compacted:
            raise CompactedError(
                f"revision {revision} is compacted: read anew and watch after {self.compacted} or later",
                first_index=self.compacted,
            )
        return self._history[self._dropped + revision - self.compacted :]

    # -- writes --

    def growth(self, writes: Writes) -> int:
        """By how much ``size_bytes`` would grow."""
        grown = 0
        for key, write in writes.items():
            old = self._records.get(key)
            if old is not None:
                grown -= len(key) + len(old.value) + RECORD_OVERHEAD_BYTES
            if write is not None:
                grown += len(key) + len(write[0]) + RECORD_OVERHEAD_BYTES
        return grown

    def commit(self, writes: Writes) -> RevisionEvents | None:
        """Make the writes one revision; None if they change nothing."""
        revision = self.revision + 1
        records = self._records
        digest = self.digest
        events: list[KeyEvent] = []
        held = 0
        for key, write in writes.items():
            previous = records.get(key)
            if write is None:
                if previous is None:
                    continue
                self.size_bytes -= len(key) + len(previous.value) + RECORD_OVERHEAD_BYTES
                held += len(previous.value)
                record = None
                del records[key]
                del self._keys[bisect.bisect_left(self._keys, key)]
                digest = zlib.crc32(key, zlib.crc32(_pack_pair(revision, 0), digest) ^ 1)
            else:
                value, lease = write
                if previous is None:
                    record = Record(key, value, revision, revision, 1, lease)
                    bisect.insort(self._keys, key)
                    self.size_bytes += len(key) + len(value) + RECORD_OVERHEAD_BYTES
                else:
                    record = Record(key, value, previous.create_revision, revision, previous.version + 1, lease)
                    self.size_bytes += len(value) - len(previous.value)
                    held += len(previous.value)
                records[key] = record
                held += len(value)
                digest = zlib.crc32(value, zlib.crc32(key, zlib.crc32(_pack_pair(revision, lease), digest)))
            held += len(key) + RECORD_OVERHEAD_BYTES
            events.append(KeyEvent(key, record, previous))
        if not events:
            return None
        self.revision = revision
        self.digest = digest
        self.history_bytes += held
        group = RevisionEvents(revision, tuple(events))
        self._history.append(group)
        return group

    def put(self, key: bytes, value: bytes, lease: int) -> RevisionEvents:
        """``commit`` of one put: the most frequent change of all, in half the time."""
        revision = self.revision + 1
        previous = self._records.get(key)
        held = len(key) + len(value) + RECORD_OVERHEAD_BYTES
        if previous is None:
            record = Record(key, value, revision, revision, 1, lease)
            bisect.insort(self._keys, key)
            self.size_bytes += held
        else:
            record = Record(key, value, previous.create_revision, revision, previous.version + 1, lease)
            self.size_bytes += len(value) - len(previous.value)
            held += len(previous.value)
        self._records[key] = record
        self.digest = zlib.crc32(value, zlib.crc32(key, zlib.crc32(_pack_pair(revision, lease), self.digest)))
        self.revision = revision
        self.history_bytes += held
        group = RevisionEvents(revision, (KeyEvent(key, record, previous),))
        self._history.append(group)
        return group

    def compact(self, revision: int) -> None:
        """Drop the history up to and including ``revision``, at most up to the present."""
        target = min(revision, self.revision)
        while self.compacted < target:
            self._drop_oldest()

    def shrink_history(self, max_revisions: int, max_bytes: int) -> None:
        while self.revision - self.compacted > max_revisions or self.history_bytes > max_bytes:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        group = self._history[self._dropped]
        self.history_bytes -= _held_bytes(group)
        self._dropped += 1
        self.compacted = group.revision
        if self._dropped >= _TRIM:
            del self._history[: self._dropped]
            self._dropped = 0

    # -- snapshots --

    def records(self) -> list[Record]:
        return [self._records[key] for key in self._keys]

    def history(self) -> Sequence[RevisionEvents]:
        return self._history[self._dropped :]

    def restore(
        self, *, revision: int, compacted: int, digest: int, records: Sequence[Record], history: Sequence[RevisionEvents]
    ) -> None:
        self.revision = revision
        self.compacted = compacted
        self.digest = digest
        self._records = {record.key: record for record in records}
        self._keys = [record.key for record in records]
        self._history = list(history)
        self._dropped = 0
        self.size_bytes = sum(len(record.key) + len(record.value) + RECORD_OVERHEAD_BYTES for record in records)
        self.history_bytes = sum(_held_bytes(group) for group in history)
        self.check()

    def check(self) -> None:
        """The rules at the head of this file."""
        history = self.history()
        invariant(
            len(history) == self.revision - self.compacted, "history has a gap", held=len(history), revision=self.revision
        )
        for at, group in enumerate(history, self.compacted + 1):
            invariant(group.revision == at, "history is out of order", found=group.revision, expected=at)
        invariant(self._keys == sorted(self._records), "the order of the keys is wrong")


def _held_bytes(group: RevisionEvents) -> int:
    held = 0
    for key, record, previous in group.events:
        held += len(key) + RECORD_OVERHEAD_BYTES
        if record is not None:
            held += len(record.value)
        if previous is not None:
            held += len(previous.value)
    return held
