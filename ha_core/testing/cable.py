"""A network of cables without root: one relay per (host, link) stands between a host's public address and its real one.

Hosts live on loopback addresses (127.a.b.c). Others reach a host under its *public* address, which the relay holds (TCP and
UDP); the host itself listens on its *real* address and binds every outgoing socket to that address's IP, so the relay knows
the sender by its source IP. ``Switchboard.cut`` is then a silent loss: nothing is forwarded and nothing is reset, TCP
connections are held and go on where they were when the cable is mended, connections begun meanwhile hang.

    ports = lay_cables(["h1", "h2"], ["a", "b"])          # {("h1", "a"): (public, real), ...}
    async with open_switchboard(ports) as board:
        board.cut("h1", "a")
        board.mend("h1", "a")

A connection begun during a cut is accepted by the kernel, but nothing behind it happens before the cable is mended; a real
cable would hold the connect call itself. What the relay has already handed to the receiver's kernel counts as delivered.

As a process of its own: ``python -m ha_core.testing.cable --json '{"h1.a": ["127.1.0.1:7400", "127.2.0.1:7400"]}'`` takes the
methods of ``Switchboard`` as lines on stdin (``cut h1 a``) and answers each with one JSON line; it ends with its stdin.
``ha_core.testing.cable_process`` is its client.
"""

from __future__ import annotations

import random
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Literal

import attrs
import trio

from ha_core.config import split_address
from ha_core.errors import ConfigError, TransportError

Direction = Literal["both", "out", "in"]
"""``out``: what the host sends is lost; ``in``: what is sent to it."""
Ports = Mapping[tuple[str, str], tuple[str, str]]
"""(host, link) -> (public address, real address), each ``127.a.b.c:port``."""

_CHUNK = 64 * 1024
_KERNEL_BUFFER = 256 * 1024  # a cable holds little: what waits for a slow receiver stays with the sender
_DATAGRAM_RUN = 64
_MAPPED_SOCKETS = 256  # return mappings of senders that use another port than their real address's
_RESET = struct.pack("ii", 1, 0)


def lay_cables(hosts: Sequence[str], links: Sequence[str]) -> dict[tuple[str, str], tuple[str, str]]:
    """Addresses for every (host, link) that are free now: each its own public and real IP of 127.0.0.0/8, one port."""
    ports: dict[tuple[str, str], tuple[str, str]] = {}
    draw = random.SystemRandom()
    while True:
        net, port = f"127.{draw.randrange(64, 250)}.{draw.randrange(1, 250)}", draw.randrange(10_000, 30_000)
        for number, (host, link) in enumerate((host, link) for host in hosts for link in links):
            ports[host, link] = (f"{net}.{2 * number + 1}:{port}", f"{net}.{2 * number + 2}:{port}")
        if all(_is_free(address) for pair in ports.values() for address in pair):
            return ports


def _is_free(address: str) -> bool:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as probe:
            try:
                probe.bind(split_address(address, "address"))
            except OSError:
                return False
    return True


@attrs.define(eq=False)
class Cable:
    """The state of one (host, link)."""

    host: str
    link: str
    public_ip: str
    cut_out: bool = False
    cut_in: bool = False
    delay_s: float = 0.0
    """Added to everything sent or received over it."""
    loss: float = 0.0
    """Part of the datagrams that it loses; TCP is only delayed."""
    sent_bytes: int = 0
    """What the host sent over it and was forwarded."""


@attrs.define(eq=False)
class _Flow:
    """One direction between two cables; None is somebody who is no host of the board, and always connected."""

    board: Switchboard
    sender: Cable | None
    receiver: Cable | None

    def is_cut(self) -> bool:
        sender, receiver = self.sender, self.receiver
        if (sender is not None and sender.cut_out) or (receiver is not None and receiver.cut_in):
            return True
        if sender is None or receiver is None:
            return False
        return (sender.host, receiver.host, receiver.link) in self.board.partitions

    def delay_s(self) -> float:
        return sum(end.delay_s for end in (self.sender, self.receiver) if end is not None)

    def loses(self) -> bool:
        return any(
            end is not None and end.loss > 0 and self.board.rng.random() < end.loss for end in (self.sender, self.receiver)
        )

    def count(self, size: int) -> None:
        if self.sender is not None:
            self.sender.sent_bytes += size

    async def wait_open(self) -> None:
        while self.is_cut():
            await self.board.changed.wait()


