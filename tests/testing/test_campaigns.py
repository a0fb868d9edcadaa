"""The runner: seeds on several interpreters, coverage demanded, violations with the command that replays them."""

from __future__ import annotations

import json

import attrs
import pytest
from click.testing import CliRunner

from ha_core.cli.simulate import simulate
from ha_core.errors import ConfigError
from ha_core.machines.contract import Effect, Event
from ha_core.testing.campaigns import load_campaign
from ha_core.testing.campaigns.ping import PingCampaign
from ha_core.testing.campaigns.runner import parse_seeds, run_campaign
from ha_core.testing.simulator import SECOND, SimProcess, Simulation

HERE = "tests.testing.test_campaigns"


class NeverCampaign:
    """Lists what it never does."""

    name = "never"
    faults = (*PingCampaign.faults, "earthquake")
    invariants = (*PingCampaign.invariants, "I99")

    def play(self, sim: Simulation) -> None:
        PingCampaign().play(sim)


class BadCampaign:
    """Violates I1 in every third seed."""

    name = "bad"
    invariants = ("I1",)
    faults = ()

    def play(self, sim: Simulation) -> None:
        sim.checked("I1")
        sim.at(SECOND // 2, sim.trace, "half")
        sim.run_for(SECOND)
        if sim.seed % 3 == 0:
            sim.violate("I1", "gone")


class HashCampaign:
    """Depends on the hash seed, as no campaign may."""

    name = "hash"
    invariants = ()
    faults = ()

    def play(self, sim: Simulation) -> None:
        sim.trace(hash("text"))


class BrokenCampaign:
    name = "broken"
    invariants = ()
    faults = ()

    def play(self, sim: Simulation) -> None:
        raise KeyError("campaign's own fault")


@attrs.frozen
class Nothing(Effect):
    pass


class Ticker:
    """Steps for as long as the simulation lasts, every 10 us."""

    def __init__(self) -> None:
        self.next_ns = 0

    def receive(self, events: object, now_ns: int) -> None: ...

    def handle_timer(self, now_ns: int) -> None:
        self.next_ns = now_ns + 10_000

    def next_timer(self) -> int | None:
        return self.next_ns

    def take_effects(self) -> list[Effect]:
        return [Nothing()]

    def persisted(self, number: int, now_ns: int) -> None: ...
    def persist_failed(self, number: int, error: str, now_ns: int) -> None: ...


def test_result_adds_up_seeds_of_both_hash_seeds_and_equals_itself() -> None:
    one, other = (run_campaign("ping", 1, 6, jobs=jobs) for jobs in (1, 2))

    assert one == other
    assert (one.seeds, one.first, one.last, one.ok) == (6, 1, 6, True)
    assert one.checks["I26"] == 6
    assert one.faults["crash"] > 0


def test_compared_seeds_have_equal_traces_and_a_campaign_that_uses_hash_is_caught() -> None:
    assert run_campaign("ping", 1, 2, compare=True).checks["I31"] == 2

    result = run_campaign(f"{HERE}:HashCampaign", 1, 1, compare=True)

    assert [found.invariant for found in result.violations] == ["I31"]


def test_an_unexercised_fault_or_invariant_fails_a_campaign_of_many_seeds() -> None:
    few = run_campaign(f"{HERE}:NeverCampaign", 1, 2)
    many = run_campaign(f"{HERE}:NeverCampaign", 1, 8, demand_coverage=True)

    assert few.ok
    assert not many.ok
    assert "fault earthquake" in many.unexercised
    assert "invariant I99" in many.unexercised


def test_violations_carry_seed_time_and_the_command_that_replays_them() -> None:
    outcome = CliRunner().invoke(simulate, ["--campaign", f"{HERE}:BadCampaign", "--seeds", "1..6", "--json"])
    report = json.loads(outcome.stdout)

    assert outcome.exit_code == 1
    assert [(found["seed"], found["invariant"], found["at"]) for found in report["violations"]] == [
        (3, "I1", 1.0),
        (6, "I1", 1.0),
    ]
    assert report["violations"][0]["replay"] == f"ha-core simulate --campaign {HERE}:BadCampaign --seed 3 --trace"
    assert {"seeds", "steps", "faults", "violations", "trace_hash"} <= set(report)


def test_the_replayed_seed_shows_its_trace() -> None:
    outcome = CliRunner().invoke(simulate, ["--campaign", f"{HERE}:BadCampaign", "--seed", "3", "--trace"])

    assert outcome.exit_code == 1
    assert "    0.500000 half" in outcome.stdout
    assert "VIOLATED I1 at 1.000000 s: gone" in outcome.stdout


def test_text_output_says_what_failed_and_how_to_replay_it() -> None:
    outcome = CliRunner().invoke(simulate, ["--campaign", f"{HERE}:BrokenCampaign", "--seeds", "1..1"])

    assert outcome.exit_code == 1
    assert "VIOLATED error in seed 1" in outcome.stdout
    assert f"REPLAY: ha-core simulate --campaign {HERE}:BrokenCampaign --seed 1 --trace" in outcome.stdout


@pytest.mark.parametrize("text", ["", "x", "3..", "5..4", "1...4", "-1..4"])
def test_a_wrong_seed_range_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected 'A\.\.B'"):
        parse_seeds(text)


@pytest.mark.parametrize(("text", "seeds"), [("7", (7, 7)), ("0..3", (0, 3))])
def test_a_seed_range_is_first_and_last(text: str, seeds: tuple[int, int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("name", ["nothing", "no_such_module:X", f"{HERE}:NoSuchClass"])
def test_an_unknown_campaign_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="campaign"):
        load_campaign(name)


@pytest.mark.parametrize("arguments", [[], ["x.toml", "--campaign", "ping"], ["--campaign", "ping", "--trace"]])
def test_usage_errors_exit_with_two(arguments: list[str]) -> None:
    assert CliRunner().invoke(simulate, arguments).exit_code == 2


def test_ten_thousand_steps_take_less_than_a_second() -> None:
    sim = Simulation(1)
    process = SimProcess(sim, "n1", lambda process: Ticker(), wake_ns=0)
    process.on(Nothing, lambda effect: None)

    sim.run_for(10_000 * 10_000)

    assert sim.steps >= 10_000
    assert isinstance(sim.trace_hash, str)
    assert Event.__doc__
