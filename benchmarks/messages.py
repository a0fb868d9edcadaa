"""Durable messages of 200 bytes from one process to another; the effect is a row in the receiver's SQLite file.

``durable-batch``: the handler takes a batch; ``durable-each``: it takes one message, under a SAVEPOINT of its own. The sender
commits groups of 256. ``durable-ping-p50``: from the send to the committed effect, one message at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import attrs
import trio

from benchmarks.harness import Case, Goal, Peer, at_most, times_peer
from benchmarks.nodes import config_of, lay_nodes, node_id
from benchmarks.peers import limit_messages, redis_streams
from benchmarks.peers.effects import PingBack, now_ns, number_of, payload
from benchmarks.workers import Answer, Workers, say, work_async
from ha_core.errors import OutboxFullError
from ha_core.machines.durable_events import Message
from ha_core.runtime.node import Node, open_node
from ha_core.storage.sqlite_transaction import Transaction

MODULE = "benchmarks.messages"
GROUP, TASKS = 256, 8
TABLE = "CREATE TABLE IF NOT EXISTS effects (number INTEGER PRIMARY KEY, body BLOB) WITHOUT ROWID"
INSERT = "INSERT INTO effects VALUES (?, ?)"


@attrs.frozen
class Parameters:
    count: int
    pings: int
    repetitions: int


SIZES: Mapping[str, Parameters] = {
    "smoke": Parameters(600, 5, 1),
    "quick": Parameters(50_000, 200, 3),
    "full": Parameters(200_000, 500, 7),
}


def cases(parameters: Parameters, seed: int) -> Sequence[Case]:
    return [
        _rate("durable-batch", parameters, each=False, redis=2.5, limit=0.75),
        _rate("durable-each", parameters, each=True, redis=1.7, limit=0.7),
        _ping(parameters),
    ]


def _rate(name: str, parameters: Parameters, *, each: bool, redis: float, limit: float) -> Case:
    goals = {
        "redis": Goal(
            words=f"at least {redis} times Redis Streams with appendfsync always (aim: 3 times)", met=times_peer(redis)
        ),
        "limit": Goal(words=f"at least {limit} times the limit skeleton", met=times_peer(limit)),
    }
    peers = [Peer(limit_messages.NAME, partial(limit_messages.measure_rate, parameters.count, each=each), goals["limit"])]
    if redis_streams.installed():
        peers.insert(0, Peer(redis_streams.NAME, partial(redis_streams.measure_rate, parameters.count), goals["redis"]))
    return Case(
        name=name, unit="messages/s", measure=partial(measure_rate, parameters.count, each=each), goal=goals["redis"],
        peers=peers, repetitions=parameters.repetitions,
    )  # fmt: skip


def _ping(parameters: Parameters) -> Case:
    goal = Goal(words="at most 0.72 ms, from the send to the committed effect", met=at_most(0.72))
    peers = []
    if redis_streams.installed():
        peers.append(Peer(redis_streams.NAME, partial(redis_streams.measure_ping, parameters.pings), goal))
    return Case(
        name="durable-ping-p50", unit="ms", measure=partial(measure_ping, parameters.pings), goal=goal, peers=peers,
        repetitions=parameters.repetitions,
    )  # fmt: skip


def measure_rate(count: int, *, each: bool) -> Sequence[float]:
    with tempfile.TemporaryDirectory(prefix="bench-messages-") as folder, Workers() as workers:
        there, here = lay_nodes(Path(folder), ["receiver", "sender"], voters=1)
        receiver = workers.start(MODULE, "receive", there | {"count": count, "each": each})
        receiver.answer()
        sender = workers.start(MODULE, "send", here | {"count": count})
        began, ended = sender.answer()["at_ns"], receiver.answer()
        if ended["count"] != count:
            raise RuntimeError(f"{ended['count']} of {count} effects are there")
        return [count / ((ended["at_ns"] - began) / 1e9)]


def measure_ping(count: int) -> Sequence[float]:
    with tempfile.TemporaryDirectory(prefix="bench-messages-") as folder, Workers() as workers:
        there, here = lay_nodes(Path(folder), ["receiver", "sender"], voters=1)
        sender = workers.start(MODULE, "send_pings", here | {"count": count})
        receiver = workers.start(MODULE, "receive_pings", there | {"back": sender.answer()["back"]})
        receiver.answer()
        sender.tell("begin")
        samples: list[float] = sender.answer()["samples"]
        return samples


# -- the receiver's process --


def create_table(tx: Transaction) -> None:
    tx.execute(TABLE)


def count_rows(tx: Transaction) -> int:
    return int(str(tx.execute("SELECT count(*) FROM effects")[0][0]))


def insert_batch(tx: Transaction, batch: Sequence[Message]) -> None:
    tx.executemany(INSERT, [(number_of(message.body), message.body) for message in batch])


def insert_each(tx: Transaction, batch: Sequence[Message]) -> None:
    for message in batch:
        tx.execute(INSERT, (number_of(message.body), message.body))


async def receive(argument: Answer) -> None:
    count, each, seen = argument["count"], argument["each"], 0

    def apply(tx: Transaction, batch: Sequence[Message]) -> None:
        nonlocal seen
        (insert_each if each else insert_batch)(tx, batch)
        seen = max(seen, number_of(batch[-1].body))

    async with open_node(config_of(argument)) as node, trio.open_nursery() as nursery:
        await node.transact(create_table)
        nursery.start_soon(partial(node.serve, "work", apply, max_batch=1 if each else GROUP))
        say(ready=True)
        rows = 0
        while rows < count:  # nothing tells from outside when the last effect was committed; a millisecond is lost in seconds
            await trio.sleep(0.001)
            if seen >= count:
                rows = await node.transact(count_rows)
        say(at_ns=now_ns(), count=rows)
        await trio.sleep_forever()


async def receive_pings(argument: Answer) -> None:
    back = PingBack()
    async with open_node(config_of(argument)) as node:
        await node.transact(create_table)
        async with node.open_inbox("work") as inbox:
            say(ready=True)
            async for _ in inbox:
                await inbox.commit(insert_each)
                back.tell(argument["back"], now_ns())


# -- the sender's process --


def send_group(tx: Transaction, first: int, end: int) -> None:
    to = node_id("receiver")
    for number in range(first, end):
        tx.send(to, "work", payload(number))


async def send(argument: Answer) -> None:
    count = argument["count"]
    async with open_node(config_of(argument)) as node:
        await node.send(node_id("receiver"), "warm-up", b"")
        groups = iter([(first, min(first + GROUP, count + 1)) for first in range(1, count + 1, GROUP)])
        say(at_ns=now_ns())
        async with trio.open_nursery() as nursery:
            for _ in range(TASKS):
                nursery.start_soon(_send_groups, node, groups)
        await trio.sleep_forever()


async def _send_groups(node: Node, groups: Iterator[tuple[int, int]]) -> None:
    for first, end in groups:
        while True:
            try:
                await node.transact(send_group, first, end)
                break
            except OutboxFullError:
                await node.wait_for_room(node_id("receiver"), "work")


async def send_pings(argument: Answer) -> None:
    back, samples = PingBack(), []
    async with open_node(config_of(argument)) as node:
        say(back=back.port)
        await trio.to_thread.run_sync(input)
        for number in range(1, argument["count"] + 1):
            began = now_ns()
            await node.send(node_id("receiver"), "work", payload(number))
            samples.append((await back.receive_ns() - began) / 1e6)
        say(samples=samples)
        await trio.sleep_forever()


if __name__ == "__main__":
    work_async({"send": send, "receive": receive, "send_pings": send_pings, "receive_pings": receive_pings})
