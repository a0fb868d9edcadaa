"""``SqliteEngine``: the RecordStore of node.db on SQLite; one row and one flush per append, a CRC in every row.

A row's checksum covers its number and the store's incarnation, so a row of another store or place is no valid row here.
"""

from __future__ import annotations

import secrets
import sqlite3
import struct
import zlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, ParamSpec

from ha_core.errors import CorruptRecordError, StorageError, StorageFullError, invariant
from ha_core.interfaces import RecordStore, Recovered, StoreStats
from ha_core.storage.sqlite_bridge import Connection
from ha_core.storage.sqlite_file import FileKind, OpenFile, open_file, storage_error

NODE_DB: Final = FileKind(
    name="record store",
    application_id=0x48416E64,
    version=1,
    schema=(
        "CREATE TABLE meta (id INTEGER PRIMARY KEY CHECK (id = 1), incarnation BLOB NOT NULL, crc INTEGER NOT NULL)",
        "CREATE TABLE checkpoint (id INTEGER PRIMARY KEY CHECK (id = 1), state BLOB NOT NULL, crc INTEGER NOT NULL)",
        "CREATE TABLE records (number INTEGER PRIMARY KEY, batch BLOB NOT NULL, crc INTEGER NOT NULL)",
    ),
)
PAGE_BYTES: Final = 4096
FRAME_BYTES: Final = PAGE_BYTES + 24
"""What one changed page costs in the WAL."""
_LENGTH = struct.Struct("<I")
P = ParamSpec("P")


class SqliteEngine:
    """Opens record stores in SQLite files. Options: ``max_page_count`` (a bound on the file's size, in pages)."""

    name = "sqlite"

    def open(self, location: str, options: Mapping[str, object]) -> AbstractAsyncContextManager[RecordStore]:
        """Open or create the store in the file ``location``.

        Raises:
            StoreLockedError: another process owns it.
            CorruptRecordError: it is damaged.
            StorageError: it is no record store, or of an unknown version, or an option is unknown.
        """
        unknown = sorted(options.keys() - {"max_page_count"})
        if unknown:
            raise StorageError(f"{location}: the sqlite store has no option {unknown[0]!r}, only max_page_count")
        limit = options.get("max_page_count")
        if limit is not None and not isinstance(limit, int):
            raise StorageError(f"{location}: max_page_count: expected a whole number, found {limit!r}")
        return _open(Path(location), limit)


@asynccontextmanager
async def _open(path: Path, max_page_count: int | None) -> AsyncIterator[RecordStore]:
    async with open_file(path, NODE_DB, max_page_count=max_page_count) as file:
        try:
            incarnation = await file.connection.run(_incarnation, file.connection.database(), path)
        except sqlite3.Error as exc:
            raise storage_error(exc, path) from exc
        store = SqliteRecordStore(file, incarnation)
        try:
            yield store
        finally:
            store.refuse("it is closed")


def _incarnation(database: sqlite3.Connection, path: Path) -> bytes:
    row = database.execute("SELECT incarnation, crc FROM meta").fetchone()
    if row is None:
        fresh = secrets.token_bytes(16)
        database.execute("INSERT INTO meta VALUES (1, ?, ?)", (fresh, zlib.crc32(fresh)))
        return fresh
    _check(path, "the store's identity", row[1], zlib.crc32(row[0]))
    return bytes(row[0])


def _check(path: Path, what: str, expected: int, actual: int) -> None:
    if expected != actual:
        raise CorruptRecordError(
            f"{path}: {what} does not match its checksum: restore the file, or remove it to join anew",
            expected_crc=expected,
            actual_crc=actual,
        )


def pack_batch(records: Sequence[bytes]) -> bytes:
    """Records of one append as one row's value: each with its length before it."""
    parts: list[bytes] = []
    for record in records:
        parts.append(_LENGTH.pack(len(record)))
        parts.append(record)
    return b"".join(parts)


def unpack_batch(batch: bytes) -> list[bytes]:
    """The records of a row whose checksum was right."""
    records: list[bytes] = []
    at = 0
    while at < len(batch):
        (length,) = _LENGTH.unpack_from(batch, at)
        at += 4
        records.append(batch[at : at + length])
        at += length
    invariant(at == len(batch), "a batch with a right checksum has a wrong length", at=at, length=len(batch))
    return records


