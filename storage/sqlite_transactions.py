"""``TransactionStore``: app.db, where the application's tables, the outbox and the cursors change together.

Rules:

* One writer: the thread takes all functions that wait, runs each under its own SAVEPOINT in one BEGIN IMMEDIATE .. COMMIT, and
  hands all results back to trio at once. One thread hop and one flush per group, however many functions.
* A group that ends early (OR ROLLBACK, a full disk, an interrupt) is run again without the function under which it ended,
  and that one alone afterwards: functions must bear being run again.
* A write or flush that fails for another reason than room poisons the store: what was acknowledged is on the disk, nobody
  knows more until it is opened again.
* A function that the thread has taken completes, whatever happens to the task that asked for it.
"""

from __future__ import annotations

import logging
import secrets
import sqlite3
import threading
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, TypeVar, TypeVarTuple, cast

import attrs
import msgpack
import outcome
import trio

from ha_core.errors import CorruptRecordError, HAError, StorageError, StorageFullError, invariant
from ha_core.ids import Boot, ChannelName, NodeId, StoreId
from ha_core.machines.durable_events import Attempt, IncomingState, OutboxRun, OutgoingState
from ha_core.machines.handshake import SeenBoot, extend_boots_digest
from ha_core.storage.sqlite_delivery import BOOT as _BOOT
from ha_core.storage.sqlite_delivery import SCHEMA as DELIVERY_SCHEMA
from ha_core.storage.sqlite_delivery import record_boots
from ha_core.storage.sqlite_file import FileKind, OpenFile, code_of, open_file, storage_error
from ha_core.storage.sqlite_outbox import SCHEMA as OUTBOX_SCHEMA
from ha_core.storage.sqlite_outbox import Outbox
from ha_core.storage.sqlite_transaction import FATAL, GroupEndedError, Transaction, name_of

logger = logging.getLogger(__name__)
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

APP_DB: Final = FileKind(
    name="transaction store",
    application_id=0x48416170,
    version=1,
    schema=(
        "CREATE TABLE ha_identity (id INTEGER PRIMARY KEY CHECK (id = 1), fields BLOB NOT NULL, crc INTEGER NOT NULL)",
        *OUTBOX_SCHEMA,
        *DELIVERY_SCHEMA,
    ),
)
GROUP_COUNT: Final = 1024
"""Functions in one group, at most: the first of them waits for the last."""


@attrs.frozen
class Identity:
    """Whose file this is; written before the node speaks."""

    store: StoreId
    owner: NodeId
    replica: bytes
    """The incarnation of the node.db beside it; empty: none was ever given."""
    boot: Boot
    boots_digest: bytes
    """Of all boots before ``boot``."""
    vouched: bytes = b""
    """The mark of the newest boot that node.db is known to have (R12)."""
    marks: tuple[bytes, ...] = ()
    """Those that node.db may have left there, if neither file is older than the other; empty: this one is new."""


@attrs.define(eq=False)
class Job:
    """One thing for the thread to do within a group, and who wants to know how it went."""

    run: Callable[[Transaction], outcome.Outcome[object]]
    name: str
    done: Callable[[outcome.Outcome[object]], None]
    taken: bool = False
    cancelled: bool = False
    finished: bool = False
    result: outcome.Outcome[object] | None = None


@attrs.define
class Aside:
    """What is written beside the jobs of the next group, whichever that is."""

    acked: dict[tuple[NodeId, ChannelName], tuple[int, bytes]] = attrs.field(factory=dict)
    """What peers have durably: it is forgotten."""
    boots: dict[StoreId, SeenBoot] = attrs.field(factory=dict)
    """Which processes of other stores were seen."""

    def __bool__(self) -> bool:
        return bool(self.acked or self.boots)

    def after(self, older: Aside) -> Aside:
        """Both; what is newer counts."""
        return Aside({**older.acked, **self.acked}, {**older.boots, **self.boots})


class _Broken(Exception):
    """A group came to nothing; ``guilty`` is the job under which it ended, None if it was the commit."""

    def __init__(self, guilty: Job | None, cause: BaseException | None) -> None:
        super().__init__()
        self.guilty = guilty
        self.cause = cause


