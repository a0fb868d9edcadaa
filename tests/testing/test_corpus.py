"""Seeds that once found a bug find it no more."""

from __future__ import annotations

from pathlib import Path

import pytest

from ha_core.testing.campaigns import load_campaign, play_seed

LINES = (Path(__file__).parent.parent / "corpus.txt").read_text().splitlines()
SEEDS = [line.split(maxsplit=2) for line in LINES if line and not line.startswith("#")]


@pytest.mark.parametrize(("campaign", "seed", "found"), SEEDS, ids=[f"{line[0]}-{line[1]}" for line in SEEDS])
def test_seed_that_found_a_bug_holds(campaign: str, seed: str, found: str) -> None:
    result = play_seed(load_campaign(campaign), int(seed))

    assert result.violations == (), found
