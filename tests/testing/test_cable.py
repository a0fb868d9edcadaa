"""The cable relay: what passes, what is held, what is lost."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from ha_core.config import split_address
from ha_core.errors import ConfigError, TransportError
from ha_core.testing.cable import Ports, Switchboard, lay_cables, open_switchboard
from ha_core.testing.cable_process import open_switchboard_process


def at(address: str) -> tuple[str, int]:
    return split_address(address, "address")


async def dial(ports: Ports, sender: str, receiver: str, link: str = "a") -> trio.SocketStream:
    end = trio.socket.socket()
    await end.bind((at(ports[sender, link][1])[0], 0))
    await end.connect(at(ports[receiver, link][0]))
    return trio.SocketStream(end)


@asynccontextmanager
async def listen(ports: Ports, host: str, link: str = "a") -> AsyncIterator[trio.SocketListener]:
    listener = trio.socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    await listener.bind(at(ports[host, link][1]))
    listener.listen()
    async with trio.SocketListener(listener) as found:
        yield found


@asynccontextmanager
async def pair(ports: Ports) -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
    """A connection from h1 to h2 over link a: both ends."""
    async with listen(ports, "h2") as listener:
        near = await dial(ports, "h1", "h2")
        far = await listener.accept()
        async with near, far:
            yield near, far


async def receive(stream: trio.SocketStream, count: int) -> bytes:
    data = b""
    with trio.fail_after(5):
        while len(data) < count:
            part = await stream.receive_some()
            if not part:
                break
            data += part
    return data


async def silent(stream: trio.SocketStream, seconds: float = 0.03) -> bool:
    """Nothing arrives: no byte, no end, no reset."""
    with trio.move_on_after(seconds):
        await stream.receive_some()
        return False
    return True


@pytest.fixture
def ports() -> Ports:
    return lay_cables(["h1", "h2"], ["a", "b"])


async def test_bytes_pass_both_ways_and_the_receiver_sees_the_senders_public_ip(ports: Ports) -> None:
    async with open_switchboard(ports), pair(ports) as (near, far):
        await near.send_all(b"to")
        assert await receive(far, 2) == b"to"
        await far.send_all(b"fro")
        assert await receive(near, 3) == b"fro"
        assert far.socket.getpeername()[0] == at(ports["h1", "a"][0])[0]


async def test_large_stream_passes_whole(ports: Ports) -> None:
    body = os.urandom(3_000_000)
    async with open_switchboard(ports) as board, pair(ports) as (near, far), trio.open_nursery() as nursery:
        nursery.start_soon(near.send_all, body)
        assert await receive(far, len(body)) == body
        assert {(one.host, one.link): one.sent_bytes for one in board.cables()}["h1", "a"] == len(body)


async def test_cut_cable_is_silent_and_goes_on_where_it_was_when_mended(ports: Ports) -> None:
    async with open_switchboard(ports) as board, pair(ports) as (near, far):
        board.cut("h1", "a")
        await near.send_all(b"lost?")
        await far.send_all(b"back?")

        assert await silent(far)
        assert await silent(near)

        board.mend("h1", "a")
        assert await receive(far, 5) == b"lost?"
        assert await receive(near, 5) == b"back?"


async def test_cut_hides_the_death_of_a_process(ports: Ports) -> None:
    async with open_switchboard(ports) as board, pair(ports) as (near, far):
        board.cut_host("h2")
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await far.aclose()
        assert await silent(near)

        board.mend_host("h2")
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(5):
            await near.receive_some()


@pytest.mark.parametrize(("host", "direction"), [("h1", "out"), ("h2", "in")])
async def test_one_way_cut_loses_one_direction_only(ports: Ports, host: str, direction: str) -> None:
    async with open_switchboard(ports) as board, pair(ports) as (near, far):
        board.cut(host, "a", "out" if direction == "out" else "in")
        await near.send_all(b"to")
        await far.send_all(b"fro")
        assert await receive(near, 3) == b"fro"
        assert await silent(far)


async def test_other_links_and_hosts_are_not_touched(ports: Ports) -> None:
    async with open_switchboard(ports) as board, listen(ports, "h2", "b") as listener:
        board.cut("h1", "a")
        near = await dial(ports, "h1", "h2", "b")
        with trio.fail_after(5):
            far = await listener.accept()
        async with near, far:
            await near.send_all(b"x")
            assert await receive(far, 1) == b"x"


async def test_connection_begun_during_a_cut_hangs_until_mended(ports: Ports) -> None:
    async with open_switchboard(ports) as board, listen(ports, "h2") as listener:
        board.cut("h2", "a", "in")
        near = await dial(ports, "h1", "h2")
        given_up = await dial(ports, "h1", "h2")
        await near.send_all(b"hello")
        await given_up.aclose()
        with trio.move_on_after(0.03) as scope:
            await listener.accept()
        assert scope.cancelled_caught

        board.mend("h2", "a")
        with trio.fail_after(5):
            far = await listener.accept()
        async with near, far:
            assert await receive(far, 5) == b"hello"
            with trio.move_on_after(0.03) as scope:
                await listener.accept()  # the one that was given up never shows
            assert scope.cancelled_caught


async def test_end_and_reset_pass_a_whole_cable(ports: Ports) -> None:
    async with open_switchboard(ports):
        async with pair(ports) as (near, far):
            await near.send_eof()
            assert await receive(far, 1) == b""
            await far.send_all(b"still")
            assert await receive(near, 5) == b"still"
        async with pair(ports) as (near, far):
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            await near.aclose()
            with pytest.raises(trio.BrokenResourceError), trio.fail_after(5):
                await far.receive_some()


async def test_refused_connection_is_reset(ports: Ports) -> None:
    async with open_switchboard(ports):
        near = await dial(ports, "h1", "h2")  # nobody listens behind the relay
        async with near:
            with pytest.raises(trio.BrokenResourceError), trio.fail_after(5):
                await near.receive_some()


async def test_partition_cuts_two_hosts_from_each_other_only() -> None:
    ports = lay_cables(["h1", "h2", "h3"], ["a"])
    async with open_switchboard(ports) as board, pair(ports) as (near, far):
        board.partition("h1", "h2", "a")
        await near.send_all(b"x")
        third = await dial(ports, "h3", "h2")
        assert await silent(far)
        board.join("h1", "h2", "a")
        assert await receive(far, 1) == b"x"
        await third.aclose()


async def open_udp(address: tuple[str, int]) -> trio.socket.SocketType:
    end = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    await end.bind(address)
    return end


async def datagram(end: trio.socket.SocketType, seconds: float = 5) -> tuple[bytes, tuple[str, int]] | None:
    with trio.move_on_after(seconds):
        data, source = await end.recvfrom(2000)
        return data, source
    return None


async def test_datagrams_come_from_the_senders_public_address_and_answers_return(ports: Ports) -> None:
    async with open_switchboard(ports) as board:
        one, two = await open_udp(at(ports["h1", "a"][1])), await open_udp(at(ports["h2", "a"][1]))
        with one, two:
            await one.sendto(b"to", at(ports["h2", "a"][0]))
            assert await datagram(two) == (b"to", at(ports["h1", "a"][0]))
            await two.sendto(b"fro", at(ports["h1", "a"][0]))
            assert await datagram(one) == (b"fro", at(ports["h2", "a"][0]))

            board.cut("h1", "a")
            await one.sendto(b"lost", at(ports["h2", "a"][0]))
            await two.sendto(b"lost", at(ports["h1", "a"][0]))
            assert await datagram(two, 0.02) is None
            assert await datagram(one, 0.02) is None


async def test_second_udp_socket_of_a_host_gets_its_own_answers(ports: Ports) -> None:
    async with open_switchboard(ports) as board:
        guard = await open_udp((at(ports["h1", "a"][1])[0], 0))
        aam = await open_udp(at(ports["h2", "a"][1]))
        with guard, aam:
            await guard.sendto(b"renew", at(ports["h2", "a"][0]))
            found = await datagram(aam)
            assert found is not None
            assert found[0] == b"renew"
            await aam.sendto(b"granted", found[1])
            assert await datagram(guard) == (b"granted", at(ports["h2", "a"][0]))

            board.cut("h1", "a", "in")
            await aam.sendto(b"lost", found[1])
            assert await datagram(guard, 0.02) is None


async def test_impaired_cable_delays_in_order_and_loses_datagrams(ports: Ports) -> None:
    async with open_switchboard(ports) as board, pair(ports) as (near, far):
        board.impair("h1", "a", delay_s=0.03, loss=1.0)
        began = trio.current_time()
        await near.send_all(b"a")
        await trio.sleep(0.005)
        board.impair("h1", "a", loss=1.0)
        await near.send_all(b"b")
        assert await receive(far, 2) == b"ab"
        assert trio.current_time() - began >= 0.03

        one, two = await open_udp(at(ports["h1", "a"][1])), await open_udp(at(ports["h2", "a"][1]))
        with one, two:
            await one.sendto(b"lost", at(ports["h2", "a"][0]))
            assert await datagram(two, 0.02) is None


async def test_unknown_cable_and_used_port_are_named(ports: Ports) -> None:
    async with open_switchboard(ports) as board:
        with pytest.raises(ConfigError, match=r"cable h9\.a: there is none"):
            board.cut("h9", "a")
        with pytest.raises(TransportError, match=r"cannot bind 127.*in use"):
            await board.add("h3", "a", ports["h1", "a"][0], "127.9.9.9:1000")
        with pytest.raises(ConfigError, match=r"already the real IP of h1\.a"):
            await board.add("h3", "a", "127.9.9.9:1000", ports["h1", "a"][1])


async def test_relay_process_obeys_its_client_and_ends_with_it(ports: Ports) -> None:
    async with open_switchboard_process(ports) as board:
        async with pair(ports) as (near, far):
            await board.cut("h1", "a")
            await near.send_all(b"x")
            assert await silent(far)
            await board.mend("h1", "a")
            assert await receive(far, 1) == b"x"
            with pytest.raises(TransportError, match="there is none"):
                await board.cut("h7", "a")
    with pytest.raises(ProcessLookupError):
        os.kill(board.pid, 0)


def test_relay_process_ends_with_its_stdin(ports: Ports) -> None:
    table = json.dumps({f"{host}.{link}": pair for (host, link), pair in ports.items()})
    argv = [sys.executable, "-m", "ha_core.testing.cable", "--json", table]
    done = subprocess.run(argv, input="mend h1 a\nnonsense\n", capture_output=True, text=True, timeout=20, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["ok"] for answer in answers] == [True, True, False]


def test_switchboard_is_idempotent() -> None:
    async def main() -> None:
        ports = lay_cables(["h1"], ["a"])
        async with open_switchboard(ports) as board:
            assert isinstance(board, Switchboard)
            for _ in range(2):
                board.cut("h1", "a")
            (cable,) = board.cables()
            assert cable.cut_in
            assert cable.cut_out
            for _ in range(2):
                board.mend("h1", "a")
            assert not cable.cut_in

    trio.run(main)
