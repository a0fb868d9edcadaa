"""The endpoint's shell with real sockets on loopback."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import attrs
import pytest
import trio

from ha_core.config import LAN
from ha_core.errors import TransportError
from ha_core.ids import Boot, ChannelName, LinkName, NodeId, StoreId
from ha_core.interfaces import DatagramTransport, StreamTransport
from ha_core.machines import messages as m
from ha_core.machines.contract import Effect, Event
from ha_core.machines.endpoint import EndpointMachine
from ha_core.runtime.driver import Driver
from ha_core.runtime.endpoint import EndpointShell
from ha_core.transports.memory import MemoryNetwork, MemoryTransport
from ha_core.transports.tcp import TcpTransport
from ha_core.transports.udp import UdpTransport

LINKS = (LinkName("l1"), LinkName("l2"))
C = ChannelName("c")


@attrs.define(eq=False)
class Node:
    """A machine, its driver and its shell, as a program would put them together."""

    name: NodeId
    shell: EndpointShell
    driver: Driver | None = None
    machine: EndpointMachine | None = None
    delivered: list[bytes] = attrs.field(factory=list)
    log: list[Effect] = attrs.field(factory=list)
    wake: trio.Event = attrs.field(factory=trio.Event)
    guard: list[tuple[str, str, bytes]] = attrs.field(factory=list)

    def post(self, *events: Event) -> None:
        if self.driver is not None:
            self.driver.post(*events)

    def step(self, *events: Event) -> None:
        if self.driver is not None:
            self.driver.step(*events)
            self.wake.set()

    def perform(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if self.shell.perform(effect):
                continue
            self.log.append(effect)
            if isinstance(effect, m.DeliverRun):
                self.delivered += effect.bodies
                self.post(m.Consumed(effect.peer, effect.channel, len(effect.bodies), sum(map(len, effect.bodies))))
        self.wake.set()

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self.wake = trio.Event()
            await self.wake.wait()

    def connections(self) -> int:
        session = self.machine.session_with(NodeId("app@h2" if self.name == "app@h1" else "app@h1")) if self.machine else None
        return len(session.connections) if session is not None else 0

    def note_guard(self, link: LinkName, remote: str, data: bytes) -> None:
        self.guard.append((link, remote, data))
        self.wake.set()

    def has(self, kind: type[Effect]) -> bool:
        return any(isinstance(effect, kind) for effect in self.log)

    def paths_up(self) -> int:
        return sum(state is m.PathState.UP for _, state, _ in self.machine.paths()) if self.machine else 0


@asynccontextmanager
async def open_node(
    host: str, *, stream: StreamTransport | None = None, datagram: DatagramTransport | None = None, bind: str = "127.0.0.1:0"
) -> AsyncIterator[Node]:
    name = NodeId(f"app@{host}")
    node = Node(name, None)  # type: ignore[arg-type]  # filled in below: each needs the other
    node.shell = EndpointShell(
        post=node.post,
        step=node.step,
        bind=dict.fromkeys(LINKS, bind),
        stream=stream or TcpTransport(),
        datagram=datagram or UdpTransport(),
        on_guard_datagram=node.note_guard,
    )
    await node.shell.open()
    node.machine = EndpointMachine(
        node=name,
        cluster="c",
        key=b"k" * 32,
        store=StoreId(host.encode().ljust(16, b"s")),
        boot=Boot(1, random.getrandbits(64)),
        boots_digest=b"",
        links=node.shell.addresses,
        profile=LAN,
        rng=random.Random(),
    )
    node.driver = Driver(node.machine, node.perform)
    async with trio.open_nursery() as nursery:
        await nursery.start(node.shell.run)
        await nursery.start(node.driver.run)
        yield node
        nursery.cancel_scope.cancel()


def meet(a: Node, b: Node) -> None:
    a.post(m.SetPeer(b.name, b.shell.addresses))
    b.post(m.SetPeer(a.name, a.shell.addresses))


@pytest.mark.parametrize("transport", ["tcp", "memory"])
async def test_messages_travel_over_real_streams(transport: str) -> None:
    memory = MemoryTransport(MemoryNetwork())
    options = {"stream": memory, "datagram": memory, "bind": "m:0"} if transport == "memory" else {}
    async with open_node("h1", **options) as a, open_node("h2", **options) as b:  # type: ignore[arg-type]
        meet(a, b)
        await a.until(lambda: a.has(m.SessionUp))
        bodies = [b"%d" % n for n in range(3_000)] + [random.randbytes(3 << 20)]

        a.post(m.SendRun(b.name, C, bodies))
        await b.until(lambda: len(b.delivered) == len(bodies))

        assert b.delivered == bodies


async def test_both_links_come_up_and_one_connection_remains_on_each() -> None:
    async with open_node("h1") as a, open_node("h2") as b:
        meet(a, b)
        await a.until(lambda: a.paths_up() == 2)
        await b.until(lambda: b.paths_up() == 2)

        # Duplicates of simultaneous dials are closed.
        await a.until(lambda: a.connections() == 2)
        await b.until(lambda: b.connections() == 2)


async def test_datagrams_travel_and_the_guards_are_handed_on() -> None:
    async with open_node("h1") as a, open_node("h2") as b:
        meet(a, b)
        await b.until(lambda: b.has(m.SessionUp))
        await a.until(lambda: a.has(m.SessionUp))

        a.post(m.SendDatagram(b.name, ChannelName("t"), b"beat"))
        await b.until(lambda: b.has(m.DeliverDatagram))
        a.shell.send_raw(LINKS[0], b.shell.addresses[LINKS[0]], b"HAG1 renewal")
        await b.until(lambda: b.guard)

        assert [effect.body for effect in b.log if isinstance(effect, m.DeliverDatagram)] == [b"beat"]
        assert b.guard == [(LINKS[0], a.shell.addresses[LINKS[0]], b"HAG1 renewal")]


async def test_a_port_in_use_is_one_clear_line_and_leaves_nothing_bound() -> None:
    async with await TcpTransport().listen("127.0.0.1:0") as listener:
        taken = TcpTransport().address_of(listener)
        free = await TcpTransport().listen("127.0.0.1:0")
        address = TcpTransport().address_of(free)
        await free.aclose()
        shell = EndpointShell(
            post=lambda *_: None,
            step=lambda *_: None,
            bind={LINKS[0]: address, LINKS[1]: taken},
            stream=TcpTransport(),
            datagram=UdpTransport(),
        )

        with pytest.raises(TransportError, match=f"^link l2: {taken}: the port is in use by another process: [^\n]*$"):
            await shell.open()
        async with await TcpTransport().listen(address):
            pass


async def test_a_refused_stranger_hears_why_before_the_connection_ends() -> None:
    async with open_node("h1") as a:
        async with await TcpTransport().dial(a.shell.addresses[LINKS[0]]) as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
            answer = b""
            while data := await stream.receive_some():
                answer += data

        await a.until(lambda: a.has(m.PeerRefused))
        assert b"protocol" in answer


async def test_a_killed_peer_is_noticed_and_found_again() -> None:
    async with open_node("h1") as a:
        async with open_node("h2") as b:
            meet(a, b)
            await a.until(lambda: a.paths_up() == 2)
            addresses = dict(b.shell.addresses)
        await a.until(lambda: m.PeerReachable(NodeId("app@h2"), False) in a.log)

        shell = EndpointShell(
            post=lambda *_: None, step=lambda *_: None, bind=addresses, stream=TcpTransport(), datagram=UdpTransport()
        )
        await shell.open()  # the ports are free at once
        await shell._close_all()


async def test_cancelling_the_shell_closes_every_connection() -> None:
    async with open_node("h1") as a:
        async with open_node("h2") as b:
            meet(a, b)
            await b.until(lambda: b.paths_up() == 2)
        assert b.shell._wires == {}
        assert b.shell._listeners == {}


async def test_bulk_in_both_directions_does_not_stand_still() -> None:
    async with open_node("h1") as a, open_node("h2") as b:
        meet(a, b)
        await a.until(lambda: a.has(m.SessionUp))
        await b.until(lambda: b.has(m.SessionUp))
        run = [bytes(1_000)] * 1_000

        for _ in range(10):
            a.post(m.SendRun(b.name, C, run, m.Priority.BULK))
            b.post(m.SendRun(a.name, C, run, m.Priority.BULK))
        await a.until(lambda: len(a.delivered) == 10_000)
        await b.until(lambda: len(b.delivered) == 10_000)
