"""The flash store on a simulated NAND that breaks in every way it can, and on a file."""

from __future__ import annotations

import itertools
import logging
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from ha_core.errors import ConfigError, CorruptRecordError, StorageError, StorageFullError, StoreLockedError
from ha_core.interfaces import Recovered
from ha_core.storage.flash import FlashEngine, FlashRecordStore, open_flash_store
from ha_core.storage.flash_device import Geometry
from ha_core.storage.flash_format import SEGMENT_HEADER_BYTES
from ha_core.storage.flash_log import FlashLog
from ha_core.storage.flash_nand import TEARS, SimulatedNand, Tear
from ha_core.storage.flash_recovery import Reader, scan
from ha_core.testing.check_record_store import CHECKS, RecordStoreKit, check_record_store

SMALL = Geometry(512, 16, 24)
PAGED = Geometry(4096, 256, 16)


def open_log(nand: SimulatedNand, *, clock_ns: Callable[[], int] = lambda: 0, budget: int = 0) -> FlashLog:
    return FlashLog(nand, "nand", incarnation=b"i" * 16, clock_ns=clock_ns, daily_budget_bytes=budget)


def content(nand: SimulatedNand) -> Recovered:
    return open_log(nand).recover()


def read_only(nand: SimulatedNand) -> Recovered:
    reader = Reader(nand, "nand", scan(nand))
    reader.check_owner()
    found = reader.read()
    return Recovered(found.checkpoint, tuple(found.records))


class NandEngine:
    name = "nand"

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.devices: dict[str, SimulatedNand] = {}
        self.owned: set[str] = set()

    def device(self, location: str) -> SimulatedNand:
        return self.devices.setdefault(location, SimulatedNand(self.geometry, seed=7))

    @asynccontextmanager
    async def open(self, location: str, options: Mapping[str, object]) -> AsyncIterator[FlashRecordStore]:
        if location in self.owned:
            raise StoreLockedError("owned")
        self.owned.add(location)
        try:
            async with open_flash_store(self.device(location), location) as store:
                yield store
        finally:
            self.owned.discard(location)


@pytest.mark.parametrize("tear", TEARS)
@pytest.mark.parametrize("geometry", [Geometry(4096, 64, 96), Geometry(16384, 512, 24)], ids=["small", "paged"])
async def test_flash_store_conforms_on_nand(geometry: Geometry, tear: Tear) -> None:
    engine, count = NandEngine(geometry), itertools.count()

    def make() -> RecordStoreKit:
        location = str(next(count))

        def cut(operations: int) -> None:
            engine.device(location).cut_after(operations, tear)

        def fail(failing: bool) -> None:
            engine.device(location).failing = failing

        return RecordStoreKit(
            engine=engine, location=location, cut_power=cut, restore_power=lambda: engine.device(location).restore_power(),
            fail_writes=fail, fill_records=50, largest_record_bytes=100_000,
        )  # fmt: skip

    assert len(await check_record_store(make)) == len(CHECKS)


async def test_flash_store_conforms_on_a_file(tmp_path: Path) -> None:
    count = itertools.count()
    options = {"size_bytes": 16 << 20, "erase_bytes": 1 << 18, "program_bytes": 512}

    def make() -> RecordStoreKit:
        location = str(tmp_path / f"{next(count)}.flash")
        return RecordStoreKit(
            engine=FlashEngine(), location=location, options=options, between_processes=True, largest_record_bytes=4 << 20
        )

    await check_record_store(make)


# -- power cuts --


def workload(log: FlashLog, acknowledge: Callable[[str, list[bytes]], None]) -> None:
    """A short life with small and large groups, checkpoints and a group over several segments."""
    for step in range(6):
        records = [b"%d/%d" % (step, number) * (1 + 7 * number) for number in range(1 + step % 3)]
        log.append(records)
        acknowledge("append", records)
        if step == 2:
            log.checkpoint(b"S" * 700, [b"kept"])
            acknowledge("checkpoint", [b"S" * 700, b"kept"])
    log.append([b"wide" * 300])
    acknowledge("append", [b"wide" * 300])
    log.checkpoint(b"T" * 300, [])
    acknowledge("checkpoint", [b"T" * 300])
    log.append([b"end"])
    acknowledge("append", [b"end"])


