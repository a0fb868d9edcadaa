"""Two nodes in two network namespaces, joined by two cables that the kernel takes down: messages arrive once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ha_core.demo.judge import judge_messages
from tests.conftest import required

pytestmark = [pytest.mark.integration, pytest.mark.netns]

LINKS = ("a", "b")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two namespaces with a veth pair per link; removed at the end."""
    names = (f"ha-{os.getpid()}-1", f"ha-{os.getpid()}-2")
    made = []
    try:
        if not shutil.which("ip"):
            raise OSError("there is no ip command")
        for name in names:
            ip("netns", "add", name)
            made.append(name)
            ip("-n", name, "link", "set", "dev", "lo", "up")
        for number, link in enumerate(LINKS):
            ends = [f"{link}{os.getpid() % 10000}{end}" for end in "xy"]
            ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
            for name, end, last in zip(names, ends, "12", strict=True):
                ip("-n", name, "link", "set", "dev", end, "name", link)
                ip("-n", name, "addr", "add", f"10.87.{number}.{last}/24", "dev", link)
                ip("-n", name, "link", "set", "dev", link, "up")
    except (OSError, subprocess.CalledProcessError) as exc:
        for name in made:
            ip("netns", "del", name)
        if required("netns"):
            raise
        pytest.skip(f"no network namespaces here: {exc}")
    yield names
    for name in names:
        ip("netns", "del", name)


def application(folder: Path, number: int, namespace: str) -> subprocess.Popen[bytes]:
    """The demo's application in a namespace."""
    nodes = {one: {link: f"10.87.{at}.{one}:7400" for at, link in enumerate(LINKS)} for one in (1, 2)}
    other = 3 - number
    settings = {
        "node": f"orders@h{number}.example", "links": nodes[number], "bind": nodes[number],
        "peers": {f"orders@h{other}.example": nodes[other]}, "data_dir": str(folder / f"h{number}"),
        "key_file": str(folder / "cluster.key"), "interval_s": 0.002, "stop_file": str(folder / "stop"),
        "progress_file": str(folder / f"h{number}.progress"),
    }  # fmt: skip
    path = folder / f"h{number}.json"
    path.write_text(json.dumps(settings))
    command = ["ip", "netns", "exec", namespace, sys.executable, "-m", "ha_core.demo.application", str(path)]
    return subprocess.Popen(command, cwd=folder)


def wait_for(folder: Path, what: str, process: subprocess.Popen[bytes]) -> None:
    """Until both have sent 300 messages, or all that was sent has been received."""
    for _ in range(400):
        assert process.poll() is None
        try:
            one, two = (json.loads((folder / f"h{number}.progress").read_text()) for number in (1, 2))
            sent = [sum(found["sent"].values()) for found in (one, two)]
            received = [sum(found["received"].values()) for found in (two, one)]
        except (OSError, ValueError):
            sent, received = [0, 0], [0, 0]
        if (what == "sent" and min(sent) >= 300) or (what == "received" and sent == received and min(sent) >= 300):
            return
        subprocess.run(["sleep", "0.05"], check=True)
    raise AssertionError(f"not everything was {what}: {sent} sent, {received} received")


def test_a_link_that_goes_down_loses_and_doubles_nothing(tmp_path: Path, hosts: tuple[str, str]) -> None:
    (tmp_path / "cluster.key").write_bytes(os.urandom(32))
    (tmp_path / "cluster.key").chmod(0o600)
    processes = [application(tmp_path, number, name) for number, name in zip((1, 2), hosts, strict=True)]
    try:
        for link in LINKS:
            wait_for(tmp_path, "sent", processes[0])
            ip("-n", hosts[0], "link", "set", "dev", link, "down")
            subprocess.run(["sleep", "1"], check=True)
            ip("-n", hosts[0], "link", "set", "dev", link, "up")
            subprocess.run(["sleep", "1.5"], check=True)  # the path comes up again before the other one goes
        (tmp_path / "stop").touch()
        subprocess.run(["sleep", "0.5"], check=True)
        wait_for(tmp_path, "received", processes[0])
    finally:
        for process in processes:
            process.kill()
            process.wait()

    found = judge_messages({f"orders@h{number}.example": tmp_path / f"h{number}" / "app.db" for number in (1, 2)})
    assert (found.lost, found.duplicates, found.out_of_order) == (0, 0, 0)
    assert found.delivered == found.sent >= 600
