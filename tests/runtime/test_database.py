"""The database as programs use it: three nodes under trio, clients beside a leader, a follower and none."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio

from ha_core.errors import (
    CompactedError,
    LeaseLostError,
    LocalProtocolError,
    NodeFailedError,
    OutcomeUnknownError,
    ProposalDroppedError,
    SessionExpiredError,
)
from ha_core.ids import FencingToken, LeaseToken, NodeId, Revision
from ha_core.machines.keyvalue.model import Change, Compare, Delete, Get, Put, Record, RequestId, RevisionEvents
from ha_core.runtime.clock import now_ns
from ha_core.runtime.database import LOCKS, Database, Lease, Watch
from ha_core.runtime.database_calls import DatabaseCalls
from ha_core.storage.memory import MemoryEngine
from ha_core.storage.sqlite import SqliteEngine
from tests.runtime.database_nodes import CLIENT, NODES, Bus, open_bus


@attrs.define
class Three:
    bus: Bus
    databases: dict[NodeId, Database]

    async def roles(self) -> tuple[NodeId, NodeId, NodeId]:
        """(leader, follower, the other follower)."""
        leader = await self.bus.leader()
        first, second = [node for node in NODES if node != leader]
        return leader, first, second


@asynccontextmanager
async def three_nodes(folder: Path, *, client: bool = False) -> AsyncIterator[Three]:
    async with open_bus(folder) as bus:
        nodes = [*NODES, CLIENT] if client else NODES
        yield Three(bus, {node: await bus.start(node) for node in nodes})


@pytest.fixture
async def single(tmp_path: Path) -> AsyncIterator[Database]:
    """One voter: the quickest database there is."""
    async with open_bus(tmp_path) as bus:
        bus.voters = NODES[:1]
        yield await bus.start(NODES[0])


async def test_records_carry_their_revisions(single: Database) -> None:
    assert await single.get(b"k") is None
    first = await single.put(b"k", b"1")
    second = await single.put(b"k", b"2")

    assert await single.get(b"k") == Record(b"k", b"2", first, second, 2, 0)
    assert await single.delete(b"k") == second + 1
    assert await single.get(b"k") is None


async def test_a_change_is_compared_and_carried_out_at_once(single: Database) -> None:
    change = Change((Compare.missing(b"k"),), (Put(b"k", b"mine"),), (Get(b"k"),))

    first = await single.commit(change)
    second = await single.commit(change)

    assert first.succeeded
    assert not second.succeeded
    (found,) = second.results
    assert isinstance(found, Record)
    assert found.value == b"mine"


async def test_pages_are_read_on_consistently(single: Database) -> None:
    for number in range(5):
        await single.put(b"p/%d" % number, b"old")

    first = await single.range(b"p/", limit=2)
    await single.put(b"p/3", b"new")
    second = await single.range(b"p/", limit=10, after=first.records[-1].key, at=first.revision)

    assert first.more
    assert not second.more
    assert [record.key for record in (*first.records, *second.records)] == [b"p/%d" % number for number in range(5)]
    assert {record.value for record in second.records} == {b"old"}


async def test_what_breaks_a_rule_is_the_callers_fault(single: Database) -> None:
    with pytest.raises(LocalProtocolError, match="a key is 1 to"):
        await single.put(b"", b"")
    with pytest.raises(LocalProtocolError, match="procedures only"):
        await single.put(b"\x00ha/vm", b"")
    with pytest.raises(SessionExpiredError):
        await single.commit(Change(then=(Delete(b"k"),)), request=RequestId(999, 1))
    with pytest.raises(LocalProtocolError, match="still to come"):
        await single.range(b"", at=99)
    with pytest.raises(LocalProtocolError):
        await single.range("text")  # type: ignore[arg-type]
    with pytest.raises(LocalProtocolError):
        async with single.watch("text"):  # type: ignore[arg-type]
            pass
    assert await single.get(b"k") is None


async def test_many_tasks_write_at_once_and_each_hears_of_its_own(single: Database) -> None:
    revisions: list[Revision] = []

    async def write(number: int) -> None:
        revisions.append(await single.put(b"k%d" % number, b""))

    async with trio.open_nursery() as nursery:
        for number in range(200):
            nursery.start_soon(write, number)

    assert sorted(revisions) == list(range(1, 201))


async def test_a_cancelled_call_leaves_the_database_usable(single: Database) -> None:
    with trio.move_on_after(0):
        await single.put(b"k", b"cancelled before it began")
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(single.put, b"k", b"cancelled meanwhile")
            await trio.lowlevel.checkpoint()
            scope.cancel()

    await single.put(b"k", b"after")
    record = await single.get(b"k")
    assert record is not None
    assert record.value == b"after"


async def take(watch: Watch, count: int) -> list[RevisionEvents]:
    groups: list[RevisionEvents] = []
    with trio.fail_after(5):
        async for group in watch:
            groups.append(group)
            if len(groups) == count:
                break
    return groups


async def test_a_watch_begins_after_now_and_resumes_after_its_bookmark(single: Database) -> None:
    await single.put(b"w/before", b"")
    async with single.watch(b"w/") as watch:
        await single.put(b"w/1", b"a")
        await single.put(b"other", b"")
        await single.put(b"w/2", b"b")
        first = await take(watch, 1)
        bookmark = watch.revision
    await single.delete(b"w/1")

    assert [event.key for group in first for event in group.events] == [b"w/1"]
    assert bookmark == first[0].revision
    async with single.watch(b"w/", after=bookmark) as watch:
        rest = await take(watch, 2)
    assert [(event.key, event.record is None) for group in rest for event in group.events] == [(b"w/2", False), (b"w/1", True)]


async def test_a_watch_of_what_is_compacted_raises_and_says_from_where(single: Database) -> None:
    """R39."""
    for _ in range(6):
        await single.put(b"k", bytes(800_000))

    with pytest.raises(CompactedError) as caught:
        async with single.watch(b"", after=Revision(0)):
            pass

    async with single.watch(b"", after=Revision(caught.value.first_index)) as watch:
        assert await take(watch, 1)


async def test_a_watcher_that_sleeps_gets_everything_in_the_end(single: Database) -> None:
    async with single.watch(b"") as watch:
        async with trio.open_nursery() as nursery:
            for number in range(6_000):
                nursery.start_soon(single.put, b"k%d" % number, b"")
                if number % 500 == 499:
                    await trio.lowlevel.checkpoint()
        groups = await take(watch, 6_000)

    assert [group.revision for group in groups] == list(range(1, 6_001))


async def test_a_lease_is_kept_while_its_body_runs_and_its_keys_go_with_it(single: Database) -> None:
    async with single.lease(0.15) as lease:
        await single.put(b"k", b"v", lease=lease)
        await trio.sleep(0.4)
        assert not lease.lost.is_set()
        assert lease.remaining_s > 0
        record = await single.get(b"k")
        assert record is not None
        assert record.lease == lease.token

    assert await single.get(b"k") is None
    with pytest.raises(LeaseLostError):
        await single.put(b"k", b"v", lease=lease)


def test_a_holder_counts_from_when_it_asked_and_not_from_the_answer_R38() -> None:
    asked_ns = now_ns() - 4 * 10**9
    lease = Lease(LeaseToken(7), 10.0, asked_ns)
    assert 5.5 < lease.remaining_s < 6.0

    lease.extend(asked_ns + 10**9)

    assert 6.5 < lease.remaining_s < 7.0


async def test_a_body_leaves_lease_and_lock_with_its_own_exception(single: Database) -> None:
    with pytest.raises(ZeroDivisionError):
        async with single.lease(5):
            raise ZeroDivisionError
    with pytest.raises(KeyError):
        async with single.lock("name"):
            raise KeyError
    assert (await single.range(LOCKS)).records == []


async def test_holders_of_a_lock_follow_each_other_with_growing_tokens(single: Database) -> None:
    tokens: list[FencingToken] = []
    inside = 0

    async def hold() -> None:
        nonlocal inside
        async with single.lock("name") as token:
            inside += 1
            assert inside == 1
            await trio.sleep(0.001)
            tokens.append(token)
            inside -= 1

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(hold)

    assert tokens == sorted(set(tokens))
    assert len(tokens) == 8


async def test_two_locks_do_not_wait_for_each_other(single: Database) -> None:
    async with single.lock("a"), single.lock("ab"), single.lock("a/b"):
        pass
    with pytest.raises(LocalProtocolError):
        async with single.lock("a\0b"):
            pass


async def test_a_body_runs_on_one_host_and_its_result_comes_back(single: Database) -> None:
    async def body(token: FencingToken) -> tuple[str, int]:
        return "result", token

    result, token = await single.run_on_one_host("job", body)

    assert result == "result"
    assert token > 0


async def test_writes_go_on_when_the_leader_is_closed(tmp_path: Path) -> None:
    async with three_nodes(tmp_path, client=True) as three:
        leader, follower, _ = await three.roles()
        for database in three.databases.values():
            await database.put(b"k", b"before")

        await three.bus.stop(leader)

        with trio.fail_after(3):
            await three.databases[follower].put(b"k", b"follower")
            await three.databases[CLIENT].put(b"k", b"client")
            record = await three.databases[follower].get(b"k")
        assert record is not None
        assert record.value == b"client"
        with pytest.raises(NodeFailedError):
            await three.databases[leader].put(b"k", b"closed")


async def test_a_node_that_comes_back_has_everything(tmp_path: Path) -> None:
    async with three_nodes(tmp_path) as three:
        leader, follower, _ = await three.roles()
        await three.databases[follower].put(b"k", b"1")
        await three.bus.stop(leader)
        await three.databases[follower].put(b"k", b"2")

        database = await three.bus.start(leader)

        record = await database.get(b"k")
        assert record is not None
        assert record.value == b"2"


async def test_everything_is_there_after_all_nodes_restart_on_sqlite(tmp_path: Path) -> None:
    for number in range(3):
        async with open_bus(tmp_path, SqliteEngine()) as bus:
            databases = [await bus.start(node) for node in NODES]
            assert len((await databases[0].range(b"")).records) == number
            await databases[number].put(b"k%d" % number, b"v")


async def test_a_call_without_a_quorum_says_whether_it_may_have_happened(tmp_path: Path) -> None:
    async with three_nodes(tmp_path) as three:
        leader, *followers = await three.roles()
        database = three.databases[leader]
        await database.put(b"k", b"1")
        for follower in followers:
            await three.bus.stop(follower)

        with pytest.raises(OutcomeUnknownError) as caught:
            await database.commit(Change(then=(Put(b"k", b"2"),)), timeout_s=0.3)
        with pytest.raises(ProposalDroppedError):
            await database.commit(Change(then=(Put(b"k", b"3"),)), timeout_s=0.1)
        request = caught.value.request
        assert isinstance(request, RequestId)
        for follower in followers:
            await three.bus.start(follower)

        repeated = await database.commit(Change(then=(Put(b"k", b"2"),)), request=request)
        again = await database.commit(Change(then=(Put(b"k", b"2"),)), request=request)
        assert repeated == again
        record = await database.get(b"k")
        assert record is not None
        assert (record.value, record.version) == (b"2", 2)


async def test_a_lock_is_lost_by_a_host_that_is_cut_off_before_another_gets_it(tmp_path: Path) -> None:
    """I44, and the body is cancelled with LeaseLostError."""
    async with three_nodes(tmp_path) as three:
        _, first, second = await three.roles()
        order: list[str] = []
        tokens: list[FencingToken] = []
        holding = trio.Event()

        async def hold(token: FencingToken) -> None:
            tokens.append(token)
            holding.set()
            try:
                await trio.sleep_forever()
            finally:
                order.append("lost")

        async def lose() -> None:
            with pytest.raises(LeaseLostError):
                await three.databases[first].run_on_one_host("name", hold)

        async def win() -> None:
            async with three.databases[second].lock("name") as token:
                tokens.append(token)
                order.append("got")

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lose)
                await holding.wait()
                nursery.start_soon(win)
                await trio.sleep(0.05)
                three.bus.cut(first)

        assert order == ["lost", "got"]
        assert tokens[0] < tokens[1]


async def test_a_watch_of_a_client_survives_the_death_of_its_server(tmp_path: Path) -> None:
    async with three_nodes(tmp_path, client=True) as three:
        leader, follower, _ = await three.roles()
        client = three.databases[CLIENT]
        await client.put(b"w/0", b"")
        async with client.watch(b"w/", after=Revision(0)) as watch:
            assert len(await take(watch, 1)) == 1
            await three.bus.stop(leader)
            for number in range(1, 4):
                await three.databases[follower].put(b"w/%d" % number, b"")
            groups = await take(watch, 3)
        assert [event.key for group in groups for event in group.events] == [b"w/1", b"w/2", b"w/3"]


async def test_a_store_that_fails_stops_its_node_and_the_others_go_on(tmp_path: Path) -> None:
    """A2: a failed flush is never retried."""
    engine = MemoryEngine()
    async with open_bus(tmp_path, engine) as bus:
        databases = {node: await bus.start(node) for node in NODES}
        leader = await bus.leader()
        await databases[leader].put(b"k", b"1")
        medium = engine.medium(str(tmp_path / leader))
        assert medium is not None
        medium.failing = True

        with pytest.raises(NodeFailedError):
            await databases[leader].put(b"k", b"2")

        other = await bus.leader()
        assert other != leader
        with trio.fail_after(5):
            await databases[other].put(b"k", b"3")
        medium.failing = False
        record = await (await bus.start(leader)).get(b"k")
        assert record is not None
        assert record.value == b"3"


async def test_calls_raise_once_the_node_has_failed() -> None:
    calls = DatabaseCalls(lambda *events: None, lambda *events: None)

    async def ask() -> None:
        with pytest.raises(NodeFailedError, match="gone"):
            await calls.submit(Get(b"k"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        calls.fail(NodeFailedError("gone"))
    with pytest.raises(NodeFailedError, match="gone"):
        calls.open_watch(b"", None)
