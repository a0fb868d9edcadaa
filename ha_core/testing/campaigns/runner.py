"""Plays a range of seeds on all cores and adds up what happened.

Each worker is an interpreter of its own with a PYTHONHASHSEED of its own: even seeds run under one, odd seeds under another; a
compared seed runs under both, and its two traces must be equal (I31).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b

import attrs
import cattrs

from ha_core.errors import ConfigError
from ha_core.testing.campaigns import Campaign, SeedResult, load_campaign
from ha_core.testing.simulator.core import merge_counts

HASH_SEEDS = ("0", "4242")
COVERAGE_SEEDS = 50
"""From so many seeds on, every fault kind and invariant that the campaign lists must have been exercised."""
_CHUNK = 25


@attrs.frozen
class FoundViolation:
    """``at`` is in virtual seconds."""

    seed: int
    invariant: str
    at: float
    text: str


@attrs.frozen
class CampaignResult:
    campaign: str
    first: int
    last: int
    seeds: int
    steps: int
    virtual_s: float
    faults: Mapping[str, int]
    checks: Mapping[str, int]
    violations: Sequence[FoundViolation]
    unexercised: Sequence[str]
    """Fault kinds and invariants that the campaign lists and no seed exercised."""
    trace_hash: str
    """Digest of all seeds' trace hashes, in the order of the seeds."""
    hashes: Mapping[int, str]

    @property
    def ok(self) -> bool:
        return not self.violations and not self.unexercised


def parse_seeds(text: str) -> tuple[int, int]:
    """``A..B`` or ``N`` as first and last seed.

    Raises:
        ConfigError: it is something else, or the range is empty.
    """
    first, dots, last = text.partition("..")
    if not first.isdecimal() or (dots and not last.isdecimal()) or (dots and int(last) < int(first)):
        raise ConfigError(f"seeds: {text!r} is no range, expected 'A..B' with A <= B", field="seeds", value=text)
    return int(first), int(last) if dots else int(first)


def replay_command(campaign: str, seed: int) -> str:
    return f"ha-core simulate --campaign {campaign} --seed {seed} --trace"


def run_campaign(
    name: str,
    first: int,
    last: int,
    *,
    jobs: int = 0,
    compare: bool = False,
    demand_coverage: bool | None = None,
    on_seed: Callable[[SeedResult], None] | None = None,
) -> CampaignResult:
    """Play seeds ``first`` to ``last``; ``jobs`` 0: one worker a core. ``on_seed`` is called from other threads, one at a time.

    Args:
        compare: play each seed under two PYTHONHASHSEEDs and demand equal traces.
        demand_coverage: whether unexercised faults and invariants count; None: from ``COVERAGE_SEEDS`` seeds on.

    Raises:
        ConfigError: there is no such campaign.
    """
    campaign = load_campaign(name)
    seeds = range(first, last + 1)
    jobs = jobs or len(os.sched_getaffinity(0))
    results: dict[int, SeedResult] = {}
    twins: dict[int, SeedResult] = {}
    lock = threading.Lock()

    def play(hash_seed: str, chunk: Sequence[int]) -> None:
        for result in _worker(name, hash_seed, chunk):
            with lock:
                (twins if result.seed in results else results)[result.seed] = result
                if on_seed is not None:
                    on_seed(result)

    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(play, *task) for task in _tasks(seeds, jobs, compare)]:
            future.result()
    if demand_coverage is None:
        demand_coverage = len(seeds) >= COVERAGE_SEEDS
    return _add_up(campaign, name, [results[seed] for seed in seeds], twins, demand_coverage)


def _tasks(seeds: Sequence[int], jobs: int, compare: bool) -> Iterator[tuple[str, Sequence[int]]]:
    size = max(1, min(_CHUNK, -(-len(seeds) // (2 * jobs))))
    for parity, hash_seed in enumerate(HASH_SEEDS):
        mine = [seed for seed in seeds if compare or seed % 2 == parity]
        for start in range(0, len(mine), size):
            yield hash_seed, mine[start : start + size]


def _worker(name: str, hash_seed: str, seeds: Sequence[int]) -> Iterator[SeedResult]:
    """Results of ``seeds`` from a new interpreter that finds the same packages as this one."""
    command = [sys.executable, "-P", "-m", "ha_core.testing.campaigns.worker", name, *map(str, seeds)]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            done = 0
            for line in process.stdout:
                yield cattrs.structure(json.loads(line), SeedResult)
                done += 1
            if process.wait() or done < len(seeds):
                raise RuntimeError(f"campaign {name}: the worker ended with status {process.returncode} at seed {seeds[done]}")
        finally:
            process.kill()


def _add_up(
    campaign: Campaign, name: str, results: Sequence[SeedResult], twins: Mapping[int, SeedResult], demand_coverage: bool
) -> CampaignResult:
    faults: dict[str, int] = {}
    checks: dict[str, int] = {}
    violations: list[FoundViolation] = []
    digest = blake2b(digest_size=16)
    for result in results:
        merge_counts(faults, result.faults)
        merge_counts(checks, result.checks)
        digest.update(bytes.fromhex(result.trace_hash))
        violations += [FoundViolation(result.seed, found.invariant, found.at, found.text) for found in result.violations]
        twin = twins.get(result.seed)
        if twin is not None:
            checks["I31"] = checks.get("I31", 0) + 1
            if twin.trace_hash != result.trace_hash:
                text = f"traces differ under PYTHONHASHSEED {HASH_SEEDS[0]} and {HASH_SEEDS[1]}"
                violations.append(FoundViolation(result.seed, "I31", result.virtual_s, text))
    unexercised: list[str] = []
    if demand_coverage:
        unexercised = [f"fault {kind}" for kind in campaign.faults if not faults.get(kind)]
        unexercised += [f"invariant {number}" for number in campaign.invariants if not checks.get(number)]
    return CampaignResult(
        campaign=name,
        first=results[0].seed,
        last=results[-1].seed,
        seeds=len(results),
        steps=sum(result.steps for result in results),
        virtual_s=sum(result.virtual_s for result in results),
        faults=dict(sorted(faults.items())),
        checks=dict(sorted(checks.items())),
        violations=violations,
        unexercised=unexercised,
        trace_hash=digest.hexdigest(),
        hashes={result.seed: result.trace_hash for result in results},
    )
