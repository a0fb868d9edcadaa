from __future__ import annotations

import os
from pathlib import Path

from ha_core.guard.agents import BeatSocket


def test_nobody_else_can_beat_for_an_agent(tmp_path: Path) -> None:
    """Whatever the umask, and whatever became of the mode of the run directory."""
    before = os.umask(0)
    try:
        beats = BeatSocket(str(tmp_path), "guard")
    finally:
        os.umask(before)

    assert (tmp_path / "guard.beat").stat().st_mode & 0o777 == 0o600
    beats.close()
