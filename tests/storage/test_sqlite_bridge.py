"""aiosqlite's whole API under trio, and the private names that this relies on."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import aiosqlite
import aiosqlite.core
import pytest
import trio

from ha_core.storage.sqlite_bridge import RELIED_ON, Connection, connect


def test_the_private_names_of_aiosqlite_are_there() -> None:
    for name in RELIED_ON:
        assert hasattr(aiosqlite.Connection, name), name
    connection = aiosqlite.Connection(lambda: sqlite3.connect(":memory:"), 64)
    for name in ("_running", "_connection", "_connector", "_tx", "_thread"):
        assert hasattr(connection, name), name
    assert isinstance(connection._thread, threading.Thread)
    assert not connection._thread.is_alive()
    assert aiosqlite.core._STOP_RUNNING_SENTINEL is not None


async def test_the_whole_api_works_without_asyncio(tmp_path: Path) -> None:
    async with connect(str(tmp_path / "a.db")) as db:
        await db.execute("CREATE TABLE t (n INTEGER, text TEXT)")
        await db.executemany("INSERT INTO t VALUES (?, ?)", [(n, str(n)) for n in range(200)])
        async with db.execute("SELECT n FROM t WHERE n < ? ORDER BY n", (3,)) as cursor:
            assert [row[0] async for row in cursor] == [0, 1, 2]
        rows = list(await db.execute_fetchall("SELECT count(*) FROM t"))
        assert rows[0][0] == 200
        assert db.in_transaction is False


async def test_a_failed_connect_leaves_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()

    with pytest.raises(sqlite3.OperationalError):
        await connect(str(tmp_path / "missing" / "a.db"))

    with trio.fail_after(2):
        while threading.active_count() > before:
            await trio.sleep(0.001)


async def test_cancelled_call_that_has_begun_is_waited_for(tmp_path: Path) -> None:
    async with connect(str(tmp_path / "a.db")) as db:
        begun = threading.Event()

        def work() -> str:
            begun.set()
            time.sleep(0.02)
            return "done"

        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                results: list[str] = []

                async def call() -> None:
                    results.append(await db.run(work))

                nursery.start_soon(call)
                await trio.to_thread.run_sync(begun.wait)
                scope.cancel()

        assert results == ["done"]


async def test_cancelled_before_the_call_means_it_never_ran(tmp_path: Path) -> None:
    async with connect(str(tmp_path / "a.db")) as db:
        ran: list[int] = []
        with trio.CancelScope() as scope:
            scope.cancel()
            await db.run(ran.append, 1)

        assert ran == []
        await db.run(ran.append, 2)
        assert ran == [2]


async def test_closed_connection_refuses_calls(tmp_path: Path) -> None:
    db: Connection = connect(str(tmp_path / "a.db"))
    async with db:
        pass

    with pytest.raises(ValueError, match="no active connection"):
        await db.execute("SELECT 1")


_FORGETFUL = """
import sys, time, trio
from ha_core.storage.sqlite_bridge import connect
async def main():
    global connection
    connection = await connect(sys.argv[1])
    connection.post(lambda: time.sleep(60))  # stuck
trio.run(main)
"""


def test_a_connection_that_nobody_closed_does_not_hold_up_the_end_of_the_process(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-W", "ignore", "-c", _FORGETFUL, str(tmp_path / "a.db")]
    assert subprocess.run(command, timeout=10, check=False).returncode == 0