class TransactionStore:
    """The store of one app.db; make it with ``open_transaction_store``."""

    def __init__(self, file: OpenFile, identity: Identity, outbox: Outbox, tx: Transaction) -> None:
        self.identity = identity
        self.unclean = file.unclean
        self.path = file.path
        self.outgoing: Sequence[OutgoingState] = outbox.states()
        self.incoming: Sequence[IncomingState] = ()
        self.seen: Sequence[SeenBoot] = ()
        """Processes of other stores that were seen by earlier lives of this one."""
        self.requested: frozenset[ChannelName] = frozenset()
        """Channels with requests that wait for their replies, when the store was opened."""
        self.on_commit: Callable[[Sequence[OutboxRun], frozenset[ChannelName]], None] = lambda runs, requested: None
        """Called in trio with what a group sent, and the channels on which it made requests, before its functions return."""
        self.on_failed: Callable[[StorageError], None] = lambda error: None
        """Called in trio once, when the store is poisoned."""
        self._connection = file.connection
        self._database = file.connection.database()
        self._outbox = outbox
        self._tx = tx
        self._token = trio.lowlevel.current_trio_token()
        self._lock = threading.Lock()
        self._queue: deque[Job] = deque()
        self._aside = Aside()
        self._flush_wanted = False
        self._postponed: list[Callable[[], None]] = []
        self._scheduled = False
        self._poison: StorageError | None = None
        self._current: tuple[str, int] | None = None
        self._group_count = 0
        self._in_hand: list[Job] = []
        self._abandoned = False
        self.on_freed: Callable[[], None] = lambda: None
        """Called in trio when there may be more room: acknowledged messages were deleted, a function failed, a channel forked."""

    # -- for the node --

    async def transact(self, function: Callable[[Transaction, *Ts], T], *args: *Ts) -> T:
        """Run ``function(tx, *args)`` in a transaction; what it returns, once that is durable.

        Cancelled before the writer has the function, nothing happened; after that the call completes.

        Raises:
            StorageFullError: no room; nothing happened.
            StorageError: the store is poisoned or the function ran too long.
            Exception: whatever the function raised; nothing of it happened.
        """
        return cast(T, await self.perform(lambda tx: tx.within(function, *args), name_of(function)))

    async def perform(self, run: Callable[[Transaction], outcome.Outcome[object]], name: str) -> object:
        """Wait for a job that brings its own ``within``."""
        await trio.lowlevel.checkpoint_if_cancelled()
        task = trio.lowlevel.current_task()
        job = Job(run, name, partial(trio.lowlevel.reschedule, task))
        self.submit(job)

        def abort(_: object) -> trio.lowlevel.Abort:
            with self._lock:
                if job.taken:
                    return trio.lowlevel.Abort.FAILED
                job.cancelled = True
            return trio.lowlevel.Abort.SUCCEEDED

        return await trio.lowlevel.wait_task_rescheduled(abort)

    def submit(self, job: Job) -> None:
        """Queue a job; its ``done`` is called in trio."""
        with self._lock:
            self._queue.append(job)
            self._schedule()

    def acknowledge(self, to: NodeId, name: ChannelName, cursor: int, digest: bytes) -> None:
        """Forget what the peer has durably, with the next group."""
        with self._lock:
            self._aside.acked[to, name] = (cursor, digest)

    def remember_boot(self, seen: SeenBoot) -> None:
        """Write down which process of another store was seen: now, and before whatever is submitted later."""
        with self._lock:
            self._aside.boots[seen.store] = seen
            if not self._poison:
                self._flush_wanted = True
                self._schedule()

    def flush(self) -> None:
        """Do not wait for the next group: delete what was acknowledged now, and try again what found a full disk."""
        postponed, self._postponed = self._postponed, []
        for again in postponed:
            again()
        with self._lock:
            if self._aside.acked and not self._poison:
                self._flush_wanted = True
                self._schedule()

    def load_outbox(
        self, to: NodeId, name: ChannelName, start: int, byte_count: int, done: Callable[[list[OutboxRun]], None]
    ) -> None:
        """Read rows of the outbox; ``done`` is called in trio, unless the store fails."""

        def run(tx: Transaction) -> outcome.Outcome[object]:
            return outcome.Value(self._outbox.load(to, name, start, byte_count))

        def finish(result: outcome.Outcome[object]) -> None:
            if isinstance(result, outcome.Value):
                done(cast("list[OutboxRun]", result.value))
            elif isinstance(result, outcome.Error) and isinstance(result.error, StorageFullError):
                self._postponed.append(partial(self.load_outbox, to, name, start, byte_count, done))

        self.submit(Job(run, "load_outbox", finish))

    def fork(self, to: NodeId, name: ChannelName, text: str) -> None:
        """Remember that an outgoing channel stands still."""

        def run(tx: Transaction) -> outcome.Outcome[object]:
            self._outbox.fork(to, name, text)
            return outcome.Value(None)

        self.submit(Job(run, "fork", lambda result: self.on_freed()))

    def has_room(self, to: NodeId, name: ChannelName) -> bool:
        """Whether the outbox would admit what it refused last on that channel, or never will: the channel stands still."""
        record = self._outbox.records.get((to, name))
        return (record is not None and bool(record.forked)) or self._outbox.has_room(to, name)

    def abandon(self, error: HAError) -> None:
        """The writer does not come back: whoever waits hears ``error``, and nothing more is committed."""
        with self._lock:
            self._abandoned = True
            jobs = [*self._in_hand, *(job for job in self._queue if not job.cancelled)]
            self._queue.clear()
            for job in jobs:
                job.taken = True
        for job in jobs:
            self._finish(job, outcome.Error(error))

    def set_peers(self, peers: frozenset[NodeId]) -> None:
        """Nodes to which functions may send; others are refused by name."""
        self._outbox.peers = peers

    @property
    def failed(self) -> bool:
        """Nothing more is committed."""
        return self._poison is not None or self._abandoned

    async def vouch(self) -> None:
        """Remember that node.db has the mark of this boot.

        Raises:
            StorageError: it cannot be written.
        """
        identity = attrs.evolve(self.identity, vouched=self.identity.boot.mark)
        try:
            await self._connection.run(_write_identity, self._database, identity)
        except sqlite3.Error as exc:
            raise storage_error(exc, self.path) from exc
        self.identity = identity

    @property
    def outbox_bytes(self) -> int:
        """What the outbox holds."""
        return self._outbox.total_bytes

    @property
    def group_count(self) -> int:
        """Commits so far, for metrics."""
        return self._group_count

    def running(self) -> tuple[str, float] | None:
        """The function that the writer is in, and for how many seconds."""
        current = self._current
        return None if current is None else (current[0], (time.monotonic_ns() - current[1]) / 1e9)

    # -- on the thread --

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            try:
                self._connection.post(self._drain)
            except ValueError:
                self._scheduled = False
                raise StorageError(f"{self.path}: the store is closed") from None

    def _drain(self) -> None:
        """Run groups until nothing waits."""
        try:
            self._run_groups()
        except BaseException as exc:  # noqa: ASYNC103 - aiosqlite's thread would swallow it, and all who wait would wait for ever
            self._fail(exc)
            with self._lock:
                self._scheduled = False
            raise

    def _run_groups(self) -> None:
        while True:
            with self._lock:
                jobs: list[Job] = []
                while self._queue and len(jobs) < GROUP_COUNT:
                    job = self._queue.popleft()
                    if not job.cancelled:
                        job.taken = True
                        jobs.append(job)
                if not jobs and not self._flush_wanted:
                    self._scheduled = False
                    return
                self._flush_wanted = False
                aside = self._aside
                if aside:
                    self._aside = Aside()
                self._in_hand = jobs
            self._run(jobs, aside)

    def _run(self, jobs: list[Job], aside: Aside) -> None:
        work: deque[list[Job]] = deque([jobs])
        kept = done = Aside()
        while work:
            group = work.popleft()
            if self._poison is not None:
                self._hand_back(group, self._poison)
                continue
            try:
                runs = self._attempt(group, aside)
            except _Broken as broken:
                if aside.acked and broken.guilty is None and code_of(broken.cause or broken) == sqlite3.SQLITE_FULL:
                    # Forgetting needs room, too: whoever only reads, or writes less, must not wait for it.
                    kept, aside = Aside(acked=aside.acked), Aside(boots=aside.boots)
                    work.extendleft([group] if group else [])
                else:
                    work.extendleft(reversed(self._after_break(group, broken)))
            else:
                self._group_count += 1
                requested = frozenset(self._tx.requested)
                self._post(partial(self._deliver, group, runs, requested, bool(aside.acked)))
                aside = done
        if aside or kept:
            with self._lock:
                self._aside = self._aside.after(aside.after(kept))

    def _attempt(self, group: list[Job], aside: Aside) -> list[OutboxRun]:
        """One transaction with every job of the group.

        Raises:
            _Broken: it was rolled back.
        """
        tx = self._tx
        tx.requested.clear()
        tx.timed_out = False
        job: Job | None = None
        try:
            tx.own("BEGIN IMMEDIATE")
            for job in group:
                self._current = (job.name, time.monotonic_ns())
                job.result = job.run(tx)
            self._current = job = None
            if aside.acked:
                self._outbox.forget(aside.acked)
            if aside.boots:
                record_boots(tx, aside.boots.values())
            runs = self._outbox.write()
            if self._abandoned:
                raise StorageError(f"{self.path}: the node has stopped")
            tx.own("COMMIT")
        except (GroupEndedError, Exception) as exc:
            self._current = None
            self._roll_back()
            raise _Broken(job, exc.cause if isinstance(exc, GroupEndedError) else exc) from exc
        self._outbox.committed(runs)
        return runs

    def _roll_back(self) -> None:
        try:
            if self._database.in_transaction:
                self._tx.own("ROLLBACK")
        except sqlite3.Error as exc:
            self._fail(exc)
        self._outbox.rolled_back()

    def _after_break(self, group: list[Job], broken: _Broken) -> list[list[Job]]:
        """What to run next; results of those who are done for are handed back."""
        cause, guilty = broken.cause, broken.guilty
        if isinstance(cause, CorruptRecordError) or code_of(cause or broken) in FATAL:
            self._fail(cause or broken)
            return [group]
        if guilty is None:
            if len(group) > 1:
                return [[job] for job in group]  # the commit itself: each by itself shows which it was
            self._hand_back(group, self._translate(group[0].name if group else "", cause))
            return []
        innocent = [job for job in group if job is not guilty]
        if self._tx.timed_out or not innocent:
            self._hand_back([guilty], self._translate(guilty.name, cause))
            return [innocent] if innocent else []
        return [innocent, [guilty]]

    def _translate(self, name: str, cause: BaseException | None) -> BaseException:
        if self._tx.timed_out:
            return StorageError(f"{self.path}: {name} ran longer than max_transaction_s allows and was rolled back")
        if cause is None:
            return StorageError(f"{self.path}: {name} ended the transaction by itself and was rolled back")
        if code_of(cause) == sqlite3.SQLITE_FULL:
            return storage_error(cause, self.path)
        return cause

    def _fail(self, exc: BaseException) -> None:
        if self._poison is None:
            error = exc if isinstance(exc, StorageError) and not isinstance(exc, StorageFullError) else None
            self._poison = error or storage_error(exc, self.path)
            self._post(partial(self._report_failure, self._poison))

    def _hand_back(self, group: list[Job], error: BaseException) -> None:
        for job in group:
            job.result = outcome.Error(error)
        self._post(partial(self._deliver, group, [], frozenset(), False))

    def _post(self, function: Callable[[], None]) -> None:
        try:
            self._token.run_sync_soon(function)
        except trio.RunFinishedError:
            pass  # the program has ended; what is durable is found at the next start

    # -- in trio --

    def _report_failure(self, error: StorageError) -> None:
        logger.error("%s", error)
        self.on_failed(error)

    def _deliver(self, group: list[Job], runs: list[OutboxRun], requested: frozenset[ChannelName], freed: bool) -> None:
        if runs:
            self.on_commit(runs, requested)
        for job in group:
            invariant(job.result is not None, "a job is done without a result", job=job.name)
            freed = freed or type(job.result) is outcome.Error  # what it sent went back to the outbox
            self._finish(job, cast("outcome.Outcome[object]", job.result))
        if freed:
            self.on_freed()

    def _finish(self, job: Job, result: outcome.Outcome[object]) -> None:
        if not job.finished:
            job.finished = True
            job.done(result)


