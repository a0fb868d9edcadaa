"""What a scenario may say and the player cannot play yet: refused before anything is played, never passed over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from ha_core.testing.scenario.model import Scenario, ScenarioError, Step

NO_LIVE = "no driver here moves a VM live; relocate stops and starts it"
NO_FENCING = "there is no fence device"
REFUSED_STEPS: Final = (
    ("fence", NO_FENCING),
    ("storage", "nothing uses shared storage for heartbeats or locks"),
)


def check_playable(scenario: Scenario) -> None:
    """Raises ScenarioError for the first thing that cannot be played, with its line."""
    for error in _problems(scenario):
        raise error


def _problems(scenario: Scenario) -> Iterator[ScenarioError]:
    yield from _cluster(scenario)
    yield from _vms(scenario)
    for step in scenario.steps:
        reason = _refused(step)
        if reason:
            yield scenario.error(f"[step]: {step.text!r} cannot be played yet: {reason}", "step", step.number - 1, "do")
    yield from _changes(scenario)


def _cluster(scenario: Scenario) -> Iterator[ScenarioError]:
    def refuse(key: str, value: object, reason: str) -> ScenarioError:
        return scenario.error(f"[cluster]: {key} = {value!r} {reason}", "cluster", 0, key)

    yet = "cannot be played yet: "
    if scenario.witness:
        yield refuse("witness", True, yet + "there is no witness")
    if scenario.fencing != "none":
        yield refuse("fencing", scenario.fencing, yet + NO_FENCING)
    if scenario.shutdown == "migrate":
        yield refuse("shutdown", "migrate", yet + NO_LIVE)
    on = [host.name for host in scenario.hosts if host.power and host.name not in _added(scenario, "host")]
    voters = [host.name for host in scenario.hosts if host.name not in _added(scenario, "host")][: scenario.voters]
    if len(voters) < scenario.voters:
        yield refuse("voters", scenario.voters, "but fewer hosts are in the cluster before a step adds them")
    if scenario.formed and 2 * len([name for name in voters if name in on]) <= len(voters):
        yield refuse("formed", True, f"but no majority of {', '.join(voters)} is on: nothing can form; say formed = false")
    if scenario.leader and scenario.leader not in voters:
        yield refuse("leader", scenario.leader, f"expected one of the voters {', '.join(voters)}")
    if scenario.leader and not scenario.formed:
        yield refuse("leader", scenario.leader, "needs formed = true: at a cold start whoever wins leads")
    if scenario.leader and scenario.leader not in on:
        yield refuse("leader", scenario.leader, "but it is off")


def _vms(scenario: Scenario) -> Iterator[ScenarioError]:
    for number, vm in enumerate(scenario.vms):
        if vm.safety == "fence":
            yield scenario.error(f"[vm]: safety = 'fence' cannot be played yet: {NO_FENCING}", "vm", number, "safety")
        if vm.fail_migrate:
            text = f"[vm]: fail_migrate = {vm.fail_migrate} cannot be played yet: {NO_LIVE}"
            yield scenario.error(text, "vm", number, "fail_migrate")


def _refused(step: Step) -> str:
    words = step.words
    for first, reason in REFUSED_STEPS:
        if words[0] == first:
            return reason
    if words[0] == "vm":
        match words[2]:
            case "migrate":
                return NO_LIVE
            case "moved":
                return "what an administrator moves by hand is not observed"
            case "load":
                return "no decision reads measured load"
    if words[0] == "clock" and words[2] == "rate" and not 0.5 <= float(words[3]) <= 2.0:
        return "expected a rate between 0.5 and 2"
    return ""


def _changes(scenario: Scenario) -> Iterator[ScenarioError]:
    """Hosts that are added later hold nothing before, and are added once."""
    for number, vm in enumerate(scenario.vms):
        if scenario.formed and vm.host in _added(scenario, "host") and vm.state == "started":
            yield scenario.error(f"[vm]: host = {vm.host!r} is added only by a step", "vm", number, "host")


def _added(scenario: Scenario, kind: str) -> list[str]:
    return [step.words[1] for step in scenario.steps if step.words[0] == kind and step.words[2] == "add"]
