"""What all procedures share: how one is registered, refuses, and leaves its reason for ``explain``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from ha_core.ids import HostName, LogIndex
from ha_core.machines.failover.commands import Command, Outcome, RecordCommand
from ha_core.machines.failover.records import (
    Decision,
    DecisionCount,
    KvTransaction,
    Run,
    Settings,
)
from ha_core.machines.failover.shapes import shape_problem
from ha_core.machines.keyvalue.model import Plain

C = TypeVar("C", bound=Command)
Procedure = Callable[[KvTransaction, LogIndex, Sequence[Plain]], Plain]

PROCEDURES: Final[dict[str, Procedure]] = {}
"""Name -> procedure: what the key-value machine is given."""


def procedure(kind: type[C]) -> Callable[[Callable[[KvTransaction, LogIndex, C], Outcome]], Procedure]:
    """Register the function as the procedure of the command ``kind``."""

    def register(function: Callable[[KvTransaction, LogIndex, C], Outcome]) -> Procedure:
        def run(tx: KvTransaction, index: LogIndex, args: Sequence[Plain]) -> Plain:
            command = kind.decode(args)
            problem = shape_problem(command.record()) if isinstance(command, RecordCommand) else ""
            return (refuse(problem) if problem else function(tx, index, command)).encode()

        PROCEDURES[kind.name] = run
        return run

    return register


def refuse(reason: str) -> Outcome:
    return Outcome(False, 0, reason)


DONE = Outcome(True)


def settings_of(tx: KvTransaction) -> Settings:
    return Settings.get(tx, "all") or Settings()


def decide(
    tx: KvTransaction, index: LogIndex, kind: str, *, host: str = "", vm: str = "", token: int = 0, why: str = ""
) -> None:
    """Keep for ``explain`` what was done and why; the oldest decision makes room."""
    number = (DecisionCount.get(tx, "count") or DecisionCount()).last + 1
    DecisionCount(number).put(tx)
    Decision(number, index, kind, host, vm, token, why).put(tx)


def runs_on(tx: KvTransaction, host: HostName) -> list[Run]:
    return [run for run in Run.all(tx) if run.host == host]
