"""What an application notices when the path in use is cut silently: the longest gap in a 1 kHz stream of 200-byte messages.

Two processes, two links, each link of each host a cable of the switchboard; the cable that carries the stream is cut, later
mended, and then the one that carries it then is cut. All messages must arrive, in order.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import attrs
import trio

from benchmarks.harness import Case, Goal, at_most, p99
from benchmarks.nodes import LINKS, config_of, lay_nodes, node_id
from benchmarks.peers.effects import now_ns, number_of, payload
from benchmarks.workers import Answer, Worker, Workers, say, work_async
from ha_core.runtime.node import open_node
from ha_core.testing.cable import Cable, Switchboard, lay_cables, open_switchboard

MODULE = "benchmarks.paths"
PERIOD_S = 0.001
WINDOW_NS = 1_000_000_000
"""A gap belongs to a cut if it began before this much later."""


@attrs.frozen
class Parameters:
    repetitions: int
    cuts: int
    """In one life of the two processes: flapping is held down longer each time, and would be measured instead."""
    steady_s: float
    cut_s: float
    mended_s: float


SIZES: Mapping[str, Parameters] = {
    "smoke": Parameters(1, 1, 0.3, 0.3, 0.0),
    "quick": Parameters(3, 2, 0.7, 1.0, 3.0),
    "full": Parameters(25, 2, 0.7, 1.0, 3.0),
}


def cases(parameters: Parameters, seed: int) -> Sequence[Case]:
    def case(name: str, limit_ms: float, *, redundant: bool) -> Case:
        goal = Goal(words=f"p99 at most {limit_ms:g} ms, 0 lost (a loss ends the run)", met=at_most(limit_ms))
        stalls = partial(measure, parameters, redundant)
        return Case(
            name=name, unit="ms", measure=stalls, goal=goal, repetitions=parameters.repetitions, warm_up=False, figure=p99
        )  # fmt: skip

    return [case("drop-stall-p99", 50, redundant=False), case("drop-stall-redundant-p99", 5, redundant=True)]


def measure(parameters: Parameters, redundant: bool) -> Sequence[float]:
    """Milliseconds: one stall a cut."""
    return trio.run(_measure, parameters, redundant)


async def _measure(parameters: Parameters, redundant: bool) -> Sequence[float]:
    ports = lay_cables(["receiver", "sender"], LINKS)
    with tempfile.TemporaryDirectory(prefix="bench-paths-") as folder:
        there, here = lay_nodes(Path(folder), ["receiver", "sender"], voters=1, ports=ports)
        async with open_switchboard(ports) as board:
            with Workers() as workers:
                receiver = workers.start(MODULE, "receive", there | {"redundant": redundant, "log": f"{folder}/arrivals"})
                await _answer(receiver)
                sender = workers.start(MODULE, "send", here | {"redundant": redundant})
                await _answer(sender)
                cuts = [await _cut(board, parameters) for _ in range(parameters.cuts)]
                sender.tell("end")
                sent = (await _answer(sender))["sent"]
                receiver.tell(str(sent))
                await _answer(receiver)
        return _stalls(json.loads(Path(folder, "arrivals").read_text()), sent, cuts)


async def _answer(worker: Worker) -> Answer:
    return await trio.to_thread.run_sync(worker.answer)


async def _cut(board: Switchboard, parameters: Parameters) -> int:
    """Cut the sender's cable that is in use, and mend it; returns when it was cut."""
    await trio.sleep(parameters.steady_s)
    before = {link: cable.sent_bytes for link, cable in _cables(board)}
    await trio.sleep(0.1)
    busiest = max(_cables(board), key=lambda item: item[1].sent_bytes - before[item[0]])[0]
    at_ns = now_ns()
    board.cut("sender", busiest)
    await trio.sleep(parameters.cut_s)
    board.mend("sender", busiest)
    await trio.sleep(parameters.mended_s)
    return at_ns


def _cables(board: Switchboard) -> list[tuple[str, Cable]]:
    return [(cable.link, cable) for cable in board.cables() if cable.host == "sender"]


def _stalls(arrivals: Sequence[tuple[int, int]], sent: int, cuts: Sequence[int]) -> list[float]:
    numbers = [number for number, _ in arrivals]
    if numbers != list(range(sent)):
        raise RuntimeError(f"{sent} messages sent, {len(numbers)} arrived, or in another order")
    gaps = [(before, after) for (_, before), (_, after) in zip(arrivals, arrivals[1:], strict=False)]
    return [
        max((after - before) / 1e6 for before, after in gaps if after > cut_ns and before < cut_ns + WINDOW_NS)
        for cut_ns in cuts
    ]


async def receive(argument: Answer) -> None:
    arrivals: list[tuple[int, int]] = []
    async with (
        open_node(config_of(argument)) as node,
        node.open_session(node_id("sender"), "stream", redundant=argument["redundant"]) as channel,
        trio.open_nursery() as nursery,
    ):
        sent, whole = 0, trio.Event()

        async def take() -> None:
            while True:
                bodies = await channel.receive()
                at_ns = now_ns()
                arrivals.extend((number_of(body), at_ns) for body in bodies)
                if sent and len(arrivals) >= sent:
                    whole.set()

        nursery.start_soon(take)
        say(ready=True)
        sent = int(await trio.to_thread.run_sync(input, abandon_on_cancel=True))
        if len(arrivals) < sent:
            with trio.move_on_after(5):
                await whole.wait()
        Path(argument["log"]).write_text(json.dumps(arrivals))
        say(done=True)
        await trio.sleep_forever()


async def send(argument: Answer) -> None:
    async with (
        open_node(config_of(argument)) as node,
        node.open_session(node_id("receiver"), "stream", redundant=argument["redundant"]) as channel,
    ):
        sent = 0
        ended = trio.Event()

        async def stream() -> None:
            nonlocal sent
            began = trio.current_time()
            while not ended.is_set():
                while sent * PERIOD_S <= trio.current_time() - began:
                    await channel.send(payload(sent))
                    sent += 1
                await trio.sleep(PERIOD_S / 2)

        async def wait_for_end() -> None:
            say(ready=True)
            await trio.to_thread.run_sync(input, abandon_on_cancel=True)
            ended.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream)
            nursery.start_soon(wait_for_end)
        say(sent=sent)
        await trio.sleep_forever()


if __name__ == "__main__":
    work_async({"send": send, "receive": receive})
