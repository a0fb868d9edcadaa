"""Processes of a benchmark: started with one JSON argument, they answer on stdout, one JSON object a line.

A worker is a module of this package that calls ``work(main)``; ``main`` gets the argument and returns or prints its answers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import trio

from benchmarks.harness import ROOT

TIMEOUT_S = 120.0
Answer = dict[str, Any]


class Worker:
    """One process; its ``pid`` is ended with the context at the latest."""

    def __init__(self, module: str, role: str, argument: Mapping[str, object]) -> None:
        argv = [sys.executable, "-m", module, role, json.dumps(argument)]
        self._process = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._what = f"{module} {role}"
        self.pid = self._process.pid

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._process:
            self._process.kill()

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def answer(self, timeout_s: float = TIMEOUT_S) -> Answer:
        """The next line; raises RuntimeError if the process ends or stays silent instead."""
        assert self._process.stdout is not None
        timer = threading.Timer(timeout_s, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise RuntimeError(f"{self._what} gave no answer (exit code {self._process.wait()})")
        found: Answer = json.loads(line)
        return found


class Workers(ExitStack):
    """``with Workers() as workers: one = workers.start(module, role, argument)``."""

    def start(self, module: str, role: str, argument: Mapping[str, object]) -> Worker:
        return self.enter_context(Worker(module, role, argument))


def say(**answer: object) -> None:
    print(json.dumps(answer), flush=True)


def work(roles: Mapping[str, Callable[[Answer], None]]) -> None:
    """The main of a worker module: its role and its argument are on the command line."""
    roles[sys.argv[1]](json.loads(sys.argv[2]))


def work_async(roles: Mapping[str, Callable[[Answer], Awaitable[None]]]) -> None:
    """``work`` for roles that run under trio."""
    trio.run(roles[sys.argv[1]], json.loads(sys.argv[2]))
