"""The session class, 200 bytes, one call a message, from one process to another: awaited sends, and sends that do not wait."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import attrs
import trio

from benchmarks.harness import Case, Goal, Peer, times_peer
from benchmarks.nodes import config_of, lay_nodes, node_id
from benchmarks.peers import volatile
from benchmarks.peers.effects import now_ns, payload
from benchmarks.workers import Answer, Workers, say, work_async
from ha_core.runtime.node import open_node

MODULE = "benchmarks.session"


@attrs.frozen
class Parameters:
    count: int
    repetitions: int


SIZES: Mapping[str, Parameters] = {
    "smoke": Parameters(500, 1),
    "quick": Parameters(100_000, 3),
    "full": Parameters(500_000, 7),
}


def cases(parameters: Parameters, seed: int) -> Sequence[Case]:
    return [
        _case("one-call-each", parameters, "awaited", ["nats", "dealer"]),
        _case("send-nowait", parameters, "nowait", ["push"]),
    ]


def _case(name: str, parameters: Parameters, mode: str, kinds: Sequence[str]) -> Case:
    goals = {
        "nats": Goal(words="at least nats core, aiming past pyzmq DEALER", met=times_peer(1)),
        "dealer": Goal(words="aiming past pyzmq DEALER (at least nats core)"),
        "push": Goal(words="at least pyzmq PUSH/PULL", met=times_peer(1)),
    }
    peers = [
        Peer(volatile.NAMES[kind], partial(volatile.measure_rate, kind, parameters.count), goals[kind])
        for kind in kinds
        if volatile.installed(kind)
    ]
    return Case(
        name=name, unit="messages/s", measure=partial(measure_rate, parameters.count, mode), goal=goals[kinds[0]], peers=peers,
        repetitions=parameters.repetitions,
    )  # fmt: skip


def measure_rate(count: int, mode: str) -> Sequence[float]:
    with tempfile.TemporaryDirectory(prefix="bench-session-") as folder, Workers() as workers:
        there, here = lay_nodes(Path(folder), ["receiver", "sender"], voters=1)
        receiver = workers.start(MODULE, "receive", there | {"count": count})
        receiver.answer()
        sender = workers.start(MODULE, "send", here | {"count": count, "mode": mode})
        began, ended = sender.answer()["at_ns"], receiver.answer()["at_ns"]
        return [count / ((ended - began) / 1e9)]


async def receive(argument: Answer) -> None:
    left = argument["count"] + 1  # the first one says that the session stands
    async with open_node(config_of(argument)) as node, node.open_session(node_id("sender"), "stream") as channel:
        say(ready=True)
        while left:
            left -= len(await channel.receive())
        say(at_ns=now_ns())
        await trio.sleep_forever()


async def send(argument: Answer) -> None:
    async with open_node(config_of(argument)) as node, node.open_session(node_id("receiver"), "stream") as channel:
        await channel.send(b"")
        await trio.sleep(0.05)
        bodies = [payload(number) for number in range(argument["count"])]
        say(at_ns=now_ns())
        if argument["mode"] == "awaited":
            for body in bodies:
                await channel.send(body)
        else:
            for body in bodies:
                try:
                    channel.send_nowait(body)
                except trio.WouldBlock:
                    await channel.send(body)
        await trio.sleep_forever()


if __name__ == "__main__":
    work_async({"send": send, "receive": receive})
