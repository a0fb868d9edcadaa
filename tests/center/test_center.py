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
from ha_core.ids import VmName
from ha_core.machines.failover.records import Host, Record, Vm
from ha_core.runtime.rpc import Call, serve_unix

KEY = bytes(range(32))
PAGE = 100


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
            found = [(record.key_of(record.key_name), record.encode()) for record in records if type(record).prefix() == prefix]
            found = sorted(pair for pair in found if pair[0] > after)
            return {"records": found[:PAGE], "revision": 7, "more": len(found) > PAGE}
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
