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
from tests.conftest import skip_without

pytestmark = [pytest.mark.integration, pytest.mark.netns]

LINKS = ("a", "b")


class Namespaces:
    """Network namespaces of their own for some processes; whoever is not root makes them inside a user namespace."""

    def __init__(self, *, unprivileged: bool) -> None:
        self.prefix: list[str] = []
        """Of every command that is to be run where the namespaces are known."""
        self.names = (f"ha-{os.getpid()}-1", f"ha-{os.getpid()}-2")
        self._unprivileged = unprivileged
        self._holder: subprocess.Popen[bytes] | None = None

    def ip(self, *words: str) -> None:
        done = subprocess.run([*self.prefix, "ip", *words], check=False, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")

    def make(self) -> None:
        """Two namespaces with a veth pair per link. Raises OSError: what is not allowed, or missing."""
        if self._unprivileged:
            script = "mount -t tmpfs none /run && mkdir /run/netns && echo made && exec sleep 600"
            self._holder = subprocess.Popen(["unshare", "-Urnm", "sh", "-c", script], stdout=subprocess.PIPE)
            assert self._holder.stdout is not None
            if self._holder.stdout.read(5) != b"made\n":
                raise OSError("user, network and mount namespaces are not allowed")
            self.prefix = ["nsenter", "-t", str(self._holder.pid), "-U", "-n", "-m", "--preserve-credentials"]
        for name in self.names:
            self.ip("netns", "add", name)
            self.ip("-n", name, "link", "set", "dev", "lo", "up")
        for number, link in enumerate(LINKS):
            ends = [f"{link}{os.getpid() % 10000}{end}" for end in "xy"]
            one, two = self.names
            self.ip("link", "add", ends[0], "netns", one, "type", "veth", "peer", "name", ends[1], "netns", two)
            for name, end, last in zip(self.names, ends, "12", strict=True):
                self.ip("-n", name, "link", "set", "dev", end, "name", link)
                self.ip("-n", name, "addr", "add", f"10.87.{number}.{last}/24", "dev", link)
                self.ip("-n", name, "link", "set", "dev", link, "up")

    def end(self) -> None:
        for name in self.names:
            subprocess.run([*self.prefix, "ip", "netns", "del", name], check=False, capture_output=True)
        if self._holder is not None:
            self._holder.kill()
            self._holder.communicate()


@pytest.fixture
def hosts() -> Iterator[Namespaces]:
    """As root, or else as whoever this is; removed at the end."""
    if not shutil.which("ip"):
        skip_without("netns", "there is no ip command (iproute2)")
    reasons = []
    for unprivileged in (False, True):
        namespaces = Namespaces(unprivileged=unprivileged)
        try:
            namespaces.make()
            yield namespaces
            return
        except OSError as exc:
            reasons.append(str(exc))
        finally:
            namespaces.end()
    skip_without("netns", f"no network namespaces here: {'; '.join(reasons)}")


def application(folder: Path, number: int, hosts: Namespaces) -> subprocess.Popen[bytes]:
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
    namespace = hosts.names[number - 1]
    command = [*hosts.prefix, "ip", "netns", "exec", namespace, sys.executable, "-m", "ha_core.demo.application", str(path)]
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


def test_a_link_that_goes_down_loses_and_doubles_nothing(tmp_path: Path, hosts: Namespaces) -> None:
    (tmp_path / "cluster.key").write_bytes(os.urandom(32))
    (tmp_path / "cluster.key").chmod(0o600)
    processes = [application(tmp_path, number, hosts) for number in (1, 2)]
    try:
        for link in LINKS:
            wait_for(tmp_path, "sent", processes[0])
            hosts.ip("-n", hosts.names[0], "link", "set", "dev", link, "down")
            subprocess.run(["sleep", "1"], check=True)
            hosts.ip("-n", hosts.names[0], "link", "set", "dev", link, "up")
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