@asynccontextmanager
async def open_transaction_store(
    path: Path,
    *,
    owner: NodeId,
    replica: bytes = b"",
    max_transaction_s: float = 0.5,
    outbox_max_bytes: int = 64 << 20,
    max_page_count: int | None = None,
) -> AsyncIterator[TransactionStore]:
    """Open or create app.db; a new boot is written into it before this returns.

    Args:
        owner: the node; the file of another node is refused.
        replica: the incarnation of the node.db beside it, if there is one; another one than last time is refused.

    Raises:
        StoreLockedError: another process owns it.
        CorruptRecordError: it is damaged.
        StorageError: it belongs to another node or node.db, or is no file of this kind.
    """
    async with open_file(path, APP_DB, max_page_count=max_page_count) as file:
        mark = f"/*{secrets.token_hex(4)}*/"

        def build() -> tuple[Identity, Outbox, Transaction, list[IncomingState], list[SeenBoot], frozenset[ChannelName]]:
            database = file.connection.database()
            database.execute("PRAGMA foreign_keys=ON")
            identity = _identify(database, path, owner, replica)
            outbox = Outbox(database, mark, outbox_max_bytes)
            names = frozenset(ChannelName(row[0]) for row in database.execute("SELECT DISTINCT name FROM ha_requests"))
            incoming = _incoming(database)
            tx = Transaction(database, outbox, identity.store, identity.owner, mark, max_transaction_s)
            return identity, outbox, tx, incoming, _seen(database), names

        try:
            identity, outbox, tx, incoming, seen, names = await file.connection.run(build)
        except sqlite3.Error as exc:
            raise storage_error(exc, path) from exc
        file.cursors.extend(tx.cursors)
        store = TransactionStore(file, identity, outbox, tx)
        store.incoming, store.seen = incoming, seen
        store.requested = names
        yield store


