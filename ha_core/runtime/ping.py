"""Asking an isolation address whether it is there: one ICMP echo, or a TCP connection where a port is named.

ICMP needs no root where ``net.ipv4.ping_group_range`` allows it (Debian's default forbids it); with root a raw socket does.
"""

from __future__ import annotations

import struct

import trio

from ha_core.runtime.entropy import fresh_id

_ECHO_REQUEST, _ECHO_REPLY = 8, 0


async def ping(address: str, timeout_s: float) -> bool:
    """True if ``address`` (an IPv4 address, or ``host:port``) answered within ``timeout_s`` seconds."""
    with trio.move_on_after(timeout_s):
        try:
            return await (_connect(address) if ":" in address else _echo(address))
        except OSError:
            return False
    return False


async def _connect(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_STREAM) as socket:
        try:
            await socket.connect((host, int(port)))
        except ConnectionRefusedError:
            return True  # somebody is there to refuse
    return True


async def _echo(address: str) -> bool:
    payload = fresh_id()
    try:
        kind = trio.socket.SOCK_DGRAM
        socket = trio.socket.socket(trio.socket.AF_INET, kind, trio.socket.IPPROTO_ICMP)
    except PermissionError:
        kind = trio.socket.SOCK_RAW
        socket = trio.socket.socket(trio.socket.AF_INET, kind, trio.socket.IPPROTO_ICMP)
    with socket:
        await socket.connect((address, 0))
        await socket.send(_echo_request(payload))
        while True:
            packet = await socket.recv(2048)
            if kind == trio.socket.SOCK_RAW:
                packet = packet[(packet[0] & 15) * 4 :]
            if packet[:1] == bytes([_ECHO_REPLY]) and packet[8:] == payload:
                return True


def _echo_request(payload: bytes) -> bytes:
    head = struct.Struct(">BBHHH")
    body = head.pack(_ECHO_REQUEST, 0, 0, 1, 1) + payload
    return head.pack(_ECHO_REQUEST, 0, _checksum(body), 1, 1) + payload


def _checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
