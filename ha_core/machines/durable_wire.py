"""Durable messages as bytes: the prefix digest, runs as they lie in the outbox and travel, and the frames of the protocol.

* H_0 is 16 zero bytes; H_n = blake2b-128(H_n-1 || n as 8 bytes, big-endian || body_n). Equal digests at a number mean equal
  messages up to it, so two ends need no more than (number, digest) to know whether they share a history.
* A run is a number of consecutive messages of one channel: msgpack, an array of bins. It is packed once, in the sender's
  transaction, and unpacked once, at the receiver.
* Frames are msgpack arrays with a kind in front; each is one message of a session channel. A Report carries absolute state and
  is idempotent; a Run goes only where a Report of the same session gave credit.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from struct import Struct
from typing import Final

import attrs
import msgpack

from ha_core.errors import DecodeError
from ha_core.ids import ChannelName

START_DIGEST: Final = bytes(16)
"""H_0."""
MAX_MESSAGE_BYTES: Final = 1 << 20
RUN_BYTES: Final = 30 << 10
"""A run is closed when it holds this much, so that with its frame it fits one DATA frame of a session."""
RUN_COUNT: Final = 1024
WINDOW_COUNT: Final = 4096
"""Credit: how many messages beyond the receiver's cursor may be on their way."""
FLIGHT_BYTES: Final = 1 << 20
"""And how many bytes, on each channel; one run always may."""
MAX_CHANNEL_BYTES: Final = 128
"""Length of a channel's name in UTF-8."""
MAX_RUN_FRAME_BYTES: Final = MAX_MESSAGE_BYTES + RUN_BYTES + (8 << 10)

_NUMBER = Struct(">Q").pack
_EMPTY = blake2b(digest_size=16)
_REPORT: Final = 1
_RUN: Final = 2
_FORK: Final = 3


def chain(before: bytes, first: int, bodies: Sequence[bytes]) -> list[bytes]:
    """The prefix digests of messages ``first``, ``first`` + 1, ..., given the one before them."""
    digests: list[bytes] = []
    add = digests.append
    number = _NUMBER
    copy = _EMPTY.copy
    for at, body in enumerate(bodies, first):
        state = copy()  # cheaper than a new one
        state.update(before + number(at) + body)
        before = state.digest()
        add(before)
    return digests


def pack_run(bodies: Sequence[bytes]) -> bytes:
    packed: bytes = msgpack.packb(bodies, use_bin_type=True)
    return packed


def unpack_run(blob: bytes) -> list[bytes]:
    """The messages of a run.

    Raises:
        DecodeError: it is no array of bins.
    """
    try:
        bodies: list[bytes] = msgpack.unpackb(
            blob, max_array_len=RUN_COUNT, max_bin_len=MAX_MESSAGE_BYTES, max_map_len=0, max_ext_len=0, max_str_len=0
        )
        if type(bodies) is not list or not bodies:
            raise ValueError("no messages")
        b"".join(bodies)  # refuses anything that is not bytes, in one pass
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as exc:
        raise DecodeError("a run of durable messages is no array of bins", code="durable") from exc
    return bodies


@attrs.frozen
class ChannelReport:
    """What the receiver of a channel has: durable up to ``cursor``, in memory up to ``received``, credit up to ``limit``."""

    name: ChannelName
    cursor: int
    digest: bytes
    received: int
    received_digest: bytes
    limit: int


@attrs.frozen
class Report:
    """``complete``: the first of a session; a channel that it does not name has never delivered anything."""

    complete: bool
    channels: Sequence[ChannelReport]


@attrs.frozen
class RunFrame:
    name: ChannelName
    first: int
    before: bytes
    digest: bytes
    blob: bytes


@attrs.frozen
class ForkNotice:
    """The sender of this frame stopped a channel: one that it sends on (``outgoing``) or one that it receives."""

    name: ChannelName
    outgoing: bool
    text: str


Frame = Report | RunFrame | ForkNotice


def encode_report(report: Report) -> bytes:
    rows = [(c.name, c.cursor, c.digest, c.received, c.received_digest, c.limit) for c in report.channels]
    packed: bytes = msgpack.packb((_REPORT, report.complete, rows), use_bin_type=True)
    return packed


def encode_run(frame: RunFrame) -> bytes:
    packed: bytes = msgpack.packb((_RUN, frame.name, frame.first, frame.before, frame.digest, frame.blob), use_bin_type=True)
    return packed


def encode_fork(notice: ForkNotice) -> bytes:
    packed: bytes = msgpack.packb((_FORK, notice.name, notice.outgoing, notice.text[:300]), use_bin_type=True)
    return packed


def decode(data: bytes) -> Frame:
    """One frame.

    Raises:
        DecodeError: it is none, or a field has the wrong type or size.
    """
    try:
        fields = msgpack.unpackb(
            data, max_array_len=4096, max_bin_len=MAX_RUN_FRAME_BYTES, max_map_len=0, max_ext_len=0, max_str_len=1024
        )
        match fields:
            case [2, str(name), int(first), bytes(before), bytes(digest), bytes(blob)] if first > 0:
                return RunFrame(_name(name), first, _digest(before), _digest(digest), blob)
            case [1, bool(complete), list(rows)]:
                return Report(complete, [_channel_report(row) for row in rows])
            case [3, str(name), bool(outgoing), str(text)]:
                return ForkNotice(
                    _name(name), outgoing, text if text.isprintable() else ascii(text)
                )  # it goes to logs: one line
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as exc:
        raise DecodeError("a durable frame cannot be read", code="durable") from exc
    raise DecodeError("a durable frame of an unknown form", code="durable")


def _channel_report(row: object) -> ChannelReport:
    match row:
        case [str(name), int(cursor), bytes(digest), int(received), bytes(received_digest), int(limit)]:
            if 0 <= cursor <= received and limit >= 0:
                return ChannelReport(_name(name), cursor, _digest(digest), received, _digest(received_digest), limit)
    raise DecodeError("a channel's report has an unknown form", code="durable")


def _digest(value: bytes) -> bytes:
    if len(value) != len(START_DIGEST):
        raise DecodeError("a digest has the wrong length", code="durable")
    return value


def _name(value: str) -> ChannelName:
    if not value or len(value.encode()) > MAX_CHANNEL_BYTES:
        raise DecodeError("a channel's name has the wrong length", code="durable")
    return ChannelName(value)
