"""The helper that makes processes hang does what it says, or the tests that use it would prove nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration import hang

pytestmark = pytest.mark.integration

# Two threads that count, each into its own file, and a socket that the kernel serves.
VICTIM = """
import os, socket, sys, threading, time
server = socket.socket(socket.AF_UNIX); server.bind("socket"); server.listen()
def count(name):
    with open(name, "w") as file:
        while True:
            print(os.getpid(), file=file, flush=True)
            time.sleep(0.005)
threading.Thread(target=count, args=["other"], daemon=True).start()
count("main")
"""


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def test_a_hung_process_stands_still_in_its_main_thread_only(tmp_path: Path) -> None:
    hang.skip_unless_possible()

    def size(name: str) -> int:
        path = tmp_path / name
        return path.stat().st_size if path.exists() else 0

    path = str(tmp_path / "hang")
    command = [*hang.launcher(path), sys.executable, "-I", "-S", "-c", VICTIM]
    with subprocess.Popen(command, cwd=tmp_path) as launcher:
        try:
            until(lambda: size("main") and size("other"))
            pid = int((tmp_path / "main").read_text().split()[0])
            hang.ask(path, f"hang {pid}")
            stood_at, other_at = size("main"), size("other")
            os.kill(pid, signal.SIGCONT)
            until(lambda: size("other") > other_at)
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(1)
                client.connect(str(tmp_path / "socket"))
            assert size("main") == stood_at
            assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "t"

            hang.ask(path, "release")
            until(lambda: size("main") > stood_at)

            hang.ask(path, f"hang {pid}")
            os.kill(pid, signal.SIGKILL)
            assert launcher.wait(5) == 0
            with pytest.raises(OSError, match=r"No such file|refused"):
                hang.ask(path, "release")
        finally:
            launcher.kill()
