"""Reads and checks scenario files. Every mistake is a ScenarioError with the file, the line and what was expected."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import attrs

from ha_core.config import LAN, PROFILES, Profile
from ha_core.testing.scenario.lines import Lines
from ha_core.testing.scenario.model import STEPS, Expect, HostSpec, RuleSpec, Scenario, ScenarioError, Step, VmSpec
from ha_core.testing.scenario.tables import T, Table


def load_scenario(path: Path | str) -> Scenario:
    """Read and check a scenario file.

    Raises:
        ScenarioError: it cannot be read, or something in it is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is no UTF-8 text"
        raise ScenarioError(f"{path}: cannot read the scenario: {reason}", field="", value=str(path)) from exc
    return parse_scenario(text, str(path))


def parse_scenario(text: str, path: str = "scenario") -> Scenario:
    """The same for text; ``path`` is only named in errors."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        found = re.search(r"\(at line (\d+), column (\d+)\)", str(exc))
        line = found.group(1) if found else str(text.count("\n") + 1)
        reason = str(exc).partition(" (at ")[0]
        raise ScenarioError(f"{path}:{line}: no TOML: {reason}", field="", value=path) from exc
    return _Reader(path, Lines(text), data).scenario()


@attrs.define
class _Reader:
    path: str
    lines: Lines
    data: dict[str, object]
    hosts: dict[str, HostSpec] = attrs.field(factory=dict)
    vms: dict[str, VmSpec] = attrs.field(factory=dict)

    def scenario(self) -> Scenario:
        parts = {key: self.data.pop(key, None) for key in ("cluster", "host", "vm", "rule", "step", "expect", "profile")}
        head = Table(self, "", 0, self.data)
        title, until_s = head.take("title", str, ""), head.seconds("until")
        if until_s <= 0:
            raise head.fail("until", "the scenario: until = 0, expected seconds, more than 0")
        for table in self._tables("host", parts):
            self._add(self.hosts, table, self._host(table))
        if not self.hosts:
            raise head.fail("host", "the scenario: there is no [[host]]")
        tables = list(self._tables("vm", parts))
        names = [table.values.get("name") for table in tables]
        for table in tables:
            self._add(self.vms, table, self._vm(table, {name: None for name in names if isinstance(name, str)}))
        rules = [self._rule(table) for table in self._tables("rule", parts)]
        steps = [self._step(table, until_s) for table in self._tables("step", parts)]
        expects = [self._expect(table, until_s, steps) for table in self._tables("expect", parts)]
        cluster = parts["cluster"] if parts["cluster"] is not None else {}
        if not isinstance(cluster, dict):
            raise head.fail("cluster", "[cluster] must be a table")
        profile = self._profile(head, parts["profile"])
        head.end()
        return self._cluster(Table(self, "cluster", 0, cluster), title, until_s, profile, rules, steps, expects)

    def _tables(self, name: str, parts: Mapping[str, object]) -> Iterator[Table]:
        found = parts[name] if parts[name] is not None else []
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            raise ScenarioError(f"{self.path}:{self.lines.of(name)}: {name}: expected [[{name}]] tables", field=name)
        for number, values in enumerate(found):
            yield Table(self, name, number, values)

    def _add(self, into: dict[str, T], table: Table, spec: T) -> None:
        name = getattr(spec, "name")  # noqa: B009  # both kinds have one
        if name in into:
            raise table.fail("name", f"[{table.name}]: there are two of the name {name!r}")
        into[name] = spec
        table.end()

    def _profile(self, head: Table, value: object) -> Profile:
        if value is None:
            return LAN
        if isinstance(value, str) and value in PROFILES:
            return PROFILES[value]
        if isinstance(value, dict):
            try:
                return attrs.evolve(LAN, name="custom", **{key: float(amount) for key, amount in value.items()})
            except (TypeError, ValueError) as exc:
                raise ScenarioError(
                    f"{self.path}:{self.lines.of('profile')}: profile: {exc}", field="profile", value=value
                ) from exc
        raise head.fail(
            "profile", f"the scenario: profile = {value!r}, expected one of {', '.join(PROFILES)} or a table of timings"
        )

    def _name(self, table: Table) -> str:
        name = table.take("name", str)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise table.fail("name", f"{table.title}: name = {name!r}, expected letters, digits, '.', '-' and '_'")
        return name

    def _host(self, table: Table) -> HostSpec:
        return HostSpec(
            name=self._name(table),
            line=table.line,
            power=table.choice("power", ("on", "off"), "off") == "on",
            paths=table.count("paths", 2, 1),
            cpu_mhz=table.count("cpu_mhz", 8000, 1),
            memory_mib=table.count("memory_mib", 16384, 1),
            store=table.choice("store", ("sqlite", "flash"), "sqlite"),
        )

    def _vm(self, table: Table, vms: Mapping[str, object]) -> VmSpec:
        host = table.take("host", str, "")
        if host:
            table.known("host", host, self.hosts, "host")
        return VmSpec(
            name=self._name(table),
            line=table.line,
            host=host,
            state=table.choice("state", ("started", "stopped", "ignored"), "started"),
            priority=table.choice("priority", ("highest", "high", "medium", "low", "lowest", "disabled"), "medium"),
            after=table.names("after", vms, "VM"),
            cpu_mhz=table.count("cpu_mhz", 500),
            memory_mib=table.count("memory_mib", 512),
            fail_start=table.count("fail_start", 0),
            fail_start_on=self._fail_start_on(table),
            fail_stop=table.count("fail_stop", 0),
            fail_migrate=table.count("fail_migrate", 0),
            max_restart=table.count("max_restart", 1),
            max_relocate=table.count("max_relocate", 1),
            failback=table.take("failback", bool, True),
            shutdown_s=table.seconds("shutdown_s", 5.0),
            start_s=table.seconds("start_s", 1.0),
            safety=table.choice("safety", ("lease", "fence"), "lease"),
        )

    def _fail_start_on(self, table: Table) -> Mapping[str, int]:
        if isinstance(table.values.get("fail_start_on"), dict):
            return self._weights(table, "fail_start_on")
        return dict.fromkeys(table.names("fail_start_on", self.hosts, "host"), -1)

    def _weights(self, table: Table, key: str) -> Mapping[str, int]:
        """``{ host = number }``, or a list of hosts."""
        value = table.values.get(key, {})
        if isinstance(value, list):
            return dict.fromkeys(table.names(key, self.hosts, "host"), 1)
        if not isinstance(value, dict) or not all(type(weight) is int for weight in value.values()):
            raise table.fail(key, f"{table.title}: {key} = {value!r}, expected {{ host = number }}")
        for name in value:
            table.known(key, name, self.hosts, "host")
        table.values.pop(key, None)
        return dict(value)

    def _rule(self, table: Table) -> RuleSpec:
        kind = table.choice("kind", ("together", "apart", "prefer", "require"))
        rule = RuleSpec(
            line=table.line, kind=kind, vms=table.names("vms", self.vms, "VM"), hosts=self._weights(table, "hosts")
        )  # fmt: skip
        if not rule.vms:
            raise table.fail("vms", f"{table.title}: vms is missing, expected a list of names")
        if (kind in ("prefer", "require")) != bool(rule.hosts):
            raise table.fail("hosts", f"{table.title}: hosts go with prefer and require, and only with them")
        table.end()
        return rule

    # -- steps --

    def _step(self, table: Table, until_s: float) -> Step:
        at_s, text = table.seconds("at"), table.take("do", str)
        if at_s > until_s:
            raise table.fail("at", f"[step]: at = {at_s:g} is after the end, until = {until_s:g}")
        table.end()
        words = text.split()
        for pattern in STEPS:
            if self._fits(pattern.split(), words):
                break
        else:
            same = [pattern for pattern in STEPS if words and pattern.split()[0] == words[0]]
            near = same or difflib.get_close_matches(text, STEPS, 1, 0.0)
            raise table.fail("do", f"[step]: {text!r} is no step, expected {' or '.join(repr(pattern) for pattern in near)}")
        for part, word in zip(pattern.split(), words, strict=True):
            self._check_word(table, text, part, word)
        if pattern.startswith("path"):
            self._check_path(table, text, words)
        return Step(table.number + 1, at_s, table.line, words)

    @staticmethod
    def _fits(pattern: Sequence[str], words: Sequence[str]) -> bool:
        """Whether the words that stand for themselves are all there."""
        same_length = len(pattern) == len(words)
        return same_length and all(part.isupper() or word in part.split("|") for part, word in zip(pattern, words, strict=True))

    def _check_word(self, table: Table, text: str, part: str, word: str) -> None:
        match part:
            case "HOST":
                if word not in self.hosts:
                    raise table.fail(
                        "do", f"[step]: {text!r}: there is no host {word!r}, expected one of {', '.join(self.hosts)}"
                    )
            case "VM":
                if word not in self.vms:
                    known = ", ".join(self.vms) or "none"
                    raise table.fail("do", f"[step]: {text!r}: there is no VM {word!r}, expected one of {known}")
            case "PATH":
                self._number(
                    table, text, word, "the number of a path, 1 or more", lambda number: number >= 1 and number % 1 == 0
                )
            case "SHARE":
                self._number(table, text, word, "a share from 0 to 1", lambda number: 0 <= number <= 1)
            case "SECONDS":
                self._number(table, text, word, "seconds, at least 0", lambda number: 0 <= number < 1e9)
            case "AMOUNT":
                self._number(table, text, word, "an integer, at least 0", lambda number: number >= 0 and number % 1 == 0)
            case "NUMBER":
                self._number(table, text, word, "a number", lambda number: abs(number) < 1e12)

    @staticmethod
    def _number(table: Table, text: str, word: str, what: str, good: Callable[[float], bool]) -> None:
        try:
            number = float(word)
        except ValueError:
            number = float("nan")
        if not good(number):
            raise table.fail("do", f"[step]: {text!r}: {word!r} is not {what}")

    def _check_path(self, table: Table, text: str, words: Sequence[str]) -> None:
        paths = self.hosts[words[1]].paths
        if int(words[2]) > paths:
            raise table.fail("do", f"[step]: {text!r}: {words[1]} has only {paths} paths")

    # -- expectations --

    def _expect(self, table: Table, until_s: float, steps: Sequence[Step]) -> Expect:
        after_step = table.count("after_step", 0)
        if after_step > len(steps):
            raise table.fail("after_step", f"[expect]: after_step = {after_step}, but there are only {len(steps)} steps")
        vm = table.take("vm", str, "")
        if vm:
            table.known("vm", vm, self.vms, "VM")
        host = table.take("host", str, "") or None
        if host not in (None, "any", "none"):
            table.known("host", host, self.hosts, "host")
        expect = Expect(
            line=table.line,
            at_s=table.seconds("at", until_s),
            after_step=after_step,
            vm=vm,
            host=host,
            within_s=table.seconds("within") if "within" in table.values else None,
            not_on=table.names("not_on", self.hosts, "host"),
            state=table.choice("state", ("started", "stopped", "failed", "ignored")) if "state" in table.values else None,
            undisturbed=table.take("undisturbed", bool) if "undisturbed" in table.values else None,
            order=table.names("order", self.vms, "VM"),
            overlaps=table.count("overlaps", 0) if "overlaps" in table.values else None,
            fenced=table.names("fenced", self.hosts, "host") if "fenced" in table.values else None,
            leader=table.take("leader", str) if "leader" in table.values else None,
            messages_lost=table.count("messages_lost", 0) if "messages_lost" in table.values else None,
            rules=table.take("rules", bool) if "rules" in table.values else None,
            host_state=self._host_states(table),
        )
        self._check_expect(table, expect)
        table.end()
        return expect

    def _host_states(self, table: Table) -> Mapping[str, str]:
        value = table.values.pop("host_state", {})
        if not isinstance(value, dict) or not all(isinstance(state, str) for state in value.values()):
            raise table.fail("host_state", '[expect]: host_state, expected { host = "state" }')
        for name in value:
            table.known("host_state", name, self.hosts, "host")
        return dict(value)

    def _check_expect(self, table: Table, expect: Expect) -> None:
        of_vm = [expect.host, expect.within_s, expect.not_on or None, expect.state, expect.undisturbed]
        if not expect.vm and any(part is not None for part in of_vm):
            raise table.fail("", "[expect]: host, within, not_on, state and undisturbed need a vm")
        if expect.leader not in (None, "any", "none"):
            table.known("leader", expect.leader or "", self.hosts, "host")
        whole = [expect.overlaps, expect.fenced, expect.leader, expect.messages_lost, expect.rules]
        if not (expect.vm or expect.order or expect.host_state) and all(part is None for part in whole):
            raise table.fail("", "[expect]: nothing is expected")
        if expect.vm and all(part is None for part in of_vm):
            raise table.fail("vm", f"[expect]: nothing is expected of {expect.vm}")
        if expect.within_s is not None and not expect.after_step:
            raise table.fail("within", "[expect]: within counts from a step: name it with after_step")

    # -- the cluster --

    def _cluster(
        self, table: Table, title: str, until_s: float, profile: Profile, rules: Sequence[RuleSpec], steps: Sequence[Step],
        expects: Sequence[Expect],
    ) -> Scenario:  # fmt: skip
        leader = table.take("leader", str, "")
        if leader:
            table.known("leader", leader, self.hosts, "host")
        retries = table.take("retries", list, [0, 120, 360, 840, 1800])
        if not retries or any(type(item) not in (int, float) or item < 0 for item in retries) or sorted(retries) != retries:
            raise table.fail("retries", f"[cluster]: retries = {retries!r}, expected seconds in ascending order")
        added = {step.words[1] for step in steps if step.words[0] == "host" and step.words[2] == "add"}
        scenario = Scenario(
            path=self.path,
            title=title,
            profile=profile,
            until_s=until_s,
            voters=table.count("voters", max(1, min(3, len(self.hosts) - len(added))), 1),
            witness=table.take("witness", bool, False),
            leader=leader,
            formed=table.take("formed", bool, True),
            admission=self._admission(table),
            retries_s=tuple(float(item) for item in retries),
            fencing=table.choice("fencing", ("none", "ok", "fail", "slow"), "none"),
            shutdown=table.choice("shutdown", ("migrate", "failover", "freeze", "conditional"), "conditional"),
            messages_per_s=table.seconds("messages_per_s", 0.0),
            hosts=tuple(self.hosts.values()),
            vms=tuple(self.vms.values()),
            rules=tuple(rules),
            steps=tuple(sorted(steps, key=lambda step: step.at_s)),
            expects=tuple(expects),
            lines=self.lines,
        )
        if scenario.voters > min(5, len(self.hosts)):
            raise table.fail("voters", f"[cluster]: voters = {scenario.voters}, expected at most {min(5, len(self.hosts))}")
        table.end()
        return scenario

    def _admission(self, table: Table) -> tuple[str, int, Sequence[str]]:
        inner = Table(self, "cluster", 0, table.take("admission", dict, {}), inside="admission")
        policy = inner.choice("policy", ("none", "host-failures", "percentage", "failover-hosts"), "none")
        hosts = inner.names("hosts", self.hosts, "host")
        tolerate = inner.count("tolerate", 1 if policy == "host-failures" else 0)
        inner.end()
        return policy, tolerate, hosts