class Switchboard:
    """All cables of a test; made by ``open_switchboard``. Its commands take effect at once and are idempotent."""

    def __init__(self, nursery: trio.Nursery, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.changed = trio.Event()
        self.partitions: set[tuple[str, str, str]] = set()
        self._nursery = nursery
        self._cables: dict[tuple[str, str], Cable] = {}
        self._by_ip: dict[str, Cable] = {}
        self._public: dict[str, socket.socket] = {}  # real "ip:port" -> the UDP socket of its public address

    # -- commands --

    def cut(self, host: str, link: str, direction: Direction = "both") -> None:
        """Lose everything that the host sends (``out``), is sent (``in``) or both on this link, silently."""
        cable = self._cable(host, link)
        cable.cut_out = cable.cut_out or direction in ("both", "out")
        cable.cut_in = cable.cut_in or direction in ("both", "in")

    def mend(self, host: str, link: str) -> None:
        """Undo every cut of this cable."""
        cable = self._cable(host, link)
        cable.cut_out = cable.cut_in = False
        self._change()

    def cut_host(self, host: str) -> None:
        """Cut all links of a host."""
        for cable in self._of(host):
            self.cut(host, cable.link)

    def mend_host(self, host: str) -> None:
        for cable in self._of(host):
            self.mend(host, cable.link)

    def partition(self, host: str, other: str, link: str) -> None:
        """Cut two hosts from each other on one link; each still reaches the rest."""
        self._cable(host, link), self._cable(other, link)
        self.partitions |= {(host, other, link), (other, host, link)}

    def join(self, host: str, other: str, link: str) -> None:
        """Undo ``partition``."""
        self.partitions -= {(host, other, link), (other, host, link)}
        self._change()

    def impair(self, host: str, link: str, *, delay_s: float = 0.0, loss: float = 0.0) -> None:
        """Delay all that passes this cable and lose a part of its datagrams; zeroes end it."""
        cable = self._cable(host, link)
        cable.delay_s, cable.loss = delay_s, loss

    async def add(self, host: str, link: str, public: str, real: str) -> None:
        """Relay ``public`` to ``real``; several pairs on one (host, link) share its cuts.

        Raises:
            TransportError: the public address cannot be bound.
        """
        public_at, real_at = split_address(public, "public"), split_address(real, "real")
        owner = self._by_ip.get(real_at[0])
        if owner is not None and (owner.host, owner.link) != (host, link):
            raise ConfigError(
                f"cable {host}.{link}: {real_at[0]} is already the real IP of {owner.host}.{owner.link}", field=real
            )
        listener, datagrams = _bind(socket.SOCK_STREAM, public_at), _bind(socket.SOCK_DGRAM, public_at)
        listener.listen(1024)
        cable = self._cables.setdefault((host, link), Cable(host, link, public_at[0]))
        self._by_ip[real_at[0]] = cable
        self._public[real] = datagrams
        self._nursery.start_soon(self._accept, listener, cable, real_at)
        self._nursery.start_soon(self._relay_datagrams, datagrams, cable, real_at)

    def cables(self) -> Sequence[Cable]:
        return list(self._cables.values())

    def _cable(self, host: str, link: str) -> Cable:
        try:
            return self._cables[host, link]
        except KeyError:
            raise ConfigError(f"cable {host}.{link}: there is none; known: {', '.join(map('.'.join, self._cables))}") from None

    def _of(self, host: str) -> list[Cable]:
        return [cable for cable in self._cables.values() if cable.host == host]

    def _change(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    # -- TCP --

    async def _accept(self, listener: socket.socket, cable: Cable, real: tuple[str, int]) -> None:
        try:
            while True:
                await trio.lowlevel.wait_readable(listener)
                try:
                    client, (ip, _) = listener.accept()
                except BlockingIOError:
                    continue
                except OSError:  # no descriptors left, or the client gave up: neither may end the cable
                    await trio.sleep(0.02)
                    continue
                self._nursery.start_soon(self._relay_stream, client, self._by_ip.get(ip), cable, real)
        finally:
            listener.close()

    async def _relay_stream(self, client: socket.socket, sender: Cable | None, receiver: Cable, real: tuple[str, int]) -> None:
        there, back = _Flow(self, sender, receiver), _Flow(self, receiver, sender)
        server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            for end in (client, server):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if sender is not None:  # the receiver sees the sender's public IP
                server.bind((sender.public_ip, 0))
            while there.is_cut() or back.is_cut():
                await there.wait_open()
                await back.wait_open()
            if _hung_up(client):
                return
            if not await _connect(server, real):
                await back.wait_open()  # a refusal, too, travels back only over a whole cable
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                return
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_Pump(client, server, there, back, nursery).run)
                nursery.start_soon(_Pump(server, client, back, there, nursery).run)
        finally:
            client.close()
            server.close()

    # -- UDP --

    async def _relay_datagrams(self, public: socket.socket, receiver: Cable, real: tuple[str, int]) -> None:
        mapped: dict[tuple[str, int], tuple[socket.socket, trio.CancelScope]] = {}
        try:
            while True:
                for data, source in await _receive_run(public):
                    sender = self._by_ip.get(source[0])
                    out = self._public.get(f"{source[0]}:{source[1]}")
                    if out is None:
                        out = self._map(mapped, source, sender, public, receiver)
                    self._forward(out, data, real, _Flow(self, sender, receiver))
        finally:
            public.close()

    def _map(
        self,
        mapped: dict[tuple[str, int], tuple[socket.socket, trio.CancelScope]],
        source: tuple[str, int],
        sender: Cable | None,
        public: socket.socket,
        receiver: Cable,
    ) -> socket.socket:
        """The socket that stands for a sender without a public port; answers to it go back as if from ``public``."""
        found = mapped.pop(source, None)
        if found is None:
            found = (_bind(socket.SOCK_DGRAM, (sender.public_ip if sender else "127.0.0.1", 0)), trio.CancelScope())
            self._nursery.start_soon(self._relay_answers, found, source, public, _Flow(self, receiver, sender))
        mapped[source] = found
        if len(mapped) > _MAPPED_SOCKETS:
            mapped.pop(next(iter(mapped)))[1].cancel()
        return found[0]

    async def _relay_answers(
        self, mapped: tuple[socket.socket, trio.CancelScope], source: tuple[str, int], public: socket.socket, flow: _Flow
    ) -> None:
        with mapped[0], mapped[1]:
            while True:
                for data, _ in await _receive_run(mapped[0]):
                    self._forward(public, data, source, flow)

    def _forward(self, out: socket.socket, data: bytes, target: tuple[str, int], flow: _Flow) -> None:
        if flow.is_cut() or flow.loses():
            return
        delay_s = flow.delay_s()
        if delay_s:
            self._nursery.start_soon(self._send_late, out, data, target, flow, delay_s)
        else:
            self._send(out, data, target, flow)

    async def _send_late(self, out: socket.socket, data: bytes, target: tuple[str, int], flow: _Flow, delay_s: float) -> None:
        await trio.sleep(delay_s)
        self._send(out, data, target, flow)

    @staticmethod
    def _send(out: socket.socket, data: bytes, target: tuple[str, int], flow: _Flow) -> None:
        with suppress(OSError):  # a full or closed socket loses datagrams, as a cable does
            flow.count(out.sendto(data, target))


@attrs.define(eq=False)
class _Pump:
    """One direction of one TCP connection."""

    source: socket.socket
    sink: socket.socket
    flow: _Flow
    back: _Flow
    nursery: trio.Nursery
    late: deque[tuple[float, bytes]] = attrs.field(factory=deque)

    async def run(self) -> None:
        while True:
            await self.flow.wait_open()
            await trio.lowlevel.wait_readable(self.source)
            if self.flow.is_cut():
                continue
            try:
                data = self.source.recv(_CHUNK)
            except BlockingIOError:
                continue
            except OSError:
                self._reset()
                return
            delay_s = self.flow.delay_s()
            if delay_s or self.late:
                if not self.late:
                    self.nursery.start_soon(self._write_late)
                self.late.append((trio.current_time() + delay_s, data))
            else:
                await self._write(data)
            if not data:
                return

    async def _write_late(self) -> None:
        while self.late:
            await trio.sleep_until(self.late[0][0])
            await self.flow.wait_open()
            await self._write(self.late[0][1])
            self.late.popleft()

    async def _write(self, data: bytes) -> None:
        """Hand it all over; an empty one ends this direction."""
        try:
            if not data:
                self.sink.shutdown(socket.SHUT_WR)
                return
            rest = memoryview(data)
            while rest:
                try:
                    sent = self.sink.send(rest)
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self.sink)
                    await self.flow.wait_open()
                    continue
                rest = rest[sent:]
            self.flow.count(len(data))
        except OSError:  # the receiver is gone; its reset travels back on the other direction
            await self.back.wait_open()
            self._reset()

    def _reset(self) -> None:
        for end in (self.source, self.sink):
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.nursery.cancel_scope.cancel()


