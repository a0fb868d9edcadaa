"""Every planted bug of the tables is caught, and the harness itself can tell a caught one from a surviving one."""

from __future__ import annotations

import attrs
import pytest

import ha_core
from tests.mutants.harness import Mutant, mutated_source, try_mutant
from tests.mutants.mutants import MUTANTS

PING = "ha_core/testing/campaigns/ping.py"
EAGER = Mutant(
    name="ping answers before the write", file=PING, campaign="ping", invariant="I52",
    old='self._gate.put(Send(event.sender, b"%d" % self.pings), number)',
    new='self._gate.put(Send(event.sender, b"%d" % self.pings))',
)  # fmt: skip
HARMLESS = Mutant(
    name="nothing", file=PING, campaign="ping", invariant="I52",
    old="self._next_ns = now_ns + SECOND", new="self._next_ns = now_ns + SECOND + 1",
)  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_planted_bug_is_caught(mutant: Mutant) -> None:
    verdict = try_mutant(mutant)

    assert verdict.caught, verdict.text


def test_names_are_unique_and_each_bug_is_reached_one_way() -> None:
    names = [mutant.name for mutant in MUTANTS]

    assert len(set(names)) == len(names)
    assert [mutant.name for mutant in MUTANTS if bool(mutant.campaign) == bool(mutant.test)] == []


def test_harness_catches_a_bug_and_keeps_the_seed() -> None:
    verdict = try_mutant(EAGER, more_seeds=30)

    assert verdict.caught
    assert verdict.seed is not None


def test_harness_lets_a_harmless_change_survive() -> None:
    verdict = try_mutant(HARMLESS, more_seeds=3)

    assert not verdict.caught
    assert "no violation of I52" in verdict.text


def test_bug_caught_by_the_wrong_invariant_survives() -> None:

    assert not try_mutant(attrs.evolve(EAGER, invariant="I1"), more_seeds=3).caught


@pytest.mark.parametrize("old", ["no such text", "self"])
def test_old_text_must_be_found_exactly_once(old: str) -> None:

    with pytest.raises(ValueError, match="expected once"):
        mutated_source(attrs.evolve(EAGER, old=old), "self and self")


def test_test_mutant_is_caught_only_if_the_failing_test_names_the_invariant() -> None:
    test = "tests/mutants/test_mutants.py::test_witness_of_the_harness"
    bug = Mutant(
        name="release", file="ha_core/_version.py", old='__version__ = "', new='__version__ = "666', invariant="I99", test=test
    )

    assert try_mutant(bug).caught
    assert "does not name" in try_mutant(attrs.evolve(bug, invariant="I98")).text
    assert "passes" in try_mutant(attrs.evolve(HARMLESS, campaign="", test=test)).text


def test_witness_of_the_harness() -> None:
    """Stands in for a process test, in the test above."""
    assert not ha_core.__version__.startswith("666"), "I99 is violated"
