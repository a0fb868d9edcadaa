"""Messaging without durability, one message a call: pyzmq PUSH/PULL and DEALER/ROUTER, nats core. Each where it is installed."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import shutil
import socket
import subprocess
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from benchmarks.peers.effects import now_ns, payload
from benchmarks.workers import Answer, Workers, say, work

MODULE = "benchmarks.peers.volatile"
NAMES = {"push": "pyzmq PUSH/PULL", "dealer": "pyzmq DEALER/ROUTER", "nats": "nats core"}


def installed(kind: str) -> bool:
    if kind == "nats":
        return shutil.which("nats-server") is not None and importlib.util.find_spec("nats") is not None
    return importlib.util.find_spec("zmq") is not None


def measure_rate(kind: str, count: int) -> Sequence[float]:
    """Messages a second from the first send to the last receipt."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argument = {"kind": kind, "count": count, "port": port}
    with _server(kind, port), Workers() as workers:
        receiver = workers.start(MODULE, "receive", argument)
        receiver.answer()
        sender = workers.start(MODULE, "send", argument)
        began, ended = sender.answer()["at_ns"], receiver.answer()["at_ns"]
        sender.answer()
        return [count / ((ended - began) / 1e9)]


class _Server:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        with self._process:
            self._process.kill()


def _server(kind: str, port: int) -> Any:
    if kind != "nats":
        return nullcontext()
    argv = ["nats-server", "-a", "127.0.0.1", "-p", str(port)]
    return _Server(subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))


def _zmq_socket(kind: str, argument: Answer) -> Any:
    zmq = importlib.import_module("zmq")
    end = zmq.Context().socket(getattr(zmq, kind))
    end.sndhwm = end.rcvhwm = 100_000
    return end


def send(argument: Answer) -> None:
    if argument["kind"] == "nats":
        asyncio.run(_nats_send(argument))
        return
    end = _zmq_socket("PUSH" if argument["kind"] == "push" else "DEALER", argument)
    end.connect(f"tcp://127.0.0.1:{argument['port']}")
    say(at_ns=now_ns())
    for number in range(argument["count"]):
        end.send(payload(number))
    end.close(linger=30_000)
    end.context.term()
    say(sent=True)


def receive(argument: Answer) -> None:
    if argument["kind"] == "nats":
        asyncio.run(_nats_receive(argument))
        return
    end = _zmq_socket("PULL" if argument["kind"] == "push" else "ROUTER", argument)
    end.bind(f"tcp://127.0.0.1:{argument['port']}")
    say(ready=True)
    take = end.recv if argument["kind"] == "push" else end.recv_multipart
    for _ in range(argument["count"]):
        take()
    say(at_ns=now_ns())


async def _nats_connect(port: int) -> Any:
    nats = importlib.import_module("nats")
    return await nats.connect(
        f"nats://127.0.0.1:{port}", connect_timeout=5, max_reconnect_attempts=50, reconnect_time_wait=0.05
    )


async def _nats_send(argument: Answer) -> None:
    client = await _nats_connect(argument["port"])
    say(at_ns=now_ns())
    for number in range(argument["count"]):
        await client.publish("subject", payload(number))
    await client.flush()
    say(sent=True)
    await client.close()


async def _nats_receive(argument: Answer) -> None:
    client = await _nats_connect(argument["port"])
    left, whole = argument["count"], asyncio.Event()

    async def take(message: object) -> None:
        nonlocal left
        left -= 1
        if not left:
            say(at_ns=now_ns())
            whole.set()

    await client.subscribe("subject", cb=take, pending_msgs_limit=10**7, pending_bytes_limit=2**31)
    await client.flush()
    say(ready=True)
    await whole.wait()
    await client.close()


if __name__ == "__main__":
    work({"send": send, "receive": receive})
