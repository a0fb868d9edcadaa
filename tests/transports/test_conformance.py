"""Every transport of ours passes the public suites; transports that break a rule do not."""

from __future__ import annotations

import os
import resource
import socket
from contextlib import aclosing
from typing import Any

import pytest
import trio
import trio.testing

from ha_core.errors import TransportError
from ha_core.testing.check_transport import (
    DATAGRAM_CHECKS,
    STREAM_CHECKS,
    TransportKit,
    check_datagram_transport,
    check_stream_transport,
)
from ha_core.transports.memory import MemoryNetwork, MemoryTransport
from ha_core.transports.tcp import TcpStream, TcpTransport
from ha_core.transports.udp import UdpTransport


async def test_tcp_conforms() -> None:
    assert len(await check_stream_transport(lambda: TransportKit(transport=TcpTransport(), address="127.0.0.1:0"))) == len(
        STREAM_CHECKS
    )


async def test_tcp_conforms_over_ipv6() -> None:
    await check_stream_transport(lambda: TransportKit(transport=TcpTransport(), address="[::1]:0"))


async def test_memory_conforms() -> None:
    await check_stream_transport(lambda: TransportKit(transport=MemoryTransport(MemoryNetwork()), address="memory:0"))
    await check_datagram_transport(lambda: TransportKit(transport=MemoryTransport(MemoryNetwork()), address="memory:0"))


async def test_udp_conforms() -> None:
    assert len(await check_datagram_transport(lambda: TransportKit(transport=UdpTransport(), address="127.0.0.1:0"))) == len(
        DATAGRAM_CHECKS
    )


class Lossy(MemoryTransport):
    """Its listeners hand out streams that lose what does not fit at once."""

    async def dial(self, remote: str, *, local: str | None = None) -> trio.abc.Stream:
        return Leak(await super().dial(remote, local=local))

    def address_of(self, end: trio.abc.Listener[trio.abc.Stream] | trio.abc.Stream) -> str:
        return super().address_of(end.inner if isinstance(end, Leak) else end)


class Leak(trio.abc.Stream):
    def __init__(self, inner: trio.abc.Stream) -> None:
        self.inner = inner

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        with trio.move_on_after(0.001):
            await self.inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.inner.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self.inner.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self.inner.aclose()


class Deaf(MemoryTransport):
    """Does not say where it listens."""

    def address_of(self, end: trio.abc.Listener[trio.abc.Stream] | trio.abc.Stream) -> str:
        return "memory:0"


@pytest.mark.parametrize(
    ("transport", "rule"), [(Lossy, "bytes_arrive_whole|a_writer_waits"), (Deaf, "a_listener_says_where|nobody listens")]
)
async def test_a_transport_that_breaks_a_rule_is_caught(transport: type[MemoryTransport], rule: str) -> None:
    network = MemoryNetwork()

    with pytest.raises((AssertionError, TransportError), match=rule):
        await check_stream_transport(lambda: TransportKit(transport=transport(network), address="memory:0"), limit_s=0.5)


async def test_tcp_keeps_queues_short_and_does_not_wait_to_send() -> None:
    transport = TcpTransport()
    listener = await transport.listen("127.0.0.1:0")
    dialled = await transport.dial(transport.address_of(listener))
    accepted = await listener.accept()
    async with listener, dialled, accepted:
        for stream in (dialled, accepted):
            assert isinstance(stream, TcpStream)
            assert stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            assert stream.socket.getsockopt(socket.IPPROTO_TCP, 25) == 64 << 10
            assert stream.socket.getsockopt(socket.IPPROTO_TCP, 18) == 10_000


@pytest.mark.parametrize(
    ("address", "text"),
    [("203.0.113.7:0", "this machine has no such address"), ("x" * 70 + ":1", "the host has no address")],
)
async def test_what_is_in_the_way_of_listening_is_said(address: str, text: str) -> None:
    for transport in (TcpTransport().listen, UdpTransport().bind):
        with pytest.raises(TransportError, match=text):
            await transport(address)


async def test_a_port_in_use_is_one_clear_line() -> None:
    async with await TcpTransport().listen("127.0.0.1:0") as listener:
        address = TcpTransport().address_of(listener)
        with pytest.raises(TransportError, match=f"{address}: the port is in use by another process"):
            await TcpTransport().listen(address)


async def test_dialling_without_a_free_descriptor_is_an_error_of_the_transport() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with await TcpTransport().listen("127.0.0.1:0") as listener:
        address = TcpTransport().address_of(listener)
        probe = os.dup(0)
        os.close(probe)
        resource.setrlimit(resource.RLIMIT_NOFILE, (probe, hard))
        try:
            with pytest.raises(TransportError, match=f"^{address}: cannot connect: [^\n]*$"):
                await TcpTransport().dial(address)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class SlowResolver(trio.abc.HostnameResolver):
    """Knows one name, after a while; where numbers are given it is not asked."""

    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s
        self.asked = 0

    async def getaddrinfo(
        self, host: bytes | None, port: bytes | str | int | None, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
    ) -> list[Any]:  # each version of typeshed has its own idea of what an address is
        self.asked += 1
        await trio.sleep(self.delay_s)
        if host != b"h1.example":
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(socket.AF_INET, socket.SOCK_DGRAM, 0, "", ("127.0.0.1", int(str(port))))]

    async def getnameinfo(self, sockaddr: tuple[str, int] | tuple[str, int, int, int], flags: int) -> tuple[str, str]:
        raise NotImplementedError


async def test_a_datagram_to_a_host_by_name_waits_for_no_resolver(autojump_clock: trio.testing.MockClock) -> None:
    resolver = SlowResolver(delay_s=20.0)
    async with (
        aclosing(await UdpTransport().bind("127.0.0.1:0")) as here,
        aclosing(await UdpTransport().bind("127.0.0.1:0")) as there,
    ):
        port = there.address.rpartition(":")[2]
        trio.socket.set_custom_hostname_resolver(resolver)

        for number in range(100):
            here.send_nowait(b"%d" % number, f"h1.example:{port}")
            here.send_nowait(b"", "nowhere.example:1")
        await trio.sleep(21.0)
        here.send_nowait(b"after", f"h1.example:{port}")

        assert [data for data, _ in await there.receive()] == [b"after"]
        assert resolver.asked == 2


async def test_a_datagram_to_what_is_no_address_gets_lost() -> None:
    async with aclosing(await UdpTransport().bind("127.0.0.1:0")) as one:
        for remote in ("", "h1", "h1:", ":7400", "127.0.0.1:99999", "127.0.0.1:0"):
            one.send_nowait(b"x", remote)
