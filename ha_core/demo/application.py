"""An application of the demo: ``python -m ha_core.demo.application SETTINGS.json``, one on each host.

It sends numbered durable messages to every other application and writes a row for each that it receives; what it sent and what
it received are tables of its own in app.db, so that a judge who knows nothing of ha-core can compare them. It may be killed at
any time; started again it goes on where its database stands.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
import trio

from ha_core.config import Config
from ha_core.errors import OutboxFullError
from ha_core.ids import ChannelName, LinkName, NodeId
from ha_core.runtime.clock import now_ns
from ha_core.runtime.node import Message, Node, Transaction, open_node

CHANNEL = ChannelName("demo")


@attrs.frozen
class Settings:
    """``peers``: node -> link -> address; ``interval_s`` between a message to each peer and the next one."""

    node: NodeId
    links: Mapping[LinkName, str]
    bind: Mapping[LinkName, str]
    peers: Mapping[NodeId, Mapping[LinkName, str]]
    data_dir: str
    key_file: str
    interval_s: float
    stop_file: str
    """Nothing more is sent once this file is there."""
    progress_file: str
    """Written again and again: how many messages were sent to whom and received from whom."""

    def config(self) -> Config:
        return Config(
            node=self.node, cluster="demo", data_dir=Path(self.data_dir), key_file=Path(self.key_file), links=self.links,
            bind=self.bind, bootstrap=self.peers, role="client",
        )  # fmt: skip


def make_tables(tx: Transaction) -> None:
    tx.execute("CREATE TABLE IF NOT EXISTS sent (receiver TEXT, number INTEGER, at_ns INTEGER, PRIMARY KEY (receiver, number))")
    tx.execute("CREATE TABLE IF NOT EXISTS received (at INTEGER PRIMARY KEY, sender TEXT, body BLOB, at_ns INTEGER)")


def send_next(tx: Transaction, peers: Sequence[NodeId], at_ns: int) -> None:
    for peer in peers:
        ((last,),) = tx.execute("SELECT coalesce(max(number), 0) FROM sent WHERE receiver = ?", (peer,))
        assert isinstance(last, int)
        tx.execute("INSERT INTO sent VALUES (?, ?, ?)", (peer, last + 1, at_ns))
        tx.send(peer, CHANNEL, json.dumps({"number": last + 1, "at_ns": at_ns}).encode())


def write_rows(tx: Transaction, messages: Sequence[Message]) -> None:
    at_ns = now_ns()
    tx.executemany(
        "INSERT INTO received (sender, body, at_ns) VALUES (?, ?, ?)",
        [(message.sender, message.body, at_ns) for message in messages],
    )


async def send(node: Node, settings: Settings) -> None:
    peers = sorted(settings.peers)
    next_s = trio.current_time()
    stop = Path(settings.stop_file)
    while not stop.exists():
        try:
            await node.transact(send_next, peers, now_ns())
        except OutboxFullError:
            for peer in peers:
                await node.wait_for_room(peer, CHANNEL)
        next_s = max(next_s + settings.interval_s, trio.current_time())
        await trio.sleep_until(next_s)


def count(tx: Transaction) -> dict[str, dict[str, object]]:
    sent = tx.execute("SELECT receiver, max(number) FROM sent GROUP BY receiver")
    received = tx.execute("SELECT sender, count(*) FROM received GROUP BY sender")
    return {
        "sent": {str(peer): number for peer, number in sent},
        "received": {str(peer): number for peer, number in received},
    }


async def report(node: Node, settings: Settings) -> None:
    path = Path(settings.progress_file)
    while True:
        path.with_suffix(".new").write_text(json.dumps(await node.transact(count)))
        path.with_suffix(".new").replace(path)
        await trio.sleep(0.2)


async def run(settings: Settings) -> None:
    async with open_node(settings.config()) as node, trio.open_nursery() as nursery:
        await node.transact(make_tables)
        nursery.start_soon(node.serve, CHANNEL, write_rows)
        nursery.start_soon(send, node, settings)
        nursery.start_soon(report, node, settings)


if __name__ == "__main__":
    trio.run(run, Settings(**json.loads(Path(sys.argv[1]).read_text())))
