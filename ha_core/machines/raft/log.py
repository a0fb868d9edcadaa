"""The log in memory: a snapshot, a tail of entries (some of them before the snapshot, for slow followers), what of it is
durable, and the bytes of its runs.

Invariants (``check``): entries are consecutive from ``base_index + 1``; terms never fall; the snapshot lies within or at the
end of what is held; ``durable <= last``.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence

import attrs

from ha_core.errors import invariant
from ha_core.machines.raft.configuration import Configuration, decode_configuration
from ha_core.machines.raft.messages import encode_run
from ha_core.machines.raft.records import EMPTY_SNAPSHOT, Snapshot
from ha_core.machines.raft.types import Entry, EntryKind, Limits


@attrs.define(eq=False)
class Log:
    limits: Limits
    snapshot: Snapshot = EMPTY_SNAPSHOT
    base_index: int = 0
    base_term: int = 0
    durable: int = 0
    """Every entry up to here is in the store."""
    entries: list[Entry] = attrs.field(factory=list)
    _configurations: list[tuple[int, Configuration]] = attrs.field(factory=list)
    _run_firsts: list[int] = attrs.field(factory=list)
    _run_lasts: list[int] = attrs.field(factory=list)
    _runs: list[bytes] = attrs.field(factory=list)
    _run_bytes: int = 0
    _unwritten: list[bytes] = attrs.field(factory=list)
    _truncate_from: int = 0
    _writes: deque[tuple[int, int]] = attrs.field(factory=deque)
    """(write number, last index that it makes durable), oldest first."""

    @classmethod
    def restored(cls, limits: Limits, snapshot: Snapshot, entries: Sequence[Entry]) -> Log:
        """A log as read from the store: all of it durable."""
        log = cls(limits)
        log.reset(snapshot)
        log._hold(list(entries))
        log.durable = log.last_index
        return log

    # -- reading --

    @property
    def last_index(self) -> int:
        return self.base_index + len(self.entries)

    @property
    def last_term(self) -> int:
        return self.entries[-1].term if self.entries else self.base_term

    def term_at(self, index: int) -> int | None:
        """The term of the entry at ``index``; None if it is compacted or beyond the end."""
        at = index - self.base_index - 1
        if 0 <= at < len(self.entries):
            return self.entries[at].term
        return self.base_term if at == -1 else None

    def slice(self, first: int, last: int) -> list[Entry]:
        """Entries ``first``..``last``, both inclusive and held."""
        return self.entries[first - self.base_index - 1 : last - self.base_index]

    def is_covered_by(self, last_index: int, last_term: int) -> bool:
        """True if a log that ends with (``last_index``, ``last_term``) is at least as new as this one (section 3.6.1)."""
        return (last_term, last_index) >= (self.last_term, self.last_index)

    def agreement_before(self, index: int, term: int) -> int:
        """The largest index <= ``index`` that is held with a term <= ``term``: where two logs may still agree."""
        at = min(index, self.last_index)
        while at > self.base_index and self.entries[at - self.base_index - 1].term > term:
            at -= 1
        return at

    @property
    def configuration(self) -> Configuration | None:
        """The newest one appended, in force; None before the first."""
        return self._configurations[-1][1] if self._configurations else None

    @property
    def configuration_index(self) -> int:
        return self._configurations[-1][0] if self._configurations else 0

    def configuration_at(self, index: int) -> Configuration | None:
        at = bisect_right(self._configurations, index, key=lambda item: item[0])
        return self._configurations[at - 1][1] if at else None

    def runs_from(self, first: int, max_bytes: int) -> tuple[tuple[bytes, ...], int, int]:
        """Runs of the entries from ``first`` on, at least one and at most ``max_bytes`` where one is not larger by itself;
        the last index in them and their size."""
        at = bisect_left(self._run_firsts, first)
        if at < len(self._runs) and self._run_firsts[at] == first:
            runs, size = [self._runs[at]], len(self._runs[at])
            while (
                at + 1 < len(self._runs)
                and self._run_firsts[at + 1] == self._run_lasts[at] + 1
                and size + len(self._runs[at + 1]) <= max_bytes
            ):
                at += 1
                runs.append(self._runs[at])
                size += len(self._runs[at])
            return tuple(runs), self._run_lasts[at], size
        # Not at the beginning of a kept run: encode up to where one begins.
        limit = self._run_firsts[at] - 1 if at < len(self._runs) else self.last_index
        start = end = first - self.base_index - 1
        size = 0
        while end < limit - self.base_index and (end == start or size + len(self.entries[end].data) <= max_bytes):
            size += len(self.entries[end].data) + 16
            end += 1
        run = encode_run(self.entries[start:end])
        return (run,), self.base_index + end, len(run)

    # -- writing --

    def append(self, entries: list[Entry], run: bytes) -> None:
        """Add ``entries``, which ``run`` encodes, at the end."""
        invariant(entries[0].index == self.last_index + 1, "entries follow the log", index=entries[0].index)
        self._run_firsts.append(entries[0].index)
        self._run_lasts.append(entries[-1].index)
        self._runs.append(run)
        self._run_bytes += len(run)
        self._unwritten.append(run)
        self._hold(entries)
        if self._run_bytes > self.limits.cache_bytes:
            self._drop_runs(len(self._runs) // 2)

    def _hold(self, entries: list[Entry]) -> None:
        self.entries.extend(entries)
        for entry in entries:
            if entry[2] == EntryKind.CONFIGURATION:
                self._configurations.append((entry.index, decode_configuration(entry.data)))

    def truncate(self, first: int) -> None:
        """Discard ``first`` and everything after it."""
        invariant(first > self.snapshot.index, "I35 what a snapshot holds is never truncated", first=first)
        if self._unwritten:
            # Entries that no record holds yet and that go at once: rare, so write the rest anew instead of cutting runs.
            kept = self.slice(self._last_written() + 1, first - 1)
            self._unwritten = [encode_run(kept)] if kept else []
        if first <= self._last_written():
            self._truncate_from = min(first, self._truncate_from or first)
        del self.entries[first - self.base_index - 1 :]
        while self._configurations and self._configurations[-1][0] >= first:
            self._configurations.pop()
        keep = bisect_left(self._run_lasts, first)
        self._run_bytes -= sum(map(len, self._runs[keep:]))
        del self._run_firsts[keep:], self._run_lasts[keep:], self._runs[keep:]
        # A write that finishes later made other entries durable than those that will stand there (R29).
        self.durable = min(self.durable, first - 1)
        self._writes = deque((number, min(last, first - 1)) for number, last in self._writes)

    def _last_written(self) -> int:
        """The last index that some record, durable or on its way, holds."""
        return self._writes[-1][1] if self._writes else self.durable

    def take_unwritten(self) -> tuple[int, list[bytes]]:
        """What the next record must carry: the first index to discard (0: none), and runs."""
        truncate_from, runs = self._truncate_from, self._unwritten
        self._truncate_from, self._unwritten = 0, []
        return truncate_from, runs

    def wrote(self, number: int) -> None:
        """Everything that is in the log now is in the store once write ``number`` is durable."""
        self._writes.append((number, self.last_index))

    def persisted(self, number: int) -> None:
        while self._writes and self._writes[0][0] <= number:
            self.durable = max(self.durable, self._writes.popleft()[1])

    def reset(self, snapshot: Snapshot) -> None:
        """Forget everything and begin at ``snapshot``; the store must be told by a checkpoint."""
        self.snapshot = snapshot
        self.base_index, self.base_term = snapshot.index, snapshot.term
        self.durable = min(self.durable, snapshot.index)
        self.entries.clear()
        self._configurations = [(snapshot.index, snapshot.configuration)] if snapshot.configuration else []
        self._drop_runs(len(self._runs))
        self._unwritten.clear()
        self._truncate_from = 0
        self._writes = deque((number, min(last, snapshot.index)) for number, last in self._writes)

    def compact(self, snapshot: Snapshot) -> None:
        """Take a newer snapshot and drop entries before it, but for a bounded tail (R31)."""
        invariant(self.snapshot.index < snapshot.index <= self.last_index, "a snapshot of what the log holds")
        self.snapshot = snapshot
        size, first = 0, snapshot.index + 1
        while first - 1 > self.base_index and snapshot.index - first + 1 < self.limits.tail_entries:
            size += len(self.entries[first - self.base_index - 2].data) + 16
            if size > self.limits.tail_bytes:
                break
            first -= 1
        term = self.term_at(first - 1)
        assert term is not None
        del self.entries[: first - 1 - self.base_index]
        self.base_index, self.base_term = first - 1, term
        self._drop_runs(bisect_left(self._run_firsts, first))
        while len(self._configurations) > 1 and self._configurations[1][0] <= snapshot.index:
            del self._configurations[0]

    def _drop_runs(self, count: int) -> None:
        self._run_bytes -= sum(map(len, self._runs[:count]))
        del self._run_firsts[:count], self._run_lasts[:count], self._runs[:count]

    def check(self) -> None:
        invariant(self.base_index <= self.snapshot.index <= self.last_index, "the snapshot lies within the log")
        invariant(self.durable <= self.last_index, "durable <= last", durable=self.durable, last=self.last_index)
        invariant(all(last <= self.last_index for _, last in self._writes), "writes on their way hold no more than the log")
        if self.entries:
            ends = (self.entries[0], self.entries[-1])
            invariant(ends[0].index == self.base_index + 1 and ends[1].index == self.last_index, "entries are consecutive")
            invariant(self.base_term <= ends[0].term <= ends[1].term, "terms never fall")
        invariant(self._run_bytes == sum(map(len, self._runs)), "the size of the kept runs")
        if self._runs:
            invariant(
                self.base_index < self._run_firsts[0] and self._run_lasts[-1] <= self.last_index, "kept runs lie in the log"
            )
        indexes = [index for index, _ in self._configurations]
        invariant(indexes == sorted(set(indexes)) and (not indexes or indexes[-1] <= self.last_index), "configurations")
