"""The center keeps nothing: it asks any host that lives, again where that may help, and answers with the database's reasons."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
import trio

from ha_core.center import hosts as center_hosts
from ha_core.center.hosts import Hosts
from ha_core.center.server import Center
from ha_core.errors import (
    CompactedError,
    HAError,
    NotJoinedError,
    NoUsablePathError,
    OperationFailedError,
    OutcomeUnknownError,
    ProposalDroppedError,
    RemoteProtocolError,
)
from ha_core.ids import FencingToken, HostName, LeaseToken, LogIndex, VmName
from ha_core.machines.failover.records import Decision, Host, Lease, Mode, Record, Run, RunState, Settings, Vm, Wanted
from ha_core.runtime.rpc import Call, serve_tcp, serve_unix

KEY = bytes(range(32))
PAGE = 100
STATUS = {
    "cluster": "shop", "leader": "aam@h1.example", "term": 3, "voters": ["aam@h1.example", "aam@h2.example"], "learners": [],
    "primaries": {}, "coordinating": True, "waiting": [["mail", "no host has room and is allowed"]],
    "verdict": "connected", "verdict_reason": "", "paths": [],
}  # fmt: skip


async def nothing(value: object) -> None:
    pass


@asynccontextmanager
async def vpxa(path: Path, answer: Callable[[Call], object]) -> AsyncIterator[Path]:
    async def handle(call: Call) -> object:
        return answer(call)

    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: serve_unix(path, handle, task_status=task_status))
        yield path
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def management(answer: Callable[[Call], object]) -> AsyncIterator[str]:
    """A vpxa as the other hosts' center sees it."""

    async def handle(call: Call) -> object:
        return answer(call)

    async with trio.open_nursery() as nursery:
        yield await nursery.start(lambda task_status: serve_tcp("127.0.0.1:0", handle, key=KEY, task_status=task_status))
        nursery.cancel_scope.cancel()


async def ask(path: Path, method: str, **params: object) -> object:
    return await Center(key=KEY, vpxas=[path]).handle(Call(method, params, nothing))


def host(number: int, address: str = "127.0.0.1:1") -> Host:
    return Host(HostName(f"h{number}.example"), (("a", f"127.0.0.{number}:7400"),), 8000, 8192, management=address)


def run_of(name: str, state: RunState = RunState.RUNNING, text: str = "") -> Run:
    return Run(VmName(name), FencingToken(7), HostName("h1.example"), LeaseToken(5), state, why="first start", text=text)


def raising(error: HAError) -> Callable[[Call], object]:
    def answer(call: Call) -> object:
        raise error

    return answer


@pytest.mark.parametrize("error", [NotJoinedError("left"), ProposalDroppedError("no leader"), OutcomeUnknownError("unknown")])
async def test_what_may_be_repeated_is_asked_elsewhere(tmp_path: Path, error: HAError) -> None:
    async with vpxa(tmp_path / "1", raising(error)) as one, vpxa(tmp_path / "2", lambda call: call.method) as two:
        assert await Hosts([one, two], KEY).call("cluster.status") == "cluster.status"


async def test_a_refusal_is_an_answer(tmp_path: Path) -> None:
    refused = raising(OperationFailedError("the host is absent"))
    async with vpxa(tmp_path / "1", refused) as one, vpxa(tmp_path / "2", lambda call: call.method) as two:
        with pytest.raises(OperationFailedError, match="the host is absent"):
            await Hosts([one, two], KEY).call("cluster.call")


async def test_when_nobody_answers_everybody_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(center_hosts, "PAUSE_S", 0.0)
    with pytest.raises(NoUsablePathError, match=r"cluster\.status: no vpxa answered: .*/one: .*/two: "):
        await Hosts([tmp_path / "one", tmp_path / "two"], KEY).call("cluster.status")


def cluster(records: list[Record]) -> Callable[[Call], object]:
    def answer(call: Call) -> object:
        if call.method == "cluster.read":
            prefix, after = cast(bytes, call.params["prefix"]), cast(bytes, call.params["after"])
            found = [(record.key_of(record.key_name), record.encode()) for record in records]
            found = sorted(pair for pair in found if pair[0].startswith(prefix) and pair[0] > after)
            return {"records": found[:PAGE], "revision": 7, "more": len(found) > PAGE}
        if call.method == "cluster.status":
            return STATUS
        assert call.method == "cluster.call"
        return (False, 0, "the database says no")

    return answer


