"""The endpoint's shell: carries out Dial, Transmit, Disconnect and TransmitDatagram, and reports what happens below.

Each connection has a reader and a writer task that nobody cancels but their end. The shell decides nothing: limits,
handshakes, retries and verdicts are the machine's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Protocol

import attrs
import trio

from ha_core.config import split_address
from ha_core.errors import TransportError
from ha_core.guard.renewal import MAGIC as GUARD_MAGIC
from ha_core.ids import LinkName
from ha_core.interfaces import DatagramSocket, DatagramTransport, StreamTransport
from ha_core.machines import messages
from ha_core.machines.contract import Effect, Event

logger = logging.getLogger(__name__)

RECEIVE_BYTES = 256 << 10
CLOSE_S = 1.0
"""A connection that is to end has so long to send its last words."""
ACCEPT_PAUSE_S = 0.1
BIND_ATTEMPTS = 20


class Post(Protocol):
    def __call__(self, *events: Event) -> None: ...


@attrs.define(eq=False)
class _Wire:
    """A connection: what is to be written, and how it ends."""

    number: int
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    chunks: list[bytes] = attrs.field(factory=list)
    wake: trio.Event = attrs.field(factory=trio.Event)
    send_nowait: Callable[[bytes], int] | None = None
    """Sends what the kernel takes at once; None if the transport has no such thing."""
    idle: bool = False
    """The writer waits for chunks."""
    closing: bool = False
    """The machine wants it closed, after what was transmitted."""


class EndpointShell:
    """The world of an EndpointMachine, or of a parent that passes its effects on.

    ``open`` binds all addresses, ``run`` serves until cancelled; ``perform`` may be called once ``run`` has started.
    """

    def __init__(
        self,
        *,
        post: Post,
        step: Post,
        bind: Mapping[LinkName, str],
        stream: StreamTransport,
        datagram: DatagramTransport,
        on_guard_datagram: Callable[[LinkName, str, bytes], None] | None = None,
    ) -> None:
        """
        Args:
            post: queues events for the machine (Driver.post).
            step: feeds events at once (Driver.step).
            bind: where to listen, per link; port 0 takes a free one.
            on_guard_datagram: gets (link, remote, data) of packets that are for the guard's lease server.
        """
        self.addresses: dict[LinkName, str] = {}
        """Per link the address that is listened on; after ``open``."""
        self._post = post
        self._step = step
        self._bind = dict(bind)
        self._stream = stream
        self._datagram = datagram
        self._on_guard_datagram = on_guard_datagram
        self._listeners: dict[LinkName, trio.abc.Listener[trio.abc.Stream]] = {}
        self._sockets: dict[LinkName, DatagramSocket] = {}
        self._wires: dict[int, _Wire] = {}
        self._next_accept = 1
        self._nursery: trio.Nursery | None = None

    async def open(self) -> None:
        """Bind a listener and a datagram socket, on the same port, for each link.

        Raises:
            TransportError: a port is in use or an address is not ours; nothing stays bound.
        """
        try:
            for link, address in self._bind.items():
                await self._open_link(link, address)
        except BaseException:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_S):
                await self._close_all()
            raise

    async def _open_link(self, link: LinkName, address: str) -> None:
        _, port = split_address(address, f"links.{link}")
        for attempt in range(BIND_ATTEMPTS):
            try:
                listener = await self._stream.listen(address)
            except TransportError as exc:
                raise TransportError(f"link {link}: {exc}") from exc
            self._listeners[link] = listener
            found = self._stream.address_of(listener)
            try:
                self._sockets[link] = await self._datagram.bind(found)
                self.addresses[link] = found
                return
            except TransportError as exc:
                await listener.aclose()
                del self._listeners[link]
                if port or attempt == BIND_ATTEMPTS - 1:
                    raise TransportError(f"link {link}: {exc} (datagrams)") from exc

    async def _close_all(self) -> None:
        for listener in self._listeners.values():
            await listener.aclose()
        for socket in self._sockets.values():
            await socket.aclose()
        self._listeners.clear()
        self._sockets.clear()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; then every connection is closed."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for link, listener in self._listeners.items():
                    nursery.start_soon(self._accept, link, listener)
                for link, socket in self._sockets.items():
                    nursery.start_soon(self._receive_datagrams, link, socket)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_S):
                await self._close_all()

    # -- effects --

    def perform(self, effect: Effect) -> bool:
        """Carry out one effect of the endpoint; False if it is none that concerns the world below."""
        match effect:
            case messages.Transmit():
                wire = self._wires.get(effect.connection)
                if wire is not None and not wire.closing:
                    self._transmit(wire, effect.data)
            case messages.TransmitDatagram():
                self.send_raw(effect.link, effect.remote, effect.data)
            case messages.Dial():
                wire = self._wires[effect.connection] = _Wire(effect.connection)
                if self._nursery is not None:
                    self._nursery.start_soon(self._dial, wire, effect.path)
            case messages.Disconnect():
                wire = self._wires.pop(effect.connection, None)
                if wire is not None:
                    logger.debug("connection %d ends: %s", effect.connection, effect.reason)
                    wire.closing = True
                    wire.wake.set()
                    wire.scope.deadline = min(wire.scope.deadline, trio.current_time() + CLOSE_S)
            case _:
                return False
        return True

    def _transmit(self, wire: _Wire, data: bytes) -> None:
        """Send at once what the kernel takes, if the writer is idle; a task's turn costs more than the call."""
        sent = 0
        if wire.send_nowait is not None and wire.idle and not wire.chunks:
            sent = wire.send_nowait(data)
            if sent:
                self._step(messages.Flushed(wire.number, sent))
        if sent < len(data):
            wire.chunks.append(data[sent:])
            wire.wake.set()

    def send_raw(self, link: LinkName, remote: str, data: bytes) -> None:
        """Send a datagram that is not the endpoint's (an answer to a guard)."""
        socket = self._sockets.get(link)
        if socket is not None:
            socket.send_nowait(data, remote)

    # -- connections --

    async def _dial(self, wire: _Wire, path: messages.PathKey) -> None:
        local = self.addresses.get(path.link)
        if local is not None and split_address(local, "local")[0] in ("0.0.0.0", "::"):
            local = None
        with wire.scope:
            try:
                stream = await self._stream.dial(path.remote, local=local)
            except TransportError as exc:
                self._end(wire, str(exc))
                return
            if not wire.closing:
                self._post(messages.Connected(wire.number))
            await self._serve(wire, stream)

    async def _accept(self, link: LinkName, listener: trio.abc.Listener[trio.abc.Stream]) -> None:
        while True:
            try:
                stream = await listener.accept()
            except OSError as exc:
                # Out of descriptors, or the peer is gone already: that must not end the listener.
                logger.warning("link %s: cannot accept a connection: %s", link, exc.strerror)
                await trio.sleep(ACCEPT_PAUSE_S)
                continue
            wire = _Wire(self._next_accept)
            self._next_accept += 2
            self._wires[wire.number] = wire
            if self._nursery is not None:
                self._nursery.start_soon(self._serve_accepted, wire, stream, link)

    async def _serve_accepted(self, wire: _Wire, stream: trio.abc.Stream, link: LinkName) -> None:
        with wire.scope:
            self._post(messages.Accepted(wire.number, link, self._stream.address_of(stream)))
            await self._serve(wire, stream)

    async def _serve(self, wire: _Wire, stream: trio.abc.Stream) -> None:
        """Read and write until either ends."""
        error = "closed here"
        wire.send_nowait = getattr(stream, "send_nowait", None)
        try:
            async with trio.open_nursery() as nursery:

                async def read() -> None:
                    nonlocal error
                    error = await self._read(wire, stream)
                    nursery.cancel_scope.cancel()

                nursery.start_soon(read)
                failure = await self._write(wire, stream)
                if failure:
                    error = failure
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_S):
                await stream.aclose()
            self._end(wire, error)

    async def _read(self, wire: _Wire, stream: trio.abc.Stream) -> str:
        while True:
            try:
                data = await stream.receive_some(RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                return f"the connection broke: {exc.__cause__ or exc}"
            if not data:
                return "closed by the peer"
            if not wire.closing:
                self._step(messages.Received(wire.number, bytes(data)))

    async def _write(self, wire: _Wire, stream: trio.abc.Stream) -> str:
        while True:
            while wire.chunks:
                data = wire.chunks[0] if len(wire.chunks) == 1 else b"".join(wire.chunks)
                wire.chunks.clear()
                try:
                    await stream.send_all(data)
                except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                    return f"the connection broke: {exc.__cause__ or exc}"
                if not wire.closing:
                    self._step(messages.Flushed(wire.number, len(data)))
            if wire.closing:
                return ""
            wire.wake = trio.Event()
            wire.idle = True
            await wire.wake.wait()
            wire.idle = False

    def _end(self, wire: _Wire, error: str) -> None:
        """Report the end, unless the machine wanted it."""
        if self._wires.get(wire.number) is wire:
            del self._wires[wire.number]
        if not wire.closing:
            wire.closing = True
            self._post(messages.Disconnected(wire.number, error))

    # -- datagrams --

    async def _receive_datagrams(self, link: LinkName, socket: DatagramSocket) -> None:
        while True:
            events: list[Event] = []
            for data, remote in await socket.receive():
                if data.startswith(GUARD_MAGIC):
                    if self._on_guard_datagram is not None:
                        self._on_guard_datagram(link, remote, data)
                else:
                    events.append(messages.DatagramReceived(link, remote, data))
            if events:
                self._step(*events)
