"""The record store on SQLite: what was acknowledged is there, what is damaged is said."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from ha_core.errors import CorruptRecordError, StorageError, StorageFullError, StoreLockedError
from ha_core.storage.sqlite import NODE_DB, SqliteEngine, pack_batch, unpack_batch
from ha_core.storage.sqlite_file import FileKind, open_file
from ha_core.storage.sqlite_transactions import APP_DB


async def test_appended_records_are_there_after_reopening(tmp_path: Path) -> None:
    path = str(tmp_path / "node.db")
    async with SqliteEngine().open(path, {}) as store:
        incarnation = store.incarnation
        found = await store.recover()
        assert found.checkpoint is None
        assert list(found.records) == []
        await store.append([b"a", b"", b"ccc"])
        await store.append([b"d" * 100_000])
        assert store.stats().flushes == 2

    async with SqliteEngine().open(path, {}) as store:
        assert store.incarnation == incarnation
        assert list((await store.recover()).records) == [b"a", b"", b"ccc", b"d" * 100_000]
    assert not os.path.exists(path + "-wal")


async def test_checkpoint_replaces_everything_and_numbers_go_on(tmp_path: Path) -> None:
    path = str(tmp_path / "node.db")
    async with SqliteEngine().open(path, {}) as store:
        await store.recover()
        await store.append([b"old"])
        await store.checkpoint(b"state", [b"kept"])
        await store.append([b"new"])
        assert store.stats().checkpoints == 1

    async with SqliteEngine().open(path, {}) as store:
        found = await store.recover()
        assert found.checkpoint == b"state"
        assert list(found.records) == [b"kept", b"new"]
        await store.checkpoint(b"empty", [])

    async with SqliteEngine().open(path, {}) as store:
        found = await store.recover()
        assert (found.checkpoint, list(found.records)) == (b"empty", [])


async def test_full_disk_is_reported_and_the_store_goes_on(tmp_path: Path) -> None:
    path = str(tmp_path / "node.db")
    async with SqliteEngine().open(path, {"max_page_count": 20}) as store:
        await store.recover()
        await store.append([b"kept"])

        with pytest.raises(StorageFullError, match=r"node\.db"):
            await store.append([b"x" * 200_000])

        await store.append([b"small"])

    async with SqliteEngine().open(path, {}) as store:
        assert list((await store.recover()).records) == [b"kept", b"small"]


async def test_full_disk_in_a_checkpoint_loses_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "node.db")
    async with SqliteEngine().open(path, {"max_page_count": 20}) as store:
        await store.recover()
        await store.append([b"kept"])

        with pytest.raises(StorageFullError):
            await store.checkpoint(b"x" * 200_000, [])

        await store.append([b"more"])

    async with SqliteEngine().open(path, {}) as store:
        found = await store.recover()
        assert (found.checkpoint, list(found.records)) == (None, [b"kept", b"more"])


async def test_failed_write_poisons_the_store(tmp_path: Path) -> None:
    async with SqliteEngine().open(str(tmp_path / "node.db"), {}) as store:
        await store.recover()
        database = store._database  # type: ignore[attr-defined]
        await store._connection.run(database.execute, "DROP TABLE records")  # type: ignore[attr-defined]

        with pytest.raises(StorageError):
            await store.append([b"a"])
        with pytest.raises(StorageError, match="takes no more writes"):
            await store.append([b"b"])


@pytest.mark.parametrize("table", ["records", "checkpoint", "meta"])
async def test_flipped_bit_is_detected(tmp_path: Path, table: str) -> None:
    path = tmp_path / "node.db"
    async with SqliteEngine().open(str(path), {}) as store:
        await store.recover()
        await store.checkpoint(b"state", [b"record"])
    column = {"records": "batch", "checkpoint": "state", "meta": "incarnation"}[table]
    with sqlite3.connect(path) as db:
        value = bytearray(db.execute(f"SELECT {column} FROM {table}").fetchone()[0])
        value[-1] ^= 1
        db.execute(f"UPDATE {table} SET {column} = ?", (bytes(value),))
    db.close()

    with pytest.raises(CorruptRecordError, match=r"node\.db"):
        async with SqliteEngine().open(str(path), {}) as store:
            await store.recover()


async def test_missing_row_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "node.db"
    async with SqliteEngine().open(str(path), {}) as store:
        await store.recover()
        for record in (b"a", b"b", b"c"):
            await store.append([record])
    with sqlite3.connect(path) as db:
        db.execute("DELETE FROM records WHERE number = 2")
    db.close()

    async with SqliteEngine().open(str(path), {}) as store:
        with pytest.raises(CorruptRecordError, match="row 2 is missing"):
            await store.recover()


async def test_second_owner_is_refused_with_the_file_named(tmp_path: Path) -> None:
    path = str(tmp_path / "node.db")
    async with SqliteEngine().open(path, {}):
        with pytest.raises(StoreLockedError, match=r"node\.db.*locked by another process"):
            async with SqliteEngine().open(path, {}):
                pass


async def test_garbage_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "node.db"
    path.write_bytes(b"not a database, but long enough to be read as one" * 100)

    with pytest.raises(StorageError, match=r"node\.db: damaged or no SQLite database") as caught:
        async with SqliteEngine().open(str(path), {}):
            pass

    assert "\n" not in str(caught.value)
    assert path.read_bytes().startswith(b"not a database")


@pytest.mark.parametrize(("pragma", "text"), [("application_id=7", "is no record store"), ("user_version=9", "version 9")])
async def test_other_files_and_versions_are_refused(tmp_path: Path, pragma: str, text: str) -> None:
    path = tmp_path / "node.db"
    async with SqliteEngine().open(str(path), {}):
        pass
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA {pragma}")
    db.close()

    with pytest.raises(StorageError, match=text):
        async with SqliteEngine().open(str(path), {}):
            pass


async def test_foreign_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "theirs.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE theirs (x)")
        db.commit()
    before = path.read_bytes()

    with pytest.raises(StorageError, match="is no record store of ha-core"):
        async with SqliteEngine().open(str(path), {}):
            pass

    assert path.read_bytes() == before, "not even its journal mode"
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


async def test_what_an_unclean_end_left_in_the_wal_is_written_anew_before_anything_follows_it(tmp_path: Path) -> None:
    """After a failed flush the WAL may read well, out of the page cache, and yet not be on the disk."""
    left, alone = tmp_path / "left.db", tmp_path / "alone.db"
    async with SqliteEngine().open(str(tmp_path / "node.db"), {}) as store:
        await store.recover()
        await store.append([b"kept"])
        for suffix in ("", "-wal"):
            shutil.copy(tmp_path / f"node.db{suffix}", f"{left}{suffix}")

    async with SqliteEngine().open(str(left), {}) as store:
        assert list((await store.recover()).records) == [b"kept"]
        shutil.copy(left, alone)

    async with SqliteEngine().open(str(alone), {}) as store:
        assert list((await store.recover()).records) == [b"kept"]


@pytest.mark.parametrize("kind", [NODE_DB, APP_DB], ids=lambda kind: kind.name)
async def test_what_is_committed_is_flushed_before_the_commit_returns(tmp_path: Path, kind: FileKind) -> None:
    async with open_file(tmp_path / "one.db", kind) as file:
        database = file.connection.database()

        def read() -> dict[str, object]:
            names = ("journal_mode", "synchronous", "locking_mode")
            return {name: database.execute(f"PRAGMA {name}").fetchone()[0] for name in names}

        settings = await file.connection.run(read)
    assert settings == {"journal_mode": "wal", "synchronous": 2, "locking_mode": "exclusive"}, "I52: 1 survives no power cut"


async def test_unknown_option_and_missing_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no option 'speed'"):
        async with SqliteEngine().open(str(tmp_path / "node.db"), {"speed": 1}):
            pass
    with pytest.raises(StorageError, match=r"missing/node\.db: cannot be opened"):
        async with SqliteEngine().open(str(tmp_path / "missing" / "node.db"), {}):
            pass


_WRITER = """
import sys, trio
from ha_core.storage.sqlite import SqliteEngine
async def main():
    async with SqliteEngine().open(sys.argv[1], {}) as store:
        await store.recover()
        for number in range(1000000):
            await store.append([b"%d" % number])
            print(number, flush=True)
trio.run(main)
"""


@pytest.mark.integration
def test_killed_writer_leaves_every_acknowledged_record(tmp_path: Path) -> None:
    path = str(tmp_path / "node.db")
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, path], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    acknowledged = [int(writer.stdout.readline()) for _ in range(50)][-1]
    writer.send_signal(signal.SIGKILL)
    acknowledged = max([acknowledged, *(int(line) for line in writer.stdout)])
    writer.wait()
    writer.stdout.close()

    import trio

    async def read() -> list[bytes]:
        async with SqliteEngine().open(path, {}) as store:
            return list((await store.recover()).records)

    records = trio.run(read)
    assert records[: acknowledged + 1] == [b"%d" % number for number in range(acknowledged + 1)]
    assert len(records) <= acknowledged + 2


def test_batches_survive_packing() -> None:
    for records in ([], [b""], [b"a", b"bc"], [b"x" * 70_000, b"", b"y"]):
        assert unpack_batch(pack_batch(records)) == records