@pytest.mark.parametrize(
    ("method", "params", "text"),
    [
        ("cluster.mode", {"mode": "asleep"}, "mode: expected one of armed, disarmed, found 'asleep'"),
        ("vm.want", {"name": "web", "wanted": "perhaps"}, "wanted: expected one of"),
        ("vm.add", {"name": "web", "shutdown_s": "soon"}, "could not convert"),
        ("vm.add", {"name": "web", "priority": "utmost"}, "UTMOST"),
        ("vm.add", {"name": "web", "colour": "red"}, "colour"),
        ("vm.sing", {}, "no method"),
    ],
)
async def test_a_wrong_request_is_one_clear_line(tmp_path: Path, method: str, params: dict[str, object], text: str) -> None:
    async with vpxa(tmp_path / "1", cluster([])) as one:
        with pytest.raises(RemoteProtocolError, match=text):
            await Center(key=KEY, vpxas=[one]).handle(Call(method, params, nothing))


async def test_the_reason_of_the_database_reaches_the_administrator(tmp_path: Path) -> None:
    async with vpxa(tmp_path / "1", cluster([])) as one:
        with pytest.raises(OperationFailedError, match="the database says no"):
            await Center(key=KEY, vpxas=[one]).handle(Call("vm.want", {"name": "web", "wanted": "started"}, nothing))


@pytest.mark.parametrize(("name", "text"), [("h2.example", "no such host"), ("h1.example", "the only host of the cluster")])
async def test_a_host_that_cannot_go_is_kept(tmp_path: Path, name: str, text: str) -> None:
    only = Host("h1.example", (("a", "127.0.0.1:1"),), 1, 1)  # type: ignore[arg-type]
    async with vpxa(tmp_path / "1", cluster([only])) as one:
        with pytest.raises(OperationFailedError, match=text):
            await Center(key=KEY, vpxas=[one]).handle(Call("host.remove", {"name": name}, nothing))


async def test_only_of_a_host_that_does_not_answer_can_be_said_that_it_is_off(tmp_path: Path) -> None:
    lease = Lease(HostName("h2.example"), LeaseToken(9), b"boot", b"guard", 1, 2, 1, 2)
    asked: list[Call] = []

    def answer(call: Call) -> object:
        asked.append(call)
        return (True, 0, "") if call.method == "cluster.call" else cluster([host(1), host(2), lease])(call)

    async with vpxa(tmp_path / "1", answer) as one:
        assert await ask(one, "host.fenced", name="h2.example") == {"name": "h2.example"}
        assert [call.params["args"] for call in asked if call.method == "cluster.call"] == [
            ["h2.example", 9, "an administrator says that it is off"]
        ]
        with pytest.raises(OperationFailedError, match="h1.example: it never had a lease"):
            await ask(one, "host.fenced", name="h1.example")

    async with management(lambda call: {}) as address, vpxa(tmp_path / "2", cluster([host(2, address), lease])) as one:
        with pytest.raises(OperationFailedError, match="h2.example answers: it is not off"):
            await ask(one, "host.fenced", name="h2.example")


async def test_a_thousand_vms_are_listed_page_by_page(tmp_path: Path) -> None:
    vms: list[Record] = [Vm(VmName(f"vm{number:04}"), options=(("argv", ("x" * 1000,)),)) for number in range(1000)]
    async with vpxa(tmp_path / "1", cluster(vms)) as one:
        rows = cast(list[dict[str, object]], await Center(key=KEY, vpxas=[one]).handle(Call("vm.list", {}, nothing)))

    assert [row["name"] for row in rows] == [f"vm{number:04}" for number in range(1000)]


async def test_a_list_whose_first_page_was_compacted_away_begins_anew(tmp_path: Path) -> None:
    vms: list[Record] = [Vm(VmName(f"vm{number:03}")) for number in range(PAGE + 1)]
    compactions = 1

    def answer(call: Call) -> object:
        nonlocal compactions
        if call.params.get("at") and compactions:
            compactions -= 1
            raise CompactedError("revision 7 is compacted", first_index=9)
        return cluster(vms)(call)

    async with vpxa(tmp_path / "1", answer) as one:
        rows = cast(list[object], await Center(key=KEY, vpxas=[one]).handle(Call("vm.list", {}, nothing)))

    assert len(rows) == PAGE + 1
    assert not compactions


async def test_the_status_says_who_waits_and_how_each_host_sees_itself(tmp_path: Path) -> None:
    lonely = {**STATUS, "coordinating": False, "verdict": "isolated", "verdict_reason": "nobody answers"}
    async with management(lambda call: STATUS) as first, management(lambda call: lonely) as second:
        records: list[Record] = [
            host(1, first), host(2, second), host(3), Vm(VmName("web")), Vm(VmName("mail")),
            Vm(VmName("old"), wanted=Wanted.STOPPED), run_of("web"), run_of("mail", RunState.RELEASED, "ended with status 3"),
        ]  # fmt: skip
        async with vpxa(tmp_path / "1", cluster(records)) as one:
            status = cast(dict[str, list[dict[str, object]]], await ask(one, "cluster.status"))

    assert [row["verdict"] for row in status["hosts"]] == ["connected", "isolated", "unreachable"]
    assert status["hosts"][1]["verdict_reason"] == "nobody answers"
    assert {row["name"]: (row["state"], row["waits"]) for row in status["vms"]} == {
        "web": ("running", ""), "mail": ("waiting", "no host has room and is allowed"), "old": ("stopped", ""),
    }  # fmt: skip
    assert (status["mode"], status["notes"]) == ("armed", [])


