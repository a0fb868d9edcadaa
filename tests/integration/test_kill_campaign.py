"""Sender and receiver killed a hundred times while their paths are cut in turn: nothing lost, nothing doubled, order kept."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.check_effects import check

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.integration
def test_a_hundred_kills_lose_nothing_and_double_nothing(request: pytest.FixtureRequest) -> None:
    seed = request.config.option.seed
    argv = [
        sys.executable,
        "-m",
        "tests.integration.kill_campaign",
        "--kills",
        "100",
        "--messages",
        "20000",
        "--seed",
        str(seed),
    ]
    print("REPRO:", " ".join(argv[1:]))
    finished = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=400)

    assert finished.returncode == 0, finished.stdout + finished.stderr
    result = json.loads(finished.stdout)
    assert result["ok"]
    assert result["kills"] >= 100
    assert result["near"] >= 80
    assert result["cuts"] >= 2
    assert result["delivered"] == result["sent"] >= 20_000


def make(path: Path, table: str, rows: list[tuple[object, ...]]) -> str:
    with sqlite3.connect(path) as db:
        db.execute(table)
        name = table.split()[2]
        db.executemany(f"INSERT INTO {name} VALUES ({','.join('?' * len(rows[0]))})", rows)
    db.close()
    return str(path)


@pytest.mark.parametrize(
    ("numbers", "wrong"),
    [
        ([1, 2, 3], {}),
        ([1, 2], {"lost": 1}),
        ([1, 2, 2, 3], {"duplicates": 1, "disordered": 1}),
        ([1, 3, 2], {"disordered": 2}),
        ([1, 2, 3, 4], {"unsent": 1}),
    ],
)
def test_checker_sees_what_is_wrong(tmp_path: Path, numbers: list[int], wrong: dict[str, int]) -> None:
    bodies = {number: b"body %d" % number for number in range(1, 5)}
    sent = [("c", number, hashlib.sha256(bodies[number]).hexdigest()) for number in (1, 2, 3)]
    effects = [(at, "c", number, bodies[number]) for at, number in enumerate(numbers, 1)]
    sender = make(tmp_path / "s.db", "CREATE TABLE sent (channel TEXT, number INTEGER, digest TEXT)", list(sent))
    receiver = make(
        tmp_path / "r.db", "CREATE TABLE effects (at INTEGER, channel TEXT, number INTEGER, body BLOB)", list(effects)
    )

    counts = check(sender, receiver)

    assert {name: count for name, count in counts.items() if count and name not in ("sent", "delivered")} == wrong


def test_checker_sees_a_damaged_body(tmp_path: Path) -> None:
    sender = make(tmp_path / "s.db", "CREATE TABLE sent (channel TEXT, number INTEGER, digest TEXT)", [("c", 1, "0" * 64)])
    table = "CREATE TABLE effects (at INTEGER, channel TEXT, number INTEGER, body BLOB)"
    receiver = make(tmp_path / "r.db", table, [(1, "c", 1, b"other")])

    assert check(sender, receiver)["damaged"] == 1
