"""app.db: functions in groups, sends that follow their transaction, and what may not go wrong in between."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import outcome
import pytest
import trio

from ha_core.errors import (
    CorruptRecordError,
    ForkedError,
    LocalProtocolError,
    OutboxFullError,
    StorageError,
    StorageFullError,
    StoreLockedError,
)
from ha_core.ids import Boot, ChannelName, NodeId, StoreId
from ha_core.machines.durable_events import OutboxRun
from ha_core.machines.durable_wire import START_DIGEST, chain, unpack_run
from ha_core.machines.handshake import SeenBoot
from ha_core.storage.sqlite_transaction import Transaction
from ha_core.storage.sqlite_transactions import TransactionStore, open_transaction_store

ME = NodeId("a@h1.example")
PEER = NodeId("b@h2.example")
C = ChannelName("orders")


def opened(
    tmp_path: Path, *, max_transaction_s: float = 0.5, outbox_max_bytes: int = 64 << 20, max_page_count: int | None = None
) -> AbstractAsyncContextManager[TransactionStore]:
    return open_transaction_store(
        tmp_path / "app.db",
        owner=ME,
        max_transaction_s=max_transaction_s,
        outbox_max_bytes=outbox_max_bytes,
        max_page_count=max_page_count,
    )


def create(tx: Transaction) -> None:
    tx.execute("CREATE TABLE t (n INTEGER PRIMARY KEY, text TEXT)")


def insert(tx: Transaction, number: int) -> int:
    tx.execute("INSERT INTO t VALUES (?, ?)", (number, "x"))
    return number


def numbers(tx: Transaction) -> list[object]:
    return [row[0] for row in tx.execute("SELECT n FROM t ORDER BY n")]


def send_to(tx: Transaction, name: str) -> None:
    tx.send(PEER, name, b"")


async def together(store: TransactionStore, *functions: object) -> list[object]:
    """Run functions in one group: they queue while the writer is held; what each returned or raised."""
    results: list[object] = [None] * len(functions)
    hold = threading.Event()
    entered = threading.Event()

    def block(tx: Transaction) -> None:
        entered.set()
        hold.wait(5)

    async def call(at: int, function: object) -> None:
        try:
            results[at] = await store.transact(function)  # type: ignore[arg-type]
        except Exception as exc:
            results[at] = exc

    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.transact, block)
        await trio.to_thread.run_sync(entered.wait)
        for at, function in enumerate(functions):
            nursery.start_soon(call, at, function)
        await trio.testing.wait_all_tasks_blocked()
        hold.set()
    return results


async def test_function_commits_what_it_wrote_and_returns_its_value(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.transact(create)
        assert await store.transact(insert, 7) == 7

    async with opened(tmp_path) as store:
        assert await store.transact(numbers) == [7]


async def test_function_that_raises_leaves_nothing_and_others_of_its_group_stay(tmp_path: Path) -> None:
    def bad(tx: Transaction) -> None:
        insert(tx, 2)
        tx.send(PEER, C, b"never")
        raise RuntimeError("no")

    async with opened(tmp_path) as store:
        runs: list[OutboxRun] = []
        store.on_commit = lambda more, _: runs.extend(more)
        await store.transact(create)
        before = store.group_count
        results = await together(store, lambda tx: insert(tx, 1), bad, lambda tx: insert(tx, 3))

        assert results[0] == 1
        assert isinstance(results[1], RuntimeError)
        assert await store.transact(numbers) == [1, 3]
        assert runs == []
        assert store.group_count <= before + 3  # the holder, the group, the question


async def test_numbers_follow_each_other_and_a_rollback_gives_its_own_back(tmp_path: Path) -> None:
    def send(tx: Transaction, body: bytes) -> int:
        return tx.send(PEER, C, body).number

    def fail(tx: Transaction) -> None:
        assert tx.send(PEER, C, b"lost").number == 3
        raise RuntimeError

    async with opened(tmp_path) as store:
        assert [await store.transact(send, body) for body in (b"one", b"two")] == [1, 2]
        with pytest.raises(RuntimeError):
            await store.transact(fail)
        assert await store.transact(send, b"three") == 3, "I4: no number is skipped or sent twice"

    async with opened(tmp_path) as store:
        assert store.outgoing[0].last == 3
        assert await store.transact(send, b"four") == 4


async def test_one_groups_sends_on_a_channel_are_one_run_with_its_digest(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        runs: list[OutboxRun] = []
        store.on_commit = lambda more, _: runs.extend(more)
        sends = [lambda tx, n=n: tx.send(PEER, C, b"%d" % n).number for n in range(3)]

        assert sorted(await together(store, *sends)) == [1, 2, 3]  # type: ignore[type-var]

        (run,) = runs
        assert (run.first, run.last, run.before) == (1, 3, START_DIGEST)
        assert run.digest == chain(START_DIGEST, 1, unpack_run(run.blob))[-1]
        assert sorted(unpack_run(run.blob)) == [b"0", b"1", b"2"]


async def test_large_sends_are_cut_into_runs(tmp_path: Path) -> None:
    def send(tx: Transaction) -> None:
        for _ in range(300):
            tx.send(PEER, C, b"x" * 1000)
        tx.send(PEER, C, b"y" * 500_000)
        for _ in range(2500):
            tx.send(PEER, C, b"")

    async with opened(tmp_path) as store:
        runs: list[OutboxRun] = []
        store.on_commit = lambda more, _: runs.extend(more)
        await store.transact(send)

        assert sum(run.last - run.first + 1 for run in runs) == 2801
        assert all(run.size <= 30 << 10 or run.first == run.last for run in runs)
        for one, two in zip(runs, runs[1:], strict=False):
            assert (one.last + 1, one.digest) == (two.first, two.before)
        got: list[OutboxRun] = []
        done = trio.Event()

        def take(more: list[OutboxRun]) -> None:
            got.extend(more)
            done.set()

        store.load_outbox(PEER, C, 302, 1 << 20, take)
        await done.wait()
        assert got[0].first <= 302 <= got[0].last
        assert got == runs[runs.index(got[0]) :]


@pytest.mark.parametrize(
    "statement",
    ["INSERT OR ROLLBACK INTO t VALUES (1, 'again')", "INSERT INTO raising VALUES (1)"],
    ids=["or-rollback", "raise-rollback"],
)
async def test_statement_that_ends_the_groups_transaction_harms_only_itself(tmp_path: Path, statement: str) -> None:
    """M35: nothing autocommits, and the innocent are run again."""
    autocommitted: list[str] = []

    def guilty(tx: Transaction) -> None:
        tx.send(PEER, C, b"never")
        try:
            tx.execute(statement)
        except Exception:
            autocommitted.append("the end of the group was hidden")
        tx.execute("INSERT INTO t VALUES (99, 'after')")

    async with opened(tmp_path) as store:
        await store.transact(create)
        await store.transact(insert, 1)
        await store.transact(lambda tx: tx.execute("CREATE TABLE raising (n)"))
        trigger = "CREATE TRIGGER r BEFORE INSERT ON raising BEGIN SELECT RAISE(ROLLBACK, 'no'); END"
        await store.transact(lambda tx: tx.execute(trigger))

        results = await together(store, lambda tx: insert(tx, 10), guilty, lambda tx: insert(tx, 11))

        assert results[0] == 10
        assert results[2] == 11
        assert isinstance(results[1], sqlite3.IntegrityError)
        assert autocommitted == []
        assert await store.transact(numbers) == [1, 10, 11]
        assert await store.transact(lambda tx: tx.send(PEER, C, b"first").number) == 1


async def test_constraint_error_is_the_functions_own_business(tmp_path: Path) -> None:
    def upsert(tx: Transaction) -> str:
        try:
            insert(tx, 1)
        except sqlite3.IntegrityError:
            tx.execute("UPDATE t SET text = 'again' WHERE n = 1")
            return "updated"
        return "inserted"

    async with opened(tmp_path) as store:
        await store.transact(create)
        assert await store.transact(upsert) == "inserted"
        assert await store.transact(upsert) == "updated"


@pytest.mark.parametrize(
    "sql",
    [
        "COMMIT", "ROLLBACK", "SAVEPOINT s", "RELEASE ha_function", "ATTACH ':memory:' AS other", "PRAGMA synchronous=OFF",
        "DELETE FROM ha_outbox", "SELECT * FROM HA_OUTGOING", "CREATE TABLE ha_mine (n)", "UPDATE ha_incoming SET cursor = 9",
        "DROP TABLE ha_identity", "CREATE TRIGGER x AFTER INSERT ON ha_outbox BEGIN SELECT 1; END",
    ],
)  # fmt: skip
async def test_statements_that_are_not_for_transactions_are_refused(tmp_path: Path, sql: str) -> None:
    async with opened(tmp_path) as store:
        await store.transact(create)
        with pytest.raises(LocalProtocolError, match="not inside a transaction|belongs to ha-core"):
            await store.transact(lambda tx: tx.execute(sql))
        await store.transact(insert, 1)
        assert await store.transact(numbers) == [1]


async def test_our_own_statements_cannot_be_borrowed(tmp_path: Path) -> None:
    """Prepared statements are cached by their text: ours must not be reachable by it."""
    async with opened(tmp_path) as store:
        await store.transact(lambda tx: tx.send(PEER, C, b"x"))
        with pytest.raises(LocalProtocolError):
            await store.transact(lambda tx: tx.execute("UPDATE ha_outgoing SET last=?, digest=? WHERE id=?", (9, b"", 1)))
        with pytest.raises(LocalProtocolError):
            await store.transact(lambda tx: tx.execute("RELEASE ha_function"))


async def test_full_disk_rolls_back_its_function_and_the_store_goes_on(tmp_path: Path) -> None:
    def big(tx: Transaction) -> None:
        tx.send(PEER, C, b"never")
        for number in range(1000, 1100):
            tx.execute("INSERT INTO t VALUES (?, ?)", (number, "x" * 10_000))

    async with opened(tmp_path, max_page_count=60) as store:
        await store.transact(create)

        results = await together(store, lambda tx: insert(tx, 1), big, lambda tx: insert(tx, 2))

        assert isinstance(results[1], StorageFullError)
        assert "app.db" in str(results[1])
        assert await store.transact(numbers) == [1, 2]
        assert await store.transact(lambda tx: tx.send(PEER, C, b"small").number) == 1


async def test_full_disk_at_the_outbox_is_reported_to_the_sender(tmp_path: Path) -> None:
    async with opened(tmp_path, max_page_count=60) as store:
        await store.transact(create)
        results = await together(
            store, lambda tx: insert(tx, 1), lambda tx: tx.send(PEER, C, b"x" * 900_000), lambda tx: insert(tx, 2)
        )

        assert isinstance(results[1], StorageFullError)
        assert await store.transact(numbers) == [1, 2]
        assert store.outbox_bytes == 0


async def test_disk_too_full_to_forget_what_was_acknowledged_harms_nobody_else(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.transact(create)
        await store.transact(lambda tx: [tx.send(PEER, C, b"x" * 40_000) for _ in range(3)])
    with contextlib.closing(sqlite3.connect(tmp_path / "app.db")) as db:  # a deletion that needs more room than there is
        db.execute("CREATE TABLE filler (body BLOB)")
        db.execute("CREATE TRIGGER fill AFTER DELETE ON ha_outbox BEGIN INSERT INTO filler VALUES (zeroblob(900000)); END")
        db.commit()

    async with opened(tmp_path, max_page_count=80) as store:
        loaded: list[int] = []
        done = trio.Event()

        def take(runs: list[OutboxRun]) -> None:
            loaded.extend(run.first for run in runs)
            done.set()

        store.acknowledge(PEER, C, 1, b"d" * 16)
        store.load_outbox(PEER, C, 2, 1 << 20, take)
        with trio.fail_after(2):
            await done.wait()
            store.flush()
            assert await store.transact(insert, 7) == 7
        assert loaded == [2, 3]
        assert store.outbox_bytes > 120_000, "nothing was forgotten yet"


async def test_outbox_that_a_full_disk_kept_from_being_read_is_read_later(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.transact(lambda tx: tx.send(PEER, C, b"x"))
    with contextlib.closing(sqlite3.connect(tmp_path / "app.db")) as db:
        db.execute("CREATE TABLE filler (body BLOB)")
        db.execute("CREATE TRIGGER fill AFTER INSERT ON ha_boots BEGIN INSERT INTO filler VALUES (zeroblob(900000)); END")
        db.commit()

    async with opened(tmp_path, max_page_count=80) as store:
        done = trio.Event()
        store.remember_boot(SeenBoot(PEER, StoreId(b"s" * 16), Boot(1, 2), b""))
        store.load_outbox(PEER, C, 1, 1 << 20, lambda runs: done.set())
        with pytest.raises(StorageFullError):
            await store.transact(lambda tx: None)
        assert not done.is_set()
        await store._connection.run(lambda: store._database.execute("PRAGMA max_page_count=100000"))

        store.flush()

        with trio.fail_after(2):
            await done.wait()


async def test_bug_of_ours_on_the_writers_thread_fails_the_store_and_hangs_nobody(tmp_path: Path) -> None:
    def leave(tx: Transaction) -> outcome.Outcome[object]:
        raise SystemExit

    async with opened(tmp_path) as store:
        failed = trio.Event()

        def fail(error: StorageError) -> None:
            failed.set()
            store.abandon(error)

        store.on_failed = fail
        with trio.fail_after(2):
            with pytest.raises(StorageError):
                await store.perform(leave, "leave")
            await failed.wait()


async def test_statement_that_runs_too_long_is_interrupted_and_named(tmp_path: Path) -> None:
    endless = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT count(*) FROM c"

    def runaway(tx: Transaction) -> None:
        tx.execute("INSERT INTO t VALUES (5, 'x')")
        tx.execute(endless)

    async with opened(tmp_path, max_transaction_s=0.02) as store:
        await store.transact(create)
        results = await together(store, lambda tx: insert(tx, 1), runaway, lambda tx: insert(tx, 2))

        assert isinstance(results[1], StorageError)
        assert "runaway" in str(results[1])
        assert await store.transact(numbers) == [1, 2]


async def test_outbox_is_bounded_and_has_room_again_after_acknowledgement(tmp_path: Path) -> None:
    async with opened(tmp_path, outbox_max_bytes=100_000) as store:
        sent: list[int] = []
        for _ in range(50):  # one channel alone: half
            sent.append(await store.transact(lambda tx: tx.send(PEER, C, b"x" * 968).number))
        with pytest.raises(OutboxFullError, match="wait_for_room"):
            await store.transact(lambda tx: tx.send(PEER, C, b"x" * 968))
        assert not store.has_room(PEER, C)

        other = await store.transact(lambda tx: tx.send(NodeId("c@h3.example"), C, b"x" * 968).number)
        assert other == 1  # a quiet channel always finds room

        done = trio.Event()
        loaded: list[OutboxRun] = []

        def take(runs: list[OutboxRun]) -> None:
            loaded.extend(runs)
            done.set()

        store.load_outbox(PEER, C, 1, 1 << 20, take)
        await done.wait()
        store.acknowledge(PEER, C, 40, loaded[39].digest)
        store.flush()
        await store.transact(lambda tx: None)

        assert store.has_room(PEER, C)
        assert store.outbox_bytes == 11 * 1000

    async with opened(tmp_path) as store:
        state = next(state for state in store.outgoing if state.to == PEER)
        assert (state.last, state.acked, state.acked_digest) == (50, 40, loaded[39].digest)


async def test_room_that_a_failed_function_gives_back_is_announced(tmp_path: Path) -> None:
    async with opened(tmp_path, outbox_max_bytes=100_000) as store:
        freed: list[bool] = []
        store.on_freed = lambda: freed.append(store.has_room(PEER, C))
        await store.transact(lambda tx: tx.send(PEER, C, b"x" * 40_000))
        with pytest.raises(OutboxFullError):
            await store.transact(lambda tx: tx.send(PEER, C, b"x" * 30_000))
        store.acknowledge(PEER, C, 1, b"d" * 16)
        await store.transact(lambda tx: None)
        assert freed[-1]
        freed.clear()
        entered, hold = threading.Event(), threading.Event()

        def change_its_mind(tx: Transaction) -> None:
            tx.send(PEER, C, b"x" * 40_000)
            entered.set()
            hold.wait(5)
            raise ZeroDivisionError

        async def fail() -> None:
            with pytest.raises(ZeroDivisionError):
                await store.transact(change_its_mind)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            await trio.to_thread.run_sync(entered.wait, 5)
            assert not store.has_room(PEER, C)
            hold.set()
        assert freed == [True]


async def test_nobody_waits_for_room_on_a_channel_that_stands_still(tmp_path: Path) -> None:
    async with opened(tmp_path, outbox_max_bytes=100_000) as store:
        freed = trio.Event()
        store.on_freed = freed.set
        await store.transact(lambda tx: tx.send(PEER, C, b"x" * 40_000))
        with pytest.raises(OutboxFullError):
            await store.transact(lambda tx: tx.send(PEER, C, b"x" * 30_000))
        assert not store.has_room(PEER, C)
        freed = trio.Event()
        store.on_freed = freed.set

        store.fork(PEER, C, "cloned")

        with trio.fail_after(1):
            await freed.wait()
        assert store.has_room(PEER, C)
        with pytest.raises(ForkedError):
            await store.transact(lambda tx: tx.send(PEER, C, b"x" * 30_000))


async def test_function_that_hides_a_full_outbox_is_rolled_back_all_the_same(tmp_path: Path) -> None:
    def hides(tx: Transaction) -> None:
        insert(tx, 1)
        try:
            for _ in range(3):
                tx.send(PEER, C, b"x" * 20_000)
        except OutboxFullError:
            insert(tx, 2)

    async with opened(tmp_path, outbox_max_bytes=100_000) as store:
        await store.transact(create)
        await store.transact(lambda tx: tx.send(PEER, C, b"x" * 20_000))
        with pytest.raises(OutboxFullError):
            await store.transact(hides)
        with pytest.raises(LocalProtocolError, match="one transaction sends"):
            await store.transact(lambda tx: tx.send(PEER, C, b"x" * 60_000))
        assert await store.transact(numbers) == []


async def test_cancelled_before_the_writer_has_it_means_nothing_happened(tmp_path: Path) -> None:
    hold, entered = threading.Event(), threading.Event()

    def block(tx: Transaction) -> None:
        entered.set()
        hold.wait(5)

    async with opened(tmp_path) as store:
        await store.transact(create)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.transact, block)
            await trio.to_thread.run_sync(entered.wait)
            with trio.move_on_after(0.01) as scope:
                await store.transact(insert, 1)
            hold.set()

        assert scope.cancelled_caught
        assert await store.transact(numbers) == []


async def test_cancelled_after_the_writer_has_it_means_it_completes(tmp_path: Path) -> None:
    def slow(tx: Transaction) -> int:
        time.sleep(0.03)
        return insert(tx, 1)

    async with opened(tmp_path) as store:
        await store.transact(create)
        with trio.move_on_after(0.01):
            assert await store.transact(slow) == 1

        assert await store.transact(numbers) == [1]


async def test_transaction_is_over_when_its_function_is(tmp_path: Path) -> None:
    kept: list[Transaction] = []
    async with opened(tmp_path) as store:
        await store.transact(kept.append)
        for use in (
            lambda: kept[0].execute("SELECT 1"),
            lambda: kept[0].send(PEER, C, b""),
            lambda: kept[0].executemany("", []),
        ):
            with pytest.raises(LocalProtocolError, match="is over"):
                use()


async def test_async_functions_wrong_names_and_wrong_bodies_are_refused(tmp_path: Path) -> None:
    async def coroutine(tx: Transaction) -> None:
        raise AssertionError

    async with opened(tmp_path) as store:
        store.set_peers(frozenset({PEER}))
        with pytest.raises(LocalProtocolError, match="plain functions"):
            await store.transact(coroutine)  # type: ignore[unused-coroutine]
        for name in ("", "ha.durable", "x" * 120):
            with pytest.raises(LocalProtocolError, match="expected 1 to 119 bytes"):
                await store.transact(send_to, name)
        with pytest.raises(LocalProtocolError, match="is bytes, not str"):
            await store.transact(lambda tx: tx.send(PEER, C, "text"))  # type: ignore[arg-type]
        with pytest.raises(LocalProtocolError, match="at most"):
            await store.transact(lambda tx: tx.send(PEER, C, b"x" * (1 << 20)))
        with pytest.raises(LocalProtocolError, match=r"z@h9\.example: unknown node"):
            await store.transact(lambda tx: tx.send(NodeId("z@h9.example"), C, b""))


async def test_forked_channel_refuses_sends_also_after_a_restart(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        store.fork(PEER, C, "its store was restored")
        with pytest.raises(ForkedError, match="its store was restored"):
            await store.transact(lambda tx: tx.send(PEER, C, b""))

    async with opened(tmp_path) as store:
        assert store.outgoing[0].forked == "its store was restored"
        with pytest.raises(ForkedError):
            await store.transact(lambda tx: tx.send(PEER, C, b""))


async def test_every_boot_is_written_down_and_folded_into_the_digest(tmp_path: Path) -> None:
    seen = []
    for _ in range(3):
        async with opened(tmp_path) as store:
            seen.append(store.identity)

    assert [identity.boot.counter for identity in seen] == [1, 2, 3]
    assert len({identity.boot.nonce for identity in seen}) == 3
    assert len({identity.boots_digest for identity in seen}) == 3
    assert len({identity.store for identity in seen}) == 1


async def test_file_of_another_node_or_another_node_db_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "app.db"
    async with open_transaction_store(path, owner=ME):
        pass
    async with open_transaction_store(path, owner=ME, replica=b"r" * 16) as store:
        assert store.identity.replica == b"r" * 16
    async with open_transaction_store(path, owner=ME, replica=b"r" * 16):
        with pytest.raises(StoreLockedError, match=r"app\.db"):
            async with open_transaction_store(path, owner=ME):
                pass

    with pytest.raises(StorageError, match="belongs to node a@h1.example"):
        async with open_transaction_store(path, owner=PEER):
            pass
    with pytest.raises(StorageError, match="belongs to another node.db"):
        async with open_transaction_store(path, owner=ME, replica=b"q" * 16):
            pass


async def test_damaged_identity_and_damaged_outbox_are_detected(tmp_path: Path) -> None:
    path = tmp_path / "app.db"
    async with opened(tmp_path) as store:
        await store.transact(lambda tx: tx.send(PEER, C, b"payload"))
    with sqlite3.connect(path) as db:
        blob = bytearray(db.execute("SELECT bodies FROM ha_outbox").fetchone()[0])
        blob[-1] ^= 1
        db.execute("UPDATE ha_outbox SET bodies = ?", (bytes(blob),))
    db.close()
    async with opened(tmp_path) as store:
        failed: list[StorageError] = []
        store.on_failed = failed.append
        store.load_outbox(PEER, C, 1, 1000, lambda runs: failed.clear())
        with pytest.raises(CorruptRecordError, match="do not match their digest"):
            await store.transact(lambda tx: None)
        assert len(failed) == 1

    with sqlite3.connect(path) as db:
        db.execute("UPDATE ha_identity SET crc = crc + 1")
    db.close()
    with pytest.raises(CorruptRecordError, match="identity"):
        async with opened(tmp_path):
            pass


async def test_failed_write_poisons_the_store_and_says_so_once(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        failed: list[StorageError] = []
        store.on_failed = failed.append
        await store.transact(create)
        await store._connection.run(lambda: store._database.execute("PRAGMA query_only=ON"))

        for _ in range(2):
            with pytest.raises(StorageError):
                await store.transact(insert, 1)
        assert len(failed) == 1


async def test_running_function_is_known_by_name(tmp_path: Path) -> None:
    hold, entered = threading.Event(), threading.Event()

    def stuck(tx: Transaction) -> None:
        entered.set()
        hold.wait(5)

    async with opened(tmp_path) as store:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.transact, stuck)
            await trio.to_thread.run_sync(entered.wait)
            running = store.running()
            hold.set()
        assert running is not None
        assert running[0].endswith("stuck")
        assert store.running() is None
