"""What all benchmarks share: sizes, repetitions interleaved with the peers', medians, and one line a result.

A benchmark is a module with ``SIZES`` (parameters by size: ``smoke`` for the tests, ``quick``, ``full``) and
``cases(parameters, seed)``. A case measures ours and any number of peers: one warm-up each, then repetition by repetition in
turn, so that what disturbs the machine disturbs all of them. Figures of different machines say little; the ratio of one run does.
"""

from __future__ import annotations

import json
import os
import platform
import sqlite3
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import attrs

ROOT = Path(__file__).resolve().parent.parent
SEED = 20_240_917
Size = Literal["smoke", "quick", "full"]
Measure = Callable[[], Sequence[float]]
"""One repetition: its samples."""


@attrs.frozen(kw_only=True)
class Goal:
    words: str
    met: Callable[[float, float | None], bool | None] = lambda value, peer: None
    """(our figure, the peer's or None) -> met, or None if it cannot be judged."""


@attrs.frozen
class Peer:
    name: str
    measure: Measure
    goal: Goal


@attrs.frozen(kw_only=True)
class Case:
    """``figure`` turns all samples into the one that is compared; ``goal`` is judged without a peer."""

    name: str
    unit: str
    measure: Measure
    goal: Goal
    peers: Sequence[Peer] = ()
    repetitions: int = 1
    warm_up: bool = True
    figure: Callable[[Sequence[float]], float] = statistics.median


class Benchmark(Protocol):
    """What a module of this package offers."""

    SIZES: Mapping[str, object]

    def cases(self, parameters: object, seed: int) -> Sequence[Case]: ...


@attrs.frozen
class Result:
    bench: str
    case: str
    value: float
    unit: str
    min: float
    max: float
    repetitions: int
    peer: Mapping[str, str | float] | None
    goal: str
    met: bool | None
    env: Mapping[str, str | int]

    def as_json(self) -> str:
        return json.dumps(attrs.asdict(self, recurse=False))

    def as_text(self) -> str:
        beside = "" if self.peer is None else f"; {self.peer['name']}: {self.peer['value']:,} {self.unit}"
        verdict = {True: "met", False: "NOT MET", None: "not judged"}[self.met]
        spread = f"{self.min:,} to {self.max:,}, {self.repetitions} repetitions"
        return f"{self.bench} {self.case}: {self.value:,} {self.unit} ({spread}){beside}. Goal: {self.goal}: {verdict}"


def at_least(value: float) -> Callable[[float, float | None], bool]:
    return lambda figure, peer: figure >= value


def at_most(value: float) -> Callable[[float, float | None], bool]:
    return lambda figure, peer: figure <= value


def times_peer(factor: float) -> Callable[[float, float | None], bool | None]:
    """At least so many times the peer's figure."""
    return lambda figure, peer: None if peer is None else figure >= factor * peer


def percentile(samples: Sequence[float], percent: float) -> float:
    """The smallest sample that is not exceeded by ``percent`` of them."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def p99(samples: Sequence[float]) -> float:
    return percentile(samples, 99)


def environment(size: str, seed: int, parameters: object) -> Mapping[str, str | int]:
    return {
        "commit": _commit(), "cpu": _cpu(), "cpus": os.cpu_count() or 0, "kernel": platform.release(),
        "python": platform.python_version(), "sqlite": sqlite3.sqlite_version, "size": size, "seed": seed,
        "parameters": str(parameters),
    }  # fmt: skip


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, timeout=10, check=False
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def run_case(bench: str, case: Case, env: Mapping[str, str | int]) -> list[Result]:
    """Measure ours and the peers in turn; a line for each peer, or one without."""
    measures = [case.measure, *(peer.measure for peer in case.peers)]
    samples: list[list[float]] = [[] for _ in measures]
    medians: list[list[float]] = [[] for _ in measures]
    if case.warm_up:
        for measure in measures:
            measure()
    for _ in range(case.repetitions):
        for measure, all_samples, per_repetition in zip(measures, samples, medians, strict=True):
            found = measure()
            all_samples.extend(found)
            per_repetition.append(case.figure(found))
    figures = [_rounded(case.figure(found)) for found in samples]
    spread = medians[0] if case.repetitions > 1 else samples[0]

    def result(goal: Goal, peer: Mapping[str, str | float] | None, other: float | None) -> Result:
        return Result(
            bench=bench, case=case.name, value=figures[0], unit=case.unit, min=_rounded(min(spread)), max=_rounded(max(spread)),
            repetitions=case.repetitions, peer=peer, goal=goal.words, met=goal.met(figures[0], other), env=env,
        )  # fmt: skip

    if not case.peers:
        return [result(case.goal, None, None)]
    return [
        result(peer.goal, {"name": peer.name, "value": figure}, figure)
        for peer, figure in zip(case.peers, figures[1:], strict=True)
    ]


def _rounded(value: float) -> float:
    """Four significant digits: more would pretend."""
    return float(f"{value:.4g}")


def run_benchmark(
    name: str, module: Benchmark, size: Size, report: Callable[[Result], None], *, only: str = "", seed: int = SEED
) -> bool:
    """Run every case (or the one named ``only``); False if a goal was judged and not met."""
    parameters = module.SIZES[size]
    env = environment(size, seed, parameters)
    well = True
    for case in module.cases(parameters, seed):
        if only and case.name != only:
            continue
        if size == "smoke":  # the peers have tests of their own
            case = attrs.evolve(case, warm_up=False, peers=())
        for result in run_case(name, case, env):
            report(result)
            well = well and result.met is not False
    return well
