"""RecordStore on raw flash, a preallocated file or a partition: for hosts without a disk.

Options of the engine (a location is the path of a file or block device):

* ``size_bytes`` (64 MiB), ``erase_bytes`` (1 MiB), ``program_bytes`` (4096): the geometry, fixed when the store is made. An
  append programs whole units, so a small unit writes less; a unit smaller than the device's own only hides its cost.
  Give it room for twice the largest state plus ``checkpoint_factor`` times the usual one.
* ``checkpoint_factor`` (8): ``stats().checkpoint_due`` becomes true once the log is that many times the state. Higher: fewer
  bytes are programmed (1 + 1/factor times the log), a start reads more.
* ``daily_budget_bytes`` (0, none): above it in 24 hours a warning is logged; durability is never given up for it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

from ha_core.errors import ConfigError
from ha_core.interfaces import Recovered
from ha_core.storage.flash_device import FileDevice, FlashDevice, Geometry
from ha_core.storage.flash_log import FlashLog, FlashStats

T = TypeVar("T")

_DEFAULTS: Mapping[str, int | float] = {
    "size_bytes": 64 << 20,
    "erase_bytes": 1 << 20,
    "program_bytes": 4096,
    "checkpoint_factor": 8.0,
    "daily_budget_bytes": 0,
}


def _clock_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class FlashRecordStore:
    """The face of a FlashLog to trio: each call is one hop to a worker thread, or none where the device is memory."""

    def __init__(self, log: FlashLog, *, blocks_thread: bool) -> None:
        self.incarnation = log.incarnation
        self._log = log
        self._blocks_thread = blocks_thread
        self._lock = trio.Lock()

    async def recover(self) -> Recovered:
        return await self._call(self._log.recover)

    async def append(self, records: Sequence[bytes]) -> None:
        await self._call(lambda: self._log.append(records))

    async def checkpoint(self, state: bytes, records: Sequence[bytes]) -> None:
        await self._call(lambda: self._log.checkpoint(state, records))

    def stats(self) -> FlashStats:
        return self._log.stats()

    async def aclose(self) -> None:
        with trio.CancelScope(shield=True):  # a close is short, and a forgotten one keeps the lock
            await self._call(self._log.close)

    async def _call(self, function: Callable[[], T]) -> T:
        async with self._lock:
            if self._blocks_thread:
                return await trio.to_thread.run_sync(function)
            return function()


def read_options(location: str, options: Mapping[str, object]) -> tuple[Geometry, float, int]:
    """Geometry, checkpoint factor and daily budget; raises ConfigError."""
    found = dict(_DEFAULTS)
    for key, value in options.items():
        if key not in _DEFAULTS or isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise ConfigError(
                f"flash store {location}: {key} = {value!r}: expected one of {', '.join(_DEFAULTS)}, a number",
                field=key,
                value=value,
            )
        found[key] = value
    erase_bytes = int(found["erase_bytes"])
    if erase_bytes < 1 or found["checkpoint_factor"] < 1:
        raise ConfigError(f"flash store {location}: erase_bytes and checkpoint_factor must be 1 or more", field="erase_bytes")
    geometry = Geometry(erase_bytes, int(found["program_bytes"]), int(found["size_bytes"]) // erase_bytes)
    return geometry, float(found["checkpoint_factor"]), int(found["daily_budget_bytes"])


@asynccontextmanager
async def open_flash_store(
    device: FlashDevice, name: str, *, checkpoint_factor: float = 8.0, daily_budget_bytes: int = 0
) -> AsyncIterator[FlashRecordStore]:
    """Open or create a store on any device; closes it at the end.

    Raises:
        StorageError: the device holds something else, or a store of another geometry.
    """

    def make() -> FlashLog:
        return FlashLog(
            device, name, incarnation=secrets.token_bytes(16), clock_ns=_clock_ns,
            checkpoint_factor=checkpoint_factor, daily_budget_bytes=daily_budget_bytes,
        )  # fmt: skip

    try:
        log = await trio.to_thread.run_sync(make) if device.blocks_thread else make()
    except BaseException:
        device.close()
        raise
    store = FlashRecordStore(log, blocks_thread=device.blocks_thread)
    try:
        yield store
    finally:
        await store.aclose()


class FlashEngine:
    name = "flash"

    @asynccontextmanager
    async def open(self, location: str, options: Mapping[str, object]) -> AsyncIterator[FlashRecordStore]:
        geometry, factor, budget = read_options(location, options)
        device = await trio.to_thread.run_sync(FileDevice, location, geometry)
        async with open_flash_store(device, location, checkpoint_factor=factor, daily_budget_bytes=budget) as store:
            yield store
