"""The limit of a quorum commit in Python on trio: one leader, two followers, one flush a batch; no state machine, no elections.

Leader and clients share a process, as a program that embeds ha-core does; followers are processes of their own; every node
keeps its records in SQLite (WAL, FULL, a row a batch). A put is done when a majority has flushed it.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgpack
import trio

from benchmarks.harness import percentile
from benchmarks.peers.limit_messages import Writer, frame, frames
from benchmarks.workers import Answer, Workers, say, work

NAME = "limit skeleton (trio, SQLite, no state machine)"
MODULE = "benchmarks.peers.limit_commit"


def measure_p50(seconds: float, clients: int) -> Sequence[float]:
    """Milliseconds: the median of a put."""
    return [_measure(seconds, clients)["p50_ms"]]


def measure_rate(seconds: float, clients: int) -> Sequence[float]:
    """Puts a second."""
    return [_measure(seconds, clients)["rate"]]


def _measure(seconds: float, clients: int) -> Answer:
    with tempfile.TemporaryDirectory(prefix="bench-limit-") as folder, Workers() as workers:
        followers = [workers.start(MODULE, "follow", {"folder": folder, "name": f"follower{at}"}) for at in range(2)]
        ports = [follower.answer()["port"] for follower in followers]
        leader = workers.start(MODULE, "lead", {"folder": folder, "ports": ports, "seconds": seconds, "clients": clients})
        return leader.answer()


class Store:
    def __init__(self, path: Path) -> None:
        self._writer = Writer(path, "records (number integer primary key, body blob)")

    def append(self, body: bytes, done: Callable[[], None]) -> None:
        def insert(database: sqlite3.Connection) -> None:
            database.execute("insert into records (body) values (?)", (body,))

        self._writer.put(insert, done)


async def follow(argument: Answer) -> None:
    listener = trio.socket.socket()
    await listener.bind(("127.0.0.1", 0))
    listener.listen()
    say(port=listener.getsockname()[1])
    store = Store(Path(argument["folder"]) / f"{argument['name']}.db")
    stream = trio.SocketStream((await listener.accept())[0])
    durable, wake = 0, trio.Event()

    async def answer() -> None:
        nonlocal wake
        while True:
            await wake.wait()
            wake = trio.Event()
            await stream.send_all(frame(durable))

    def append(batch: list[bytes]) -> None:
        last = msgpack.unpackb(batch[-1])[0]

        def done() -> None:
            nonlocal durable
            durable = last
            wake.set()

        store.append(b"".join(batch), done)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        async for batch in frames(stream):
            append(batch)
        nursery.cancel_scope.cancel()


class Leader:
    def __init__(self, folder: Path, streams: Sequence[trio.SocketStream]) -> None:
        self._store = Store(folder / "leader.db")
        self._streams = streams
        self._match = [0] * (len(streams) + 1)
        self._sent = self._number = self._committed = 0
        self._pending: list[tuple[int, bytes, bytes]] = []
        self._waiting: dict[int, trio.lowlevel.Task] = {}
        self._wake = trio.Event()

    def _advance(self, node: int, value: int) -> None:
        self._match[node] = max(self._match[node], value)
        quorum = sorted(self._match)[len(self._match) // 2]
        for number in range(self._committed + 1, quorum + 1):
            trio.lowlevel.reschedule(self._waiting.pop(number))
        self._committed = max(self._committed, quorum)
        self._wake.set()

    async def receive(self, node: int, stream: trio.SocketStream) -> None:
        async for batch in frames(stream):
            self._advance(node, msgpack.unpackb(batch[-1]))

    async def pump(self) -> None:
        """One local flush at a time: what comes meanwhile shares the next."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            if self._pending and self._match[0] >= self._sent:
                batch, self._pending = self._pending, []
                self._sent = last = batch[-1][0]
                body = frame([last, batch])
                self._store.append(body, lambda last=last: self._advance(0, last))  # type: ignore[misc]
                for stream in self._streams:
                    await stream.send_all(body)

    async def put(self, key: bytes, value: bytes) -> None:
        self._number += 1
        self._pending.append((self._number, key, value))
        self._waiting[self._number] = trio.lowlevel.current_task()
        self._wake.set()
        await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)


async def lead(argument: Answer) -> None:
    streams = [await trio.open_tcp_stream("127.0.0.1", port) for port in argument["ports"]]
    for stream in streams:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    leader = Leader(Path(argument["folder"]), streams)
    latencies: list[float] = []
    end = trio.current_time() + argument["seconds"]

    async def client() -> None:
        value = os.urandom(200)
        while trio.current_time() < end:
            began = time.perf_counter()
            await leader.put(b"key", value)
            latencies.append((time.perf_counter() - began) * 1e3)

    async with trio.open_nursery() as nursery:
        for node, stream in enumerate(streams, 1):
            nursery.start_soon(leader.receive, node, stream)
        nursery.start_soon(leader.pump)
        async with trio.open_nursery() as callers:
            for _ in range(argument["clients"]):
                callers.start_soon(client)
        nursery.cancel_scope.cancel()
    say(rate=len(latencies) / argument["seconds"], p50_ms=percentile(latencies, 50), p99_ms=percentile(latencies, 99))


if __name__ == "__main__":
    work({"lead": lambda argument: trio.run(lead, argument), "follow": lambda argument: trio.run(follow, argument)})