def _bind(kind: socket.SocketKind, address: tuple[str, int]) -> socket.socket:
    end = socket.socket(socket.AF_INET, kind)
    try:
        end.setblocking(False)
        if kind == socket.SOCK_STREAM:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _KERNEL_BUFFER)
        end.bind(address)
    except OSError as exc:
        end.close()
        raise TransportError(f"cable: cannot bind {address[0]}:{address[1]}: {exc.strerror}; is the port in use?") from exc
    return end


async def _receive_run(end: socket.socket) -> list[tuple[bytes, tuple[str, int]]]:
    await trio.lowlevel.wait_readable(end)
    run: list[tuple[bytes, tuple[str, int]]] = []
    with suppress(OSError):  # nothing more is there
        while len(run) < _DATAGRAM_RUN:
            run.append(end.recvfrom(_CHUNK))
    return run


async def _connect(end: socket.socket, address: tuple[str, int]) -> bool:
    try:
        end.connect(address)
    except BlockingIOError:
        await trio.lowlevel.wait_writable(end)
        return end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    except OSError:
        return False
    return True


def _hung_up(client: socket.socket) -> bool:
    """Whether a connection that never got through was given up meanwhile: then the receiver must not see it at all."""
    state: int = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return state != 1  # TCP_ESTABLISHED


@asynccontextmanager
async def open_switchboard(ports: Ports, *, seed: int = 0) -> AsyncIterator[Switchboard]:
    """Relay every pair of ``ports`` until the body ends; ``seed`` decides which datagrams an impaired cable loses.

    Raises:
        TransportError: a public address cannot be bound.
    """
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            board = Switchboard(nursery, seed)
            for (host, link), (public, real) in ports.items():
                await board.add(host, link, public, real)
            yield board
        except Exception as exc:  # leaves unwrapped, below
            failure = exc
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


if __name__ == "__main__":
    from ha_core.testing.cable_process import main

    main()
