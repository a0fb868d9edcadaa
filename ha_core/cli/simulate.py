"""``ha-core simulate``: campaigns of many seeds, one seed with its trace, and scenario files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NoReturn

import attrs
import click

from ha_core.testing.campaigns import CAMPAIGNS, SeedResult, load_campaign, play_seed
from ha_core.testing.campaigns.runner import CampaignResult, parse_seeds, replay_command, run_campaign
from ha_core.testing.scenario import load_scenario, play_scenario, tell
from ha_core.testing.simulator import Simulation, TraceField


@click.command()
@click.argument("scenario", type=click.Path(path_type=Path), required=False)
@click.option("--campaign", metavar="NAME", help=f"Play a campaign: {', '.join(CAMPAIGNS)}, or module:class for your own.")
@click.option("--seeds", metavar="A..B", default="1..100", show_default=True, help="The seeds of a campaign.")
@click.option("--seed", type=int, help="One seed (of a campaign, or for a scenario).")
@click.option("--jobs", type=click.IntRange(0), default=0, help="Worker processes; 0: one a core.")
@click.option("--compare", is_flag=True, help="Play each seed under two PYTHONHASHSEEDs and demand equal traces.")
@click.option("--trace", is_flag=True, help="With --campaign and --seed: print every step.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def simulate(
    scenario: Path | None,
    campaign: str | None,
    seeds: str,
    seed: int | None,
    jobs: int,
    compare: bool,
    trace: bool,
    as_json: bool,
) -> None:
    """Play a SCENARIO file, or a campaign of many seeds, in virtual time.

    The exit status is 0 when every invariant and expectation holds, 1 when one does not, 2 for faulty input.
    """
    if (scenario is None) == (campaign is None):
        raise click.UsageError("expected either a scenario file or --campaign NAME")
    if scenario is not None:
        if trace or compare:
            raise click.UsageError("--trace and --compare go with --campaign")
        _play_scenario(scenario, seed if seed is not None else 1, as_json)
    assert campaign is not None
    if trace:
        if seed is None:
            raise click.UsageError("--trace shows one seed: give it with --seed N")
        _show_trace(campaign, seed)
    first, last = (seed, seed) if seed is not None else parse_seeds(seeds)
    result = _run_with_progress(campaign, first, last, jobs, compare)
    if as_json:
        print(json.dumps(_as_json(result)))
    else:
        _tell(result)
    sys.exit(0 if result.ok else 1)


def _run_with_progress(campaign: str, first: int, last: int, jobs: int, compare: bool) -> CampaignResult:
    total = (last - first + 1) * (2 if compare else 1)
    if not sys.stderr.isatty():
        return run_campaign(campaign, first, last, jobs=jobs, compare=compare)
    with click.progressbar(length=total, label=campaign, file=sys.stderr, show_pos=True) as bar:

        def on_seed(result: SeedResult) -> None:
            bar.update(1)
            if result.violations:
                bar.label = f"{campaign} (seed {result.seed}: {result.violations[0].invariant} violated)"

        return run_campaign(campaign, first, last, jobs=jobs, compare=compare, on_seed=on_seed)


def _as_json(result: CampaignResult) -> dict[str, object]:
    return {
        "campaign": result.campaign,
        "first": result.first,
        "last": result.last,
        "seeds": result.seeds,
        "steps": result.steps,
        "virtual_s": round(result.virtual_s, 3),
        "faults": result.faults,
        "checks": result.checks,
        "violations": [
            {**attrs.asdict(found), "replay": replay_command(result.campaign, found.seed)} for found in result.violations
        ],
        "unexercised": result.unexercised,
        "trace_hash": result.trace_hash,
        "ok": result.ok,
    }


def _tell(result: CampaignResult) -> None:
    print(
        f"{result.campaign}: {result.seeds} seeds ({result.first}..{result.last}), {result.steps:,} steps, "
        f"{result.virtual_s:,.0f} virtual seconds, trace {result.trace_hash}"
    )
    print("faults: " + (", ".join(f"{kind} {count:,}" for kind, count in result.faults.items()) or "none"))
    print("checked: " + (", ".join(f"{number} {count:,}" for number, count in result.checks.items()) or "nothing"))
    for found in result.violations:
        print(f"VIOLATED {found.invariant} in seed {found.seed} at {found.at:.6f} s: {found.text}")
    for seed in sorted({found.seed for found in result.violations}):
        print(f"REPLAY: {replay_command(result.campaign, seed)}")
    for what in result.unexercised:
        print(f"NEVER EXERCISED: {what}")
    print("ok" if result.ok else "failed")


def _show_trace(campaign: str, seed: int) -> None:
    sim = Simulation(seed, keep_trace=True)
    result = play_seed(load_campaign(campaign), seed, sim=sim)
    for when_ns, *fields in sim.lines or ():
        assert isinstance(when_ns, int)
        print(f"{when_ns / 1e9:12.6f} {' '.join(map(_show, fields))}")
    for found in result.violations:
        print(f"VIOLATED {found.invariant} at {found.at:.6f} s: {found.text}")
    print(f"seed {seed}: {result.steps:,} steps, trace {result.trace_hash}")
    sys.exit(1 if result.violations else 0)


def _show(field: TraceField) -> str:
    return field.hex() if isinstance(field, bytes) else str(field)


def _play_scenario(path: Path, seed: int, as_json: bool) -> NoReturn:
    result = play_scenario(load_scenario(path), seed)
    if as_json:
        print(json.dumps(result.as_json()))
    else:
        print("\n".join(tell(result)))
    sys.exit(0 if result.ok else 1)
