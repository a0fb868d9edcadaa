"""``node.database`` of real nodes over loopback: leaders are closed, nodes come back, a client has no replica."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio

from ha_core.config import FAST, Config
from ha_core.errors import LeaseLostError, NodeFailedError, OutcomeUnknownError
from ha_core.events import LeaderEvent
from ha_core.ids import FencingToken, NodeId, Revision
from ha_core.machines.keyvalue.model import Change, Compare, Put
from ha_core.runtime.node import Node, open_node
from tests.runtime.test_node import make_configs

VOTERS = [NodeId(f"n{number}@h{number}.example") for number in (1, 2, 3)]
CLIENT = NodeId("c@h4.example")


def four_configs(folder: Path, store: str = "sqlite") -> dict[NodeId, Config]:
    configs = make_configs(folder, [*VOTERS, CLIENT], profile=FAST, store=store)
    voters = {node: config.links for node, config in configs.items() if node != CLIENT}
    return {
        node: attrs.evolve(config, role="client" if node == CLIENT else "voter", bootstrap=voters)
        for node, config in configs.items()
    }


@attrs.define
class Cluster:
    configs: Mapping[NodeId, Config]
    nursery: trio.Nursery
    nodes: dict[NodeId, Node] = attrs.field(factory=dict)
    _ends: dict[NodeId, tuple[trio.Event, trio.Event]] = attrs.field(factory=dict)

    async def start(self, node: NodeId) -> Node:
        opened, close, closed = trio.Event(), trio.Event(), trio.Event()

        async def run() -> None:
            async with open_node(self.configs[node]) as self.nodes[node]:
                opened.set()
                await close.wait()
            closed.set()

        self.nursery.start_soon(run)
        await opened.wait()
        self._ends[node] = (close, closed)
        return self.nodes[node]

    async def stop(self, node: NodeId) -> None:
        close, closed = self._ends.pop(node)
        close.set()
        await closed.wait()
        del self.nodes[node]

    async def leader(self) -> NodeId:
        """Who any of the nodes takes for the leader, once it has heard of one that is open."""
        with trio.fail_after(10):
            while True:
                for node in self.nodes.values():
                    leader = leaders.get(node.name)
                    if leader in self.nodes:
                        return leader
                await trio.sleep(0.01)


leaders: dict[NodeId, NodeId] = {}


@asynccontextmanager
async def open_cluster(configs: Mapping[NodeId, Config], *, client: bool = False) -> AsyncIterator[Cluster]:
    leaders.clear()
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.enter_context(trio.fail_after(30))
        cluster = Cluster(configs, nursery)
        for name in [*VOTERS, CLIENT] if client else VOTERS:
            node = await cluster.start(name)
            await nursery.start(follow_leader, node)
        yield cluster
        for name in list(cluster.nodes):
            await cluster.stop(name)
        nursery.cancel_scope.cancel()


async def follow_leader(node: Node, *, task_status: trio.TaskStatus[None]) -> None:
    async with node.open_events() as events:
        task_status.started()
        try:
            async for event in events:
                if isinstance(event, LeaderEvent) and event.leader is not None:
                    leaders[node.name] = event.leader
        except NodeFailedError:
            return


async def test_writes_go_on_over_loopback_when_the_leader_is_closed(tmp_path: Path) -> None:
    async with open_cluster(four_configs(tmp_path), client=True) as cluster:
        for number, node in enumerate(cluster.nodes.values()):
            with trio.fail_after(10):
                await node.database.put(b"k%d" % number, b"before")
        leader = await cluster.leader()

        await cluster.stop(leader)

        with trio.fail_after(5):
            for node in cluster.nodes.values():
                await node.database.put(b"after", node.name.encode())
                page = await node.database.range(b"k")
                assert len(page.records) == 4
        node = await cluster.start(leader)
        with trio.fail_after(5):
            assert len((await node.database.range(b"k")).records) == 4


@pytest.mark.parametrize("store", ["sqlite", "memory"])
async def test_watches_and_locks_work_between_nodes(tmp_path: Path, store: str) -> None:
    configs = four_configs(tmp_path, store)
    async with open_cluster(configs) as cluster:
        one, two, three = (cluster.nodes[name] for name in VOTERS)
        tokens: list[FencingToken] = []

        async def hold(token: FencingToken) -> str:
            tokens.append(token)
            return "done"

        with trio.fail_after(10):
            async with one.database.watch(b"w/") as watch:
                revision = await two.database.put(b"w/1", b"v")
                assert (await anext(watch)).revision == revision
                assert watch.revision == revision
            for node in (one, two, three):
                assert await node.run_on_one_host("job", hold) == "done"
        assert tokens == sorted(set(tokens))


async def test_all_nodes_restart_with_everything(tmp_path: Path) -> None:
    configs = four_configs(tmp_path)
    revisions: list[Revision] = []
    for life in range(2):
        async with open_cluster(configs) as cluster:
            database = cluster.nodes[VOTERS[life]].database
            with trio.fail_after(10):
                assert len((await database.range(b"")).records) == life
                revisions.append(await database.put(b"k%d" % life, b"v"))
    assert revisions == [1, 2]


async def test_a_lock_passes_on_when_its_holders_node_is_closed(tmp_path: Path) -> None:
    async with open_cluster(four_configs(tmp_path)) as cluster:
        one, two, _ = VOTERS
        holding = trio.Event()

        async def hold(token: FencingToken) -> None:
            holding.set()
            await trio.sleep_forever()

        async def lose() -> None:
            with pytest.raises((NodeFailedError, LeaseLostError)):
                await cluster.nodes[one].run_on_one_host("job", hold)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lose)
            with trio.fail_after(10):
                await holding.wait()
                await cluster.stop(one)
                async with cluster.nodes[two].lock("job") as token:
                    assert token > 0


async def test_a_lost_quorum_is_said_and_the_request_repeated_once(tmp_path: Path) -> None:
    async with open_cluster(four_configs(tmp_path)) as cluster:
        leader = await cluster.leader()
        database = cluster.nodes[leader].database
        with trio.fail_after(10):
            await database.put(b"k", b"1")
        others = [name for name in VOTERS if name != leader]
        for name in others:
            await cluster.stop(name)

        change = Change((Compare.value(b"k", b"1"),), (Put(b"k", b"2"),))
        with pytest.raises(OutcomeUnknownError) as caught:
            await database.commit(change, timeout_s=0.1)
        for name in others:
            await cluster.start(name)

        with trio.fail_after(10):
            outcome = await database.commit(change, request=caught.value.request)  # type: ignore[arg-type]
            assert outcome.succeeded
            record = await database.get(b"k")
        assert record is not None
        assert (record.value, record.version) == (b"2", 2)
