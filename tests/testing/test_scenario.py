"""Scenario files: what is well formed is read whole, and each mistake is named with its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from ha_core.cli.simulate import simulate
from ha_core.config import FAST, LAN
from ha_core.testing.scenario import STEPS, ScenarioError, load_scenario, parse_scenario

WHOLE = """\
title = "one host dies"
profile = "fast"
until = 60.0

[cluster]
voters = 3
leader = "node1"
admission = { policy = "host-failures", tolerate = 1 }
retries = [0, 120, 360.5]

[[host]]
name = "node1"
power = "on"
[[host]]
name = "node2"
cpu_mhz = 4000
[[host]]
name = "node3"

[[vm]]
name = "vm100"
host = "node1"
[[vm]]
name = "vm101"
after = ["vm100"]
priority = "high"
fail_start_on = { node2 = 2 }

[[rule]]
kind = "prefer"
vms = ["vm100"]
hosts = { node1 = 2, node2 = 1 }

[[step]]
at = 10.0
do = "power node1 off"
[[step]]
at = 5
do = "link node1 -> node2 off"

[[expect]]
vm = "vm101"
host = "node2"
within = 3.0
after_step = 1
[[expect]]
order = ["vm100", "vm101"]
after_step = 1
[[expect]]
overlaps = 0
fenced = ["node1"]
host_state = { node2 = "maintenance" }
"""
HOST = 'until = 1\n[[host]]\nname = "n1"\n'
VM = HOST + '[[vm]]\nname = "v1"\n'


def test_whole_scenario_is_read() -> None:
    scenario = parse_scenario(WHOLE)

    assert (scenario.profile, scenario.until_s, scenario.voters, scenario.leader) == (FAST, 60.0, 3, "node1")
    assert scenario.admission == ("host-failures", 1, ())
    assert scenario.retries_s == (0.0, 120.0, 360.5)
    assert [(host.name, host.power, host.cpu_mhz) for host in scenario.hosts] == [
        ("node1", True, 8000), ("node2", False, 4000), ("node3", False, 8000),
    ]  # fmt: skip
    assert scenario.vms[1].after == ("vm100",)
    assert scenario.vms[1].fail_start_on == {"node2": 2}
    assert scenario.rules[0].hosts == {"node1": 2, "node2": 1}
    assert scenario.expects[0].within_s == 3.0
    assert scenario.expects[2].fenced == ("node1",)


def test_steps_come_in_order_of_time_and_keep_their_number() -> None:
    steps = parse_scenario(WHOLE).steps

    assert [(step.number, step.at_s, step.text) for step in steps] == [
        (2, 5.0, "link node1 -> node2 off"), (1, 10.0, "power node1 off"),
    ]  # fmt: skip


def test_defaults_are_those_of_the_documentation() -> None:
    scenario = parse_scenario(VM)

    assert (scenario.profile, scenario.voters, scenario.formed, scenario.shutdown) == (LAN, 1, True, "conditional")
    assert scenario.retries_s == (0.0, 120.0, 360.0, 840.0, 1800.0)
    assert (scenario.vms[0].shutdown_s, scenario.vms[0].start_s, scenario.vms[0].failback) == (5.0, 1.0, True)


@pytest.mark.parametrize("pattern", STEPS)
def test_each_step_of_the_table_is_understood(pattern: str) -> None:
    words = {
        "HOST": "n1", "VM": "v1", "PATH": "2", "SHARE": "0.1", "SECONDS": "2.5", "AMOUNT": "100", "NUMBER": "-1.005",
    }  # fmt: skip
    text = " ".join(words.get(part, part.split("|")[-1]) for part in pattern.split())

    (step,) = parse_scenario(VM + f'[[step]]\nat = 0.5\ndo = "{text}"\n').steps

    assert step.text == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("until = ", "s.toml:1: no TOML: Invalid value"),
        ("title = 'x'\n", "s.toml:1: the scenario: until is missing, expected a number"),
        ("until = 0\n", "s.toml:1: the scenario: until = 0, expected seconds, more than 0"),
        ("until = 1\n", "s.toml:1: the scenario: there is no [[host]]"),
        ("until = 1\ncolour = 2\n[[host]]\nname = 'a'\n", "s.toml:2: the scenario: unknown key 'colour'"),
        ("profile = 'lam'\n" + HOST, "s.toml:1: the scenario: profile = 'lam', expected one of lan, fast, aam or a table"),
        (HOST + "[[host]]\nname = 'n1'\n", "s.toml:5: [host]: there are two of the name 'n1'"),
        (HOST + "[[host]]\nname = 'n 2'\n", "s.toml:5: [host]: name = 'n 2', expected letters"),
        (HOST + "\npower = 'maybe'\n", "s.toml:5: [host]: power = 'maybe', expected one of on, off"),
        (HOST + "paths = 0\n", "s.toml:4: [host]: paths = 0, expected at least 1"),
        (HOST + "paths = '2'\n", "s.toml:4: [host]: paths = '2', expected an integer"),
        (HOST + "pahts = 2\n", "s.toml:4: [host]: unknown key 'pahts'"),
        (VM + "host = 'n2'\n", "s.toml:6: [vm]: there is no host 'n2', expected one of n1"),
        (VM + "after = ['v2']\n", "s.toml:6: [vm]: there is no VM 'v2', expected one of v1"),
        (VM + "after = [1]\n", "s.toml:6: [vm]: after = [1], expected a list of names"),
        (VM + "priority = 'urgent'\n", "s.toml:6: [vm]: priority = 'urgent', expected one of highest, high, medium"),
        (VM + "shutdown_s = -1\n", "s.toml:6: [vm]: shutdown_s = -1.0, expected seconds, at least 0"),
        (VM + "[[rule]]\nkind = 'apart'\n", "s.toml:6: [rule]: vms is missing"),
        (VM + "[[rule]]\nkind = 'prefer'\nvms = ['v1']\n", "s.toml:6: [rule]: hosts go with prefer and require"),
        (VM + "[[step]]\nat = 2\ndo = 'arm'\n", "s.toml:7: [step]: at = 2 is after the end, until = 1"),
        (VM + "[[step]]\nat = 1\n", "s.toml:6: [step]: do is missing, expected a string"),
        (VM + "[[step]]\nat = 1\ndo = 'power n1 of'\n", "s.toml:8: [step]: 'power n1 of' is no step, expected 'power HOST on|off'"),
        (VM + "[[step]]\nat = 1\ndo = 'powr n1 on'\n", "s.toml:8: [step]: 'powr n1 on' is no step, expected 'power HOST on|off'"),
        (VM + "[[step]]\nat = 1\ndo = 'power n2 on'\n", "s.toml:8: [step]: 'power n2 on': there is no host 'n2', expected one of n1"),
        (VM + "[[step]]\nat = 1\ndo = 'crash-vm w'\n", "s.toml:8: [step]: 'crash-vm w': there is no VM 'w', expected one of v1"),
        (VM + "[[step]]\nat = 1\ndo = 'network n1 loss 2'\n", "s.toml:8: [step]: 'network n1 loss 2': '2' is not a share from 0 to 1"),
        (VM + "[[step]]\nat = 1\ndo = 'freeze n1 soon'\n", "s.toml:8: [step]: 'freeze n1 soon': 'soon' is not seconds, at least 0"),
        (VM + "[[step]]\nat = 1\ndo = 'path n1 3 off'\n", "s.toml:8: [step]: 'path n1 3 off': n1 has only 2 paths"),
        (VM + "[[expect]]\nvm = 'v1'\n", "s.toml:7: [expect]: nothing is expected of v1"),
        (VM + "[[expect]]\nat = 1\n", "s.toml:6: [expect]: nothing is expected"),
        (VM + "[[expect]]\nhost = 'n1'\n", "s.toml:6: [expect]: host, within, not_on, state and undisturbed need a vm"),
        (VM + "[[expect]]\nvm = 'v1'\nwithin = 1\n", "s.toml:8: [expect]: within counts from a step"),
        (VM + "[[expect]]\noverlaps = 0\nafter_step = 1\n", "s.toml:8: [expect]: after_step = 1, but there are only 0 steps"),
        (HOST + "[cluster]\nvoters = 2\n", "s.toml:5: [cluster]: voters = 2, expected at most 1"),
        (HOST + "[cluster]\nretries = [2, 1]\n", "s.toml:5: [cluster]: retries = [2, 1], expected seconds in ascending order"),
        (HOST + "[cluster]\nquorum = 2\n", "s.toml:5: [cluster]: unknown key 'quorum'"),
        (HOST + "[cluster]\nadmission = { policy = 'x' }\n", "s.toml:5: [cluster]: policy = 'x', expected one of none"),
        ("host = 1\nuntil = 1\n", "s.toml:1: host: expected [[host]] tables"),
    ],
)  # fmt: skip
def test_mistake_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        parse_scenario(text, "s.toml")

    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="cannot read the scenario: No such file"):
        load_scenario(tmp_path / "none.toml")


def test_command_refuses_a_faulty_scenario(tmp_path: Path) -> None:
    path = tmp_path / "faulty.toml"
    path.write_text("until = 1\n")

    outcome = CliRunner().invoke(simulate, [str(path)])

    assert isinstance(outcome.exception, ScenarioError)
