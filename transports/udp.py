"""UDP datagrams: sent or dropped at once, received in batches."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

import trio

from ha_core.config import split_address
from ha_core.errors import ConfigError, TransportError
from ha_core.transports.tcp import bind_error, format_address, resolve

MAX_BATCH = 64
MAX_PACKET_BYTES = 65536
BUFFER_BYTES = 1 << 20
"""Packets that arrive while the event loop is busy wait here; the default is a few hundred."""
MAX_NAMES = 1024
NAME_S = 30.0
"""How long the address of a host that is given by name is used before it is asked for again, ..."""
RETRY_S = 1.0
"""... and after how long if there was none."""


class UdpSocket:
    """``DatagramSocket`` over UDP."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._names: dict[str, tuple[object, ...]] = {}
        self._resolved: dict[str, tuple[tuple[object, ...] | None, float]] = {}
        """Hosts given by name: their address, None while it is not known, and when to ask for it again."""
        self.address = format_address(sock.getsockname())

    def send_nowait(self, data: bytes, remote: str) -> None:
        name = self._names.get(remote) or self._learn(remote)
        if name is not None:
            try:
                self._socket.sendto(data, name)
            except OSError:
                pass  # a full buffer, no route, a closed socket: datagrams may get lost

    def _learn(self, remote: str) -> tuple[object, ...] | None:
        """The address to send to; None if there is none, or none yet: the resolver may take seconds, and nobody waits for it."""
        try:
            host, port = split_address(remote, "remote")
            ipaddress.ip_address(host)
        except ConfigError:
            return None
        except ValueError:
            return self._by_name(remote)
        if len(self._names) >= MAX_NAMES:
            self._names.clear()
        self._names[remote] = (host, port)
        return host, port

    def _by_name(self, remote: str) -> tuple[object, ...] | None:
        known, ask_again = self._resolved.get(remote, (None, 0.0))
        now = trio.current_time()
        if now >= ask_again:
            if len(self._resolved) >= MAX_NAMES:
                self._resolved.clear()
            self._resolved[remote] = known, now + NAME_S
            trio.lowlevel.spawn_system_task(self._resolve, remote)
        return known

    async def _resolve(self, remote: str) -> None:
        try:
            family, name = await resolve(remote, socket.SOCK_DGRAM)
        except (TransportError, ValueError):
            self._resolved[remote] = None, trio.current_time() + RETRY_S
            return
        if family == self._socket.family:
            self._resolved[remote] = name, trio.current_time() + NAME_S

    async def receive(self) -> Sequence[tuple[bytes, str]]:
        while True:
            if self._socket.fileno() < 0:
                raise trio.ClosedResourceError("the datagram socket is closed")
            await trio.lowlevel.wait_readable(self._socket)
            found: list[tuple[bytes, str]] = []
            for _ in range(MAX_BATCH):
                try:
                    data, name = self._socket.recvfrom(MAX_PACKET_BYTES)
                except BlockingIOError:
                    break
                except OSError:
                    continue  # an ICMP answer to something that was sent earlier
                found.append((data, format_address(name)))
            if found:
                return found

    async def aclose(self) -> None:
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
        await trio.lowlevel.checkpoint()


class UdpTransport:
    """``DatagramTransport`` over UDP."""

    name = "udp"

    async def bind(self, address: str) -> UdpSocket:
        family, name = await resolve(address, socket.SOCK_DGRAM)
        sock = socket.socket(family, socket.SOCK_DGRAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
            sock.bind(name)
        except OSError as exc:
            sock.close()
            raise bind_error(address, exc) from exc
        except BaseException:
            sock.close()
            raise
        return UdpSocket(sock)
