"""Every scenario file of this folder is played, and holds; what a play prints depends on the file and the seed alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ha_core.cli.simulate import simulate
from ha_core.testing.scenario import STEPS, load_scenario, parse_scenario, play_scenario, tell

FOLDER = Path(__file__).parent
FILES = sorted(FOLDER.glob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_scenario_holds(path: Path) -> None:
    result = play_scenario(load_scenario(path))

    assert result.expectations, "a scenario that expects nothing proves nothing"
    assert result.ok, "\n".join(tell(result))


def test_there_are_scenarios() -> None:
    assert len(FILES) >= 10


def test_example_of_the_manual_holds() -> None:
    manual = (FOLDER.parent.parent / "docs" / "scenarios.md").read_text()
    example = manual.partition("```toml\n")[2].partition("```")[0]

    result = play_scenario(parse_scenario(example, "docs/scenarios.md"))

    assert len(result.expectations) == 4
    assert result.ok, "\n".join(tell(result))


def test_manual_names_every_step() -> None:
    manual = (FOLDER.parent.parent / "docs" / "scenarios.md").read_text()

    assert [pattern for pattern in STEPS if f"`{pattern.split()[0]}" not in manual] == []


@pytest.mark.parametrize("name", ["host_dies", "disk_lost"])
def test_equal_seeds_print_equal_bytes_whatever_the_hash_seed(name: str) -> None:
    run = "from ha_core.cli.main import main; main()"
    command = [sys.executable, "-c", run, "simulate", str(FOLDER / f"{name}.toml"), "--json", "--seed", "7"]
    one, other = (
        subprocess.run(command, capture_output=True, check=True, env={**os.environ, "PYTHONHASHSEED": hash_seed}).stdout
        for hash_seed in ("1", "2")
    )

    assert one == other
    assert json.loads(one)["seed"] == 7


def test_another_seed_is_another_play_of_the_same_story() -> None:
    one, other = (play_scenario(load_scenario(FOLDER / "leader_dies.toml"), seed) for seed in (1, 2))

    assert one.trace_hash != other.trace_hash
    assert one.ok
    assert other.ok


def test_command_tells_the_story_and_exits_with_zero() -> None:
    outcome = CliRunner().invoke(simulate, [str(FOLDER / "host_dies.toml")])

    assert outcome.exit_code == 0
    assert "STEP 1: power node1 off" in outcome.stdout
    assert "vm100" in outcome.stdout
    assert "failover of node1 (power node1 off)" in outcome.stdout
