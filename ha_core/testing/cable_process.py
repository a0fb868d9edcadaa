"""The cable relay as a process of its own, for tests and demos whose hosts are real processes, and its client."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from ha_core.errors import ConfigError, HAError, TransportError
from ha_core.testing.cable import Direction, Ports, Switchboard, open_switchboard


class SwitchboardProcess:
    """The methods of ``Switchboard``, each returning once the relay process has carried it out."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.pid = process.pid
        self._stdin, self._stdout = process.stdin, process.stdout
        self._buffer = b""
        self._lock = trio.Lock()

    async def command(self, *words: str) -> None:
        """Raises TransportError with the relay's own words if it refuses or has ended."""
        async with self._lock:
            try:
                await self._stdin.send_all(" ".join(words).encode() + b"\n")
            except trio.BrokenResourceError as exc:
                raise TransportError(f"cable relay: process {self.pid} has ended") from exc
            await self.receive_answer()

    async def receive_answer(self) -> None:
        while b"\n" not in self._buffer:
            data = await self._stdout.receive_some()
            if not data:
                raise TransportError(f"cable relay: process {self.pid} has ended")
            self._buffer += bytes(data)
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer = json.loads(line)
        if not answer["ok"]:
            raise TransportError(answer["error"])

    async def cut(self, host: str, link: str, direction: Direction = "both") -> None:
        await self.command("cut", host, link, direction)

    async def mend(self, host: str, link: str) -> None:
        await self.command("mend", host, link)

    async def cut_host(self, host: str) -> None:
        await self.command("cut_host", host)

    async def mend_host(self, host: str) -> None:
        await self.command("mend_host", host)

    async def partition(self, host: str, other: str, link: str) -> None:
        await self.command("partition", host, other, link)

    async def join(self, host: str, other: str, link: str) -> None:
        await self.command("join", host, other, link)

    async def impair(self, host: str, link: str, *, delay_s: float = 0.0, loss: float = 0.0) -> None:
        await self.command("impair", host, link, str(delay_s), str(loss))

    async def add(self, host: str, link: str, public: str, real: str) -> None:
        await self.command("add", host, link, public, real)


@asynccontextmanager
async def open_switchboard_process(ports: Ports) -> AsyncIterator[SwitchboardProcess]:
    """Start the relay in a process of its own; it ends with the body, and with its parent at the latest.

    Raises:
        TransportError: it could not bind an address.
    """
    table = json.dumps({f"{host}.{link}": list(pair) for (host, link), pair in ports.items()})
    argv = [sys.executable, "-m", "ha_core.testing.cable", "--json", table]
    process = await trio.lowlevel.open_process(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        board = SwitchboardProcess(process)
        await board.receive_answer()
        yield board
    finally:
        process.kill()
        with trio.CancelScope(shield=True):  # a killed child is reaped at once
            await process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    await pipe.aclose()


async def carry_out(board: Switchboard, line: str) -> None:
    """One command line of the relay process.

    Raises:
        ConfigError: no such command, or not its arguments.
    """
    match line.split():
        case ["cut", host, link]:
            board.cut(host, link)
        case ["cut", host, link, ("both" | "out" | "in") as direction]:
            board.cut(host, link, direction)
        case ["mend", host, link]:
            board.mend(host, link)
        case ["cut_host", host]:
            board.cut_host(host)
        case ["mend_host", host]:
            board.mend_host(host)
        case ["partition", host, other, link]:
            board.partition(host, other, link)
        case ["join", host, other, link]:
            board.join(host, other, link)
        case ["impair", host, link, delay_s, loss]:
            board.impair(host, link, delay_s=float(delay_s), loss=float(loss))
        case ["add", host, link, public, real]:
            await board.add(host, link, public, real)
        case _:
            raise ConfigError(f"cable relay: {line.strip()!r} is no command; see the methods of Switchboard", value=line)


def _answer(error: str = "") -> None:
    print(json.dumps({"ok": not error, "error": error}), flush=True)


async def serve(ports: Ports) -> None:
    try:
        async with open_switchboard(ports) as board:
            _answer()
            while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
                try:
                    await carry_out(board, line)
                except (HAError, ValueError) as exc:
                    _answer(str(exc))
                else:
                    _answer()
    except HAError as exc:
        _answer(str(exc))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ha_core.testing.cable", description=__doc__)
    parser.add_argument("--json", required=True, help='{"host.link": ["public ip:port", "real ip:port"], ...}')
    table: dict[str, list[str]] = json.loads(parser.parse_args().json)
    ports: dict[tuple[str, str], tuple[str, str]] = {}
    for name, (public, real) in table.items():
        host, _, link = name.rpartition(".")
        ports[host, link] = (public, real)
    trio.run(serve, ports)
