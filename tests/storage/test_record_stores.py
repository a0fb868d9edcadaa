"""Every RecordStore of ours passes the conformance suite, and the suite catches stores that break a rule."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import pytest

from ha_core.interfaces import Recovered
from ha_core.storage.memory import MemoryEngine, MemoryRecordStore
from ha_core.testing.check_record_store import CHECKS, RecordStoreKit, check_record_store


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