class SqliteRecordStore:
    """RecordStore over one SQLite file (ha_core.interfaces says what each call promises)."""

    def __init__(self, file: OpenFile, incarnation: bytes) -> None:
        self.incarnation = incarnation
        self._path = file.path
        self._connection: Connection = file.connection
        self._database = file.connection.database()
        self._poison = ""
        self._next = 0  # number of the next row; 0: not recovered yet
        self._appended_bytes = 0
        self._programmed_bytes = 0
        self._flushes = 0
        self._checkpoints = 0

    async def recover(self) -> Recovered:
        """What the store holds; called once, first.

        Raises:
            CorruptRecordError: a row does not match its checksum, or one is missing.
        """
        try:
            return await self._connection.run(self._recover)
        except sqlite3.Error as exc:
            raise storage_error(exc, self._path) from exc

    def _recover(self) -> Recovered:
        row = self._database.execute("SELECT state, crc FROM checkpoint").fetchone()
        state = None
        if row is not None:
            _check(self._path, "the checkpoint", row[1], self._crc(0, row[0]))
            state = bytes(row[0])
        records: list[bytes] = []
        number = 0
        for found, batch, crc in self._database.execute("SELECT number, batch, crc FROM records ORDER BY number"):
            if number and found != number + 1:
                raise CorruptRecordError(f"{self._path}: row {number + 1} is missing: restore the file, or join anew")
            number = found
            _check(self._path, f"row {number}", crc, self._crc(number, batch))
            records.extend(unpack_batch(batch))
        self._next = number + 1
        return Recovered(state, records)

    async def append(self, records: Sequence[bytes]) -> None:
        """Append all ``records`` as one row, durable on return.

        Raises:
            StorageFullError: nothing was written; the store is not poisoned.
            StorageError: the store is poisoned.
        """
        batch = pack_batch(records)
        await self._write(self._append, batch)
        self._appended_bytes += sum(map(len, records))

    def _append(self, batch: bytes) -> None:
        number = self._next
        self._database.execute("INSERT INTO records VALUES (?, ?, ?)", (number, batch, self._crc(number, batch)))
        self._next = number + 1
        self._programmed_bytes += (len(batch) // PAGE_BYTES + 1) * FRAME_BYTES

    async def checkpoint(self, state: bytes, records: Sequence[bytes]) -> None:
        """Replace everything by ``state`` and the ``records`` that follow it, in one transaction."""
        await self._write(self._checkpoint, state, pack_batch(records))
        self._checkpoints += 1

    def _checkpoint(self, state: bytes, batch: bytes) -> None:
        execute = self._database.execute
        execute("BEGIN IMMEDIATE")
        execute("DELETE FROM records")
        execute("INSERT OR REPLACE INTO checkpoint VALUES (1, ?, ?)", (state, self._crc(0, state)))
        number = self._next
        if batch:
            execute("INSERT INTO records VALUES (?, ?, ?)", (number, batch, self._crc(number, batch)))
        execute("COMMIT")
        self._next = number + (1 if batch else 0)
        self._programmed_bytes += ((len(batch) + len(state)) // PAGE_BYTES + 2) * FRAME_BYTES

    def stats(self) -> StoreStats:
        """Counters since the store was opened; programmed bytes are counted in whole pages of the WAL."""
        try:
            size = self._path.stat().st_size
        except OSError:
            size = 0
        return StoreStats(self._appended_bytes, self._programmed_bytes, self._flushes, self._checkpoints, size)

    async def aclose(self) -> None:
        """Refuse everything from now on; the file itself closes with the context that opened it."""
        self.refuse("it is closed")
        await self._connection.close()

    def refuse(self, reason: str) -> None:
        """Take no more writes."""
        self._poison = self._poison or reason

    def _crc(self, number: int, data: bytes) -> int:
        return zlib.crc32(data, zlib.crc32(self.incarnation + number.to_bytes(8, "little")))

    async def _write(self, function: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        invariant(self._next > 0, "a store is written before it was recovered", path=self._path)
        self._refuse_if_poisoned()
        await self._connection.run(self._guarded, partial(function, *args, **kwargs))
        self._flushes += 1

    def _refuse_if_poisoned(self) -> None:
        if self._poison:
            raise StorageError(f"{self._path}: takes no more writes: {self._poison}")

    def _guarded(self, write: Callable[[], None]) -> None:
        """One write on the store's thread: done, or undone because there was no room, or the store is poisoned."""
        self._refuse_if_poisoned()
        try:
            write()
        except BaseException as exc:
            undone = self._undo()
            error = storage_error(exc, self._path) if isinstance(exc, sqlite3.Error) else exc
            if not (isinstance(error, StorageFullError) and undone):
                self._poison = str(exc)
            raise error from exc  # noqa: ASYNC104 - on the store's thread: nothing is cancelled there

    def _undo(self) -> bool:
        try:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
        except sqlite3.Error:
            return False
        return not self._database.in_transaction
