"""The conformance suites of transports: what every one must do, whatever carries its bytes.

    async def test_my_transport():
        await check_stream_transport(lambda: TransportKit(transport=MyTransport(), address="127.0.0.1:0"))

``make`` is called once for each check. A rule that does not hold raises AssertionError with the name of the check.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

import attrs
import trio

from ha_core.errors import TransportError
from ha_core.interfaces import DatagramSocket, DatagramTransport, StreamTransport

T = TypeVar("T", StreamTransport, DatagramTransport)
LIMIT_S = 5.0


@attrs.frozen(kw_only=True)
class TransportKit(Generic[T]):
    """A transport and an address of this machine with port 0."""

    transport: T
    address: str


StreamKit = TransportKit[StreamTransport]
DatagramKit = TransportKit[DatagramTransport]
Ends = tuple[trio.abc.Stream, trio.abc.Stream]


async def check_stream_transport(make: Callable[[], StreamKit], *, limit_s: float = LIMIT_S) -> Sequence[str]:
    """Run every check, each for at most ``limit_s``; returns their names.

    Raises:
        AssertionError: a rule does not hold; the text begins with the check's name.
    """
    return await _run(STREAM_CHECKS, make, limit_s)


async def check_datagram_transport(make: Callable[[], DatagramKit], *, limit_s: float = LIMIT_S) -> Sequence[str]:
    """As ``check_stream_transport``."""
    return await _run(DATAGRAM_CHECKS, make, limit_s)


async def _run(
    checks: Sequence[Callable[[TransportKit[T]], Awaitable[None]]], make: Callable[[], TransportKit[T]], limit_s: float
) -> Sequence[str]:
    for check in checks:
        name = check.__name__
        try:
            with trio.fail_after(limit_s):
                await check(make())
        except AssertionError as exc:
            raise AssertionError(f"{name}: {exc}") from exc
        except trio.TooSlowError as exc:
            raise AssertionError(f"{name}: not done within {limit_s:g} s") from exc
    return [check.__name__ for check in checks]


def _demand(condition: object, text: str) -> None:
    if not condition:
        raise AssertionError(text)


@asynccontextmanager
async def _connected(kit: StreamKit) -> AsyncIterator[Ends]:
    listener = await kit.transport.listen(kit.address)
    async with listener:
        dialled = await kit.transport.dial(kit.transport.address_of(listener), local=kit.address)
        accepted = await listener.accept()
        async with dialled, accepted:
            yield dialled, accepted


async def _receive(stream: trio.abc.Stream, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        data = await stream.receive_some(size - len(found))
        _demand(data, f"the stream ended after {len(found)} of {size} bytes")
        found += data
    return bytes(found)


# -- streams --


async def bytes_arrive_whole_and_in_order_both_ways(kit: StreamKit) -> None:
    there, back = random.Random(1).randbytes(3 << 20), random.Random(2).randbytes(1 << 20)
    async with _connected(kit) as (one, other), trio.open_nursery() as nursery:
        nursery.start_soon(one.send_all, there)
        nursery.start_soon(other.send_all, back)
        _demand(await _receive(other, len(there)) == there, "other bytes arrived than were sent")
        _demand(await _receive(one, len(back)) == back, "other bytes arrived than were sent")


async def a_listener_says_where_it_listens(kit: StreamKit) -> None:
    async with await kit.transport.listen(kit.address) as listener:
        address = kit.transport.address_of(listener)
        host, _, port = address.rpartition(":")
        _demand(host and port.isdecimal() and int(port) > 0, f"{address!r} is no host:port with the port that was taken")


async def both_ends_know_where_the_other_one_is(kit: StreamKit) -> None:
    async with _connected(kit) as (one, other):
        for end in (one, other):
            address = kit.transport.address_of(end)
            host, _, port = address.rpartition(":")
            _demand(host and port.isdecimal(), f"{address!r} is no host:port")
        source = kit.transport.address_of(other).rpartition(":")[0]
        wanted = kit.address.rpartition(":")[0]
        _demand(source == wanted, f"the connection comes from {source}, not from the local address {wanted}")


async def an_end_ends_after_all_its_bytes(kit: StreamKit) -> None:
    async with _connected(kit) as (one, other):
        await one.send_all(b"last words")
        await one.aclose()
        _demand(await _receive(other, 10) == b"last words", "bytes that were sent before the end are lost")
        _demand(await other.receive_some(10) == b"", "the end is not told")


async def writing_to_a_closed_end_fails(kit: StreamKit) -> None:
    async with _connected(kit) as (one, other):
        await other.aclose()
        try:
            for _ in range(100):
                await one.send_all(bytes(64 << 10))
                await trio.sleep(0.001)
        except trio.BrokenResourceError:
            return
        _demand(False, "100 writes to a closed end succeeded")


async def a_writer_waits_for_a_slow_reader(kit: StreamKit) -> None:
    async with _connected(kit) as (one, other):
        sent = 0
        with trio.move_on_after(0.3):
            while sent < 64 << 20:
                await one.send_all(bytes(256 << 10))
                sent += 256 << 10
        _demand(sent < 64 << 20, "64 MiB were taken that nobody read")
        _demand(await other.receive_some(1), "nothing arrived")


async def a_dial_that_nobody_answers_fails_in_words(kit: StreamKit) -> None:
    listener = await kit.transport.listen(kit.address)
    address = kit.transport.address_of(listener)
    await listener.aclose()
    await _demand_transport_error(lambda: kit.transport.dial(address), address)


async def an_address_is_taken_once(kit: StreamKit) -> None:
    async with await kit.transport.listen(kit.address) as listener:
        address = kit.transport.address_of(listener)
        await _demand_transport_error(lambda: kit.transport.listen(address), address)
    async with await kit.transport.listen(address):
        pass  # it is free again


async def many_connect_at_once(kit: StreamKit) -> None:
    async with await kit.transport.listen(kit.address) as listener, trio.open_nursery() as nursery:
        address = kit.transport.address_of(listener)
        found: list[bytes] = []

        async def talk(number: int) -> None:
            async with await kit.transport.dial(address) as stream:
                await stream.send_all(bytes([number]))
                await stream.receive_some(1)

        for number in range(30):
            nursery.start_soon(talk, number)
        for _ in range(30):
            async with await listener.accept() as stream:
                found.append(await _receive(stream, 1))
        _demand(sorted(found) == [bytes([number]) for number in range(30)], "not every connection was accepted once")


async def a_cancelled_accept_or_receive_loses_nothing(kit: StreamKit) -> None:
    async with await kit.transport.listen(kit.address) as listener:
        with trio.move_on_after(0.01):
            await listener.accept()
        async with await kit.transport.dial(kit.transport.address_of(listener)) as one, await listener.accept() as other:
            with trio.move_on_after(0.01):
                await other.receive_some(10)
            await one.send_all(b"hello")
            _demand(await _receive(other, 5) == b"hello", "bytes are lost after a cancelled receive")


async def _demand_transport_error(call: Callable[[], Awaitable[object]], address: str) -> None:
    try:
        await call()
    except TransportError as exc:
        _demand(address in str(exc) and "\n" not in str(exc), f"{str(exc)!r} does not name {address} in one line")
        return
    _demand(False, "no TransportError")


STREAM_CHECKS: Sequence[Callable[[StreamKit], Awaitable[None]]] = (
    bytes_arrive_whole_and_in_order_both_ways,
    a_listener_says_where_it_listens,
    both_ends_know_where_the_other_one_is,
    an_end_ends_after_all_its_bytes,
    writing_to_a_closed_end_fails,
    a_writer_waits_for_a_slow_reader,
    a_dial_that_nobody_answers_fails_in_words,
    an_address_is_taken_once,
    many_connect_at_once,
    a_cancelled_accept_or_receive_loses_nothing,
)

# -- datagrams --


@asynccontextmanager
async def _bound(kit: DatagramKit) -> AsyncIterator[DatagramSocket]:
    socket = await kit.transport.bind(kit.address)
    try:
        yield socket
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
            await socket.aclose()


async def datagrams_arrive_whole_with_their_source(kit: DatagramKit) -> None:
    async with _bound(kit) as one, _bound(kit) as other:
        for size in (0, 1, 1200, 1400):
            one.send_nowait(bytes(size), other.address)
            found = list(await other.receive())
            _demand(found == [(bytes(size), one.address)], f"{size} bytes arrived otherwise, or from elsewhere")


async def what_is_there_comes_in_batches_and_in_order(kit: DatagramKit) -> None:
    async with _bound(kit) as one, _bound(kit) as other:
        for number in range(50):
            one.send_nowait(bytes([number]), other.address)
        found: list[bytes] = []
        while len(found) < 50:
            found += [data for data, _ in await other.receive()]
        _demand(found == [bytes([number]) for number in range(50)], "the order changed")


async def sending_where_nobody_is_does_nothing(kit: DatagramKit) -> None:
    async with _bound(kit) as one:
        async with _bound(kit) as other:
            gone = other.address
        for _ in range(3):
            one.send_nowait(b"x", gone)
            await trio.sleep(0.001)
        async with _bound(kit) as third:
            one.send_nowait(b"y", third.address)
            _demand([data for data, _ in await third.receive()] == [b"y"], "the socket does not work any more")
    one.send_nowait(b"after the end", one.address)


async def a_flood_is_dropped_and_never_waits(kit: DatagramKit) -> None:
    async with _bound(kit) as one, _bound(kit) as other:
        for _ in range(20_000):
            one.send_nowait(bytes(1000), other.address)
        _demand(len(await other.receive()) > 0, "nothing of a flood arrived")


async def a_socket_address_is_taken_once(kit: DatagramKit) -> None:
    async with _bound(kit) as one:
        await _demand_transport_error(lambda: kit.transport.bind(one.address), one.address)


DATAGRAM_CHECKS: Sequence[Callable[[DatagramKit], Awaitable[None]]] = (
    datagrams_arrive_whole_with_their_source,
    what_is_there_comes_in_batches_and_in_order,
    sending_where_nobody_is_does_nothing,
    a_flood_is_dropped_and_never_waits,
    a_socket_address_is_taken_once,
)
