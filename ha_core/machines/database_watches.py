"""Watches that a replica serves to its own node and to others: opened at a revision that a quorum round has confirmed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from ha_core.errors import CompactedError
from ha_core.ids import NodeId
from ha_core.machines.database_server import Origin
from ha_core.machines.database_wire import WatchDeliver, WatchEnd
from ha_core.machines.keyvalue.machine import KeyValue
from ha_core.machines.keyvalue.watches import Watches, WatchOver, WatchRun

WatchKey: TypeAlias = tuple[Origin, int]
"""(who watches, None for this node; its number there)."""
WatchAnswer: TypeAlias = tuple[Origin, WatchDeliver | WatchEnd]


class ServedWatches:
    __slots__ = ("_hub", "_opening", "_out", "_state", "wants_round")

    def __init__(self, state: KeyValue) -> None:
        self._state = state
        self._hub: Watches[WatchKey] = Watches()
        self._opening: dict[WatchKey, bytes] = {}
        """Watches of what comes after now: they stand once a round has told what now is."""
        self._out: list[WatchAnswer] = []
        self.wants_round = False

    def __len__(self) -> int:
        return len(self._hub) + len(self._out)

    def open(self, key: WatchKey, prefix: bytes, after: int | None) -> None:
        self.close(key)
        if after is None:
            self._opening[key] = prefix
            self.wants_round = True
        else:
            self._stand(key, prefix, after)

    def _stand(self, key: WatchKey, prefix: bytes, after: int) -> None:
        origin, watch = key
        try:
            self._state.state.since(after)
        except CompactedError as exc:
            self._out.append((origin, WatchEnd(watch, after, exc.first_index)))
            return
        self._hub.open(key, prefix, after)
        self._out.append((origin, WatchDeliver(watch, after, ())))

    def take_opening(self) -> list[WatchKey]:
        """Watches that a round that begins now may open."""
        self.wants_round = False
        return list(self._opening)

    def opened(self, keys: Sequence[WatchKey]) -> None:
        """The round is over and everything up to it is applied."""
        for key in keys:
            prefix = self._opening.pop(key, None)
            if prefix is not None:
                self._stand(key, prefix, self._state.revision)

    def close(self, key: WatchKey) -> None:
        self._opening.pop(key, None)
        self._hub.close(key)

    def forget(self, peer: NodeId) -> None:
        for key in (*self._hub.keys(), *self._opening):
            origin, _ = key
            if origin is not None and origin[0] == peer:
                self.close(key)

    def taken(self, key: WatchKey, count: int) -> None:
        self._hub.taken(key, count)

    def run(self) -> Sequence[WatchAnswer]:
        out, self._out = self._out, []
        out.extend([_answer(one) for one in self._hub.run(self._state.state)])
        return out

    def bookmarks(self) -> Sequence[WatchAnswer]:
        return [_answer(one) for one in self._hub.bookmarks(self._state.state)]


def _answer(one: WatchRun[WatchKey] | WatchOver[WatchKey]) -> WatchAnswer:
    origin, watch = one.watch
    if isinstance(one, WatchRun):
        return origin, WatchDeliver(watch, one.revision, one.changes)
    return origin, WatchEnd(watch, one.resume, one.compacted)