def _incoming(database: sqlite3.Connection) -> list[IncomingState]:
    query = (
        "SELECT store, name, peer, cursor, digest, number, size, count, upto FROM ha_incoming"
        " LEFT JOIN ha_attempts USING (store, name) ORDER BY store, name"
    )
    return [
        IncomingState(
            peer, store, name, cursor, digest, None if number is None else Attempt(number, size, count, upto)
        )
        for store, name, peer, cursor, digest, number, size, count, upto in database.execute(query)
    ]  # fmt: skip


def _seen(database: sqlite3.Connection) -> list[SeenBoot]:
    query = "SELECT peer, store, boot, digest FROM ha_boots ORDER BY store"
    return [SeenBoot(peer, store, Boot(*_BOOT.unpack(boot)), digest) for peer, store, boot, digest in database.execute(query)]


def _identify(database: sqlite3.Connection, path: Path, owner: NodeId, replica: bytes) -> Identity:
    """Read whose file it is, refuse what does not fit, and write this boot down."""
    database.execute("BEGIN IMMEDIATE")
    try:
        row = database.execute("SELECT fields, crc FROM ha_identity").fetchone()
        nonce = secrets.randbits(63)
        if row is None:
            identity = Identity(StoreId(secrets.token_bytes(16)), owner, replica, Boot(1, nonce), b"")
        else:
            if zlib.crc32(row[0]) != row[1]:
                raise CorruptRecordError(f"{path}: the store's identity does not match its checksum: restore the file")
            identity = _next_boot(_unpack(row[0]), path, owner, replica, nonce)
        _write_identity(database, identity)
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise
    return identity


