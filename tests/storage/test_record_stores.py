"""Every RecordStore of ours passes the conformance suite, and the suite catches stores that break a rule."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from ha_core.errors import StorageError, StoreLockedError
from ha_core.interfaces import Recovered, StoreStats
from ha_core.storage.memory import MemoryEngine, MemoryRecordStore
from ha_core.storage.sqlite import SqliteEngine
from ha_core.testing.check_record_store import CHECKS, RecordStoreKit, check_record_store
from ha_core.testing.simulator import SimDisk, Simulation


async def test_memory_store_conforms() -> None:
    engine, count = MemoryEngine(), itertools.count()

    def make() -> RecordStoreKit:
        location = str(next(count))

        def fail(failing: bool) -> None:
            medium = engine.medium(location)
            assert medium is not None
            medium.failing = failing

        options = {"capacity_bytes": 20 << 20}
        return RecordStoreKit(engine=engine, location=location, options=options, fail_writes=fail, fill_records=2100)

    done = await check_record_store(make)

    assert len(done) == len(CHECKS) - 1  # memory has no power to cut


async def test_sqlite_store_conforms(tmp_path: Path) -> None:
    count = itertools.count()

    def make() -> RecordStoreKit:
        return RecordStoreKit(
            engine=SqliteEngine(), location=str(tmp_path / f"{next(count)}.db"), options={"max_page_count": 4000},
            fill_records=1700, between_processes=True,
        )  # fmt: skip

    done = await check_record_store(make)

    assert len(done) == len(CHECKS) - 2


class DiskStore:
    """The simulator's disk as a RecordStore: each call lets virtual time pass until its write is done."""

    def __init__(self, sim: Simulation, disk: SimDisk) -> None:
        self._sim, self._disk = sim, disk
        self.incarnation = disk.incarnation
        self._refusal = ""
        self._counts = [0, 0, 0]

    async def recover(self) -> Recovered:
        await trio.lowlevel.checkpoint()
        return self._disk.recover()

    async def append(self, records: Sequence[bytes]) -> None:
        if records:

            def start(done: Callable[[str | None], None]) -> None:
                for record in records:
                    self._disk.append(record, done)

            await self._write(start, len(records))
            self._counts[0] += sum(map(len, records))
            self._counts[1] += 1

    async def checkpoint(self, state: bytes, records: Sequence[bytes]) -> None:
        await self._write(lambda done: self._disk.checkpoint(state, records, done), 1)
        self._counts[2] += 1

    async def _write(self, start: Callable[[Callable[[str | None], None]], None], count: int) -> None:
        await trio.lowlevel.checkpoint()
        if self._refusal:
            raise StorageError(self._refusal)
        done: list[str | None] = []
        start(done.append)
        self._sim.run_for(10**9, stop=lambda: len(done) == count)
        errors = [error for error in done if error] or ([] if len(done) == count else ["no answer"])
        if errors:
            self._refusal = errors[0]
            raise StorageError(self._refusal)

    def stats(self) -> StoreStats:
        appended, flushes, checkpoints = self._counts
        return StoreStats(appended, appended, flushes, checkpoints, appended + 1)

    async def aclose(self) -> None:
        self._refusal = "closed"
        await trio.lowlevel.checkpoint()


class DiskEngine:
    name = "simulated"

    def __init__(self) -> None:
        self.sim = Simulation(1)
        self.disks: dict[str, SimDisk] = {}
        self.owned: set[str] = set()

    @asynccontextmanager
    async def open(self, location: str, options: Mapping[str, object]) -> AsyncIterator[DiskStore]:
        if location in self.owned:
            raise StoreLockedError("owned")
        disk = self.disks.setdefault(location, SimDisk(self.sim, location))
        disk.device.reopen()
        self.owned.add(location)
        store = DiskStore(self.sim, disk)
        try:
            yield store
        finally:
            self.owned.discard(location)
            await store.aclose()


async def test_simulated_disk_conforms() -> None:
    engine, count = DiskEngine(), itertools.count()

    def make() -> RecordStoreKit:
        location = str(next(count))

        def fail(failing: bool) -> None:
            engine.disks[location].device.fail_next("input/output error" if failing else "")

        def cut(operations: int) -> None:
            device = engine.disks[location].device
            engine.sim.after(operations * 200_000, device.crash)

        return RecordStoreKit(
            engine=engine,
            location=location,
            fail_writes=fail,
            cut_power=cut,
            restore_power=lambda: None,
            largest_record_bytes=1000,
        )

    assert len(await check_record_store(make)) == len(CHECKS) - 1  # its "full" fails the write and poisons it


class Forgetful(MemoryEngine):
    """Breaks one rule, named by ``fault``."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    @asynccontextmanager
    async def open(self, location: str, options: Mapping[str, object]) -> AsyncIterator[MemoryRecordStore]:
        async with super().open(location, options) as store:
            medium = self.medium(location)
            assert medium is not None
            if self.fault == "order":
                medium.records = medium.records[::-1]
            if self.fault == "owner":
                medium.owned = False
            if self.fault == "identity":
                store.incarnation = bytes(16)
            yield Broken(store, self.fault) if self.fault in ("checkpoint", "poison") else store  # type: ignore[misc]


class Broken:
    def __init__(self, store: MemoryRecordStore, fault: str) -> None:
        self.store, self.fault = store, fault
        self.incarnation = store.incarnation
        self.stats, self.aclose = store.stats, store.aclose

    async def recover(self) -> Recovered:
        return await self.store.recover()

    async def append(self, records: Sequence[bytes]) -> None:
        if self.fault == "poison":
            self.store._refusal = ""
        await self.store.append(records)

    async def checkpoint(self, state: bytes, records: Sequence[bytes]) -> None:
        if self.fault == "checkpoint":
            await self.store.append(records)
        else:
            await self.store.checkpoint(state, records)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("order", "records_come_back_in_order"),
        ("owner", "one_owner_at_a_time"),
        ("identity", "a_new_store_is_empty"),
        ("checkpoint", "a_checkpoint_replaces"),
        ("poison", "a_failed_write_poisons"),
    ],
)
async def test_suite_catches_a_store_that_breaks_a_rule(fault: str, check: str) -> None:
    engine, count = Forgetful(fault), itertools.count()

    def make() -> RecordStoreKit:
        location = str(next(count))

        def fail(failing: bool) -> None:
            medium = engine.medium(location)
            assert medium is not None
            medium.failing = failing

        return RecordStoreKit(engine=engine, location=location, fail_writes=fail)

    with pytest.raises(AssertionError, match=check):
        await check_record_store(make)
