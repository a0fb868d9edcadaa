"""The limit of durable exactly-once messages in Python on trio: outbox and effect in SQLite, one cursor; no paths, no restart.

The sender commits each group of messages to its outbox and sends it as one frame; the receiver commits effects and cursor in
one transaction, with one function a group or one a message under a SAVEPOINT of its own, and acknowledges; the sender deletes
what was acknowledged in its next group.
"""

from __future__ import annotations

import queue
import socket
import sqlite3
import struct
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import msgpack
import trio

from benchmarks.peers.effects import now_ns, payload
from benchmarks.workers import Answer, Workers, say, work

NAME = "limit skeleton (trio, SQLite)"
MODULE = "benchmarks.peers.limit_messages"
GROUP, WINDOW = 256, 4096
Job = tuple[Callable[[sqlite3.Connection], None], Callable[[], None]]


def measure_rate(count: int, *, each: bool) -> Sequence[float]:
    """Messages a second from the first send to the last committed effect."""
    with tempfile.TemporaryDirectory(prefix="bench-limit-") as folder, Workers() as workers:
        receiver = workers.start(MODULE, "receive", {"folder": folder, "count": count, "each": each})
        port = receiver.answer()["port"]
        sender = workers.start(MODULE, "send", {"folder": folder, "count": count, "port": port})
        began, ended = sender.answer()["at_ns"], receiver.answer()["at_ns"]
        return [count / ((ended - began) / 1e9)]


class Writer:
    """One connection, one thread: each job is a function run in a transaction of its own; its callback runs in trio after it."""

    def __init__(self, path: Path, *tables: str) -> None:
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._token = trio.lowlevel.current_trio_token()
        self._tables = tables
        threading.Thread(target=self._run, args=(path,), daemon=True).start()

    def put(self, function: Callable[[sqlite3.Connection], None], done: Callable[[], None]) -> None:
        self._jobs.put((function, done))

    def _run(self, path: Path) -> None:
        database = sqlite3.connect(path, isolation_level=None)
        for pragma in ("journal_mode = wal", "synchronous = full", "locking_mode = exclusive"):
            database.execute("pragma " + pragma)
        for table in self._tables:
            database.execute("create table " + table)
        while True:
            function, done = self._jobs.get()
            database.execute("begin immediate")
            function(database)
            database.execute("commit")
            self._token.run_sync_soon(done)


def frame(message: object) -> bytes:
    body: bytes = msgpack.packb(message)
    return struct.pack(">I", len(body)) + body


async def frames(stream: trio.SocketStream) -> AsyncIterator[list[bytes]]:
    """The whole frames that each read completed."""
    buffer = bytearray()
    while True:
        try:
            data = await stream.receive_some(1 << 18)
        except trio.BrokenResourceError:  # the other process is done and was ended
            return
        if not data:
            return
        buffer += data
        whole, at = [], 0
        while len(buffer) - at >= 4:
            (size,) = struct.unpack_from(">I", buffer, at)
            if len(buffer) - at - 4 < size:
                break
            whole.append(bytes(buffer[at + 4 : at + 4 + size]))
            at += 4 + size
        del buffer[:at]
        if whole:
            yield whole


class Receiver:
    def __init__(self, argument: Answer, stream: trio.SocketStream) -> None:
        self._stream, self._count, self._each = stream, argument["count"], argument["each"]
        effects = "effects (number integer primary key, body blob) without rowid"
        self._writer = Writer(
            Path(argument["folder"]) / "receiver.db", effects, "cursors (channel integer primary key, cursor integer)"
        )
        self._cursor = self._durable = 0
        self._wake = trio.Event()

    def _effects(self, database: sqlite3.Connection, groups: Sequence[tuple[int, list[bytes]]]) -> None:
        for first, bodies in groups:
            if self._each:
                for number, body in enumerate(bodies, first):
                    database.execute("savepoint message")
                    database.execute("insert into effects values (?, ?)", (number, body))
                    database.execute("release message")
            else:
                database.executemany("insert into effects values (?, ?)", enumerate(bodies, first))
            self._cursor = first + len(bodies) - 1
        database.execute("insert or replace into cursors values (1, ?)", (self._cursor,))

    def _done(self) -> None:
        self._durable = self._cursor
        if self._durable >= self._count:
            say(at_ns=now_ns())
        self._wake.set()

    async def _acknowledge(self) -> None:
        while self._durable < self._count:
            await self._wake.wait()
            self._wake = trio.Event()
            await self._stream.send_all(frame(self._durable))

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._acknowledge)
            async for batch in frames(self._stream):
                groups = [msgpack.unpackb(one) for one in batch]
                self._writer.put(lambda database, groups=groups: self._effects(database, groups), self._done)  # type: ignore[misc]


class Sender:
    def __init__(self, argument: Answer, stream: trio.SocketStream) -> None:
        self._stream, self._count = stream, argument["count"]
        outbox = "outbox (number integer primary key, body blob) without rowid"
        self._writer = Writer(Path(argument["folder"]) / "sender.db", outbox)
        self._acked = 0
        self._room, self._ready = trio.Event(), trio.Event()
        self._outgoing: list[tuple[int, list[bytes]]] = []

    async def _acknowledgements(self) -> None:
        async for batch in frames(self._stream):
            self._acked = msgpack.unpackb(batch[-1])
            self._room.set()
            if self._acked >= self._count:
                return

    async def _pump(self) -> None:
        sent = 0
        while sent < self._count:
            await self._ready.wait()
            self._ready = trio.Event()
            batch, self._outgoing = self._outgoing, []
            for first, bodies in batch:
                sent = first + len(bodies) - 1
                await self._stream.send_all(frame([first, bodies]))

    def _commit(self, first: int, bodies: list[bytes]) -> None:
        upto = self._acked

        def commit(database: sqlite3.Connection) -> None:
            database.executemany("insert into outbox values (?, ?)", enumerate(bodies, first))
            database.execute("delete from outbox where number <= ?", (upto,))

        def done() -> None:
            self._outgoing.append((first, bodies))
            self._ready.set()

        self._writer.put(commit, done)

    async def run(self) -> None:
        say(at_ns=now_ns())
        first = 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._acknowledgements)
            nursery.start_soon(self._pump)
            while first <= self._count:
                bodies = [payload(number) for number in range(first, min(first + GROUP, self._count + 1))]
                self._commit(first, bodies)
                first += len(bodies)
                while first - self._acked > WINDOW:
                    self._room = trio.Event()
                    await self._room.wait()
                await trio.lowlevel.checkpoint()


async def _receive(argument: Answer) -> None:
    listener = trio.socket.socket()
    await listener.bind(("127.0.0.1", 0))
    listener.listen()
    say(port=listener.getsockname()[1])
    stream = trio.SocketStream((await listener.accept())[0])
    await Receiver(argument, stream).run()


async def _send(argument: Answer) -> None:
    stream = await trio.open_tcp_stream("127.0.0.1", argument["port"])
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    await Sender(argument, stream).run()


if __name__ == "__main__":
    work({"send": lambda argument: trio.run(_send, argument), "receive": lambda argument: trio.run(_receive, argument)})
