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


def tune(stream: trio.SocketStream) -> trio.SocketStream:
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, NOTSENT_LOWAT_BYTES)
    stream.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
    return stream


def bind_error(address: str, exc: OSError) -> TransportError:
    """What is in the way of listening, in one line."""
    if exc.errno == errno.EADDRINUSE:
        return TransportError(f"{address}: the port is in use by another process: stop it or configure another port")
    if exc.errno == errno.EADDRNOTAVAIL:
        return TransportError(f"{address}: this machine has no such address: check the links of the configuration")
    return TransportError(f"{address}: cannot listen: {exc.strerror}")


class _TcpListener(trio.abc.Listener[trio.abc.Stream]):
    def __init__(self, listener: trio.SocketListener) -> None:
        self.listener = listener

    async def accept(self) -> trio.abc.Stream:
        return tune(await self.listener.accept())

    async def aclose(self) -> None:
        await self.listener.aclose()


class TcpTransport:
    """``StreamTransport`` over TCP."""

    name = "tcp"

    async def dial(self, remote: str, *, local: str | None = None) -> trio.abc.Stream:
        family, name = await resolve(remote, socket.SOCK_STREAM)
        sock = trio.socket.socket(family, socket.SOCK_STREAM)
        try:
            if local is not None:
                host, _ = split_address(local, "local")
                # Choose the port only on connecting: a local port per remote, not one per socket.
                sock.setsockopt(socket.IPPROTO_IP, getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24), 1)
                await sock.bind((host, 0))
            await sock.connect(name)
        except OSError as exc:
            sock.close()
            raise TransportError(f"{remote}: cannot connect: {exc.strerror or exc}") from exc
        except BaseException:
            sock.close()
            raise
        return tune(trio.SocketStream(sock))

    async def listen(self, address: str) -> trio.abc.Listener[trio.abc.Stream]:
        family, name = await resolve(address, socket.SOCK_STREAM)
        sock = trio.socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            await sock.bind(name)
            sock.listen(BACKLOG)
        except OSError as exc:
            sock.close()
            raise bind_error(address, exc) from exc
        return _TcpListener(trio.SocketListener(sock))

    def address_of(self, end: trio.abc.Listener[trio.abc.Stream] | trio.abc.Stream) -> str:
        if isinstance(end, _TcpListener):
            return format_address(end.listener.socket.getsockname())
        if isinstance(end, trio.SocketStream):
            try:
                return format_address(end.socket.getpeername())
            except OSError:
                return "?:0"
        raise TransportError(f"{type(end).__name__} is no end of a TCP connection")