def states() -> list[Recovered]:
    """What the store holds after each acknowledged step of the workload."""
    found = [Recovered(None, ())]

    def acknowledge(what: str, items: list[bytes]) -> None:
        last = found[-1]
        found.append(
            Recovered(items[0], tuple(items[1:]))
            if what == "checkpoint"
            else Recovered(last.checkpoint, (*last.records, *items))
        )

    log = open_log(SimulatedNand(SMALL))
    log.recover()
    workload(log, acknowledge)
    return found


def play(nand: SimulatedNand) -> int:
    """Run the workload until it ends or the power goes; how many steps were acknowledged."""
    steps = 0

    def acknowledge(what: str, items: list[bytes]) -> None:
        nonlocal steps
        steps += 1

    try:
        log = open_log(nand)
        log.recover()
        workload(log, acknowledge)
    except StorageError:
        return steps
    return steps


@pytest.mark.parametrize("tear", TEARS)
def test_every_program_and_erase_cut_once_loses_nothing_acknowledged(tear: Tear) -> None:
    """I52, I55: then the power is cut again in the recovery, and what was only seemingly programmed decays."""
    life = states()
    for operation in itertools.count():
        nand = SimulatedNand(SMALL, seed=operation)
        nand.cut_after(operation, tear)
        steps = play(nand)
        allowed = life[steps : steps + 2]

        nand.restore_power()
        nand.cut_after(operation % 9, tear)
        with_cut = [recovered(nand)]
        nand.restore_power()
        first = content(nand)
        nand.decay()
        second = content(nand)

        assert first in allowed, f"cut at operation {operation} after step {steps}"
        assert all(found in (None, first) for found in with_cut), (
            f"cut at operation {operation}: recovered content was taken back"
        )
        assert second == first, f"cut at operation {operation}: weakly programmed bytes were trusted"
        if steps == len(life) - 1:
            break
    assert operation > 60


def recovered(nand: SimulatedNand) -> Recovered | None:
    try:
        return content(nand)
    except CorruptRecordError:
        raise
    except StorageError:
        return None


def test_store_goes_on_after_a_cut_anywhere_for_several_lives() -> None:
    """I52, I55."""
    draw = random.Random(3)
    nand = SimulatedNand(SMALL, seed=3)
    life = Recovered(None, ())
    for _ in range(150):
        in_flight: Recovered | None = None
        try:
            log = open_log(nand)
            found = log.recover()
            assert found == life
            nand.cut_after(draw.randrange(40), draw.choice(TEARS))
            while True:
                records = tuple(draw.randbytes(draw.randrange(60)) for _ in range(draw.randrange(1, 4)))
                if draw.random() < 0.2 or log.stats().checkpoint_due:
                    in_flight = Recovered(draw.randbytes(400), records)
                    log.checkpoint(in_flight.checkpoint or b"", records)
                else:
                    in_flight = Recovered(life.checkpoint, (*life.records, *records))
                    log.append(records)
                life, in_flight = in_flight, None
        except StorageFullError:
            raise
        except StorageError:
            pass
        nand.restore_power()
        now = content(nand)
        assert now in (life, in_flight)
        life = now


# -- corruption --


def used_bits(nand: SimulatedNand) -> list[tuple[int, int]]:
    blank = b"\xff" * nand.geometry.erase_bytes
    return [
        (block, bit)
        for block, state in enumerate(nand.blocks)
        if state.data != blank
        for bit in range(nand.geometry.erase_bytes * 8)
    ]


