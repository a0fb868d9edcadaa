"""Redis Streams, appendfsync always: XADD in pipelines of 256, XREADGROUP, a row a message, XACK. At least once.

Needs ``redis-server`` and the Python package ``redis[hiredis]``.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.peers.effects import Effects, PingBack, now_ns, number_of, payload
from benchmarks.workers import Answer, Workers, say, work

NAME = "Redis Streams, appendfsync always"
MODULE = "benchmarks.peers.redis_streams"
GROUP = 256


def installed() -> bool:
    return shutil.which("redis-server") is not None and importlib.util.find_spec("redis") is not None


def measure_rate(count: int) -> Sequence[float]:
    """Messages a second from the first send to the last committed effect."""
    return _measure(count, "rate")


def measure_ping(count: int) -> Sequence[float]:
    """Milliseconds from a send to its committed effect, one message at a time."""
    return _measure(count, "ping")


def _measure(count: int, mode: str) -> Sequence[float]:
    with tempfile.TemporaryDirectory(prefix="bench-redis-") as folder, _server(Path(folder)) as port, Workers() as workers:
        argument = {"port": port, "count": count, "folder": folder, "mode": mode}
        sender = workers.start(MODULE, "send", argument)
        receiver = workers.start(MODULE, "receive", argument | {"back": sender.answer()["back"]})
        receiver.answer()
        sender.tell("begin")
        if mode == "ping":
            samples: list[float] = sender.answer()["samples"]
            return samples
        began, ended = sender.answer()["at_ns"], receiver.answer()
        if ended["count"] != count:
            raise RuntimeError(f"Redis delivered {ended['count']} of {count} messages")
        return [count / ((ended["at_ns"] - began) / 1e9)]


@contextmanager
def _server(folder: Path) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--appendonly", "yes"]
    argv += ["--appendfsync", "always", "--save", "", "--auto-aof-rewrite-percentage", "0"]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            client = _client(port)
            for _ in range(200):
                try:
                    client.ping()
                    break
                except Exception:
                    time.sleep(0.02)
            client.xgroup_create("stream", "group", id="0", mkstream=True)
            client.close()
            yield port
        finally:
            process.kill()


def _client(port: int) -> Any:
    return importlib.import_module("redis").Redis(host="127.0.0.1", port=port, protocol=2)


def send(argument: Answer) -> None:
    client, count, back = _client(argument["port"]), argument["count"], PingBack()
    client.ping()
    say(back=back.port)
    input()
    if argument["mode"] == "ping":
        samples = []
        for number in range(1, count + 1):
            began = now_ns()
            client.xadd("stream", {"p": payload(number)}, id=f"{number}-0")
            samples.append((back.wait_ns() - began) / 1e6)
        say(samples=samples)
        return
    say(at_ns=now_ns())
    for first in range(1, count + 1, GROUP):
        pipeline = client.pipeline(transaction=False)
        for number in range(first, min(first + GROUP, count + 1)):
            pipeline.xadd("stream", {"p": payload(number)}, id=f"{number}-0")
        pipeline.execute()


def receive(argument: Answer) -> None:
    client, count, effects = _client(argument["port"]), argument["count"], Effects(Path(argument["folder"]))
    client.ping()
    back = PingBack()
    say(ready=True)
    last = 0
    while last < count:
        found = client.xreadgroup("group", "consumer", {"stream": ">"}, count=GROUP, block=5000)
        for _, messages in found or ():
            bodies = [fields[b"p"] for _, fields in messages]
            effects.apply(bodies)
            last = number_of(bodies[-1])
            if argument["mode"] == "ping":
                back.tell(argument["back"], now_ns())
            client.xack("stream", "group", *[name for name, _ in messages])
    say(at_ns=now_ns(), count=effects.count())


if __name__ == "__main__":
    work({"send": send, "receive": receive})