async def test_the_status_warns_before_something_fails(tmp_path: Path) -> None:
    async with vpxa(tmp_path / "1", cluster([host(1), host(2), Settings(mode=Mode.DISARMED)])) as one:
        status = cast(dict[str, list[str]], await ask(one, "cluster.status"))

    assert "disarmed" in status["notes"][0]
    assert "two hosts" in status["notes"][1]


async def test_paths_are_asked_of_every_host_and_one_that_is_silent_is_said_to_be(tmp_path: Path) -> None:
    path = {"peer": "aam@h2.example", "link": "a", "state": "up", "rtt_ms": 0.5}
    async with management(lambda call: {**STATUS, "paths": [path]}) as first:
        async with vpxa(tmp_path / "1", cluster([host(1, first), host(2)])) as one:
            rows = cast(list[dict[str, object]], await ask(one, "host.paths"))

    assert rows[0] == {"host": "h1.example", **path}
    assert "unreachable: 127.0.0.1:1: nobody answers" in cast(str, rows[1]["state"])


@pytest.mark.parametrize("method", ["host.paths", "host.list", "cluster.status", "vm.list", "explain"])
async def test_a_center_that_reaches_nobody_says_so_and_lives_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """An error that left a nursery as a group was no answer: it ended the center."""
    monkeypatch.setattr(center_hosts, "PAUSE_S", 0.0)
    with pytest.raises(NoUsablePathError, match="no vpxa answered"):
        await ask(tmp_path / "nobody", method)


STORY: list[Record] = [
    host(1), Vm(VmName("mail")), run_of("mail", RunState.RELEASED, "ended with status 3"),
    Decision(1, LogIndex(4), "registered", host="h1.example"),
    Decision(2, LogIndex(7), "assigned", host="h1.example", vm="mail", token=7, why="first start"),
    Decision(3, LogIndex(9), "released", host="h1.example", vm="mail", token=7, why="ended with status 3"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("params", "lines"),
    [
        (
            {"vm": "mail"},
            [
                "[7] mail was assigned to h1.example (token 7): first start",
                "[9] mail ended on h1.example (token 7): ended with status 3",
                "now: wanted started, released on h1.example (token 7)",
                "waits: no host has room and is allowed",
            ],
        ),
        ({"host": "h1.example"}, ["[4] h1.example was registered", "now: online, it never had a lease"]),
        ({}, ["[4] h1.example was registered", "[9] mail ended on h1.example (token 7): ended with status 3"]),
    ],
)
async def test_explain_tells_the_story_in_sentences(tmp_path: Path, params: dict[str, object], lines: list[str]) -> None:
    async with management(lambda call: STATUS) as first:
        story = [host(1, first) if isinstance(record, Host) else record for record in STORY]
        async with vpxa(tmp_path / "1", cluster(story)) as one:
            answer = cast(dict[str, list[str]], await ask(one, "explain", **params))

    assert [line for line in answer["lines"] if line in lines] == lines
    assert len(answer["decisions"]) == (2 if "vm" in params else 3)


@pytest.mark.parametrize(("params", "text"), [({"vm": "nix"}, "nix: there is no such VM"), ({"host": "h9"}, "no such host")])
async def test_nothing_can_be_explained_of_what_never_was(tmp_path: Path, params: dict[str, object], text: str) -> None:
    async with vpxa(tmp_path / "1", cluster(STORY)) as one:
        with pytest.raises(OperationFailedError, match=text):
            await ask(one, "explain", **params)


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"name": "we ird"}, "is no name of a VM"),
        ({"name": "web", "memory_mib": -5}, "cannot be negative"),
        ({"name": "web", "after": ["db"]}, "web: cannot wait for db: there is no such VM; add it first"),
        ({"name": "web", "host": "h7.example"}, "there is no host h7.example; there are h1.example"),
    ],
)
async def test_a_vm_that_nobody_meant_so_is_refused(tmp_path: Path, params: dict[str, object], text: str) -> None:
    async with vpxa(tmp_path / "1", cluster(STORY)) as one:
        with pytest.raises(OperationFailedError, match=text):
            await ask(one, "vm.add", **params)
