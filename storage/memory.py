"""A RecordStore in memory: the oracle of the conformance suite, and the store of tests.

What it holds lives as long as the engine (``medium``) does, so that a store can be closed and opened again.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import attrs
import trio

from ha_core.errors import ConfigError, StorageError, StorageFullError, StoreLockedError
from ha_core.interfaces import Recovered, StoreStats

_RECORD_OVERHEAD_BYTES = 16


@attrs.define(eq=False)
class Medium:
    """What is durable of one store, and the faults that a test puts on it."""

    incarnation: bytes
    capacity_bytes: int
    checkpoint: bytes | None = None
    records: list[bytes] = attrs.field(factory=list)
    owned: bool = False
    failing: bool = False
    """Every write fails until it is set back."""

    def size_bytes(self) -> int:
        return len(self.checkpoint or b"") + sum(len(record) + _RECORD_OVERHEAD_BYTES for record in self.records)


class MemoryRecordStore:
    def __init__(self, location: str, medium: Medium) -> None:
        self.incarnation = medium.incarnation
        self._location = location
        self._medium = medium
        self._refusal = ""
        self._appended_bytes = 0
        self._flushes = 0
        self._checkpoints = 0

    async def recover(self) -> Recovered:
        await trio.lowlevel.checkpoint()
        self._usable()
        return Recovered(self._medium.checkpoint, tuple(self._medium.records))

    async def append(self, records: Sequence[bytes]) -> None:
        await trio.lowlevel.checkpoint()
        self._usable()
        if not records:
            return
        new = [bytes(record) for record in records]
        size = sum(len(record) + _RECORD_OVERHEAD_BYTES for record in new)
        self._make_room(self._medium.size_bytes() + size)
        self._write()
        self._medium.records += new
        self._appended_bytes += sum(map(len, new))

    async def checkpoint(self, state: bytes, records: Sequence[bytes]) -> None:
        await trio.lowlevel.checkpoint()
        self._usable()
        new = [bytes(record) for record in records]
        self._make_room(len(state) + sum(len(record) + _RECORD_OVERHEAD_BYTES for record in new))
        self._write()
        self._medium.checkpoint, self._medium.records = bytes(state), new
        self._checkpoints += 1

    def stats(self) -> StoreStats:
        size_bytes = self._medium.size_bytes()
        return StoreStats(self._appended_bytes, self._appended_bytes, self._flushes, self._checkpoints, size_bytes)

    async def aclose(self) -> None:
        if not self._refusal.endswith("closed"):
            self._medium.owned = False
        self._refusal = f"memory store {self._location}: it is closed"
        await trio.lowlevel.checkpoint()

    def _usable(self) -> None:
        if self._refusal:
            raise StorageError(self._refusal)

    def _make_room(self, size_bytes: int) -> None:
        if size_bytes > self._medium.capacity_bytes:
            raise StorageFullError(
                f"memory store {self._location}: full, {size_bytes} bytes do not fit in {self._medium.capacity_bytes}; "
                "nothing was written; write a checkpoint or give it a larger capacity_bytes"
            )

    def _write(self) -> None:
        if self._medium.failing:
            self._refusal = f"memory store {self._location}: a write failed; open it again to learn what is durable"
            raise StorageError(self._refusal)
        self._flushes += 1


class MemoryEngine:
    """Option ``capacity_bytes`` (default 1 GiB): when StorageFullError is raised."""

    name = "memory"

    def __init__(self) -> None:
        self._media: dict[str, Medium] = {}

    def medium(self, location: str) -> Medium | None:
        """What the store at ``location`` holds; None if there is none."""
        return self._media.get(location)

    @asynccontextmanager
    async def open(self, location: str, options: Mapping[str, object]) -> AsyncIterator[MemoryRecordStore]:
        capacity_bytes = options.get("capacity_bytes", 1 << 30)
        if not isinstance(capacity_bytes, int) or options.keys() - {"capacity_bytes"}:
            raise ConfigError(f"memory store {location}: expected only capacity_bytes, a whole number", field="capacity_bytes")
        medium = self._media.setdefault(location, Medium(secrets.token_bytes(16), capacity_bytes))
        medium.capacity_bytes = capacity_bytes
        if medium.owned:
            raise StoreLockedError(f"memory store {location}: already open; close it first")
        medium.owned = True
        store = MemoryRecordStore(location, medium)
        try:
            yield store
        finally:
            await store.aclose()