def _next_boot(found: Identity, path: Path, owner: NodeId, replica: bytes, nonce: int) -> Identity:
    if found.owner != owner:
        raise StorageError(f"{path}: belongs to node {found.owner}, not to {owner}: give each node its own data_dir")
    if replica and found.replica and replica != found.replica:
        raise StorageError(
            f"{path}: belongs to another node.db (it knows {found.replica.hex()[:8]}, found {replica.hex()[:8]}): "
            "restore both files together, or remove both to join anew"
        )
    return Identity(
        found.store,
        owner,
        found.replica or replica,
        Boot(found.boot.counter + 1, nonce),
        extend_boots_digest(found.boots_digest, found.boot),
        found.vouched,
        (found.vouched, found.boot.mark),
    )


def _write_identity(database: sqlite3.Connection, identity: Identity) -> None:
    boot = identity.boot
    fields = msgpack.packb(
        (
            identity.store, identity.owner, identity.replica, boot.counter, boot.nonce, identity.boots_digest,
            identity.vouched,
        )
    )  # fmt: skip
    database.execute("INSERT OR REPLACE INTO ha_identity VALUES (1, ?, ?)", (fields, zlib.crc32(fields)))


def _unpack(fields: bytes) -> Identity:
    store, owner, replica, counter, nonce, digest, vouched = msgpack.unpackb(fields)
    return Identity(store, owner, replica, Boot(counter, nonce), digest, vouched)
