"""The player: what it cannot play is refused up front, every other step does what it says, and the result has its documented shape."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
from click.testing import CliRunner

from ha_core.cli.simulate import simulate
from ha_core.testing.scenario import STEPS, PlayResult, ScenarioError, parse_scenario, play_scenario, tell
from ha_core.testing.scenario.playable import check_playable

HOSTS = "".join(f'[[host]]\nname = "n{number}"\npower = "on"\n' for number in (1, 2, 3))
VM = '[[vm]]\nname = "v1"\nhost = "n1"\n'
NEVER = ("fence", "storage")
NOT_YET = ("migrate", "moved", "load")


def play(body: str, *, until: float = 10, head: str = "", hosts: str = HOSTS, seed: int = 1) -> PlayResult:
    return play_scenario(parse_scenario(f"until = {until}\n{head}\n{hosts}{body}"), seed)


def step(at: float, text: str) -> str:
    return f'[[step]]\nat = {at}\ndo = "{text}"\n'


def told(result: PlayResult, subject: str = "") -> list[str]:
    return [line.text for line in result.lines if subject in ("", line.subject)]


def variants(pattern: str) -> list[str]:
    """Every way to fill in a pattern of ``STEPS``."""
    words = {
        "HOST": "n1", "VM": "v1", "PATH": "2", "SHARE": "0.1", "SECONDS": "0.2", "AMOUNT": "100", "NUMBER": "1.001",
    }  # fmt: skip
    texts = [" ".join(choice) for choice in product(*(words.get(part, part).split("|") for part in pattern.split()))]
    return [text.replace("link n1 n1", "link n1 n2").replace("link n1 -> n1", "link n1 -> n2") for text in texts]


ALL_STEPS = [text for pattern in STEPS for text in variants(pattern)]


def is_refused(text: str) -> bool:
    words = text.split()
    return words[0] in NEVER or (words[0] == "vm" and words[2] in NOT_YET)


# -- refusals --


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[cluster]\nwitness = true\n", "s.toml:13: [cluster]: witness = True cannot be played yet: there is no witness"),
        ("[cluster]\nfencing = 'ok'\n", "s.toml:13: [cluster]: fencing = 'ok' cannot be played yet: there is no fence device"),
        ("[cluster]\nshutdown = 'migrate'\n", "s.toml:13: [cluster]: shutdown = 'migrate' cannot be played yet: no driver"),
        ("[cluster]\nleader = 'n3'\nvoters = 1\n", "s.toml:13: [cluster]: leader = 'n3' expected one of the voters n1"),
        ("[cluster]\nleader = 'n1'\nformed = false\n", "s.toml:13: [cluster]: leader = 'n1' needs formed = true"),
        ("[[vm]]\nname = 'v'\nsafety = 'fence'\n", "s.toml:14: [vm]: safety = 'fence' cannot be played yet: there is no fence"),
        ("[[vm]]\nname = 'v'\nfail_migrate = 1\n", "s.toml:14: [vm]: fail_migrate = 1 cannot be played yet: no driver here"),
        (step(1, "fence n1 ok"), "s.toml:14: [step]: 'fence n1 ok' cannot be played yet: there is no fence device"),
        (step(1, "storage n1 off"), "s.toml:14: [step]: 'storage n1 off' cannot be played yet: nothing uses shared storage"),
        (VM + step(1, "vm v1 migrate n2"), "s.toml:17: [step]: 'vm v1 migrate n2' cannot be played yet: no driver here"),
        (VM + step(1, "vm v1 moved n2"), "s.toml:17: [step]: 'vm v1 moved n2' cannot be played yet: what an administrator"),
        (VM + step(1, "vm v1 load 1 2"), "s.toml:17: [step]: 'vm v1 load 1 2' cannot be played yet: no decision reads"),
        (step(1, "clock n1 rate 5"), "s.toml:14: [step]: 'clock n1 rate 5' cannot be played yet: expected a rate"),
        ("[cluster]\nvoters = 3\n" + step(1, "host n1 add"), "s.toml:13: [cluster]: voters = 3 but fewer hosts are in the"),
    ],
)  # fmt: skip
def test_what_cannot_be_played_is_named_with_its_line(text: str, message: str) -> None:
    scenario = parse_scenario(f"\nuntil = 2\n{HOSTS}{text}", "s.toml")

    with pytest.raises(ScenarioError) as caught:
        check_playable(scenario)

    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_cluster_without_a_majority_that_is_on_cannot_be_formed() -> None:
    hosts = HOSTS.replace('power = "on"', 'power = "off"', 2)

    with pytest.raises(ScenarioError, match="no majority of n1, n2, n3 is on"):
        play("", hosts=hosts)


def test_what_the_cluster_itself_refuses_is_named_with_its_line() -> None:
    circle = '[[vm]]\nname = "a"\nafter = ["b"]\n[[vm]]\nname = "b"\nafter = ["a"]\n'

    with pytest.raises(ScenarioError, match=r"scenario:15: \[vm\]: the cluster refuses it: its dependencies form a circle"):
        play(circle)


def test_a_refusal_is_one_line_and_exit_status_two(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(f"until = 2\n{HOSTS}{step(1, 'fence n1 ok')}")

    outcome = CliRunner().invoke(simulate, [str(path)])

    assert isinstance(outcome.exception, ScenarioError)
    assert outcome.stdout == ""


# -- steps --


def test_every_step_of_the_table_is_refused_or_played() -> None:
    playable = [text for text in ALL_STEPS if not is_refused(text)]
    for text in [text for text in ALL_STEPS if is_refused(text)]:
        with pytest.raises(ScenarioError, match="cannot be played yet"):
            check_playable(parse_scenario(f"until = 9\n{HOSTS}{VM}{step(1, text)}"))
    playable = [text for text in playable if text not in ("host n1 add", "vm v1 add")]
    steps = "".join(step(0.5 * number, text) for number, text in enumerate(playable, 1))

    result = play(VM + steps, until=0.5 * len(playable) + 1)

    assert [line.text for line in result.lines if line.subject.startswith("step ")] == playable
    assert result.violations == []


def test_a_host_that_a_step_adds_joins_and_one_that_a_step_removes_leaves() -> None:
    hosts = HOSTS + '[[host]]\nname = "n4"\npower = "on"\n'
    steps = step(2, "host n4 add") + step(8, "vm v1 relocate n4") + step(9, "host n2 remove")

    result = play(VM + steps, until=18, hosts=hosts, head='[cluster]\nleader = "n3"')

    assert result.ok
    assert result.vms["v1"].host == "n4"
    assert (result.hosts["n2"].state, result.hosts["n2"].role) == ("unknown", "none")
    assert result.hosts["n4"].state == "online"
    assert result.hosts["n4"].role in ("primary", "secondary")


def test_a_vm_that_a_step_adds_is_unknown_before_and_one_that_a_step_removes_runs_on() -> None:
    body = '[[vm]]\nname = "new"\n' + VM + step(3, "vm new add") + step(4, "vm v1 remove")
    body += '[[expect]]\nat = 2.9\nvm = "new"\nhost = "none"\n[[expect]]\nvm = "v1"\nundisturbed = true\n'

    result = play(body)

    assert result.ok
    assert result.vms["new"].state == "started"
    assert (result.vms["v1"].state, result.vms["v1"].host) == ("unmanaged", "n1")


def test_a_stop_lets_the_vm_shut_down_and_kills_it_when_it_does_not() -> None:
    kinds = {"a": "", "b": "fail_stop = 1\n", "c": ""}
    vms = "".join(f'[[vm]]\nname = "{name}"\nhost = "n1"\nshutdown_s = 2.0\n{more}' for name, more in kinds.items())
    result = play(vms + step(1, "vm a stop") + step(1, "vm b stop") + step(1, "vm c stop after 0.5"))

    ends = {name: vm.runs[0] for name, vm in result.vms.items()}
    assert [round((ends[name].to_ns or 0) / 1e9, 1) for name in "abc"] == [3.0, 3.1, 1.5]
    assert [ends[name].ended for name in "abc"] == ["stopped", *["killed: it did not shut down in time"] * 2]
    assert [vm.state for vm in result.vms.values()] == ["stopped"] * 3


def test_an_order_finds_nobody_while_the_center_is_off() -> None:
    result = play(VM + step(1, "center off") + step(2, "vm v1 stop") + step(3, "center on"))

    assert "the order finds no center, and is given up" in told(result, "v1")
    assert result.vms["v1"].state == "started"


def test_disarming_waits_for_a_failover_in_progress() -> None:
    hosts = HOSTS.replace('"n1"\n', '"n1"\ncpu_mhz = 20000\n')  # no other host has room for the VM
    body = VM + "cpu_mhz = 10000\n" + step(1, "power n1 off") + step(4, "disarm freeze") + step(5, "power n1 on")

    result = play(body, hosts=hosts, until=15)

    waits = "the order must wait: a failover is in progress: wait until its VMs are placed"
    assert told(result, "cluster") == [waits, "high availability is disarmed"]
    assert result.vms["v1"].state == "started"


def test_a_failing_store_is_told_and_takes_no_vm_with_it() -> None:
    steps = step(1, "disk n2 fail") + step(2, "vm v1 stop") + step(6, "disk n2 ok")
    body = VM + '[[vm]]\nname = "v2"\nhost = "n2"\n' + steps

    result = play(body, head='[cluster]\nleader = "n2"', until=15)

    assert result.ok
    assert any("its aam ends, and begins anew: input/output error" in text for text in told(result, "n2"))
    assert [run.to_ns for run in result.vms["v2"].runs] == [None]
    assert result.vms["v1"].state == "stopped"


# -- the result --


def test_json_has_the_documented_fields(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    expects = '[[expect]]\nvm = "v1"\nhost = "any"\nwithin = 3.0\nafter_step = 1\n[[expect]]\nleader = "n2"\n'
    head = 'until = 8\n[cluster]\nleader = "n3"\nmessages_per_s = 20\n'
    path.write_text(head + HOSTS + VM + step(2, "power n1 off") + expects)

    outcome = CliRunner().invoke(simulate, [str(path), "--seed", "5", "--json"])
    report = json.loads(outcome.stdout)

    assert outcome.exit_code == 1, "n2 does not lead"
    assert set(report) == {
        "seed", "until", "trace_hash", "vms", "hosts", "failovers", "messages", "expectations", "invariants",
    }  # fmt: skip
    assert (report["seed"], report["until"]) == (5, 8.0)
    first, second = report["vms"]["v1"]["runs"]
    assert (first["host"], first["from"], first["to"]) == ("n1", 0.0, 2.0)
    assert second["to"] is None
    assert second["token"] > first["token"]
    assert report["hosts"]["n1"]["state"] == "absent"
    assert len(report["hosts"]["n1"]["fenced_at"]) == 1
    (failover,) = report["failovers"]
    assert (failover["cause"], failover["host"], failover["fault_at"]) == ("power n1 off", "n1", 2.0)
    assert failover["fault_at"] < failover["declared_at"] <= failover["vms"]["v1"] <= second["from"]
    assert report["messages"]["sent"] > report["messages"]["delivered"] > 0
    assert (report["messages"]["lost"], report["messages"]["duplicates"]) == (0, 0)
    assert [found["ok"] for found in report["expectations"]] == [True, False]
    assert report["expectations"][1]["text"] == "n2 leads: n3 leads"
    assert report["invariants"]["violated"] == []
    assert report["invariants"]["checked"]["I42"] == 2


def test_each_kind_of_expectation_can_fail() -> None:
    wishes = [
        'vm = "v1"\nhost = "n2"', 'vm = "v1"\nhost = "none"', 'vm = "v1"\nnot_on = "n1"', 'vm = "v1"\nstate = "stopped"',
        'vm = "v1"\nundisturbed = false', 'vm = "v1"\nhost = "n2"\nwithin = 1.0\nafter_step = 1', 'order = ["v1"]\nafter_step = 1',
        "overlaps = 1", 'fenced = ["n1"]', 'leader = "none"', "messages_lost = 1", "rules = false",
        'host_state = { n1 = "maintenance" }',
    ]  # fmt: skip
    result = play(VM + step(1, "arm") + "".join(f"[[expect]]\n{wish}\n" for wish in wishes), until=3)

    assert [verdict.ok for verdict in result.expectations] == [False] * len(wishes)
    assert not result.ok
    assert any(line.startswith("FAILED") for line in tell(result))
