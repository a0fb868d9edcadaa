"""Kill the sender and the receiver of durable messages again and again, while one path and then the other is cut.

    python -m tests.integration.kill_campaign [--kills 100] [--messages 20000] [--seed N] [--keep DIR]

The programs are processes of their own (kill_node.py), forked from this one so that a start costs little; they say on a pipe when
they are about to commit, have committed, are about to acknowledge, and are connected again, and most kills follow one of these
within 5 ms. At the end check_effects.py, which knows nothing of ha-core, judges by the two SQLite files. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import attrs

from ha_core.config import Config
from ha_core.ids import LinkName, NodeId
from ha_core.testing.cable import lay_cables
from tests.integration.kill_node import (
    ACKNOWLEDGING,
    COMMITTED,
    COMMITTING,
    CONNECTED,
    COUNT,
    MARK,
    RECEIVER,
    SENDER,
    Program,
    run_program,
)

NEAR_S: Final = 0.005
LINKS: Final = ("a", "b")
HOSTS: Final = {SENDER: "h1", RECEIVER: "h2"}
KINDS: Final = {SENDER: (COMMITTING, COMMITTED, CONNECTED), RECEIVER: (COMMITTING, ACKNOWLEDGING, CONNECTED)}
LIMIT_S: Final = 300.0


class Cables:
    """The relay process; ``swap`` cuts one link and mends the other, in turn."""

    def __init__(self, ports: Mapping[tuple[str, str], tuple[str, str]]) -> None:
        table = json.dumps({f"{host}.{link}": list(pair) for (host, link), pair in ports.items()})
        argv = [sys.executable, "-m", "ha_core.testing.cable", "--json", table]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._cut = -1
        self.cuts = 0
        self._answer()

    def _answer(self) -> None:
        assert self._process.stdout is not None
        answer = json.loads(self._process.stdout.readline())
        assert answer["ok"], answer

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        self._answer()

    def swap(self) -> None:
        if self._cut >= 0:
            self._tell(f"mend h1 {LINKS[self._cut]}")
        self._cut = (self._cut + 1) % len(LINKS)
        self._tell(f"cut h1 {LINKS[self._cut]}")
        self.cuts += 1

    def mend(self) -> None:
        if self._cut >= 0:
            self._tell(f"mend h1 {LINKS[self._cut]}")
            self._cut = -1

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


@attrs.define
class Side:
    """One of the two programs: the process that lives now and what it shall die of."""

    program: Program
    pid: int = 0
    pipe: int = -1
    kind: bytes = b""
    """What mark is waited for; empty: the clock alone."""
    skip: int = 0
    kill_at_s: float = 0.0
    start_at_s: float = 0.0
    count: int = 0
    buffer: bytes = b""

    @property
    def name(self) -> NodeId:
        return self.program.config.node

    def start(self, rng: random.Random, now_s: float, others: tuple[int, ...]) -> None:
        reader, writer = os.pipe()
        program = attrs.evolve(self.program, marks=writer, seed=rng.getrandbits(32))
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                for descriptor in (reader, *others):
                    os.close(descriptor)
                run_program(program)
                status = 0
            except BaseException as exc:  # noqa: ASYNC103 - a forked child: nobody is above to tell
                print(f"{program.config.node}: {exc!r}", file=sys.stderr, flush=True)
            os._exit(status)
        os.close(writer)
        self.pid, self.pipe, self.buffer = pid, reader, b""
        self.kind = b"" if rng.random() < 0.08 else rng.choice(KINDS[self.name])
        self.skip = 0 if self.kind == CONNECTED else rng.randrange(12)
        self.kill_at_s = now_s + (rng.uniform(0.1, 0.6) if not self.kind else 4.0)

    def read(self) -> list[tuple[bytes, int, int]]:
        data = os.read(self.pipe, 1 << 16)
        if not data:
            raise RuntimeError(f"{self.name} ended by itself: {os.waitpid(self.pid, 0)[1]}")
        self.buffer += data
        whole = len(self.buffer) // MARK.size * MARK.size
        marks = list(MARK.iter_unpack(self.buffer[:whole]))
        self.buffer = self.buffer[whole:]
        return marks

    def reap(self) -> None:
        os.waitpid(self.pid, 0)
        os.close(self.pipe)
        self.pid, self.pipe = 0, -1


@attrs.define
class Campaign:
    sides: list[Side]
    cables: Cables
    rng: random.Random
    kills: int = 0
    near: int = 0
    sent: int = 0

    def play(self, kills: int, messages: int) -> None:
        """Until there were enough kills, four fifths of them near a mark, and enough messages were handled."""
        next_swap_s = time.monotonic()
        limit_s = time.monotonic() + LIMIT_S
        while (more := self.kills < kills or self.near < 0.8 * kills) or self.handled < messages:
            now_s = time.monotonic()
            if now_s > limit_s:
                raise RuntimeError(f"{self.kills} kills and {self.handled} messages in {LIMIT_S} s")
            if now_s >= next_swap_s:
                self.cables.swap()
                next_swap_s = now_s + self.rng.uniform(1.0, 3.0)
            self.step(now_s, killing=more)

    @property
    def handled(self) -> int:
        return max(side.count for side in self.sides if side.name == RECEIVER)

    def step(self, now_s: float, *, killing: bool) -> None:
        for side in self.sides:
            if not side.pid and now_s >= side.start_at_s:
                side.start(self.rng, now_s, tuple(other.pipe for other in self.sides if other.pid))
        live = {side.pipe: side for side in self.sides if side.pid}
        for pipe in select.select(list(live), [], [], 0.002)[0]:
            side = live[pipe]
            for kind, at_ns, number in side.read():
                if kind == COUNT:
                    side.count = number
                elif killing and side.pid and kind == side.kind:
                    side.skip -= 1
                    if side.skip < 0:
                        self.kill(side, at_ns)
                        break
        for side in self.sides:
            if killing and side.pid and now_s >= side.kill_at_s:
                self.kill(side, 0)

    def kill(self, side: Side, at_ns: int) -> None:
        """Kill up to 2 ms after the mark, and start again soon."""
        if at_ns:
            time.sleep(max(0.0, self.rng.uniform(-0.001, 0.002)))
        os.kill(side.pid, signal.SIGKILL)
        now_ns = time.monotonic_ns()
        side.reap()
        self.kills += 1
        self.near += bool(at_ns) and now_ns - at_ns <= NEAR_S * 1e9
        side.start_at_s = now_ns / 1e9 + max(0.0, self.rng.uniform(-0.05, 0.1))

    def settle(self) -> None:
        """No more kills and cuts: everything must arrive; then both leave in good order."""
        self.cables.mend()
        sender = next(side for side in self.sides if side.name == SENDER)
        sender.program.stop_file.touch()
        limit_s = time.monotonic() + 60
        sender.count = 0
        while sender.count == 0 or self.handled < sender.count:
            if time.monotonic() > limit_s:
                raise RuntimeError(f"{self.handled} of {sender.count} messages were handled a minute after the last kill")
            self.step(time.monotonic(), killing=False)
        sender.program.end_file.touch()
        for side in self.sides:
            while os.read(side.pipe, 1 << 16):
                pass
            _, status = os.waitpid(side.pid, 0)
            os.close(side.pipe)
            side.pid = 0
            if status:
                raise RuntimeError(f"{side.name} ended with status {status}")


@contextmanager
def prepared(folder: Path, rng: random.Random) -> Iterator[Campaign]:
    ports = lay_cables(["h1", "h2"], LINKS)
    key = folder / "cluster.key"
    key.write_bytes(secrets.token_bytes(32))
    key.chmod(0o600)
    links = {node: {LinkName(link): ports[host, link][0] for link in LINKS} for node, host in HOSTS.items()}
    sides = [
        Side(
            Program(
                Config(
                    node=node, cluster="kills", data_dir=folder / node, links=links[node], bootstrap=links, key_file=key,
                    bind={LinkName(link): ports[host, link][1] for link in LINKS}, role="client",
                ),
                -1, folder / "stop", folder / "end", 0,
            )
        )
        for node, host in HOSTS.items()
    ]  # fmt: skip
    cables = Cables(ports)
    try:
        yield Campaign(sides, cables, rng)
    finally:
        for side in sides:
            if side.pid:
                os.kill(side.pid, signal.SIGKILL)
                side.reap()
        cables.close()


def play(folder: Path, kills: int, messages: int, seed: int) -> dict[str, object]:
    """One campaign; its result."""
    began_s = time.monotonic()
    with prepared(folder, random.Random(seed)) as campaign:
        campaign.play(kills, messages)
        campaign.settle()
    checker = Path(__file__).with_name("check_effects.py")
    argv = [sys.executable, "-I", "-S", str(checker), str(folder / SENDER / "app.db"), str(folder / RECEIVER / "app.db")]
    judged = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)
    wrong = ("lost", "duplicates", "disordered", "damaged", "unsent")
    return {
        "seed": seed, "kills": campaign.kills, "near": campaign.near, "cuts": campaign.cables.cuts, **judged,
        "seconds": round(time.monotonic() - began_s, 1), "ok": not any(judged[name] for name in wrong),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--keep", type=Path, help="leave the stores in this folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ha-core-kills-") as name:
        folder = args.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        result = play(folder, args.kills, args.messages, args.seed)
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
