"""The outcome of a play, as ``--json`` prints it and as expectations are judged on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from ha_core.testing.scenario.record import FailoverSeen, Line, RunSeen
from ha_core.testing.simulator import Violation

NS_PER_S = 1_000_000_000


def seconds(ns: int) -> float:
    """Microseconds are enough to read, and the same everywhere."""
    return round(ns / NS_PER_S, 6)


@attrs.frozen
class Verdict:
    """An expectation and whether it held."""

    ok: bool
    text: str


@attrs.frozen
class VmResult:
    host: str | None
    state: str
    runs: Sequence[RunSeen]


@attrs.frozen
class HostResult:
    state: str
    role: str
    fenced_ns: Sequence[int]


@attrs.frozen
class MessagesResult:
    sent: int = 0
    delivered: int = 0
    duplicates: int = 0
    lost: int = 0
    dead_letters: int = 0


@attrs.frozen(kw_only=True)
class PlayResult:
    title: str
    seed: int
    until_s: float
    trace_hash: str
    opening: Sequence[str]
    """How it stood at t = 0."""
    lines: Sequence[Line]
    vms: Mapping[str, VmResult]
    hosts: Mapping[str, HostResult]
    failovers: Sequence[FailoverSeen]
    messages: MessagesResult
    expectations: Sequence[Verdict]
    checks: Mapping[str, int]
    violations: Sequence[Violation]

    @property
    def ok(self) -> bool:
        return not self.violations and all(verdict.ok for verdict in self.expectations)

    def as_json(self) -> dict[str, object]:
        return {
            "seed": self.seed,
            "until": self.until_s,
            "trace_hash": self.trace_hash,
            "vms": {name: _vm(vm) for name, vm in self.vms.items()},
            "hosts": {
                name: {"state": host.state, "role": host.role, "fenced_at": [seconds(at) for at in host.fenced_ns]}
                for name, host in self.hosts.items()
            },
            "failovers": [
                {
                    "cause": failover.cause,
                    "host": failover.host,
                    "fault_at": seconds(failover.fault_ns),
                    "declared_at": seconds(failover.declared_ns),
                    "vms": {name: None if at is None else seconds(at) for name, at in sorted(failover.vms.items())},
                }
                for failover in self.failovers
            ],
            "messages": attrs.asdict(self.messages),
            "expectations": [attrs.asdict(verdict) for verdict in self.expectations],
            "invariants": {
                "checked": dict(sorted(self.checks.items())),
                "violated": [{"id": one.invariant, "at": one.at, "text": one.text} for one in self.violations],
            },
        }


def _vm(vm: VmResult) -> dict[str, object]:
    runs = [
        {
            "host": run.host,
            "from": seconds(run.from_ns),
            "to": None if run.to_ns is None else seconds(run.to_ns),
            "token": run.token,
            "why": run.why,
            "ended": run.ended,
        }
        for run in vm.runs
    ]
    return {"host": vm.host, "state": vm.state, "runs": runs}
