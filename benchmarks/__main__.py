"""``python -m benchmarks NAME [CASE] [--json] [--quick]``: see README.md beside this file."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import cast

from benchmarks.harness import SEED, Benchmark, Result, Size, run_benchmark

NAMES = ("messages", "session", "database", "paths", "failover", "flash")


def load(name: str) -> Benchmark:
    return cast(Benchmark, importlib.import_module(f"benchmarks.{name}"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure ha-core beside its peers.")
    parser.add_argument("name", choices=[*NAMES, "all"])
    parser.add_argument("case", nargs="?", default="", help="only this case")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="few and short repetitions: tells whether it works, not how fast")
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args(argv)
    size: Size = "smoke" if arguments.smoke else "quick" if arguments.quick else "full"

    def report(result: Result) -> None:
        print(result.as_json() if arguments.json else result.as_text(), flush=True)

    names = NAMES if arguments.name == "all" else (arguments.name,)
    well = [run_benchmark(name, load(name), size, report, only=arguments.case, seed=arguments.seed) for name in names]
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
