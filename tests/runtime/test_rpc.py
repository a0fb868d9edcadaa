"""Requests and answers: errors arrive as what they were, strangers and nonsense cost one connection."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from ha_core.errors import (
    HAError,
    LocalProtocolError,
    NotJoinedError,
    NotLeaderError,
    OutcomeUnknownError,
    RemoteProtocolError,
    StaleFencingTokenError,
    TransportError,
)
from ha_core.runtime import rpc
from ha_core.runtime.rpc import (
    ITEM,
    MAX_FRAME_BYTES,
    RESULT,
    Call,
    Handler,
    RpcClient,
    dial_rpc,
    open_rpc,
    serve_connection,
    serve_tcp,
    serve_unix,
)

KEY = bytes(range(32))


async def handle(call: Call) -> object:
    if call.method == "echo":
        return call.params["value"]
    if call.method == "count":
        for number in range(3):
            await call.send(number)
        return "done"
    if call.method == "hang":
        await trio.sleep_forever()
    raise NotLeaderError(f"{call.text('who')} does not lead")


@asynccontextmanager
async def served() -> AsyncIterator[str]:
    async with trio.open_nursery() as nursery:
        address = await nursery.start(lambda task_status: serve_tcp("127.0.0.1:0", handle, key=KEY, task_status=task_status))
        yield address
        nursery.cancel_scope.cancel()


async def test_answers_come_to_those_who_asked() -> None:
    async with served() as address, dial_rpc(address, key=KEY) as client:
        found: dict[int, object] = {}

        async def ask(number: int) -> None:
            found[number] = await client.call("echo", value=number)

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(ask, number)

        assert found == {number: number for number in range(20)}


async def test_items_stream_before_the_answer() -> None:
    async with served() as address, dial_rpc(address, key=KEY) as client, client.stream("count") as items:
        assert [pair async for pair in items] == [(ITEM, 0), (ITEM, 1), (ITEM, 2), (RESULT, "done")]


async def test_an_error_arrives_as_its_class() -> None:
    async with served() as address, dial_rpc(address, key=KEY) as client:
        with pytest.raises(NotLeaderError, match="h1 does not lead"):
            await client.call("lead", who="h1")
        with pytest.raises(RemoteProtocolError, match="who: expected a string, found 3"):
            await client.call("lead", who=3)


async def test_a_wrong_key_is_refused_at_both_ends() -> None:
    async with served() as address:
        with pytest.raises((RemoteProtocolError, TransportError)):
            async with dial_rpc(address, key=bytes(32)) as client:
                await client.call("echo", value=1)


async def test_a_hostile_frame_ends_its_connection_only() -> None:
    async with served() as address, dial_rpc(address, key=KEY) as client:
        host, _, port = address.rpartition(":")
        stranger = await trio.open_tcp_stream(host, int(port))
        async with stranger:
            await stranger.send_all(b"\xff" * 4096)
            while await stranger.receive_some(4096):
                pass

        assert await client.call("echo", value="still here") == "still here"


@pytest.mark.parametrize("body", [b"\x81\x90\x00", b"\x93\x00\x01\xc1", b"\x91" * 2000, b"\xc7\x08\xff" + bytes(8)])
async def test_a_hostile_message_of_a_key_holder_ends_its_connection_only(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "a.sock"
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: serve_unix(path, handle, task_status=task_status))
        async with await trio.open_unix_socket(str(path)) as stream:
            await stream.send_all(len(body).to_bytes(4, "big") + body)
            assert not await stream.receive_some()
        async with dial_rpc(path) as client:
            assert await client.call("echo", value=1) == 1
        nursery.cancel_scope.cancel()


async def test_parameters_that_a_handler_did_not_look_for_fail_their_request_only() -> None:
    async with served() as address, dial_rpc(address, key=KEY) as client:
        with pytest.raises(HAError, match="^echo: failed: KeyError: 'value'$"):
            await client.call("echo")
        assert await client.call("echo", value=3) == 3


async def test_a_cancelled_call_frees_its_number_and_the_connection_goes_on() -> None:
    async with served() as address, dial_rpc(address, key=KEY) as client:
        with trio.move_on_after(0):
            await client.call("hang")

        assert await client.call("echo", value=2) == 2


async def test_nobody_there_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="nobody answers"):
        async with dial_rpc(tmp_path / "no.sock"):
            pass


async def test_unix_socket_replaces_a_stale_file(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    path.write_text("left by a dead process")
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: serve_unix(path, handle, task_status=task_status))
        async with dial_rpc(path) as client:
            assert await client.call("echo", value=b"x") == b"x"
        nursery.cancel_scope.cancel()


async def test_what_an_error_knows_travels_with_it() -> None:
    async def refuse(call: Call) -> object:
        match call.method:
            case "leader":
                raise NotLeaderError("not here", leader="aam@h2.example")
            case "unknown":
                raise OutcomeUnknownError("who knows", request=object())
            case "joined":
                raise NotJoinedError("h1 belongs to no cluster")
        raise StaleFencingTokenError("old", token=3, current=4)

    async with connected(refuse) as client:
        with pytest.raises(NotLeaderError) as leader:
            await client.call("leader")
        with pytest.raises(OutcomeUnknownError) as unknown:
            await client.call("unknown")
        with pytest.raises(NotJoinedError):
            await client.call("joined")
        with pytest.raises(StaleFencingTokenError) as stale:
            await client.call("stale")

    assert leader.value.leader == "aam@h2.example"
    assert unknown.value.retryable
    assert (stale.value.token, stale.value.current) == (3, 4)


async def test_an_answer_that_fits_no_frame_is_an_error_of_its_request_only() -> None:
    async def answer(call: Call) -> object:
        return bytes(MAX_FRAME_BYTES if call.method == "much" else 1)

    async with connected(answer) as client:
        with pytest.raises(LocalProtocolError, match="fit a frame"):
            await client.call("much")

        assert await client.call("little") == bytes(1)


async def test_parameters_may_have_any_name() -> None:
    async def names(call: Call) -> object:
        return sorted(call.params)

    async with connected(names) as client:
        assert await client.call("names", method=1, self=2) == ["method", "self"]


async def test_a_frame_that_a_cancelled_send_tore_is_never_read_as_another() -> None:
    """The peer reads nothing, so the send stands half-way when it is cancelled: the connection ends, whole frames or none."""
    ours, theirs = trio.testing.memory_stream_pair()
    stuck = trio.testing.MemorySendStream(send_all_hook=trio.sleep_forever)
    stream = trio.StapledStream(stuck, ours.receive_stream)
    async with open_rpc(stream) as client:
        with trio.move_on_after(0.01):
            await client.call("echo", value=bytes(1000))
        with pytest.raises(TransportError):
            await client.call("echo", value=2)
    await theirs.aclose()


async def test_more_connections_than_allowed_are_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "MAX_CONNECTIONS", 1)
    async with served() as address, dial_rpc(address, key=KEY) as client:
        with pytest.raises((TransportError, RemoteProtocolError)):
            async with dial_rpc(address, key=KEY):
                pass

        assert await client.call("echo", value="first come") == "first come"


@asynccontextmanager
async def connected(handler: Handler) -> AsyncIterator[RpcClient]:
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, theirs, handler)
        async with open_rpc(ours) as client:
            yield client
