"""Finding, stopping and killing the processes of a pretended host: all carry its mark in their environment.

Only processes with the mark of this very demo are ever touched; the mark is drawn at random.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import attrs

MARK = "HA_CORE_DEMO_HOST"


@attrs.frozen
class Marked:
    """A living process: ``words`` is its command line."""

    pid: int
    words: tuple[str, ...]
    state: str

    def runs(self, text: str) -> bool:
        return any(text in word for word in self.words)


def marked(mark: str) -> Iterator[Marked]:
    """Every living process whose environment carries ``mark``."""
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal() or int(folder.name) == os.getpid():
            continue
        try:
            if wanted not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in ("Z", "X"):
            yield Marked(int(folder.name), tuple(words), state)


def kill_all(mark: str, limit_s: float = 5.0) -> int:
    """SIGKILL every process with the mark until none is left, as a power cut does; how many there were."""
    killed: set[int] = set()
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        found = list(marked(mark))
        if not found:
            break
        for process in found:
            send_signal(process.pid, signal.SIGKILL)
            killed.add(process.pid)
        time.sleep(0.005)
    return len(killed)


def send_signal(pid: int, number: signal.Signals) -> bool:
    """False if the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