def image(steps: int) -> SimulatedNand:
    nand = SimulatedNand(Geometry(256, 16, 10))
    log = open_log(nand)
    log.recover()
    for step in range(steps):
        log.append([b"record %d" % step])
        if step == 3:
            log.checkpoint(b"state", [b"after"])
    return nand


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_every_flipped_bit_is_detected_or_harmless(steps: int) -> None:
    """I53: an error names the place, or the bit carried nothing and the content is whole."""
    nand = image(steps)
    expected = read_only(nand)
    detected = 0
    for block, bit in used_bits(nand):
        nand.flip(block, bit)
        try:
            found = read_only(nand)
        except CorruptRecordError:
            detected += 1
        else:
            assert found == expected, f"block {block} bit {bit}: altered content was recovered"
        nand.flip(block, bit)
    assert detected > 300


def test_torn_tail_is_dropped_but_damage_before_it_is_corruption() -> None:
    """I53."""
    nand = image(2)
    (block,) = [number for number, state in enumerate(nand.blocks) if b"record 0" in state.data]
    at = nand.blocks[block].data.index(b"record 0")
    nand.blocks[block].data[at : at + 4] = b"\0\0\0\0"
    with pytest.raises(CorruptRecordError, match="an intact group follows it"):
        content(nand)

    nand = image(2)
    at = nand.blocks[block].data.index(b"record 1")
    nand.blocks[block].data[at : at + 4] = b"\0\0\0\0"
    assert content(nand).records == (b"record 0",)


def test_lost_header_of_the_newest_segment_is_corruption() -> None:
    nand = SimulatedNand(SMALL)
    log = open_log(nand)
    log.recover()
    log.append([b"x" * 600])
    numbers = {block: int.from_bytes(state.data[32:40], "big") for block, state in enumerate(nand.blocks) if state.next_offset}
    newest = max(numbers, key=lambda block: numbers[block])
    nand.blocks[newest].data[0:60] = random.Random(1).randbytes(60)
    with pytest.raises(CorruptRecordError, match="lost its header"):
        content(nand)


