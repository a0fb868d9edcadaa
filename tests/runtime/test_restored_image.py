"""A restored copy of a replica does not vote again (R12): it is refused when it opens, or by who saw its later life."""

from __future__ import annotations

import shutil
from pathlib import Path

import attrs
import pytest
import trio

from ha_core.config import Config
from ha_core.errors import OutcomeUnknownError, StorageError
from ha_core.events import PeerRefusedEvent
from ha_core.machines.raft.records import encode_mark, encode_record, last_mark
from ha_core.runtime.node import open_node
from ha_core.runtime.records import mark_boot
from ha_core.storage.sqlite import SqliteEngine
from ha_core.storage.sqlite_transactions import open_transaction_store
from tests.runtime.test_node import event_of
from tests.runtime.test_node_database import VOTERS, four_configs

ONE, TWO, THREE = VOTERS
FILES = ("node.db", "app.db")


def single(folder: Path) -> Config:
    config = four_configs(folder)[ONE]
    return attrs.evolve(config, bootstrap={ONE: config.links})


async def life(config: Config) -> None:
    async with open_node(config) as node:
        with trio.fail_after(10):
            await node.database.put(b"key", b"value")


def save(config: Config, *names: str) -> Path:
    folder = config.data_dir.with_suffix(".backup")
    folder.mkdir()
    for name in names:
        shutil.copy2(config.data_dir / name, folder / name)
    return folder


def restore(config: Config, folder: Path) -> None:
    for path in folder.iterdir():
        for old in config.data_dir.glob(path.name + "*"):
            old.unlink()
        shutil.copy2(path, config.data_dir / path.name)


@pytest.mark.parametrize("name", FILES)
async def test_one_file_of_a_pair_that_is_older_than_the_other_is_refused(tmp_path: Path, name: str) -> None:
    config = single(tmp_path)
    await life(config)
    backup = save(config, name)
    await life(config)
    restore(config, backup)

    for _ in range(2):
        with pytest.raises(StorageError, match=r"node\.db and app\.db: they are not of the same time"):
            await life(config)


async def test_a_process_that_ended_before_it_left_its_mark_is_no_restored_copy(tmp_path: Path) -> None:
    config = single(tmp_path)
    await life(config)
    for _ in range(2):
        async with open_transaction_store(config.data_dir / "app.db", owner=ONE):
            pass

    await life(config)
    await life(config)


async def test_a_process_that_ended_before_its_mark_was_vouched_for_is_no_restored_copy(tmp_path: Path) -> None:
    location = str(tmp_path / "node.db")
    async with SqliteEngine().open(location, {}) as store:
        recovered = await store.recover()
        await mark_boot(store, recovered, b"first", (), "here")

    async with SqliteEngine().open(location, {}) as store:
        recovered = await store.recover()
        assert last_mark(recovered) == b"first"
        await mark_boot(store, recovered, b"second", (b"", b"first"), "here")
        with pytest.raises(StorageError, match="here: they are not of the same time"):
            await mark_boot(store, recovered, b"third", (b"second", b"third"), "here")


def test_the_last_mark_counts_whatever_stands_behind_it() -> None:
    @attrs.frozen
    class Held:
        records: tuple[bytes, ...]
        checkpoint: bytes | None = None

    records = encode_mark(b"1"), encode_record(1, None, 0, 0, []), encode_mark(b"2"), encode_record(2, None, 0, 0, [])

    assert last_mark(Held(records)) == b"2"
    assert last_mark(Held(records[1:2])) == b""


async def test_a_restored_pair_is_refused_by_every_voter_that_saw_its_later_life(tmp_path: Path) -> None:
    """Even by one that has restarted since; without it there is no quorum, so no vote of it was counted."""
    configs = {node: config for node, config in four_configs(tmp_path).items() if node in VOTERS}
    async with open_node(configs[ONE]), open_node(configs[TWO]):
        await life(configs[THREE])
        backup = save(configs[THREE], *FILES)
        await life(configs[THREE])
    restore(configs[THREE], backup)

    async with open_node(configs[TWO]) as two, two.open_events() as events, open_node(configs[THREE]):
        refused = await event_of(events, PeerRefusedEvent)
        assert (refused.peer, refused.code) == (THREE, "clone")
        with pytest.raises((OutcomeUnknownError, trio.TooSlowError)), trio.fail_after(2):
            await two.database.put(b"key", b"without a quorum")
