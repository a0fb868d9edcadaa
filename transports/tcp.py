"""TCP streams, tuned for short queues and early notice."""

from __future__ import annotations

import errno
import socket

import trio

from ha_core.config import split_address
from ha_core.errors import TransportError

NOTSENT_LOWAT_BYTES = 64 << 10
"""The kernel takes more only while fewer bytes than this wait to be sent: what is urgent never stands behind megabytes."""
USER_TIMEOUT_MS = 10_000
"""The kernel gives up on unacknowledged data; only a backstop, paths are judged much earlier."""
BACKLOG = 128
_TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)
_TCP_USER_TIMEOUT = getattr(socket, "TCP_USER_TIMEOUT", 18)


def format_address(name: tuple[object, ...]) -> str:
    """``host:port`` of a socket's name."""
    host, port = str(name[0]), name[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def resolve(address: str, kind: int) -> tuple[int, tuple[object, ...]]:
    """Family and socket address of ``host:port``.

    Raises:
        TransportError: the host has no address.
    """
    host, port = split_address(address, "address")
    try:
        found = await trio.socket.getaddrinfo(host, port, type=kind)
    except (OSError, UnicodeError) as exc:
        raise TransportError(f"{address}: the host has no address: {getattr(exc, 'strerror', None) or exc}") from exc
    family, _, _, _, name = found[0]
    return family, name


class TcpStream(trio.abc.Stream):
    """A tuned stream that can also send without a task's turn."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, NOTSENT_LOWAT_BYTES)
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, USER_TIMEOUT_MS)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self._stream.aclose()

    def send_nowait(self, data: bytes) -> int:
        """Give the kernel what it takes now, and say how much that was; only while no ``send_all`` runs.

        An error counts as nothing taken: ``send_all`` will meet it again.
        """
        try:
            return self.socket.send(data)
        except OSError:
            return 0


def bind_error(address: str, exc: OSError) -> TransportError:
    """What is in the way of listening, in one line."""
    if exc.errno == errno.EADDRINUSE:
        return TransportError(f"{address}: the port is in use by another process: stop it or configure another port")
    if exc.errno == errno.EADDRNOTAVAIL:
        return TransportError(f"{address}: this machine has no such address: check the links of the configuration")
    return TransportError(f"{address}: cannot listen: {exc.strerror}")


class _TcpListener(trio.abc.Listener[trio.abc.Stream]):
    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock

    async def accept(self) -> trio.abc.Stream:
        while True:
            if self.socket.fileno() < 0:
                raise trio.ClosedResourceError("the listener is closed")
            await trio.lowlevel.wait_readable(self.socket)
            try:
                sock, _ = self.socket.accept()
            except BlockingIOError:
                continue
            return TcpStream(sock)

    async def aclose(self) -> None:
        if self.socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self.socket)
            self.socket.close()
        await trio.lowlevel.checkpoint()


class TcpTransport:
    """``StreamTransport`` over TCP."""

    name = "tcp"

    async def dial(self, remote: str, *, local: str | None = None) -> trio.abc.Stream:
        family, name = await resolve(remote, socket.SOCK_STREAM)
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError as exc:  # out of descriptors
            raise TransportError(f"{remote}: cannot connect: {exc.strerror}") from exc
        try:
            sock.setblocking(False)
            if local is not None:
                host, _ = split_address(local, "local")
                # Choose the port only on connecting: a local port per remote, not one per socket.
                sock.setsockopt(socket.IPPROTO_IP, getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24), 1)
                sock.bind((host, 0))
            await trio.socket.from_stdlib_socket(sock).connect(name)
            return TcpStream(sock)
        except OSError as exc:
            sock.close()
            raise TransportError(f"{remote}: cannot connect: {exc.strerror or exc}") from exc
        except BaseException:
            sock.close()
            raise

    async def listen(self, address: str) -> trio.abc.Listener[trio.abc.Stream]:
        family, name = await resolve(address, socket.SOCK_STREAM)
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(name)
            sock.listen(BACKLOG)
        except OSError as exc:
            sock.close()
            raise bind_error(address, exc) from exc
        return _TcpListener(sock)

    def address_of(self, end: trio.abc.Listener[trio.abc.Stream] | trio.abc.Stream) -> str:
        if isinstance(end, _TcpListener):
            return format_address(end.socket.getsockname())
        if isinstance(end, TcpStream):
            try:
                return format_address(end.socket.getpeername())
            except OSError:
                return "?:0"
        raise TransportError(f"{type(end).__name__} is no end of a TCP connection")
