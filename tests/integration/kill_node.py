"""The two programs that a kill campaign kills: ordinary users of ``open_node`` that say on a pipe what they are about to do."""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import signal
import struct
import time
from collections.abc import Sequence
from pathlib import Path

import attrs
import trio

from ha_core.config import Config
from ha_core.errors import OutboxFullError
from ha_core.events import PathEvent
from ha_core.ids import NodeId
from ha_core.runtime.node import Events, Message, Node, Transaction, open_node

SENDER = NodeId("sender@h1.example")
RECEIVER = NodeId("receiver@h2.example")
CHANNELS = ("served", "inbox")
MARK = struct.Struct("<cqq")
"""Kind, CLOCK_MONOTONIC ns, a number."""
COMMITTING, COMMITTED, ACKNOWLEDGING, CONNECTED, COUNT = b"b", b"c", b"a", b"r", b"n"


@attrs.frozen
class Program:
    config: Config
    marks: int
    """Descriptor of the pipe."""
    stop_file: Path
    """Nothing more is sent once it is there."""
    end_file: Path
    """Leave in good order once it is there."""
    seed: int

    def mark(self, kind: bytes, number: int = 0) -> None:
        os.write(self.marks, MARK.pack(kind, time.monotonic_ns(), number))


def run_program(program: Program) -> None:
    """Be the sender or the receiver until killed, or until the end file is there."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: nobody outlives the campaign
    trio.run(_send if program.config.node == SENDER else _receive, program)


def _make_tables(tx: Transaction) -> None:
    tx.execute("CREATE TABLE IF NOT EXISTS sent (channel TEXT, number INTEGER, digest TEXT, PRIMARY KEY (channel, number))")
    tx.execute("CREATE TABLE IF NOT EXISTS effects (at INTEGER PRIMARY KEY, channel TEXT, number INTEGER, body BLOB)")


def _count(tx: Transaction, table: str) -> int:
    return int(str(tx.execute(f"SELECT count(*) FROM {table}")[0][0]))


async def _watch_paths(events: Events, program: Program) -> None:
    async for event in events:
        if isinstance(event, PathEvent) and event.state == "up":
            program.mark(CONNECTED)


# -- the sender --


def _send_group(tx: Transaction, channel: str, count: int, program: Program) -> None:
    ((last,),) = tx.execute("SELECT coalesce(max(number), 0) FROM sent WHERE channel = ?", (channel,))
    assert isinstance(last, int)
    for number in range(last + 1, last + 1 + count):
        body = b"%d " % number + os.urandom(random.randrange(300))
        tx.execute("INSERT INTO sent VALUES (?, ?, ?)", (channel, number, hashlib.sha256(body).hexdigest()))
        tx.send(RECEIVER, channel, b"%d\n" % number + body)
    program.mark(COMMITTING)


async def _send(program: Program) -> None:
    rng = random.Random(program.seed)
    async with open_node(program.config) as node, node.open_events() as events, trio.open_nursery() as nursery:
        nursery.start_soon(_watch_paths, events, program)
        await node.transact(_make_tables)
        while not program.stop_file.exists():
            channel = rng.choice(CHANNELS)
            try:
                await node.transact(_send_group, channel, rng.randrange(1, 30), program)
                program.mark(COMMITTED)
            except OutboxFullError:
                with trio.move_on_after(0.1):
                    await node.wait_for_room(RECEIVER, channel)
            await trio.sleep(rng.random() * 0.01)
        while not program.end_file.exists():
            program.mark(COUNT, await node.transact(_count, "sent"))
            await trio.sleep(0.05)
        nursery.cancel_scope.cancel()


# -- the receiver --


def _effect(tx: Transaction, batch: Sequence[Message]) -> None:
    for message in batch:
        number, _, body = message.body.partition(b"\n")
        tx.execute("INSERT INTO effects (channel, number, body) VALUES (?, ?, ?)", (message.channel, int(number), body))


async def _receive(program: Program) -> None:
    def served(tx: Transaction, batch: Sequence[Message]) -> None:
        _effect(tx, batch)
        program.mark(COMMITTING)

    async with open_node(program.config) as node, node.open_events() as events, trio.open_nursery() as nursery:
        nursery.start_soon(_watch_paths, events, program)
        await node.transact(_make_tables)
        nursery.start_soon(node.serve, CHANNELS[0], served)
        nursery.start_soon(_take_inbox, node, program)
        while not program.end_file.exists():
            program.mark(COUNT, await node.transact(_count, "effects"))
            await trio.sleep(0.05)
        nursery.cancel_scope.cancel()


async def _take_inbox(node: Node, program: Program) -> None:
    async with node.open_inbox(CHANNELS[1], max_batch=20) as inbox:
        async for _ in inbox:
            await inbox.commit(_effect)
            program.mark(ACKNOWLEDGING)
