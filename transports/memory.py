"""Streams and datagrams inside one process, for tests: bounded buffers, refused dials, addresses as elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import trio

from ha_core.config import split_address
from ha_core.errors import TransportError

PIPE_BYTES = 64 << 10
MAX_PACKETS = 1024


class MemoryNetwork:
    """All listeners and datagram sockets that can reach each other."""

    def __init__(self) -> None:
        self.listeners: dict[str, _MemoryListener] = {}
        self.sockets: dict[str, MemorySocket] = {}
        self._next_port = 40000

    def resolve(self, address: str) -> str:
        """The address with a port of its own for port 0."""
        host, port = split_address(address, "address")
        if port == 0:
            self._next_port += 1
            port = self._next_port
        return f"{host}:{port}"


_DEFAULT = MemoryNetwork()


class _Pipe:
    """One direction: bounded, with an end."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.ended = False
        """The writer said that nothing more comes."""
        self.broken = False
        """The reader is gone."""
        self.changed = trio.lowlevel.ParkingLot()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        await trio.lowlevel.checkpoint()
        while len(view):
            if self.broken:
                raise trio.BrokenResourceError("the other end is closed")
            room = PIPE_BYTES - len(self.buffer)
            if room <= 0:
                await self.changed.park()
                continue
            self.buffer += view[:room]
            view = view[room:]
            self.changed.unpark_all()

    async def receive_some(self, max_bytes: int | None) -> bytes:
        await trio.lowlevel.checkpoint()
        while not self.buffer:
            if self.ended:
                return b""
            await self.changed.park()
        data = bytes(self.buffer[: max_bytes or PIPE_BYTES])
        del self.buffer[: len(data)]
        self.changed.unpark_all()
        return data


class MemoryStream(trio.abc.Stream):
    def __init__(self, incoming: _Pipe, outgoing: _Pipe, remote: str) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._closed = False
        self.remote = remote

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this end is closed")
        await self._outgoing.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        while len(self._outgoing.buffer) >= PIPE_BYTES and not self._outgoing.broken:
            await self._outgoing.changed.park()
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self._closed:
            raise trio.ClosedResourceError("this end is closed")
        return await self._incoming.receive_some(max_bytes)

    async def aclose(self) -> None:
        self._closed = True
        self._outgoing.ended = True
        self._incoming.broken = True
        self._outgoing.changed.unpark_all()
        self._incoming.changed.unpark_all()
        await trio.lowlevel.checkpoint()


class _MemoryListener(trio.abc.Listener[trio.abc.Stream]):
    def __init__(self, network: MemoryNetwork, address: str) -> None:
        self._network = network
        self.address = address
        self.queue: deque[trio.abc.Stream] = deque()
        self.changed = trio.lowlevel.ParkingLot()
        self.closed = False

    async def accept(self) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        while not self.queue:
            if self.closed:
                raise trio.ClosedResourceError("the listener is closed")
            await self.changed.park()
        return self.queue.popleft()

    async def aclose(self) -> None:
        if not self.closed:
            self.closed = True
            del self._network.listeners[self.address]
            self.changed.unpark_all()
            for stream in self.queue:
                await stream.aclose()
        await trio.lowlevel.checkpoint()


class MemorySocket:
    """``DatagramSocket`` in memory."""

    def __init__(self, network: MemoryNetwork, address: str) -> None:
        self._network = network
        self.address = address
        self._packets: deque[tuple[bytes, str]] = deque(maxlen=MAX_PACKETS)
        self._changed = trio.lowlevel.ParkingLot()
        self._closed = False

    def send_nowait(self, data: bytes, remote: str) -> None:
        target = self._network.sockets.get(remote)
        if target is not None and not self._closed:
            target._packets.append((data, self.address))
            target._changed.unpark_all()

    async def receive(self) -> Sequence[tuple[bytes, str]]:
        await trio.lowlevel.checkpoint()
        while not self._packets:
            if self._closed:
                raise trio.ClosedResourceError("the datagram socket is closed")
            await self._changed.park()
        found = list(self._packets)
        self._packets.clear()
        return found

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            del self._network.sockets[self.address]
            self._changed.unpark_all()
        await trio.lowlevel.checkpoint()


class MemoryTransport:
    """``StreamTransport`` and ``DatagramTransport`` in memory; those that share a network reach each other."""

    name = "memory"

    def __init__(self, network: MemoryNetwork | None = None) -> None:
        self._network = network or _DEFAULT

    async def dial(self, remote: str, *, local: str | None = None) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        listener = self._network.listeners.get(remote)
        if listener is None:
            raise TransportError(f"{remote}: cannot connect: nobody listens")
        there, back = _Pipe(), _Pipe()
        host, _ = split_address(local or "memory:0", "local")
        listener.queue.append(MemoryStream(there, back, self._network.resolve(f"{host}:0")))
        listener.changed.unpark_all()
        return MemoryStream(back, there, remote)

    async def listen(self, address: str) -> trio.abc.Listener[trio.abc.Stream]:
        await trio.lowlevel.checkpoint()
        address = self._network.resolve(address)
        if address in self._network.listeners:
            raise TransportError(f"{address}: the port is in use by another process: stop it or configure another port")
        listener = self._network.listeners[address] = _MemoryListener(self._network, address)
        return listener

    def address_of(self, end: trio.abc.Listener[trio.abc.Stream] | trio.abc.Stream) -> str:
        if isinstance(end, _MemoryListener):
            return end.address
        if isinstance(end, MemoryStream):
            return end.remote
        raise TransportError(f"{type(end).__name__} is no end of a memory connection")

    async def bind(self, address: str) -> MemorySocket:
        await trio.lowlevel.checkpoint()
        address = self._network.resolve(address)
        if address in self._network.sockets:
            raise TransportError(f"{address}: the port is in use by another process: stop it or configure another port")
        found = self._network.sockets[address] = MemorySocket(self._network, address)
        return found
