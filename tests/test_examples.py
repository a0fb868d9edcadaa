"""Every example and every Python snippet of the README runs as written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def run(tmp_path: Path, code: str) -> str:
    script = tmp_path / "example.py"
    script.write_text(code)
    result = subprocess.run(
        [sys.executable, "-W", "error", str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_there_is_something_to_run() -> None:
    assert SNIPPETS
    assert EXAMPLES


@pytest.mark.integration
@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_readme_snippet_runs_as_written(number: int, tmp_path: Path) -> None:
    assert run(tmp_path, SNIPPETS[number])


@pytest.mark.integration
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_as_written(path: Path, tmp_path: Path) -> None:
    assert run(tmp_path, path.read_text())
