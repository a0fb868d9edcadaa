"""Whether what a scenario expects has come about, and what came about instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ha_core.config import ns
from ha_core.machines.failover.records import Rule, RuleKind
from ha_core.testing.scenario.model import Expect, Step
from ha_core.testing.scenario.record import Record
from ha_core.testing.scenario.result import Verdict
from ha_core.testing.scenario.state import State


class Judge:
    """``state`` reads the cluster as it is at the moment of the judgement."""

    def __init__(self, record: Record, state: State, steps: Sequence[Step]) -> None:
        self.record = record
        self.state = state
        self._at_ns = {step.number: ns(step.at_s) for step in steps}

    def judge(self, expect: Expect) -> list[Verdict]:
        since_ns = self._at_ns.get(expect.after_step, 0)
        found = [*self._of_vm(expect, since_ns), *self._of_all(expect, since_ns)]
        where = f" after step {expect.after_step}" if expect.after_step else ""
        at = "" if expect.at_s >= self.state.until_s else f" at {expect.at_s:g} s"
        return [Verdict(ok, f"{what}{where}{at}: {seen}") for ok, what, seen in found]

    # -- one VM --

    def _of_vm(self, expect: Expect, since_ns: int) -> Iterator[tuple[bool, str, str]]:
        vm, now_ns = expect.vm, self.record.now_ns()
        here = self.record.host_at(vm, now_ns)
        if expect.host is not None and expect.within_s is not None:
            yield self._within(vm, expect.host, since_ns, ns(expect.within_s))
        elif expect.host is not None:
            ok = here is not None if expect.host == "any" else here == (None if expect.host == "none" else expect.host)
            yield ok, f"{vm} runs on {expect.host}", f"it runs on {here or 'none'}"
        elif expect.within_s is not None:
            yield self._within(vm, "any", since_ns, ns(expect.within_s))
        if expect.not_on:
            began = [run.host for run in self.record.of(vm) if run.from_ns >= max(1, since_ns)]
            bad = [host for host in began if host in expect.not_on]
            bad += [here] if here in expect.not_on and here is not None else []
            yield not bad, f"{vm} does not run on {', '.join(expect.not_on)}", f"it did on {bad[0]}" if bad else "it did not"
        if expect.state is not None:
            state = self.state.vm_state(vm)
            yield state == expect.state, f"{vm} is {expect.state}", f"it is {state}"
        if expect.undisturbed is not None:
            runs = [run for run in self.record.of(vm) if run.to_ns is None or run.to_ns > since_ns]
            undisturbed = len(runs) == 1 and runs[0].to_ns is None and (not since_ns or runs[0].from_ns <= since_ns)
            what = "undisturbed" if expect.undisturbed else "disturbed"
            yield undisturbed == expect.undisturbed, f"{vm} is {what}", f"{len(runs)} runs"

    def _within(self, vm: str, host: str, since_ns: int, within_ns: int) -> tuple[bool, str, str]:
        """A start was issued there in time, or it ran there all along."""
        until_ns = since_ns + within_ns
        what = f"{vm} starts on {host} within {within_ns / 1e9:g} s"
        if host == "none":
            left = self.record.host_at(vm, min(until_ns, self.record.now_ns()))
            return left is None, f"{vm} runs nowhere within {within_ns / 1e9:g} s", f"it runs on {left or 'none'}"
        starts = [start for start in self.record.starts(vm, since_ns) if host in ("any", start.host)]
        if starts:
            took_ns = starts[0].at_ns - since_ns
            return took_ns <= within_ns, what, f"on {starts[0].host} after {took_ns / 1e9:.3f} s"
        stays = [
            run.host for run in self.record.of(vm) if run.runs_at(since_ns) and run.to_ns is None and host in ("any", run.host)
        ]
        return bool(stays), what, f"it stays on {stays[0]}" if stays else "it was not started there"

    # -- the whole cluster --

    def _of_all(self, expect: Expect, since_ns: int) -> Iterator[tuple[bool, str, str]]:
        if expect.order:
            yield self._order(expect.order, since_ns)
        if expect.overlaps is not None:
            overlaps = self.state.overlaps()
            yield overlaps == expect.overlaps, f"{expect.overlaps} overlaps", f"{overlaps} were seen"
        if expect.fenced is not None:
            fenced = sorted({str(host) for at_ns, host in self.record.fenced if at_ns >= since_ns})
            wanted = sorted(set(expect.fenced))
            yield fenced == wanted, f"fenced: {', '.join(wanted) or 'none'}", f"fenced were {', '.join(fenced) or 'none'}"
        if expect.leader is not None:
            leader = self.state.leader()
            ok = (
                leader is not None if expect.leader == "any" else leader == (None if expect.leader == "none" else expect.leader)
            )
            yield ok, f"{expect.leader} leads", f"{leader or 'none'} leads"
        if expect.messages_lost is not None:
            lost = self.state.messages().lost
            yield lost == expect.messages_lost, f"{expect.messages_lost} messages lost", f"{lost} were lost"
        if expect.rules is not None:
            broken = list(self._broken_rules())
            what = "every rule holds" if expect.rules else "some rule is broken"
            yield (not broken) == expect.rules, what, "; ".join(broken) or "all hold"
        for host, wanted_state in expect.host_state.items():
            state = self.state.host_state(host)
            yield state == wanted_state, f"{host} is {wanted_state}", f"it is {state}"

    def _order(self, order: Sequence[str], since_ns: int) -> tuple[bool, str, str]:
        starts = {vm: [start.at_ns for start in self.record.starts(vm, since_ns)][:1] for vm in order}
        known = [when[0] for when in starts.values() if when]
        seen = ", ".join(f"{vm} {when[0] / 1e9:.3f} s" if when else f"{vm} never" for vm, when in starts.items())
        return len(known) == len(order) and known == sorted(known), f"started in the order {', '.join(order)}", seen

    def _broken_rules(self) -> Iterator[str]:
        now_ns = self.record.now_ns()
        for rule in self.state.rules():
            places = {vm: host for vm in rule.vms if (host := self.record.host_at(vm, now_ns)) is not None}
            if not self._holds(rule, list(places.values())):
                where = ", ".join(f"{vm} on {host}" for vm, host in places.items())
                yield f"{rule.kind.value} of {', '.join(rule.vms)} is broken: {where}"

    def _holds(self, rule: Rule, hosts: Sequence[str]) -> bool:
        match rule.kind:
            case RuleKind.TOGETHER:
                return len(set(hosts)) <= 1
            case RuleKind.APART:
                return len(set(hosts)) == len(hosts)
            case RuleKind.REQUIRE:
                return all(host in dict(rule.hosts) for host in hosts)
            case RuleKind.PREFER:
                # It bends while none of its hosts can be had.
                open_hosts = [host for host, _ in rule.hosts if self.state.host_state(host) == "online"]
                return not open_hosts or all(host in dict(rule.hosts) for host in hosts)
