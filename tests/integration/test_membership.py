"""Hosts that join and leave a real cluster through its commands: what they hold of it comes and goes with them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ha_core.demo.processes import MARK, kill_all
from ha_core.guard.processes import lock_holder

pytestmark = pytest.mark.integration


class World:
    """Three hosts on loopback addresses and a center; all of its processes carry a mark of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = f"membership-{os.getpid()}-{time.monotonic_ns()}"
        self.center = f"127.0.0.1:{free_port('127.0.0.1')}"
        self._processes: list[subprocess.Popen[bytes]] = []
        for number in (1, 2, 3):
            address = f"127.77.0.{number}"
            ports = [free_port(address) for _ in range(3)]
            self.config(number).write_text(
                f'node = "aam@h{number}.example"\ncluster = "c"\ndata_dir = "h{number}"\nrun_dir = "run{number}"\n'
                f'management = "{address}:{ports[0]}"\n[links]\na = "{address}:{ports[1]}"\nb = "{address}:{ports[2]}"\n'
            )

    def config(self, number: int) -> Path:
        return self.folder / f"h{number}.toml"

    def data(self, number: int) -> Path:
        return self.folder / f"h{number}"

    def management(self, number: int) -> str:
        return self.config(number).read_text().split('management = "')[1].split('"')[0]

    def token(self, number: int) -> str:
        return (self.data(number) / "join.token").read_text().strip()

    def start(self, *words: str) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "ha_core", *words], cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True, env={**os.environ, MARK: self.mark},
        )  # fmt: skip
        self._processes.append(process)

    def run(self, *words: str, center: bool = True) -> subprocess.CompletedProcess[str]:
        env = (
            {**os.environ, "HA_CORE_CENTER": self.center, "HA_CORE_KEY": str(self.data(1) / "cluster.key")} if center else None
        )
        return subprocess.run(
            [sys.executable, "-m", "ha_core", *words], cwd=self.folder, capture_output=True, text=True, timeout=60, env=env
        )  # fmt: skip

    def ask(self, *words: str) -> str:
        result = self.run(*words)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def roles(self) -> dict[str, str]:
        result = self.run("host", "list", "--json")
        return {row["name"]: row["role"] for row in json.loads(result.stdout)} if result.returncode == 0 else {}

    def add(self, number: int) -> None:
        self.ask("host", "add", f"h{number}.example", "--address", self.management(number), "--token", self.token(number))

    def signal_agents(self, number: int, signo: signal.Signals, *names: str) -> None:
        for name in names:
            os.kill(lock_holder(str(self.folder / f"run{number}"), name), signo)

    def end(self) -> None:
        kill_all(self.mark)
        for process in self._processes:
            process.wait()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    try:
        yield world
    finally:
        world.end()


def free_port(address: str) -> int:
    with socket.create_server((address, 0)) as server:
        port: int = server.getsockname()[1]
        return port


def until(condition: Callable[[], object], limit_s: float = 30.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def found(world: World, *hosts: int) -> None:
    """The first host is a cluster of its own; the center is up, and the agents of these hosts wait."""
    assert world.run("cluster", "create", "--config", "h1.toml", center=False).returncode == 0
    for number in (1, *hosts):
        world.start("agent", "--config", f"h{number}.toml")
    world.start("center", "--listen", world.center, "--key", "h1/cluster.key", "--vpxa", world.management(1))
    until(lambda: world.roles() == {"h1.example": "active primary"})
    until(lambda: all((world.data(number) / "join.token").exists() for number in hosts))


def test_a_host_that_was_away_when_it_was_removed_leaves_by_hand(world: World) -> None:
    """It never hears of its removal: the members speak to it no more."""
    found(world, 2, 3)
    for number in (2, 3):
        world.add(number)
    until(lambda: list(world.roles().values()).count("primary") == 2)

    world.signal_agents(2, signal.SIGSTOP, "guard", "aam", "vpxa")
    said = world.ask("host", "remove", "h2.example")
    assert "ha-core host leave --force" in said
    world.signal_agents(2, signal.SIGKILL, "aam")  # and with it the news that the kernel kept for it
    world.signal_agents(2, signal.SIGCONT, "guard", "vpxa")

    # Agents that had stood still may be replaced first.
    until(lambda: "--force" in world.run("host", "leave", "--config", "h2.toml", center=False).stderr)
    left = world.run("host", "leave", "--force", "--config", "h2.toml", center=False)
    assert left.returncode == 0, left.stderr
    until(lambda: (world.data(2) / "join.token").exists())
    world.add(2)
    until(lambda: world.roles().get("h2.example") == "primary")


def test_a_host_joins_leaves_with_its_key_and_joins_again(world: World) -> None:
    found(world, 2)

    refused = world.run("host", "add", "h2.example", "--address", world.management(2), "--token", "00" * 32)
    assert refused.returncode == 2
    assert "not its join token" in refused.stderr

    world.add(2)
    until(lambda: world.roles().get("h2.example") == "primary")
    first = json.loads((world.data(2) / "cluster.json").read_text())["joining"]

    # Containment is known of the founder as well, and said by the aams themselves.
    contained = {row["containment"] for row in json.loads(world.ask("host", "list", "--json"))}
    assert contained <= {"pid-namespace", "subreaper"}

    assert "has left the cluster" in world.ask("host", "remove", "h2.example")
    assert not (world.data(2) / "cluster.json").exists()
    assert not (world.data(2) / "cluster.key").exists()
    assert world.roles() == {"h1.example": "active primary"}

    until(lambda: (world.data(2) / "join.token").exists())
    until(
        lambda: (
            world.run("host", "add", "h2.example", "--address", world.management(2), "--token", world.token(2)).returncode == 0
        )
    )
    until(lambda: world.roles().get("h2.example") == "primary")
    assert json.loads((world.data(2) / "cluster.json").read_text())["joining"] != first
    assert (world.data(2) / "node.db.left").exists()

    # Its founder may go as well: the other one takes over.
    assert "has left the cluster" in world.ask("host", "remove", "h1.example")
    assert not (world.data(1) / "cluster.json").exists()
