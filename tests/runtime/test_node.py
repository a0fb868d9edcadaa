"""Nodes over real loopback TCP and UDP with two links each: what a program sees."""

from __future__ import annotations

import random
import socket
import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import attrs
import pytest
import trio

from ha_core.config import Config
from ha_core.errors import (
    ConfigError,
    LocalProtocolError,
    NodeFailedError,
    OutboxFullError,
    SessionResetError,
    StorageError,
    StoreLockedError,
    TransportError,
)
from ha_core.events import DeadLetterEvent, ForkedEvent, NodeEvent, OutboxFullEvent, PeerRefusedEvent
from ha_core.ids import ChannelName, LinkName, MessageId, NodeId
from ha_core.runtime.node import Events, Message, Node, Transaction, open_node

E = TypeVar("E", bound=NodeEvent)
A = NodeId("a@h1.example")
B = NodeId("b@h2.example")
C = "orders"


def free_port(*hosts: str) -> int:
    """A port that is free on all of these addresses, for TCP and UDP."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        try:
            for host in hosts:
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    with socket.socket(socket.AF_INET, kind) as one:
                        one.bind((host, port))
        except OSError:
            continue
        return port


@pytest.fixture
def configs(tmp_path: Path) -> dict[NodeId, Config]:
    return make_configs(tmp_path, [A, B])


def make_configs(folder: Path, nodes: Sequence[NodeId], **options: object) -> dict[NodeId, Config]:
    key = folder / "cluster.key"
    if not key.exists():
        key.write_bytes(bytes(range(32)))
        key.chmod(0o600)
    links: dict[NodeId, dict[LinkName, str]] = {}
    for number, node in enumerate(nodes, 1):
        hosts = (f"127.31.{number}.1", f"127.31.{number}.2")
        port = free_port(*hosts)
        links[node] = {LinkName("a"): f"{hosts[0]}:{port}", LinkName("b"): f"{hosts[1]}:{port}"}
    return {
        node: Config(
            node=node, cluster="test", data_dir=folder / node, links=links[node], key_file=key, bootstrap=links, role="client",
            **options,  # type: ignore[arg-type]
        )
        for node in nodes
    }  # fmt: skip


def make_table(tx: Transaction) -> None:
    tx.execute("CREATE TABLE IF NOT EXISTS effects (at INTEGER PRIMARY KEY, number INTEGER, body BLOB)")


def write(tx: Transaction, batch: Sequence[Message]) -> None:
    tx.executemany("INSERT INTO effects (number, body) VALUES (?, ?)", [(one.number, one.body) for one in batch])


def send_some(tx: Transaction, first: int, count: int) -> None:
    for number in range(first, first + count):
        tx.send(B, C, b"%d" % number)


def bodies(tx: Transaction) -> list[object]:
    return [row[0] for row in tx.execute("SELECT body FROM effects ORDER BY at")]


async def event_of(events: Events, kind: type[E]) -> E:
    """The next event of this kind."""
    with trio.fail_after(5):
        async for event in events:
            if isinstance(event, kind):
                return event
    raise AssertionError


async def wait_for(node: Node, count: int) -> list[object]:
    with trio.fail_after(10):
        while True:
            found = await node.transact(bodies)
            if len(found) >= count:
                return found
            await trio.sleep(0.005)


async def test_durable_messages_arrive_once_in_order(configs: dict[NodeId, Config]) -> None:
    async with open_node(configs[A]) as a, open_node(configs[B]) as b, trio.open_nursery() as nursery:
        await b.transact(make_table)
        nursery.start_soon(b.serve, C, write)
        for first in range(1, 501, 50):
            await a.transact(send_some, first, 50)
        assert (await a.send(B, C, b"501")).number == 501

        assert await wait_for(b, 501) == [b"%d" % number for number in range(1, 502)]
        nursery.cancel_scope.cancel()


async def test_what_was_accepted_before_a_restart_arrives_after_it(configs: dict[NodeId, Config]) -> None:
    async with open_node(configs[A]) as a:
        await a.transact(send_some, 1, 20)
    async with open_node(configs[B]) as b, trio.open_nursery() as nursery:
        await b.transact(make_table)
        nursery.start_soon(b.serve, C, write)
        async with open_node(configs[A]) as a:
            assert len(await wait_for(b, 20)) == 20
            await a.transact(send_some, 21, 5)
            await wait_for(b, 25)
        nursery.cancel_scope.cancel()
    async with open_node(configs[B]) as b, open_node(configs[A]) as a, trio.open_nursery() as nursery:
        nursery.start_soon(b.serve, C, write)
        await a.transact(send_some, 26, 1)
        assert await wait_for(b, 26) == [b"%d" % number for number in range(1, 27)]
        nursery.cancel_scope.cancel()


async def test_inbox_commits_batches_and_hands_an_uncommitted_one_out_again(configs: dict[NodeId, Config]) -> None:
    async with open_node(configs[A]) as a, open_node(configs[B]) as b:
        await b.transact(make_table)
        await a.transact(send_some, 1, 10)
        async with b.open_inbox(C, max_batch=4) as inbox:
            async for batch in inbox:
                assert [one.body for one in batch][0] == b"1"
                with pytest.raises(LocalProtocolError, match="commit the batch"):
                    await inbox.__anext__()
                break
        assert await b.transact(bodies) == []

        got: list[bytes] = []
        async with b.open_inbox(C, max_batch=4) as inbox:
            async for batch in inbox:
                await inbox.commit(write)
                got += [one.body for one in batch]
                if len(got) == 10:
                    break
        assert got == await b.transact(bodies)
        assert got == [b"%d" % number for number in range(1, 11)]


async def test_inbox_commit_that_raises_changes_nothing_and_can_be_repeated(configs: dict[NodeId, Config]) -> None:
    def bad(tx: Transaction, batch: Sequence[Message]) -> None:
        write(tx, batch)
        raise RuntimeError("no")

    async with open_node(configs[A]) as a, open_node(configs[B]) as b:
        await b.transact(make_table)
        await a.transact(send_some, 1, 3)
        async with b.open_inbox(C) as inbox, b.open_events() as events:
            await inbox.__anext__()
            with pytest.raises(RuntimeError):
                await inbox.commit(bad)
            assert await inbox.commit(lambda tx, batch: len(batch)) == 1
            await inbox.__anext__()
            await inbox.set_aside("unreadable")
            batch = await inbox.__anext__()
            assert batch[0].number == 3
            event = await event_of(events, DeadLetterEvent)
            assert (event.number, event.error) == (2, "unreadable")


async def test_poison_message_becomes_a_dead_letter_and_the_rest_goes_on(tmp_path: Path) -> None:
    configs = make_configs(tmp_path, [A, B], message_attempts=2)

    def handle(tx: Transaction, batch: Sequence[Message]) -> None:
        write(tx, batch)
        if any(one.body == b"3" for one in batch):
            raise ValueError("unreadable")

    async with open_node(configs[A]) as a, open_node(configs[B]) as b, trio.open_nursery() as nursery:
        await b.transact(make_table)
        async with b.open_events() as events:
            nursery.start_soon(b.serve, C, handle)
            await a.transact(send_some, 1, 6)
            assert await wait_for(b, 5) == [b"1", b"2", b"4", b"5", b"6"]
            event = await event_of(events, DeadLetterEvent)
            assert (event.peer, event.number) == (A, 3)
            assert "unreadable" in event.error
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT OR ROLLBACK INTO effects (at) VALUES (1)",
        "INSERT INTO effects (number) WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c) SELECT x FROM c",
    ],
    ids=["or-rollback", "endless"],
)
async def test_message_whose_handler_ends_the_transaction_becomes_a_dead_letter_and_the_rest_goes_on(
    tmp_path: Path, statement: str
) -> None:
    configs = make_configs(tmp_path, [A, B], message_attempts=1, max_transaction_s=0.05)

    def handle(tx: Transaction, batch: Sequence[Message]) -> None:
        for one in batch:
            write(tx, [one])
            if one.body == b"2":
                tx.execute(statement)

    async with (
        open_node(configs[A]) as a,
        open_node(configs[B]) as b,
        b.open_events() as events,
        trio.open_nursery() as nursery,
    ):
        await b.transact(make_table)
        await a.transact(send_some, 1, 3)
        nursery.start_soon(b.serve, C, handle)
        letter = await event_of(events, DeadLetterEvent)
        assert letter.number == 2
        assert await wait_for(b, 2) == [b"1", b"3"]
        nursery.cancel_scope.cancel()


async def test_request_is_answered_in_the_handlers_transaction(configs: dict[NodeId, Config]) -> None:
    def answer(tx: Transaction, batch: Sequence[Message]) -> None:
        write(tx, batch)
        for one in batch:
            tx.reply(one, one.body + b"!")

    asked: list[MessageId] = []
    async with open_node(configs[B]) as b, trio.open_nursery() as nursery:
        await b.transact(make_table)
        nursery.start_soon(b.serve, C, answer)
        async with open_node(configs[A]) as a:
            for body in (b"one", b"two"):
                asked.append(await a.request(B, C, body))
            with trio.fail_after(5):
                assert await a.receive_reply(asked[1], lambda tx, reply: reply.body) == b"two!"
            with pytest.raises(LocalProtocolError, match="received already"):
                await a.receive_reply(asked[1], lambda tx, reply: None)
        async with open_node(configs[A]) as a:  # the answer to the first one survives the restart
            with trio.fail_after(5):
                assert await a.receive_reply(asked[0], lambda tx, reply: reply.body) == b"one!"
        nursery.cancel_scope.cancel()


async def test_full_outbox_is_an_error_and_room_comes_back(tmp_path: Path) -> None:
    configs = make_configs(tmp_path, [A, B], outbox_max_bytes=1 << 20)
    async with open_node(configs[A]) as a, a.open_events() as events:
        with pytest.raises(OutboxFullError):
            for _ in range(100):
                await a.send(B, C, b"x" * 50_000)
        full = await event_of(events, OutboxFullEvent)
        assert (full.peer, full.channel) == (B, C)
        async with open_node(configs[B]) as b, trio.open_nursery() as nursery:
            nursery.start_soon(b.serve, C, lambda tx, batch: None)
            with trio.fail_after(5):
                await a.wait_for_room(B, C)
                await a.send(B, C, b"x" * 50_000)
            nursery.cancel_scope.cancel()


async def test_session_messages_flow_and_a_restart_is_told(configs: dict[NodeId, Config]) -> None:
    async with open_node(configs[A]) as a, a.open_session(B, "chat") as out:
        async with open_node(configs[B]) as b, b.open_session(A, "chat") as back:
            got: list[bytes] = []
            with trio.fail_after(5):
                for number in range(1000):
                    await out.send(b"%d" % number)
                while len(got) < 1000:
                    got.extend(await back.receive())
            assert got == [b"%d" % number for number in range(1000)]
            await back.send(b"hello")
            with trio.fail_after(5):
                assert await out.receive() == [b"hello"]
        async with open_node(configs[B]) as b, b.open_session(A, "chat") as back:
            with trio.fail_after(10):
                with pytest.raises(SessionResetError):
                    await out.receive()
                await out.send(b"again")
                assert list(await back.receive()) == [b"again"]


async def test_message_sent_right_before_its_channel_closes_still_arrives(configs: dict[NodeId, Config]) -> None:
    async with open_node(configs[A]) as a, open_node(configs[B]) as b, b.open_session(A, "chat") as back:
        with trio.fail_after(5):
            async with a.open_session(B, "chat") as out:
                await out.send(b"first")
                assert await back.receive() == [b"first"]
                await out.send(b"last words")
            assert await back.receive() == [b"last words"]


async def test_messages_unread_when_a_channel_closes_wait_for_its_next_opening(configs: dict[NodeId, Config]) -> None:
    async with open_node(configs[A]) as a, open_node(configs[B]) as b, a.open_session(B, "chat") as out:
        with trio.fail_after(5):
            async with b.open_session(A, "chat") as back:
                await out.send(b"1")
                assert await back.receive() == [b"1"]
                await out.send(b"2")
                while not back._runs:
                    await trio.sleep(0.005)
            async with b.open_session(A, "chat") as back:
                assert await back.receive() == [b"2"]


async def test_what_no_session_can_carry_is_refused_and_the_node_goes_on(configs: dict[NodeId, Config]) -> None:
    async with open_node(configs[A]) as a, open_node(configs[B]) as b:
        async with a.open_session(B, "chat") as out, b.open_session(A, "chat") as back:
            with trio.fail_after(5):
                await out.send(b"1")
                assert await back.receive() == [b"1"]
                for body in (b"x" * ((8 << 20) + 1), "text"):
                    with pytest.raises(LocalProtocolError, match="at most 8388608"):
                        await out.send(body)  # type: ignore[arg-type]
                for name in ("x" * 200, "a\nb"):
                    with pytest.raises(LocalProtocolError, match="printable"):
                        async with a.open_session(B, name):
                            pass
                await out.send(b"2")
                assert await back.receive() == [b"2"]


async def test_more_channels_than_a_session_has_are_refused_and_the_node_goes_on(configs: dict[NodeId, Config]) -> None:
    async with open_node(configs[A]) as a, open_node(configs[B]) as b:
        opened = 0
        with trio.fail_after(5), pytest.raises(LocalProtocolError, match="at most 112 names"):
            for number in range(200):
                async with a.open_session(B, f"chat {number}") as out:
                    await out.send(b"%d" % number)
                opened += 1
        with trio.fail_after(5):
            for number in range(opened):
                async with b.open_session(A, f"chat {number}") as back:
                    assert await back.receive() == [b"%d" % number]


async def test_bodys_exception_leaves_unwrapped(configs: dict[NodeId, Config]) -> None:
    with pytest.raises(ZeroDivisionError):
        async with open_node(configs[A]):
            raise ZeroDivisionError


async def test_cancelled_body_closes_the_node(configs: dict[NodeId, Config]) -> None:
    with trio.move_on_after(0.05) as scope:
        async with open_node(configs[A]):
            await trio.sleep_forever()
    assert scope.cancelled_caught
    async with open_node(configs[A]):
        pass


async def test_failed_store_cancels_the_body_and_names_the_cause(configs: dict[NodeId, Config]) -> None:
    async def body() -> None:
        async with open_node(configs[A]) as a:
            store = a._store
            assert store is not None
            await store._connection.run(lambda: store._database.execute("PRAGMA query_only=ON"))
            with pytest.raises((StorageError, NodeFailedError)):
                await a.send(B, C, b"x")
            await trio.sleep_forever()

    with trio.fail_after(5), pytest.raises(NodeFailedError, match=r"app\.db") as caught:
        await body()
    assert isinstance(caught.value.__cause__, StorageError)


async def test_function_that_does_not_return_is_named_and_the_node_stops(
    configs: dict[NodeId, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ha_core.runtime.node_shell.HANG_S", 0.1)
    monkeypatch.setattr("ha_core.storage.sqlite_file.CLOSE_S", 0.1)
    release = threading.Event()
    config = configs[A]

    def hangs(tx: Transaction) -> None:
        make_table(tx)
        release.wait(20)

    async def body() -> None:
        async with open_node(attrs.evolve(config, max_transaction_s=0.01)) as a:
            await a.transact(hangs)

    began = time.monotonic()
    with pytest.raises(NodeFailedError, match="hangs has not returned"):
        await body()
    assert time.monotonic() - began < 3
    release.set()
    await _until_unlocked(config)
    async with open_node(config) as a:  # what it did was not committed
        with pytest.raises(sqlite3.OperationalError, match="no such table"):
            await a.transact(bodies)


async def _until_unlocked(config: Config) -> None:
    with trio.fail_after(5):
        while True:
            try:
                async with open_node(config):
                    return
            except StoreLockedError:
                await trio.sleep(0.01)


async def test_wrong_ways_to_open_are_one_clear_line_each(tmp_path: Path, configs: dict[NodeId, Config]) -> None:
    async with open_node(configs[A]):
        with pytest.raises(StoreLockedError, match=r"app\.db"):
            async with open_node(configs[A]):
                pass
        other = attrs.evolve(configs[A], node=NodeId("c@h3.example"), data_dir=tmp_path / "c")
        with pytest.raises(TransportError, match="link a"):
            async with open_node(other):
                pass
    with pytest.raises(StorageError, match="belongs to node a@h1.example"):
        async with open_node(attrs.evolve(configs[B], data_dir=configs[A].data_dir)):
            pass
    with pytest.raises(ConfigError, match="no cluster key"):
        async with open_node(attrs.evolve(configs[A], key_file=tmp_path / "none")):
            pass


@pytest.mark.parametrize("max_batch", [0, -1])
async def test_inbox_of_no_messages_is_refused(configs: dict[NodeId, Config], max_batch: int) -> None:
    async with open_node(configs[A]) as a:
        with pytest.raises(LocalProtocolError, match="at least 1"):
            async with a.open_inbox(C, max_batch=max_batch):
                pass


async def test_unknown_peer_and_taken_channel_are_refused(configs: dict[NodeId, Config]) -> None:
    async with open_node(configs[A]) as a, trio.open_nursery() as nursery:
        with pytest.raises(LocalProtocolError, match="unknown node"):
            await a.send(NodeId("z@h9.example"), C, b"x")
        a.set_peer(NodeId("z@h9.example"), {})
        await a.send(NodeId("z@h9.example"), C, b"x")
        nursery.start_soon(a.serve, C, write)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(LocalProtocolError, match="has a handler already"):
            async with a.open_inbox(C):
                pass
        nursery.cancel_scope.cancel()


async def test_node_without_sqlite_refuses_durable_channels(tmp_path: Path) -> None:
    config = make_configs(tmp_path, [A, B], store="memory")[A]
    async with open_node(config) as a:
        with pytest.raises(StorageError, match="need store = 'sqlite'"):
            await a.send(B, C, b"x")


async def test_restored_store_is_reported_and_repeats_nothing(configs: dict[NodeId, Config]) -> None:
    """By the boots, also at a receiver that has restarted since it saw the newer one; by the digests once they passed that."""
    path = configs[A].data_dir / "app.db"
    async with open_node(configs[B]) as b, b.open_events() as events, trio.open_nursery() as nursery:
        await b.transact(make_table)
        nursery.start_soon(b.serve, C, write)
        async with open_node(configs[A]) as a:
            await a.transact(send_some, 1, 5)
            await wait_for(b, 5)
        old = path.read_bytes()
        async with open_node(configs[A]) as a:
            await a.transact(send_some, 6, 5)
            await wait_for(b, 10)
        path.write_bytes(old)
        async with open_node(configs[A]) as a:
            await a.transact(send_some, 100, 50)
            event = await event_of(events, PeerRefusedEvent)
            assert event.code == "clone"
        nursery.cancel_scope.cancel()
    async with open_node(configs[B]) as b, b.open_events() as events, trio.open_nursery() as nursery:
        nursery.start_soon(b.serve, C, write)
        async with open_node(configs[A]):
            assert (await event_of(events, PeerRefusedEvent)).code == "clone"
        async with open_node(configs[A]):
            fork = await event_of(events, ForkedEvent)
            assert (fork.peer, fork.channel) == (A, ChannelName(C))
        assert len(await b.transact(bodies)) == 10
        nursery.cancel_scope.cancel()


async def test_three_voters_share_a_database(tmp_path: Path) -> None:
    nodes = [NodeId(f"n{number}@h{number}.example") for number in (1, 2, 3)]
    configs = make_configs(tmp_path, nodes)
    voters = [attrs.evolve(config, role="voter") for config in configs.values()]
    async with open_node(voters[0]) as one, open_node(voters[1]) as two, open_node(voters[2]) as three:
        with trio.fail_after(10):
            await one.database.put(b"colour", b"blue")
            record = await three.database.get(b"colour")
            assert record is not None
            assert record.value == b"blue"
            async with two.lock("turn") as token:
                assert token > 0
