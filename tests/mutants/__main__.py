"""``python -m tests.mutants [--seeds N] [NAME...]``: try planted bugs, all by default, and say what caught them."""

from __future__ import annotations

import sys
import time

import click

from tests.mutants.harness import MORE_SEEDS, try_mutant
from tests.mutants.mutants import MUTANTS


@click.command()
@click.option("--seeds", default=MORE_SEEDS, show_default=True, help="How many seeds besides the remembered one.")
@click.argument("names", nargs=-1)
def main(seeds: int, names: tuple[str, ...]) -> None:
    survived = 0
    for mutant in MUTANTS:
        if names and mutant.name.split()[0] not in names:
            continue
        began = time.perf_counter()
        verdict = try_mutant(mutant, more_seeds=seeds)
        survived += not verdict.caught
        how = f"by seed {verdict.seed}" if verdict.seed is not None else ""
        word = "caught" if verdict.caught else "SURVIVED"
        print(f"{word} {how} in {time.perf_counter() - began:.1f} s: {mutant.name}: {verdict.text}", flush=True)
    sys.exit(1 if survived else 0)


main()
