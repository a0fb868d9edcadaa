"""Handling received messages in a group: effect and cursor together, failures one by one, records of attempts, dead letters."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import cast

import outcome
import pytest
import trio

from ha_core.errors import InvariantError, LocalProtocolError, OutboxFullError
from ha_core.ids import Boot, ChannelName, NodeId, StoreId
from ha_core.machines.durable import REPLY_PREFIX
from ha_core.machines.durable_events import Attempt, Batch, IncomingState, Message, RunBatch
from ha_core.machines.durable_wire import START_DIGEST, chain
from ha_core.machines.handshake import SeenBoot
from ha_core.storage.sqlite_delivery import Delivered, commit_inbox, deliver, record_attempt, set_aside, store_replies
from ha_core.storage.sqlite_transaction import Transaction
from ha_core.storage.sqlite_transactions import TransactionStore, open_transaction_store

ME, PEER = NodeId("b@h2.example"), NodeId("a@h1.example")
FROM = StoreId(b"a" * 16)
C = ChannelName("orders")


def opened(tmp_path: Path, *, outbox_max_bytes: int = 64 << 20) -> AbstractAsyncContextManager[TransactionStore]:
    return open_transaction_store(tmp_path / "app.db", owner=ME, outbox_max_bytes=outbox_max_bytes)


def batch(first: int, count: int, *, name: str = C, **options: object) -> RunBatch:
    bodies = [b"body %d" % number for number in range(1, first + count)]
    digests = chain(START_DIGEST, 1, bodies)
    return RunBatch(PEER, FROM, ChannelName(name), first, bodies[first - 1 :], digests[first - 1 :], **options)  # type: ignore[arg-type]


def create(tx: Transaction) -> None:
    tx.execute("CREATE TABLE effects (at INTEGER PRIMARY KEY, number INTEGER, body BLOB)")


def write(tx: Transaction, messages: Sequence[Message]) -> None:
    tx.executemany("INSERT INTO effects (number, body) VALUES (?, ?)", [(one.number, one.body) for one in messages])


def numbers(tx: Transaction) -> list[object]:
    return [row[0] for row in tx.execute("SELECT number FROM effects ORDER BY at")]


async def run(store: TransactionStore, work: Callable[[Transaction], object]) -> Delivered:
    return cast(Delivered, await store.perform(lambda tx: outcome.Value(work(tx)), "work"))


def cursor_of(tmp_path: Path) -> tuple[int, bytes]:
    with sqlite3.connect(tmp_path / "app.db") as db:
        row = db.execute("SELECT cursor, digest FROM ha_incoming").fetchone()
    db.close()
    return cast("tuple[int, bytes]", row)


async def test_effect_and_cursor_are_one(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.transact(create)
        first = batch(1, 5)
        done = await run(store, lambda tx: deliver(tx, first, ME, write, 2))
        assert done == Delivered(5, first.digests[-1])
        await run(store, lambda tx: deliver(tx, batch(6, 3), ME, write, 100))

    assert cursor_of(tmp_path) == (8, batch(1, 8).digests[-1])
    async with opened(tmp_path) as store:
        assert await store.transact(numbers) == list(range(1, 9))
        assert list(store.incoming) == [IncomingState(PEER, FROM, C, 8, batch(1, 8).digests[-1])]


async def test_batch_that_raises_is_tried_message_by_message_and_stops_before_the_one_that_raises(tmp_path: Path) -> None:
    sizes: list[int] = []

    def handle(tx: Transaction, messages: Batch) -> None:
        sizes.append(len(messages))
        write(tx, messages)
        if any(one.number == 4 for one in messages):
            raise ValueError("four")

    async with opened(tmp_path) as store:
        await store.transact(create)
        done = await run(store, lambda tx: deliver(tx, batch(1, 6), ME, handle, 6))

        assert (done.cursor, done.error) == (3, "ValueError: four")
        assert sizes == [6, 1, 1, 1, 1]
        assert await store.transact(numbers) == [1, 2, 3]
    assert cursor_of(tmp_path) == (3, batch(1, 3).digests[-1])


async def test_batch_that_only_fails_as_a_whole_goes_through_one_by_one(tmp_path: Path) -> None:
    def handle(tx: Transaction, messages: Batch) -> None:
        if len(messages) > 1:
            raise ValueError("one at a time, please")
        write(tx, messages)

    async with opened(tmp_path) as store:
        await store.transact(create)
        done = await run(store, lambda tx: deliver(tx, batch(1, 5), ME, handle, 2))

        assert (done.cursor, done.error) == (5, "")
        assert await store.transact(numbers) == [1, 2, 3, 4, 5]


async def test_cursor_steps_only_from_where_it_stands(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.transact(create)
        await run(store, lambda tx: deliver(tx, batch(1, 3), ME, write, 9))
        for wrong in (batch(1, 3), batch(5, 1)):
            with pytest.raises(InvariantError, match="steps from where it stands"):
                await run(store, lambda tx, wrong=wrong: deliver(tx, wrong, ME, write, 9))  # type: ignore[misc]
        assert await store.transact(numbers) == [1, 2, 3]


async def test_full_outbox_inside_a_handler_is_nobodys_fault(tmp_path: Path) -> None:
    def forward(tx: Transaction, messages: Batch) -> None:
        write(tx, messages)
        tx.send(PEER, C, b"x" * 20_000)

    async with opened(tmp_path, outbox_max_bytes=100_000) as store:
        await store.transact(create)
        done = await run(store, lambda tx: deliver(tx, batch(1, 5), ME, forward, 1))

        assert (done.cursor, done.error, done.blocked) == (2, "", True)
        assert await store.transact(numbers) == [1, 2]
        with pytest.raises(OutboxFullError):
            await store.transact(lambda tx: tx.send(PEER, C, b"x" * 20_000))


async def test_attempt_is_remembered_until_its_batch_is_handled(tmp_path: Path) -> None:
    attempt = Attempt(1, 3, 2, 9)
    handled = batch(1, 3, attempt=attempt)
    async with opened(tmp_path) as store:
        await store.transact(create)
        await run(store, lambda tx: record_attempt(tx, handled, attempt))
    async with opened(tmp_path) as store:
        assert [state.attempt for state in store.incoming] == [attempt]
        assert store.incoming[0].cursor == 0
        await run(store, lambda tx: deliver(tx, handled, ME, write, 9))
    async with opened(tmp_path) as store:
        assert [state.attempt for state in store.incoming] == [None]
        assert store.incoming[0].cursor == 3


async def test_dead_letter_and_cursor_move_together(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        done = await run(store, lambda tx: set_aside(tx, batch(1, 1, dead_letter="unreadable")))
        assert done.cursor == 1
    with sqlite3.connect(tmp_path / "app.db") as db:
        letters = db.execute("SELECT store, name, number, peer, body, error FROM ha_dead_letters").fetchall()
    db.close()
    assert letters == [(FROM, C, 1, PEER, b"body 1", "unreadable")]
    assert cursor_of(tmp_path)[0] == 1


@asynccontextmanager
async def with_letters(tmp_path: Path) -> AsyncIterator[TransactionStore]:
    """A store with two dead letters on C and a stray reply."""
    async with opened(tmp_path) as store:
        await store.transact(create)
        for letter in (batch(1, 1, dead_letter="unreadable"), batch(2, 1, dead_letter="unreadable, too")):
            await run(store, partial(set_aside, batch=letter))
        stray = (77).to_bytes(8, "big") + b"!"
        name = ChannelName(REPLY_PREFIX + C)
        await run(store, lambda tx: store_replies(tx, RunBatch(PEER, FROM, name, 1, [stray], chain(START_DIGEST, 1, [stray]))))
        yield store


async def test_dead_letters_are_listed_oldest_first(tmp_path: Path) -> None:
    async with with_letters(tmp_path) as store:
        every = await store.transact(lambda tx: tx.dead_letters())
        assert [letter.message.channel for letter in every] == [C, C, REPLY_PREFIX + C]
        assert every[0].message == Message(PEER, FROM, ME, C, 1, b"body 1")
        assert every[0].error == "unreadable"
        assert await store.transact(lambda tx: tx.dead_letters(C)) == every[:2]
        assert await store.transact(lambda tx: tx.dead_letters(limit=1)) == every[:1]


async def test_a_dead_letter_is_consumed_with_the_effect_of_its_retry(tmp_path: Path) -> None:
    def retry(tx: Transaction) -> None:
        write(tx, [tx.take_dead_letter(tx.dead_letters(C)[0].message.id)])

    async with with_letters(tmp_path) as store:
        await store.transact(retry)
        assert await store.transact(numbers) == [1]
        assert [letter.message.number for letter in await store.transact(lambda tx: tx.dead_letters(C))] == [2]


async def test_a_retry_that_fails_keeps_the_dead_letter(tmp_path: Path) -> None:
    def retry(tx: Transaction) -> None:
        tx.take_dead_letter(tx.dead_letters(C)[0].message.id)
        raise RuntimeError("still unreadable")

    async with with_letters(tmp_path) as store:
        with pytest.raises(RuntimeError):
            await store.transact(retry)
        assert len(await store.transact(lambda tx: tx.dead_letters(C))) == 2


async def test_a_dead_letter_is_taken_once(tmp_path: Path) -> None:
    async with with_letters(tmp_path) as store:
        (first, _) = await store.transact(lambda tx: tx.dead_letters(C))
        await store.transact(lambda tx: tx.take_dead_letter(first.message.id))
        with pytest.raises(LocalProtocolError, match="no longer"):
            await store.transact(lambda tx: tx.take_dead_letter(first.message.id))


async def test_inbox_commit_that_raises_leaves_the_cursor(tmp_path: Path) -> None:
    def bad(tx: Transaction, messages: Batch) -> None:
        write(tx, messages)
        raise RuntimeError("no")

    one = batch(1, 2)
    messages = Batch(PEER, FROM, ME, C, 1, one.bodies)
    async with opened(tmp_path) as store:
        await store.transact(create)
        with pytest.raises(RuntimeError):
            await store.perform(lambda tx: commit_inbox(tx, one, messages, bad), "bad")
        assert await store.transact(numbers) == []
        done = cast(Delivered, await store.perform(lambda tx: commit_inbox(tx, one, messages, write), "write"))
        assert done.cursor == 2


async def test_replies_are_kept_once_and_strays_become_dead_letters(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        store.set_peers(frozenset({PEER}))
        asked = await store.transact(lambda tx: tx.request(PEER, C, b"?"))
        bodies = [number.to_bytes(8, "big") + b"!" for number in (asked.number, asked.number, 77)]
        digests = chain(START_DIGEST, 1, bodies)
        replies = RunBatch(PEER, FROM, ChannelName(REPLY_PREFIX + C), 1, bodies, digests)
        await run(store, lambda tx: store_replies(tx, replies))
    with sqlite3.connect(tmp_path / "app.db") as db:
        assert db.execute("SELECT reply FROM ha_requests").fetchall() == [(b"!",)]
        assert [row[0] for row in db.execute("SELECT number FROM ha_dead_letters ORDER BY number")] == [2, 3]
    db.close()


async def test_sends_of_a_handler_that_raised_are_not_sent(tmp_path: Path) -> None:
    def handle(tx: Transaction, messages: Batch) -> None:
        for one in messages:
            tx.send(PEER, C, b"about %d" % one.number)
            if one.number == 3:
                raise ValueError

    async with opened(tmp_path) as store:
        sent: list[int] = []
        store.on_commit = lambda runs, _: sent.extend(number for one in runs for number in range(one.first, one.last + 1))
        done = await run(store, lambda tx: deliver(tx, batch(1, 4), ME, handle, 4))
        await trio.lowlevel.checkpoint()

        assert done.cursor == 2
        assert sent == [1, 2]


async def test_boots_of_other_stores_are_written_with_the_next_group_and_the_newest_counts(tmp_path: Path) -> None:
    newest = SeenBoot(PEER, FROM, Boot((1 << 64) - 1, 1 << 63), b"digest")
    async with opened(tmp_path) as store:
        store.remember_boot(SeenBoot(PEER, FROM, Boot(1, 2), b""))
        store.remember_boot(newest)
        await store.transact(create)

    async with opened(tmp_path) as store:
        assert store.seen == [newest]


async def test_a_boot_survives_the_group_that_was_to_write_it(tmp_path: Path) -> None:
    seen = SeenBoot(PEER, FROM, Boot(3, 4), b"digest")

    def end_the_group(tx: Transaction) -> None:
        for _ in range(2):
            tx.execute("INSERT OR ROLLBACK INTO effects (at) VALUES (1)")

    async with opened(tmp_path) as store:
        await store.transact(create)
        store.remember_boot(seen)
        with pytest.raises(sqlite3.IntegrityError):
            await store.transact(end_the_group)
        await store.transact(numbers)

    async with opened(tmp_path) as store:
        assert store.seen == [seen]
