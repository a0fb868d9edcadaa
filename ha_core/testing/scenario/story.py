"""A play told to a person in a terminal: how it stood, what happened, what became of it."""

from __future__ import annotations

from collections.abc import Iterator

from ha_core.testing.scenario.record import FailoverSeen, RunSeen
from ha_core.testing.scenario.result import PlayResult, VmResult


def tell(result: PlayResult) -> Iterator[str]:
    """The lines of the text output."""
    yield f"{result.title or 'a scenario'} (seed {result.seed}, {result.until_s:g} virtual seconds)"
    yield ""
    yield "AT THE START"
    yield from (f"  {line}" for line in result.opening)
    yield ""
    yield "WHAT HAPPENED"
    width = max((len(line.subject) for line in result.lines), default=0)
    for line in result.lines:
        if line.subject.startswith("step "):
            yield f"  {line.at_ns / 1e9:9.3f}  {'-' * width}  {line.subject.upper()}: {line.text}"
        else:
            yield f"  {line.at_ns / 1e9:9.3f}  {line.subject:{width}}  {line.text}"
    if not result.lines:
        yield "  nothing"
    yield ""
    yield "AT THE END"
    yield from _end(result)
    yield ""
    yield from _verdicts(result)


def _end(result: PlayResult) -> Iterator[str]:
    width = max(map(len, (*result.hosts, *result.vms)))
    for name, host in result.hosts.items():
        fenced = f", fenced at {', '.join(f'{at / 1e9:.3f}' for at in host.fenced_ns)} s" if host.fenced_ns else ""
        yield f"  {name:{width}}  {host.state}, {host.role}{fenced}"
    for name, vm in result.vms.items():
        yield f"  {name:{width}}  {_vm(vm)}"
    for failover in result.failovers:
        yield f"  failover of {_failover(failover)}"
    sent = result.messages
    if sent.sent:
        waiting = sent.sent - sent.delivered - sent.lost - sent.dead_letters
        yield (
            f"  messages: {sent.sent:,} sent, {sent.delivered:,} delivered, {sent.duplicates} duplicates, {sent.lost} lost, "
            f"{waiting:,} on their way{f', {sent.dead_letters} dead letters' if sent.dead_letters else ''}"
        )


def _vm(vm: VmResult) -> str:
    runs = "; ".join(map(_run, vm.runs))
    return f"{vm.state}{f' on {vm.host}' if vm.host else ''}" + (f"  (ran on {runs})" if runs else "")


def _run(run: RunSeen) -> str:
    return f"{run.host} {run.from_ns / 1e9:.3f} to {'now' if run.to_ns is None else f'{run.to_ns / 1e9:.3f}'}"


def _failover(failover: FailoverSeen) -> str:
    declared_s = (failover.declared_ns - failover.fault_ns) / 1e9
    starts = [at_ns for at_ns in failover.vms.values() if at_ns is not None]
    waits = [vm for vm, at_ns in sorted(failover.vms.items()) if at_ns is None]
    text = f"{failover.host} ({failover.cause}): declared after {declared_s:.3f} s"
    if starts:
        text += f", {len(starts)} of {len(failover.vms)} starts issued after {(max(starts) - failover.fault_ns) / 1e9:.3f} s"
    return text + (f", not started: {', '.join(waits)}" if waits else "")


def _verdicts(result: PlayResult) -> Iterator[str]:
    for verdict in result.expectations:
        yield f"{'ok    ' if verdict.ok else 'FAILED'}  {verdict.text}"
    for found in result.violations:
        yield f"VIOLATED {found.invariant} at {found.at:.6f} s: {found.text}"
    if not result.violations:
        checks = ", ".join(f"{number} {count:,}" for number, count in sorted(result.checks.items()))
        yield f"ok      no invariant was violated (checks: {checks})"
    yield f"trace {result.trace_hash}: {'ok' if result.ok else 'failed'}"
