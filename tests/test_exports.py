"""The public names, and that importing the folders under their bare names is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["transports", "storage"])
def test_bare_import_is_refused_with_the_right_name(name: str) -> None:
    result = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)

    assert result.returncode != 0
    assert f"import this package as ha_core.{name}" in result.stderr
