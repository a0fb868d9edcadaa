"""A replica on a small flash: its store asks for checkpoints, and gets them in time."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import trio

from ha_core.interfaces import RecordStore
from ha_core.storage.flash import FlashEngine
from tests.runtime.database_nodes import NODES, open_bus

BLOCKS, BLOCK_BYTES = 32, 32 << 10


class SmallFlash:
    """224 appends of one program unit each fill it, and hold less than 30 KB of what is written."""

    name = "flash"

    def open(self, location: str, options: Mapping[str, object]) -> AbstractAsyncContextManager[RecordStore]:
        return FlashEngine().open(location, {"size_bytes": BLOCKS * BLOCK_BYTES, "erase_bytes": BLOCK_BYTES})


async def test_many_small_commits_never_fill_a_flash(tmp_path: Path) -> None:
    with trio.fail_after(20):
        for life in range(2):
            async with open_bus(tmp_path, SmallFlash()) as bus:
                bus.voters = NODES[:1]
                database = await bus.start(NODES[0])
                for number in range(300):
                    await database.put(b"k", b"%d" % (300 * life + number))
        async with open_bus(tmp_path, SmallFlash()) as bus:
            bus.voters = NODES[:1]
            record = await (await bus.start(NODES[0])).get(b"k")
            assert record is not None
            assert record.value == b"599"


async def test_a_crash_loop_does_not_fill_a_flash(tmp_path: Path) -> None:
    """Each start begins a new block; so many starts as there are blocks must leave room for one more."""
    with trio.fail_after(20):
        for life in range(BLOCKS + 2):
            async with open_bus(tmp_path, SmallFlash()) as bus:
                bus.voters = NODES[:1]
                database = await bus.start(NODES[0])
                for number in range(2):
                    await database.put(b"k", b"%d %d" % (life, number))
