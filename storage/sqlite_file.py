"""How every SQLite file of ours is opened, checked and closed, and what SQLite's errors mean to us.

Rules:

* One connection and one thread per file, locked exclusively for as long as it is open (SQLite before 3.51.3 can corrupt a
  WAL database that two connections write). WAL, synchronous=FULL: a commit that returned is on the disk.
* A file says whose it is (application_id) and how its rows are laid out (user_version); another one is refused untouched.
* A WAL file that is still there was left by a process that did not close: the database is then checked, and the WAL copied
  back into it, before use.
"""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import attrs
import trio

from ha_core.errors import CorruptRecordError, StorageError, StorageFullError, StoreLockedError
from ha_core.storage.sqlite_bridge import Connection, connect

WAL_LIMIT_BYTES: Final = 16 << 20
"""The WAL file is cut back to this after a checkpoint: a large transaction must not hold its space for ever."""
CLOSE_S: Final = 2.0
"""How long closing waits for a thread that is still inside a transaction before it lets go of it."""


@attrs.frozen
class FileKind:
    """What a file of ours must look like."""

    name: str
    application_id: int
    version: int
    schema: Sequence[str]
    """Statements that make an empty file one of this kind."""


@attrs.frozen
class OpenFile:
    path: Path
    connection: Connection
    created: bool
    unclean: bool
    """The last owner did not close it."""
    cursors: list[sqlite3.Cursor] = attrs.field(factory=list)
    """Kept cursors, closed before the connection: one that holds a statement (after executemany it does) holds the lock."""


def code_of(exc: BaseException) -> int:
    """SQLite's primary result code, 0 if it is no error of SQLite."""
    return int(getattr(exc, "sqlite_errorcode", 0) or 0) & 0xFF


def storage_error(exc: BaseException, path: Path | str) -> StorageError:
    """What an error of SQLite means: one line that names the file."""
    code = code_of(exc)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreLockedError(f"{path}: locked by another process: a store has one owner")
    if code == sqlite3.SQLITE_FULL:
        return StorageFullError(f"{path}: no room on the device: nothing of this write was stored; free some space")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return CorruptRecordError(f"{path}: damaged or no SQLite database ({exc}): restore it, or remove it to join anew")
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY):
        return StorageError(f"{path}: cannot be opened for writing ({exc}): check the folder and its permissions")
    return StorageError(f"{path}: the store failed ({exc}): its state is known again after the next start")


@asynccontextmanager
async def open_file(
    path: Path, kind: FileKind, *, max_page_count: int | None = None, timeout_s: float = 0.0
) -> AsyncIterator[OpenFile]:
    """Open or create the file and own it; its connection closes with the context, however that ends.

    Raises:
        StoreLockedError: another process, or another part of this one, owns it.
        CorruptRecordError: it is damaged.
        StorageError: it is of another kind or version, or cannot be opened.
    """
    unclean = _has_wal(path)
    try:
        connection = await connect(str(path), timeout_s=timeout_s)
    except sqlite3.Error as exc:
        raise storage_error(exc, path) from exc
    cursors: list[sqlite3.Cursor] = []
    try:
        try:
            created = await connection.run(_prepare, connection.database(), path, kind, unclean, max_page_count)
        except sqlite3.Error as exc:
            raise storage_error(exc, path) from exc
        yield OpenFile(path, connection, created, unclean and not created, cursors)
    finally:
        await close(connection, cursors)  # noqa: ASYNC102 - shields itself, for a bounded time


async def close(connection: Connection, cursors: Sequence[sqlite3.Cursor] = ()) -> None:
    """Close, or let go of a thread that does not come back; the file is sound either way."""
    with trio.move_on_after(CLOSE_S, shield=True) as scope:
        try:
            await connection.run_or_leave(partial(_close, connection.database(), cursors))
        except (ValueError, sqlite3.Error):
            pass  # it is closed already, or its last write failed and was reported then
        connection.stop()
    if scope.cancelled_caught:
        connection.abandon()


def _close(database: sqlite3.Connection, cursors: Sequence[sqlite3.Cursor]) -> None:
    for cursor in cursors:
        cursor.close()
    if database.in_transaction:
        database.rollback()
    database.set_authorizer(None)
    database.set_progress_handler(None, 0)
    database.close()


def _has_wal(path: Path) -> bool:
    try:
        return path.with_name(path.name + "-wal").stat().st_size > 0
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENOTDIR):
            return False
        raise StorageError(f"{path}: cannot be read: {exc.strerror}") from exc


def _prepare(database: sqlite3.Connection, path: Path, kind: FileKind, unclean: bool, max_page_count: int | None) -> bool:
    execute = database.execute
    execute("PRAGMA locking_mode=EXCLUSIVE")
    _judge(execute, path, kind)  # before anything is written: the journal mode is kept in the file
    mode = execute("PRAGMA journal_mode=WAL").fetchone()[0]
    if mode != "wal":
        raise StorageError(f"{path}: SQLite offers journal mode {mode!r} here, wal is needed: use a local file system")
    execute("PRAGMA synchronous=FULL")
    execute(f"PRAGMA journal_size_limit={WAL_LIMIT_BYTES}")
    execute("BEGIN IMMEDIATE")  # takes the exclusive lock and keeps it
    empty = _judge(execute, path, kind)
    execute("COMMIT")
    if empty:
        _create(execute, kind)
    elif unclean:
        if (text := execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise CorruptRecordError(f"{path}: damaged ({text}): restore it, or remove it to join anew")
        _copy_back(execute)
    if max_page_count is not None:
        execute(f"PRAGMA max_page_count={int(max_page_count)}")
    return empty


def _judge(execute: Callable[[str], sqlite3.Cursor], path: Path, kind: FileKind) -> bool:
    """True if the file is empty; raises StorageError if it is not ours."""
    found = execute("PRAGMA application_id").fetchone()[0]
    version = execute("PRAGMA user_version").fetchone()[0]
    if found == 0 and execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
        return True
    if found != kind.application_id:
        raise StorageError(f"{path}: is no {kind.name} of ha-core (application id {found:#010x}): give another path")
    if version != kind.version:
        raise StorageError(f"{path}: is a {kind.name} of version {version}, this ha-core reads {kind.version}")
    return False


def _copy_back(execute: Callable[[str], sqlite3.Cursor]) -> None:
    """Write what the WAL holds into the database and flush it, before anything follows it: if it was a failed flush that ended
    the last owner, the WAL may read well out of the page cache and yet not be on the disk (M7)."""
    try:
        execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    except sqlite3.Error as exc:
        if code_of(exc) != sqlite3.SQLITE_FULL:  # a full disk must not keep a store from being opened
            raise


def _create(execute: Callable[[str], sqlite3.Cursor], kind: FileKind) -> None:
    """All of it or nothing: both pragmas are fields of the database header and so part of the transaction."""
    execute("BEGIN IMMEDIATE")
    for statement in kind.schema:
        execute(statement)
    execute(f"PRAGMA application_id={kind.application_id}")
    execute(f"PRAGMA user_version={kind.version}")
    execute("COMMIT")
