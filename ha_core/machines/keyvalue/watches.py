"""Watches over a replica's history. Not replicated: each replica serves its own watchers.

A watcher is a position in the history, not a queue. What it has room for is read from the history; one that is slow stays
behind, and once what it still needs is compacted it is told so, with the revision from which it may resume. So no event is
skipped, repeated or reordered, and a revision is delivered whole; memory is bounded by the history's own limits.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

import attrs

from ha_core.errors import CompactedError
from ha_core.machines.keyvalue.model import RevisionEvents
from ha_core.machines.keyvalue.versions import VersionedMap

WatchKey = TypeVar("WatchKey", bound=Hashable)

WINDOW_EVENTS = 4096
"""Delivered and not yet taken."""
RUN_REVISIONS = 1024
"""Looked through in one go for one watcher ..."""
RUN_BYTES = 128 << 10
"""... which ends at the revision that brings more than this."""


@attrs.define
class _Watcher:
    prefix: bytes
    position: int
    """Everything up to this revision was delivered, or did not concern it."""
    told: int
    """The last revision that it heard of."""
    in_flight: int = 0


@attrs.frozen
class WatchRun(Generic[WatchKey]):
    """Events under the prefix in order; nothing is missing up to ``revision``, a bookmark to resume from."""

    watch: WatchKey
    revision: int
    changes: Sequence[RevisionEvents]


@attrs.frozen
class WatchOver(Generic[WatchKey]):
    """The history after ``resume`` is compacted: it was too slow, or asked for too old a revision."""

    watch: WatchKey
    resume: int
    compacted: int


class Watches(Generic[WatchKey]):
    __slots__ = ("_watchers",)

    def __init__(self) -> None:
        self._watchers: dict[WatchKey, _Watcher] = {}

    def __len__(self) -> int:
        return len(self._watchers)

    def open(self, watch: WatchKey, prefix: bytes, after: int) -> None:
        """Events after revision ``after``, which may lie in the future."""
        self._watchers[watch] = _Watcher(prefix, after, after)

    def close(self, watch: WatchKey) -> None:
        self._watchers.pop(watch, None)

    def keys(self) -> Sequence[WatchKey]:
        return list(self._watchers)

    def taken(self, watch: WatchKey, count: int) -> None:
        """The watcher took ``count`` events: there is room for as many more."""
        watcher = self._watchers.get(watch)
        if watcher is not None:
            watcher.in_flight = max(0, watcher.in_flight - count)

    def run(self, state: VersionedMap) -> list[WatchRun[WatchKey] | WatchOver[WatchKey]]:
        """What can be delivered now."""
        out: list[WatchRun[WatchKey] | WatchOver[WatchKey]] = []
        over: list[WatchKey] = []
        for watch, watcher in self._watchers.items():
            while watcher.position < state.revision and watcher.in_flight < WINDOW_EVENTS:
                try:
                    changes = state.since(watcher.position)
                except CompactedError:
                    out.append(WatchOver(watch, watcher.position, state.compacted))
                    over.append(watch)
                    break
                delivered = self._select(watcher, changes)
                if delivered:
                    watcher.told = watcher.position
                    out.append(WatchRun(watch, watcher.position, delivered))
        for watch in over:
            del self._watchers[watch]
        return out

    def bookmarks(self, state: VersionedMap) -> list[WatchRun[WatchKey]]:
        """For each watcher that moved on without an event: how far it has come."""
        out: list[WatchRun[WatchKey]] = []
        for watch, watcher in self._watchers.items():
            if watcher.position > watcher.told and watcher.position <= state.revision:
                watcher.told = watcher.position
                out.append(WatchRun(watch, watcher.position, ()))
        return out

    def _select(self, watcher: _Watcher, changes: Sequence[RevisionEvents]) -> list[RevisionEvents]:
        prefix = watcher.prefix
        delivered: list[RevisionEvents] = []
        size = 0
        for group in changes[:RUN_REVISIONS]:
            if watcher.in_flight >= WINDOW_EVENTS or size > RUN_BYTES:
                break
            events = group.events
            if prefix:
                events = tuple([event for event in events if event.key.startswith(prefix)])
            if events:
                delivered.append(group if len(events) == len(group.events) else RevisionEvents(group.revision, events))
                watcher.in_flight += len(events)
                size += sum(len(event.record.value) for event in events if event.record is not None)
            watcher.position = group.revision
        return delivered
