"""The main job, as a user runs it: a real cluster, broken in every way, holds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration


def demo(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ha_core", "demo", "--json", "--keep", str(tmp_path / "kept"), *options]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=110)


def test_demo_holds(tmp_path: Path) -> None:
    result = demo(tmp_path)

    report = json.loads(result.stdout)
    assert report["ok"], (report, result.stderr)
    assert result.returncode == 0
    assert report["messages"]["delivered"] >= 1000
    assert report["double_activations"] == 0
    assert report["isolation_margin_ms"] > 0


def test_demo_holds_on_diskless_hosts(tmp_path: Path) -> None:
    result = demo(tmp_path, "--store", "flash")

    report = json.loads(result.stdout)
    assert report["ok"], (report, result.stderr)


def test_interrupted_demo_leaves_no_process_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ha_core", "demo", "--keep", str(tmp_path / "kept")]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=_heed_interrupts
    )
    time.sleep(6)  # some VMs run by now

    process.send_signal(signal.SIGINT)

    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert _processes_that_mention(str(tmp_path)) == []


def _processes_that_mention(text: str) -> list[str]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            try:
                words = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if text in words and "pytest" not in words:
                found.append(words)
    return found


def _heed_interrupts() -> None:
    """A shell's background jobs, and so the tests that run in one, inherit SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
