"""UDP datagrams: sent or dropped at once, received in batches."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import trio

from ha_core.config import split_address
from ha_core.transports.tcp import bind_error, format_address, resolve

MAX_BATCH = 64
MAX_PACKET_BYTES = 65536
BUFFER_BYTES = 1 << 20
"""Packets that arrive while the event loop is busy wait here; the default is a few hundred."""
MAX_NAMES = 1024


class UdpSocket:
    """``DatagramSocket`` over UDP."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._names: dict[str, tuple[str, int]] = {}
        self.address = format_address(sock.getsockname())

    def send_nowait(self, data: bytes, remote: str) -> None:
        name = self._names.get(remote)
        if name is None:
            if len(self._names) >= MAX_NAMES:
                self._names.clear()
            name = self._names[remote] = split_address(remote, "remote")
        try:
            self._socket.sendto(data, name)
        except OSError:
            pass  # a full buffer, no route, a closed socket: datagrams may get lost

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
