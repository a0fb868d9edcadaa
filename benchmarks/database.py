"""The replicated database: three nodes, 200-byte puts acknowledged after a quorum flushed them, clients in the leader's process."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import attrs
import trio

from benchmarks.harness import Case, Goal, Peer, at_least, at_most, percentile
from benchmarks.nodes import config_of, lay_nodes
from benchmarks.peers import limit_commit
from benchmarks.workers import Answer, Workers, say, work_async
from ha_core.events import LeaderEvent
from ha_core.runtime.node import Node, open_node

MODULE = "benchmarks.database"


@attrs.frozen
class Parameters:
    seconds: float
    repetitions: int


SIZES: Mapping[str, Parameters] = {"smoke": Parameters(0.2, 1), "quick": Parameters(1, 3), "full": Parameters(4, 7)}


def cases(parameters: Parameters, seed: int) -> Sequence[Case]:
    seconds = parameters.seconds
    commit = Goal(words="at most 0.75 ms", met=at_most(0.75))
    rate = Goal(words="at least 25,000/s, aiming at 40,000", met=at_least(25_000))
    return [
        Case(
            name="commit-1-p50", unit="ms", measure=partial(measure, seconds, 1, "p50_ms"), goal=commit,
            peers=[Peer(limit_commit.NAME, partial(limit_commit.measure_p50, seconds, 1), commit)],
            repetitions=parameters.repetitions,
        ),
        Case(
            name="commit-64-rate", unit="commits/s", measure=partial(measure, seconds, 64, "rate"), goal=rate,
            peers=[Peer(limit_commit.NAME, partial(limit_commit.measure_rate, seconds, 64), rate)],
            repetitions=parameters.repetitions,
        ),
    ]  # fmt: skip


def measure(seconds: float, clients: int, what: str) -> Sequence[float]:
    with tempfile.TemporaryDirectory(prefix="bench-database-") as folder, Workers() as workers:
        nodes = lay_nodes(Path(folder), ["h1", "h2", "h3"], voters=3)
        running = [workers.start(MODULE, "serve", node | {"seconds": seconds, "clients": clients}) for node in nodes]
        leaders = [worker.answer()["leader"] for worker in running]
        leader = next(worker for worker, node in zip(running, nodes, strict=True) if node["node"] == leaders[0])
        leader.tell("begin")
        found: float = leader.answer()[what]
        return [found]


async def serve(argument: Answer) -> None:
    async with open_node(config_of(argument)) as node:
        say(leader=await _leader(node))
        await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
        latencies: list[float] = []
        end = trio.current_time() + argument["seconds"]
        async with trio.open_nursery() as nursery:
            for number in range(argument["clients"]):
                nursery.start_soon(_client, node, b"key/%d" % number, end, latencies)
        rate = len(latencies) / argument["seconds"]
        say(rate=rate, p50_ms=percentile(latencies, 50), p99_ms=percentile(latencies, 99))
        await trio.sleep_forever()


async def _leader(node: Node) -> str:
    """The leader once its term has committed something: then the group works."""
    async with node.open_events() as events:
        async for event in events:
            if isinstance(event, LeaderEvent) and event.leader is not None:
                await node.database.put(b"begin/" + str(event.leader).encode(), b"")
                return event.leader
    raise RuntimeError("the node's events ended")


async def _client(node: Node, key: bytes, end: float, latencies: list[float]) -> None:
    value = os.urandom(200)
    while trio.current_time() < end:
        began = time.perf_counter()
        await node.database.put(key, value)
        latencies.append((time.perf_counter() - began) * 1e3)


if __name__ == "__main__":
    work_async({"serve": serve})