def test_damage_that_a_later_header_contradicts_is_no_torn_tail() -> None:
    nand = SimulatedNand(SMALL)
    log = open_log(nand)
    log.recover()
    log.append([b"first"])
    log.append([b"r" * (log._space() - 40)])
    last = log._chain[-1].block
    nand.cut_after(2 + SEGMENT_HEADER_BYTES // 16)  # the next segment gets its header and no fragment
    with pytest.raises(StorageError):
        log.append([b"next"])
    nand.restore_power()
    assert len(read_only(nand).records) == 2

    at = nand.blocks[last].data.index(b"rrrr")
    nand.blocks[last].data[at : at + 4] = b"\0\0\0\0"
    with pytest.raises(CorruptRecordError, match="ends early"):
        read_only(nand)


def test_only_copy_of_the_last_fragment_is_never_erased() -> None:
    nand = image(2)
    before = content(nand)  # the last fragment stands alone in the newest segment now
    last = max(scan(nand).segments, key=lambda segment: segment.header.number).block
    for block in range(10):
        if block != last:
            nand.wear_out(block)
    with pytest.raises(StorageError, match="no good block is left"):
        content(nand)
    assert read_only(nand) == before


def test_segments_of_a_broken_checkpoint_are_not_the_first_to_be_erased() -> None:
    nand = SimulatedNand(SMALL)
    log = open_log(nand)
    log.recover()
    log.append([b"kept"])
    nand.cut_after(90)
    with pytest.raises(StorageError):
        log.checkpoint(b"s" * 2000, [])
    nand.restore_power()
    broken = {segment.block for segment in scan(nand).segments if segment.header.number > log._chain[0].header.number + 1}
    log = open_log(nand)
    log._erase_counts = [0 if block in broken else 9 for block in range(SMALL.block_count)]
    assert log.recover().records == (b"kept",)
    assert log._chain[-1].block not in broken


def test_stale_and_foreign_bytes_are_refused() -> None:
    one, other = image(2), SimulatedNand(Geometry(256, 16, 10))
    FlashLog(other, "other", incarnation=b"o" * 16, clock_ns=lambda: 0).recover()
    donor = next(block for block in range(10) if other.blocks[block].data[:8] == b"HAFLASH\0")
    free = next(block for block in range(10) if one.blocks[block].data[0] == 0xFF)
    one.blocks[free].data[:] = other.blocks[donor].data
    if free == donor:
        with pytest.raises(StorageError, match="two stores"):
            content(one)
    else:  # the CRC of a header covers the block that it was made for
        assert content(one) == content(image(2))

    junk = SimulatedNand(SMALL)
    for state in junk.blocks:
        state.data[:] = random.Random(2).randbytes(512)
    with pytest.raises(StorageError, match="no flash store"):
        open_log(junk)


# -- wear and room --


def fill_life(nand: SimulatedNand, keys: int, puts: int, group: int = 1) -> FlashLog:
    log = open_log(nand)
    log.recover()
    draw = random.Random(0)
    for _ in range(puts // group):
        log.append([draw.randbytes(200) for _ in range(group)])
        if log.stats().checkpoint_due:
            log.checkpoint(draw.randbytes(keys * 204), [])
    return log


def test_wear_is_even() -> None:
    """I56, with static data in most of the state."""
    nand = SimulatedNand(Geometry(4096, 64, 64))
    log = fill_life(nand, keys=200, puts=20_000, group=4)
    stats = log.stats()
    assert stats.wear_min > 10
    assert stats.wear_max <= 1.25 * stats.wear_min
    assert [state.erases for state in nand.blocks] == log._erase_counts
    assert open_log(nand)._erase_counts == log._erase_counts


@pytest.mark.parametrize(("unit", "block", "group"), [(16, 4096, 1), (256, 4096, 1), (256, 4096, 10), (2048, 131072, 10)])
def test_write_amplification_is_near_the_padding_floor(unit: int, block: int, group: int) -> None:
    """At most 1.3 times what whole program units alone cost, checkpoints included."""
    nand = SimulatedNand(Geometry(block, unit, max(16, (1 << 20) // block)))
    log = fill_life(nand, keys=200, puts=3000 if block == 4096 else 10_000, group=group)
    payload = 200 * group
    floor = -(-payload // unit) * unit / payload
    figure = nand.programmed_bytes / log.stats().appended_bytes
    assert log.stats().checkpoints >= 1
    assert figure <= 1.3 * floor, f"{figure:.2f} bytes programmed per byte, floor {floor:.2f}"
    assert log.stats().programmed_bytes == nand.programmed_bytes


def test_bad_blocks_are_skipped_and_nothing_is_lost() -> None:
    """I54."""
    draw = random.Random(5)
    nand = SimulatedNand(PAGED)
    log = open_log(nand)
    log.recover()
    written: list[bytes] = []
    for step in range(120):
        if step == 11:
            nand.wear_out(log._allocate())
        if step == 10 or (step > 40 and log.stats().bad_blocks == 2 and log._space() > 512):
            nand.wear_out(log._chain[-1].block)
        record = draw.randbytes(150)
        log.append([record])
        written.append(record)
        if step == 60:
            log.checkpoint(b"state", [])
            written = []
    assert log.stats().bad_blocks == 3
    assert content(nand) == Recovered(b"state", tuple(written))
    log = open_log(nand)
    log.recover()
    assert log.stats().bad_blocks == 3  # remembered with the checkpoint


def test_checkpoint_that_does_not_read_back_is_written_elsewhere() -> None:
    """I52: what was before it may go only then."""
    nand = SimulatedNand(PAGED)
    log = open_log(nand)
    log.recover()
    log.append([b"before"])
    program = nand.program
    broken: list[int] = []

    def program_badly(block: int, offset: int, data: bytes) -> None:
        program(block, offset, data)
        if offset > 0 and not broken:
            broken.append(block)
            nand.flip(block, (offset + 40) * 8)

    nand.program = program_badly  # type: ignore[method-assign]
    log.checkpoint(b"state" * 1000, [])
    assert broken
    assert log.stats().bad_blocks == 1
    assert content(nand) == Recovered(b"state" * 1000, ())


def test_full_device_refuses_without_loss_and_a_checkpoint_makes_room() -> None:
    """I54."""
    nand = SimulatedNand(PAGED)
    log = open_log(nand)
    log.recover()
    written = 0
    with pytest.raises(StorageFullError, match=r"blocks are free.*write a checkpoint"):
        while True:
            log.append([b"r" * 500])
            written += 1
    assert log.stats().checkpoint_due
    with pytest.raises(StorageFullError):
        log.checkpoint(b"s" * 60_000, [])
    assert len(content(nand).records) == written
    log = open_log(nand)
    log.recover()
    log.checkpoint(b"small", [])
    log.append([b"room"])
    assert content(nand) == Recovered(b"small", (b"room",))


def test_many_openings_use_up_nothing() -> None:
    nand = SimulatedNand(PAGED)
    for _ in range(100):
        content(nand)
    assert open_log(nand).recover() == Recovered(None, ())
    assert max(state.erases for state in nand.blocks) <= 8


def test_daily_budget_is_counted_and_warned_about_once_a_day(caplog: pytest.LogCaptureFixture) -> None:
    now = [0]
    log = open_log(SimulatedNand(Geometry(4096, 256, 64)), clock_ns=lambda: now[0], budget=20_000)
    log.recover()
    with caplog.at_level(logging.WARNING):
        for _ in range(60):
            log.append([b"x" * 400])
        assert log.stats().today_bytes > log.stats().daily_budget_bytes == 20_000
        assert [record.getMessage() for record in caplog.records if "daily budget" in record.getMessage()] != []
        assert len(caplog.records) == 1
        now[0] += 86_400 * 10**9
        log.append([b"x"])
        assert log.stats().today_bytes < 1000


# -- files --


async def test_wrong_geometry_size_and_options_are_named(tmp_path: Path) -> None:
    path, engine = str(tmp_path / "node.flash"), FlashEngine()
    options: dict[str, object] = {"size_bytes": 1 << 20, "erase_bytes": 1 << 16, "program_bytes": 512}
    async with engine.open(path, options) as store:
        await store.recover()
        with pytest.raises(StoreLockedError, match="another process owns it"):
            async with engine.open(path, options):
                pass
    for wrong, error, text in [
        ({"erase_bytes": 1 << 15}, StorageError, "made with erase_bytes"),
        ({"size_bytes": 1 << 21}, StorageError, "its geometry needs 2097152"),
        ({"colour": 1}, ConfigError, "colour"),
        ({"erase_bytes": 1000, "program_bytes": 512}, ConfigError, "four program units"),
    ]:
        with pytest.raises(error, match=text):
            async with engine.open(path, options | wrong):
                pass
    with pytest.raises(StorageError, match="cannot open it"):
        async with engine.open(str(tmp_path / "no" / "folder"), options):
            pass


async def recover_file(path: str, options: Mapping[str, object]) -> Recovered:
    async with FlashEngine().open(path, options) as store:
        return await store.recover()


WRITER = """
import sys, trio
from ha_core.storage.flash import FlashEngine
async def main():
    async with FlashEngine().open(sys.argv[1], {"size_bytes": 2 << 20, "erase_bytes": 1 << 16, "program_bytes": 512}) as store:
        await store.recover()
        number = 0
        while True:
            await store.append([b"%d" % number])
            print(number, flush=True)
            number += 1
            if number % 100 == 0:
                await store.checkpoint(b"%d" % number, [])
trio.run(main)
"""


def test_killed_process_left_everything_that_it_acknowledged(tmp_path: Path) -> None:
    path = str(tmp_path / "node.flash")
    with subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(250):
            process.stdout.readline()
        process.kill()
        rest = process.stdout.read().splitlines()
    acknowledged = int(rest[-1]) if rest else 249
    options = {"size_bytes": 2 << 20, "erase_bytes": 1 << 16, "program_bytes": 512}
    found = trio.run(recover_file, path, options)
    count = int(found.checkpoint or b"0") + len(found.records)
    assert acknowledged + 1 <= count <= acknowledged + 2
