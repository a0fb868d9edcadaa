"""What happened, read from the outside: the applications' SQLite files and the witnesses' rows, with no code of ha-core."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path

import attrs


@attrs.frozen
class Messages:
    sent: int
    delivered: int
    duplicates: int
    lost: int
    out_of_order: int


def judge_messages(databases: Mapping[str, Path]) -> Messages:
    """Compare what each application's transactions sent with what every other one's effects hold. All must have ended."""
    sent: dict[tuple[str, str], int] = {}
    received: dict[tuple[str, str], list[int]] = {}
    for node, path in databases.items():
        with _open(path) as database:
            for receiver, count in database.execute("SELECT receiver, max(number) FROM sent GROUP BY receiver"):
                sent[node, receiver] = count
            for sender, body in database.execute("SELECT sender, body FROM received ORDER BY at"):
                received.setdefault((sender, node), []).append(json.loads(body)["number"])
        database.close()
    delivered = sum(len(set(numbers)) for numbers in received.values())
    total = sum(sent.values())
    return Messages(
        sent=total,
        delivered=delivered,
        duplicates=sum(len(numbers) - len(set(numbers)) for numbers in received.values()),
        lost=sum(len(set(range(1, count + 1)) - set(received.get(pair, ()))) for pair, count in sent.items()),
        out_of_order=sum(a >= b for numbers in received.values() for a, b in zip(numbers, numbers[1:], strict=False)),
    )


def longest_stall_ms(databases: Mapping[str, Path], from_ns: int, to_ns: int) -> float:
    """The longest time between two messages that arrived from one sender, within a span of time, less the senders' own pauses.

    A sender that paused (its process was busy) makes a gap between *sending* times as well; that part is not the network's.
    """
    worst = 0
    for path in databases.values():
        with _open(path) as database:
            rows = database.execute(
                "SELECT sender, at_ns, body FROM received WHERE at_ns BETWEEN ? AND ? ORDER BY at", (from_ns, to_ns)
            )
            last: dict[str, tuple[int, int]] = {}
            for sender, at_ns, body in rows:
                made_ns = json.loads(body)["at_ns"]
                if sender in last:
                    worst = max(worst, (at_ns - last[sender][0]) - (made_ns - last[sender][1]))
                last[sender] = (at_ns, made_ns)
        database.close()
    return worst / 1e6


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path)


@attrs.frozen
class Start:
    """One run of a VM as its witness saw it."""

    vm: str
    host: str
    token: int
    at_ns: int
    made_ticks: int
    pid: int
    overlap: bool


def read_starts(shared: Path) -> list[Start]:
    """All rows of all witnesses, in the order of time."""
    rows = []
    for path in sorted(shared.glob("*.runs")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            overlap = row["what"] == "overlap"
            rows.append(Start(path.stem, row["host"], row["token"], row["at_ns"], row["made_ticks"], row["pid"], overlap))
    return sorted(rows, key=lambda start: start.at_ns)
