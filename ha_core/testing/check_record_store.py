"""The conformance suite of RecordStores: what every engine must do, whatever it is made of.

    async def test_my_store(tmp_path):
        count = itertools.count()
        await check_record_store(lambda: RecordStoreKit(engine=MyEngine(), location=str(tmp_path / str(next(count)))))

``make`` is called once for each check and gives a kit for a store that does not exist yet. The optional parts of the kit let
the suite cut the power, fail writes and fill the device; what a kit cannot do is not checked, so give it all that you can.
A rule that does not hold raises AssertionError with the name of the check.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager

import attrs
import trio

from ha_core.errors import CorruptRecordError, StorageError, StorageFullError, StoreLockedError
from ha_core.interfaces import RecordStore, RecordStoreEngine, Recovered


@attrs.frozen(kw_only=True)
class RecordStoreKit:
    """One store and the world around it."""

    engine: RecordStoreEngine
    location: str
    options: Mapping[str, object] = attrs.field(factory=dict)
    cut_power: Callable[[int], None] | None = None
    """The device stops for good after so many more operations: the running call and all later ones fail."""
    restore_power: Callable[[], None] | None = None
    fail_writes: Callable[[bool], None] | None = None
    """Every write or flush fails from now on (True), or works again (False)."""
    fill_records: int = 0
    """If not 0: so many records of 10,000 bytes are more than the store can hold."""
    largest_record_bytes: int = 8 << 20
    between_processes: bool = False
    """Another process could open the same location, and must be refused."""

    def open(self) -> AbstractAsyncContextManager[RecordStore]:
        return self.engine.open(self.location, self.options)


async def check_record_store(make: Callable[[], RecordStoreKit], *, seed: int = 0) -> Sequence[str]:
    """Run every check that the kit allows; returns their names.

    Raises:
        AssertionError: a rule does not hold; the text begins with the check's name.
    """
    done: list[str] = []
    for check in CHECKS:
        try:
            if await check(make, seed):
                done.append(check.__name__)
        except AssertionError as exc:
            raise AssertionError(f"{check.__name__}: {exc}") from exc
    return done


async def _content(kit: RecordStoreKit) -> Recovered:
    async with kit.open() as store:
        return await store.recover()


def _demand(condition: object, text: str) -> None:
    if not condition:
        raise AssertionError(text)


def _same(found: Recovered, checkpoint: bytes | None, records: Sequence[bytes], when: str) -> None:
    _demand(found.checkpoint == checkpoint, f"{when}: another checkpoint was recovered than was written")
    _demand(
        list(found.records) == list(records),
        f"{when}: {len(found.records)} records recovered, {len(records)} acknowledged, or in another order",
    )


async def a_new_store_is_empty_and_has_an_identity(make: Callable[[], RecordStoreKit], seed: int) -> bool:
    kit, other = make(), make()
    async with kit.open() as store:
        _same(await store.recover(), None, [], "new store")
        incarnation = store.incarnation
    _demand(len(incarnation) == 16, "the incarnation must be 16 bytes")
    async with kit.open() as store:
        _demand(store.incarnation == incarnation, "the incarnation changed when the store was opened again")
    async with other.open() as store:
        _demand(store.incarnation != incarnation, "two stores have the same incarnation")
    return True


async def records_come_back_in_order(make: Callable[[], RecordStoreKit], seed: int) -> bool:
    kit = make()
    written: list[bytes] = []
    for round_ in range(3):
        async with kit.open() as store:
            _same(await store.recover(), None, written, f"opening {round_ + 1}")
            for group in range(5):
                records = [b"%d/%d/%d" % (round_, group, number) for number in range(group)] + [b"", b"\0" * 17, b"\xff" * 33]
                await store.append(records)
                written += records
            await store.append([])
    _same(await _content(kit), None, written, "at the end")
    return True


async def a_checkpoint_replaces_everything_before_it(make: Callable[[], RecordStoreKit], seed: int) -> bool:
    kit = make()
    async with kit.open() as store:
        await store.recover()
        await store.append([b"old"] * 10)
        await store.checkpoint(b"", [])
        await store.append([b"middle"])
        await store.checkpoint(b"state", [b"one", b"two"])
        await store.append([b"three"])
    _same(await _content(kit), b"state", [b"one", b"two", b"three"], "after two checkpoints")
    async with kit.open() as store:
        await store.recover()
        await store.checkpoint(b"", [])
    _same(await _content(kit), b"", [], "an empty checkpoint is still one")
    return True


async def big_records_and_states_are_kept(make: Callable[[], RecordStoreKit], seed: int) -> bool:
    kit = make()
    draw = random.Random(seed)
    big, state = draw.randbytes(kit.largest_record_bytes), draw.randbytes(kit.largest_record_bytes // 3 + 1)
    async with kit.open() as store:
        await store.recover()
        await store.append([b"before", big, b"after"])
    _same(await _content(kit), None, [b"before", big, b"after"], "a big record")
    async with kit.open() as store:
        await store.recover()
        await store.checkpoint(state, [b"next"])
    _same(await _content(kit), state, [b"next"], "a big state")
    return True


async def a_random_life_equals_the_plain_list(make: Callable[[], RecordStoreKit], seed: int) -> bool:
    kit = make()
    draw = random.Random(seed)
    checkpoint: bytes | None = None
    records: list[bytes] = []
    for life in range(6):
        async with kit.open() as store:
            _same(await store.recover(), checkpoint, records, f"life {life}")
            for _ in range(draw.randrange(25)):
                new = [draw.randbytes(draw.choice([0, 1, 60, 200, 900])) for _ in range(draw.randrange(1, 5))]
                if draw.random() < 0.15:
                    checkpoint, records = draw.randbytes(draw.randrange(3000)), new
                    await store.checkpoint(checkpoint, new)
                else:
                    await store.append(new)
                    records += new
    _same(await _content(kit), checkpoint, records, "at the end")
    return True


@attrs.define
class _Life:
    """What was acknowledged, and what the call that failed may have left."""

    checkpoint: bytes | None = None
    records: list[bytes] = attrs.field(factory=list)
    in_flight: tuple[bytes | None, list[bytes]] | None = None

    def allows(self, found: Recovered) -> bool:
        have = list(found.records)
        if found.checkpoint == self.checkpoint and have[: len(self.records)] == self.records:
            more = have[len(self.records) :]
            if not more or (
                self.in_flight is not None and self.in_flight[0] is None and more == self.in_flight[1][: len(more)]
            ):
                return True
        return self.in_flight is not None and (found.checkpoint, have) == self.in_flight


async def _workload(store: RecordStore, life: _Life) -> None:
    for step in range(7):
        new = [b"%d:%d" % (step, number) * (1 + 40 * number) for number in range(1 + step % 3)]
        if step in (2, 5):
            state = b"state %d " % step * 30
            life.in_flight = (state, new)
            await store.checkpoint(state, new)
            life.checkpoint, life.records = state, new
        else:
            life.in_flight = (None, new)
            await store.append(new)
            life.records = life.records + new
        life.in_flight = None


async def no_power_cut_loses_what_was_acknowledged(make: Callable[[], RecordStoreKit], seed: int) -> bool:
    for operations in range(10_000):
        kit = make()
        if kit.cut_power is None or kit.restore_power is None:
            return False
        life = _Life()
        ended = await _until_the_cut(kit, operations, life)
        kit.restore_power()
        async with kit.open() as store:
            found = await store.recover()
            _demand(life.allows(found), f"power cut after {operations} operations: acknowledged records are lost or altered")
            await store.append([b"afterwards"])
        again = await _content(kit)
        _same(again, found.checkpoint, [*found.records, b"afterwards"], f"second start after a cut at operation {operations}")
        if ended:
            return True
    raise AssertionError("the workload never ended: cut_power does not count down")


async def _until_the_cut(kit: RecordStoreKit, operations: int, life: _Life) -> bool:
    assert kit.cut_power is not None
    try:
        async with kit.open() as store:
            await store.recover()
            kit.cut_power(operations)
            await _workload(store, life)
            return True
    except StorageError:
        return False


async def a_failed_write_poisons_the_store(make: Callable[[], RecordStoreKit], seed: int) -> bool:
    kit = make()
    if kit.fail_writes is None:
        return False
    async with kit.open() as store:
        await store.recover()
        await store.append([b"safe"])
        kit.fail_writes(True)
        await _refused(store, [b"lost"], "a write that fails")
        kit.fail_writes(False)
        await _refused(store, [b"later"], "a write after one that failed")
        try:
            await store.checkpoint(b"state", [])
        except StorageError:
            pass
        else:
            raise AssertionError("a checkpoint after a failed write was acknowledged")
    found = await _content(kit)
    _demand(list(found.records) in ([b"safe"], [b"safe", b"lost"]), "a failed write lost or altered what was acknowledged")
    async with kit.open() as store:
        await store.recover()
        await store.append([b"again"])
    return True


async def _refused(store: RecordStore, records: Sequence[bytes], what: str) -> None:
    try:
        await store.append(records)
    except StorageFullError as exc:
        raise AssertionError(f"{what} raised StorageFullError") from exc
    except StorageError:
        return
    raise AssertionError(f"{what} was acknowledged")


async def a_full_store_loses_nothing_and_goes_on(make: Callable[[], RecordStoreKit], seed: int) -> bool:
    kit = make()
    if not kit.fill_records:
        return False
    draw = random.Random(seed)
    written: list[bytes] = []
    async with kit.open() as store:
        await store.recover()
        try:
            for _ in range(kit.fill_records):
                record = draw.randbytes(10_000)
                await store.append([record])
                written.append(record)
        except StorageFullError:
            pass
        else:
            raise AssertionError(f"{kit.fill_records} records of 10,000 bytes were acknowledged")
    _same(await _content(kit), None, written, "a full store")
    async with kit.open() as store:
        await store.recover()
        await store.checkpoint(b"small", [])
        await store.append([b"room again"])
    _same(await _content(kit), b"small", [b"room again"], "after a checkpoint made room")
    return True


async def one_owner_at_a_time(make: Callable[[], RecordStoreKit], seed: int) -> bool:
    kit = make()
    async with kit.open() as store:
        await store.recover()
        await store.append([b"mine"])
        try:
            async with kit.open():
                pass
        except StoreLockedError:
            pass
        else:
            raise AssertionError("a second owner in the same process was let in")
        if kit.between_processes:
            said = await trio.to_thread.run_sync(_open_elsewhere, kit)
            _demand(said == "StoreLockedError", f"a second process was not refused with StoreLockedError but: {said}")
        await store.append([b"still mine"])
    _same(await _content(kit), None, [b"mine", b"still mine"], "after the other owner was refused")
    return True


_ELSEWHERE = """
import importlib, sys, trio
async def main():
    engine = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])()
    try:
        async with engine.open(sys.argv[3], eval(sys.argv[4])):
            return "opened"
    except Exception as exc:
        return type(exc).__name__
