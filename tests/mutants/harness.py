"""Applies a planted bug to a copy of the package and says whether the tests notice.

A mutant is caught only if its invariant is reported violated while the original passes the same seed: the remembered seed is
tried first, then fifty more. Mutants of shells, which no seed can reach, are caught by a named test that fails and names the
invariant, while the same test passes on the original.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import attrs

import ha_core
from ha_core.testing.campaigns import load_campaign, play_seed

ROOT = Path(__file__).parent.parent.parent
MORE_SEEDS = 50
LIMIT_S = 300
_WORKER = (
    "import sys; import ha_core.testing.campaigns.worker as worker; "
    "assert worker.__file__.startswith(sys.argv[1]), worker.__file__; worker.main(sys.argv[2:])"
)


@attrs.frozen(kw_only=True)
class Mutant:
    """A planted bug of docs/pitfalls.md: in ``file`` (below ``ha_core/``, ``storage/`` or ``transports/``), ``old`` (found exactly
    once) becomes ``new``; that must violate ``invariant`` in ``campaign`` (``seed`` is remembered) or in the test ``test``."""

    name: str
    file: str
    old: str
    new: str
    invariant: str
    campaign: str = ""
    seed: int = 1
    test: str = ""
    """``tests/...py::test_name``: a process test, or one of a store, for what no campaign reaches."""


@attrs.frozen
class Verdict:
    """``seed`` is the one that caught it (None: a test did); ``text`` is what was reported, or why it was not caught."""

    caught: bool
    seed: int | None
    text: str


def mutated_source(mutant: Mutant, source: str) -> str:
    """Raises ValueError: the old text is not there, or not only once."""
    count = source.count(mutant.old)
    if count != 1:
        raise ValueError(f"{mutant.name}: found {count} times in {mutant.file}, expected once: {mutant.old!r}")
    return source.replace(mutant.old, mutant.new)


@contextmanager
def mutated_package(mutant: Mutant) -> Iterator[Path]:
    """A folder with a copy of the package that has the bug; goes first into PYTHONPATH."""
    with TemporaryDirectory(prefix="ha-core-mutant-") as folder:
        root = Path(folder)
        shutil.copytree(Path(ha_core.__file__).parent, root / "ha_core")  # links followed, compiled files and times kept
        path = root / mutant.file if mutant.file.startswith("ha_core/") else root / "ha_core" / mutant.file
        path.write_text(mutated_source(mutant, path.read_text()))
        yield root


def try_mutant(mutant: Mutant, *, more_seeds: int = MORE_SEEDS) -> Verdict:
    """Whether the mutant is caught."""
    with mutated_package(mutant) as root:
        if mutant.test:
            return _try_test(mutant, root)
        seeds = [mutant.seed, *(seed for seed in range(1, more_seeds + 1) if seed != mutant.seed)]
        for seed, text in violating_seeds(mutant, root, seeds):
            original = play_seed(load_campaign(mutant.campaign), seed)
            if original.violations:
                return Verdict(False, seed, f"the original fails on that seed, too: {original.violations[0]}")
            return Verdict(True, seed, text)
    return Verdict(False, None, f"no violation of {mutant.invariant} in {len(seeds)} seeds of {mutant.campaign}")


def violating_seeds(mutant: Mutant, root: Path, seeds: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Seeds under which the copy in ``root`` violates the mutant's invariant, as they are found."""
    command = [sys.executable, "-P", "-c", _WORKER, str(root), mutant.campaign, *map(str, seeds)]
    with subprocess.Popen(
        command, env=_environment(root), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                result = json.loads(line)
                for violation in result["violations"]:
                    if violation["invariant"] == mutant.invariant:
                        yield result["seed"], violation["text"]
                        break
            if process.wait():
                assert process.stderr is not None
                raise RuntimeError(f"{mutant.name}: the copy does not run:\n{process.stderr.read()[-2000:]}")
        finally:
            process.kill()


def _try_test(mutant: Mutant, root: Path) -> Verdict:
    failed = _run_test(mutant.test, root)
    if failed.returncode == 0:
        return Verdict(False, None, f"{mutant.test} passes")
    if mutant.invariant not in failed.stdout:
        return Verdict(False, None, f"{mutant.test} fails, but does not name {mutant.invariant}:\n{failed.stdout[-2000:]}")
    original = _run_test(mutant.test, Path(ha_core.__file__).parent.parent)
    if original.returncode:
        return Verdict(False, None, f"the original fails {mutant.test}, too:\n{original.stdout[-2000:]}")
    return Verdict(True, None, f"{mutant.test} fails and names {mutant.invariant}")


def _run_test(test: str, root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--seed", "1", test]
    return subprocess.run(
        command, cwd=ROOT, env=_environment(root), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def _environment(root: Path) -> dict[str, str]:
    path = os.pathsep.join([str(root), *filter(None, sys.path)])
    return {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
