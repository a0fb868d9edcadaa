"""The receiver's effect that all durable peers have in common: a row a message in a SQLite file of its own (WAL, FULL)."""

from __future__ import annotations

import socket
import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path

import trio

PAYLOAD_BYTES = 200
_FILL = bytes((at * 73 + 11) & 0xFF for at in range(PAYLOAD_BYTES - 8))


def payload(number: int) -> bytes:
    """200 bytes that begin with the message's number."""
    return number.to_bytes(8, "big") + _FILL


def number_of(body: bytes) -> int:
    return int.from_bytes(body[:8], "big")


def now_ns() -> int:
    """One clock for all processes of the machine."""
    return time.monotonic_ns()


class PingBack:
    """From the receiver's process to the sender's: when an effect was committed. One message at a time."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]

    def tell(self, port: int, at_ns: int) -> None:
        self._socket.sendto(at_ns.to_bytes(8, "big"), ("127.0.0.1", port))

    def wait_ns(self) -> int:
        return int.from_bytes(self._socket.recv(8), "big")

    async def receive_ns(self) -> int:
        await trio.lowlevel.wait_readable(self._socket)
        return self.wait_ns()


class Effects:
    def __init__(self, folder: Path) -> None:
        self._database = sqlite3.connect(folder / "effects.db", isolation_level=None)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.execute("CREATE TABLE effects (number INTEGER PRIMARY KEY, body BLOB)")

    def apply(self, bodies: Iterable[bytes]) -> None:
        """One transaction; a number that is there already is a duplicate and left out."""
        self._database.execute("BEGIN IMMEDIATE")
        self._database.executemany("INSERT OR IGNORE INTO effects VALUES (?, ?)", ((number_of(body), body) for body in bodies))
        self._database.execute("COMMIT")

    def count(self) -> int:
        (count,) = self._database.execute("SELECT count(*) FROM effects").fetchone()
        return int(count)
