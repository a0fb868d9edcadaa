"""Nodes in processes of their own: a message that ends its process, and a function that never returns."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import attrs
import pytest
import trio

from ha_core.runtime.node import Transaction, open_node
from tests.runtime.test_node import A, B, C, make_configs

ROOT = Path(__file__).parent.parent.parent

_RECEIVER = """
import os, sys, trio
from pathlib import Path
from ha_core.config import Config
from ha_core.runtime.node import open_node
from tests.runtime.test_node import make_table, write

def handle(tx, batch):
    write(tx, batch)
    if any(message.body == b"31" for message in batch):
        os._exit(9)

async def main():
    config = Config.load(sys.argv[1])
    async with open_node(config) as node, trio.open_nursery() as nursery:
        await node.transact(make_table)
        nursery.start_soon(node.serve, "orders", handle)
        while (await node.transact(lambda tx: tx.execute("SELECT count(*) FROM effects")))[0][0] < 59:
            await trio.sleep(0.01)
        nursery.cancel_scope.cancel()

trio.run(main)
"""


@pytest.mark.integration
async def test_message_that_ends_its_process_is_found_and_set_aside(tmp_path: Path) -> None:
    configs = make_configs(tmp_path, [A, B], message_attempts=2)
    settings = tmp_path / "b.toml"
    tables = "".join(
        f'[bootstrap."{node}"]\n' + "".join(f'{link} = "{address}"\n' for link, address in config.links.items())
        for node, config in configs.items()
    )
    links = "[links]\n" + "".join(f'{link} = "{address}"\n' for link, address in configs[B].links.items())
    head = (
        f'node = "{B}"\ncluster = "test"\ndata_dir = "{B}"\nkey_file = "cluster.key"\nrole = "client"\nmessage_attempts = 2\n'
    )
    settings.write_text(head + links + tables)

    statuses: list[int] = []
    async with open_node(configs[A]) as a:
        await a.transact(_send_sixty)
        while 0 not in statuses and len(statuses) < 12:
            argv = [sys.executable, "-c", _RECEIVER, str(settings)]
            statuses.append((await trio.run_process(argv, check=False, cwd=ROOT)).returncode)

    assert statuses[-1] == 0, statuses
    assert set(statuses[:-1]) == {9}
    with sqlite3.connect(configs[B].data_dir / "app.db") as db:
        assert [row[0] for row in db.execute("SELECT number FROM ha_dead_letters")] == [31]
        numbers = [row[0] for row in db.execute("SELECT number FROM effects ORDER BY at")]
    db.close()
    assert numbers == [number for number in range(1, 61) if number != 31]


def _send_sixty(tx: Transaction) -> None:
    for number in range(1, 61):
        tx.send(B, C, b"%d" % number)


_HANGING = """
import sys, time, trio
from pathlib import Path
import ha_core.runtime.node_shell as node_shell
from ha_core.config import Config
from ha_core.runtime.node import open_node

node_shell.HANG_S = 0.2

def sleeps(tx):
    time.sleep(1000)

def loops(tx):
    while True:
        pass

async def main():
    async with open_node(Config.load(sys.argv[1])) as node:
        await node.transact(globals()[sys.argv[2]])

trio.run(main)
"""


@pytest.mark.integration
@pytest.mark.parametrize("how", ["sleeps", "loops"])
def test_process_whose_function_never_returns_still_ends(tmp_path: Path, how: str) -> None:
    config = attrs.evolve(make_configs(tmp_path, [A])[A], max_transaction_s=0.01)
    (link, address), *_ = config.links.items()
    settings = tmp_path / "a.toml"
    settings.write_text(
        f'node = "{A}"\ncluster = "test"\ndata_dir = "a"\nkey_file = "cluster.key"\nrole = "client"\nmax_transaction_s = 0.01\n'
        f'[links]\n{link} = "{address}"\n'
    )

    began = time.monotonic()
    argv = [sys.executable, "-c", _HANGING, str(settings), how]
    finished = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, env={**os.environ})

    assert finished.returncode == 1
    assert f"the function {how} has not returned" in finished.stderr
    assert time.monotonic() - began < 30