print(trio.run(main))
"""


def _open_elsewhere(kit: RecordStoreKit) -> str:
    kind = type(kit.engine)
    argv = [sys.executable, "-c", _ELSEWHERE, kind.__module__, kind.__qualname__, kit.location, repr(dict(kit.options))]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip() or done.stderr.strip()


async def stats_count_what_happened(make: Callable[[], RecordStoreKit], seed: int) -> bool:
    kit = make()
    async with kit.open() as store:
        await store.recover()
        before = store.stats()
        await store.append([b"x" * 1000, b"y" * 500])
        after = store.stats()
        await store.checkpoint(b"state", [])
        last = store.stats()
    _demand(after.appended_bytes - before.appended_bytes == 1500, "appended_bytes must count the bytes of the records")
    _demand(after.programmed_bytes - before.programmed_bytes >= 1500, "programmed_bytes must count at least the records")
    _demand(after.flushes == before.flushes + 1, "one append is one flush")
    _demand(last.checkpoints == after.checkpoints + 1, "checkpoints must be counted")
    _demand(after.size_bytes > 0, "size_bytes must not be 0 when the store holds something")
    return True


async def a_closed_store_refuses(make: Callable[[], RecordStoreKit], seed: int) -> bool:
    kit = make()
    async with kit.open() as store:
        await store.recover()
    try:
        await store.append([b"too late"])
    except CorruptRecordError as exc:
        raise AssertionError("a closed store says that it is corrupt") from exc
    except StorageError:
        pass
    else:
        raise AssertionError("a closed store acknowledged a record")
    await store.aclose()
    _same(await _content(kit), None, [], "after a refused record")
    return True


CHECKS: Sequence[Callable[[Callable[[], RecordStoreKit], int], Awaitable[bool]]] = (
    a_new_store_is_empty_and_has_an_identity,
    records_come_back_in_order,
    a_checkpoint_replaces_everything_before_it,
    big_records_and_states_are_kept,
    a_random_life_equals_the_plain_list,
    no_power_cut_loses_what_was_acknowledged,
    a_failed_write_poisons_the_store,
    a_full_store_loses_nothing_and_goes_on,
    one_owner_at_a_time,
    stats_count_what_happened,
    a_closed_store_refuses,
)
