"""Frames: bytes to frames and back, with every limit checked before anything is allocated from a declared length.

Rules:

* A frame is ``u32 length of the body | u8 type | u8 flags | u16 channel handle | body``, big-endian, at most 64 KiB in all.
* Bit 7 of the type says "ignore me if you do not know me"; any other unknown type ends the connection. We send frames and
  keys from that range ourselves (``grease``), so that ignoring them stays true (RFC 9170).
* A DATA frame carries a run: ``u64 number of the first unit`` and the messages as msgpack bins one after the other. A unit
  is a message, or one fragment of a message that does not fit a frame (flags FRAGMENT and, but for the last, MORE).
* All other frames are msgpack maps with small integer keys; unknown keys are ignored.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgpack

from ha_core.errors import DecodeError, FrameTooLargeError
from ha_core.machines.contract import Rng

HEADER = struct.Struct(">IBBH")
_NUMBER = struct.Struct(">Q")
_RUN_START = struct.Struct(">IBBHQ")
_END = msgpack.packb(None)
"""Put behind a run: a message that is cut short swallows it."""
MAX_FRAME_BYTES = 64 << 10
MAX_BODY_BYTES = MAX_FRAME_BYTES - HEADER.size
MAX_HELLO_BYTES = 4 << 10
"""The longest body of a frame before the peer has proved the key."""
RUN_BYTES = 32 << 10
"""Message bytes in one DATA frame; a longer message is sent in fragments."""
RUN_COUNT = 4096
FRAGMENT_BYTES = 16 << 10
MIN_FRAGMENT_BYTES = 1 << 10
"""Any fragment but the last has at least so many bytes: a message cannot be cut into millions of pieces."""
MAX_MESSAGE_BYTES = 8 << 20
IGNORABLE = 0x80

FRAGMENT = 0x01
MORE = 0x02
ELICITING = 0x04
"""On an ACK: answer with an ACK of your own, this one carries credit that must not get lost."""


class FrameType(enum.IntEnum):
    HELLO = 1
    WELCOME = 2
    CONFIRM = 3
    REJECT = 4
    OPEN = 5
    DATA = 6
    ACK = 7
    PING = 8
    PONG = 9
    READY = 10


_KNOWN = frozenset(int(kind) for kind in FrameType)
_DATA = int(FrameType.DATA)


class Frame(NamedTuple):
    kind: int
    flags: int
    handle: int
    body: memoryview


def encode_frame(kind: int, body: bytes, *, flags: int = 0, handle: int = 0) -> bytes:
    return HEADER.pack(len(body), kind, flags, handle) + body


def encode_run(handle: int, first: int, bodies: Sequence[bytes]) -> bytes:
    """A DATA frame with whole messages; the caller keeps to RUN_BYTES and RUN_COUNT."""
    packed = msgpack.packb(bodies, use_bin_type=True)
    count = len(bodies)
    skip = 1 if count < 16 else 3  # the array's own header: RUN_COUNT < 65536
    run = memoryview(packed)[skip:]
    return b"".join((_RUN_START.pack(len(run) + 8, _DATA, 0, handle, first), run))


def encode_fragment(handle: int, number: int, piece: bytes, *, more: bool) -> bytes:
    flags = FRAGMENT | MORE if more else FRAGMENT
    return _RUN_START.pack(len(piece) + 8, _DATA, flags, handle, number) + piece


def decode_run(body: memoryview) -> tuple[int, list[bytes], int]:
    """Number of the first unit, the messages, and their bytes together, of a DATA frame without FRAGMENT.

    Raises:
        DecodeError: it is not a number followed by 1 to RUN_COUNT bins.
    """
    if len(body) < 9:
        raise DecodeError(f"a DATA frame of {len(body)} bytes carries no message", code="data")
    # No arrays, maps, strings or extensions at all: nothing nests, nothing is allocated from a declared length.
    unpacker = msgpack.Unpacker(
        max_buffer_size=MAX_FRAME_BYTES, max_str_len=0, max_array_len=0, max_map_len=0, max_ext_len=0, raw=False
    )
    try:
        unpacker.feed(body[8:])
        unpacker.feed(_END)
        bodies: list[bytes] = list(unpacker)
        if bodies.pop() is not None:
            raise DecodeError("a DATA frame ends within a message", code="data")
        size = len(b"".join(bodies))  # sums the lengths and refuses anything that is no bin, in one pass
    except (ValueError, TypeError, IndexError, msgpack.exceptions.UnpackException) as exc:
        raise DecodeError("a DATA frame holds something other than messages", code="data") from exc
    if not 0 < len(bodies) <= RUN_COUNT:
        raise DecodeError(f"a DATA frame carries {len(bodies)} messages, expected 1 to {RUN_COUNT}", code="data")
    return _NUMBER.unpack_from(body)[0], bodies, size


def decode_fragment(body: memoryview, flags: int) -> tuple[int, bytes]:
    """Number and bytes of a fragment.

    Raises:
        DecodeError: it is empty, or too short to be any but the last.
    """
    size = len(body) - 8
    least = MIN_FRAGMENT_BYTES if flags & MORE else 1
    if size < least:
        raise DecodeError(f"a fragment of {size} bytes, expected at least {least}", code="data")
    return _NUMBER.unpack_from(body)[0], bytes(body[8:])


Plain = int | str | bytes | bool | None | list["Plain"] | dict[int, "Plain"]
Fields = Mapping[int, object]


def encode_fields(fields: Mapping[int, Plain]) -> bytes:
    packed: bytes = msgpack.packb(fields, use_bin_type=True)
    return packed


def decode_fields(body: bytes | memoryview, *, max_array: int = 16) -> Fields:
    """The map of a control frame.

    Raises:
        DecodeError: it is no map with integer keys within the limits.
    """
    try:
        fields = msgpack.unpackb(
            body, max_map_len=64, max_array_len=max_array, max_ext_len=0, max_str_len=512, max_bin_len=MAX_HELLO_BYTES,
            strict_map_key=False, raw=False,
        )  # fmt: skip
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as exc:
        raise DecodeError("a control frame is no msgpack map", code="control") from exc
    if type(fields) is not dict or any(type(key) is not int for key in fields):
        raise DecodeError("a control frame is no map with integer keys", code="control")
    return fields


def int_field(fields: Fields, key: int, *, limit: int = 1 << 64, default: int | None = None) -> int:
    """Raises DecodeError unless ``fields[key]`` is an integer in 0 .. ``limit`` - 1 (or absent with a default)."""
    value = fields.get(key, default)
    if type(value) is not int or not 0 <= value < limit:
        raise DecodeError(f"field {key}: expected an integer below {limit}", code="control")
    return value


def bytes_field(fields: Fields, key: int, *, length: int | None = None, default: bytes | None = None) -> bytes:
    """Raises DecodeError unless ``fields[key]`` is a bin, of ``length`` bytes if that is given (or absent with a default)."""
    value = fields.get(key, default)
    if type(value) is not bytes or (length is not None and len(value) != length and value != default):
        raise DecodeError(f"field {key}: expected {'' if length is None else length} bytes", code="control")
    return value


def str_field(fields: Fields, key: int, *, limit: int = 400, default: str | None = None) -> str:
    """Raises DecodeError unless ``fields[key]`` is printable text of at most ``limit`` characters."""
    value = fields.get(key, default)
    if type(value) is not str or len(value) > limit or not (value.isprintable()):
        raise DecodeError(f"field {key}: expected text of at most {limit} characters", code="control")
    return value


def grease_frame(rng: Rng) -> bytes:
    """A frame that nobody knows and everybody must ignore."""
    kind = rng.randrange(0xC0, 0x100)
    return encode_frame(kind, rng.getrandbits(64).to_bytes(8, "big"), flags=rng.randrange(0, 256))


def grease_field(rng: Rng) -> tuple[int, Plain]:
    """A key and a value that nobody knows and everybody must ignore."""
    return rng.randrange(1000, 60000), rng.getrandbits(32)


class FrameDecoder:
    """Bytes in any pieces to frames; holds at most one incomplete frame."""

    __slots__ = ("_buffer", "_needed", "limit")

    def __init__(self, limit: int = MAX_HELLO_BYTES) -> None:
        self.limit = limit
        """The longest body that is accepted; raise it once the peer has proved itself."""
        self._buffer = bytearray()
        self._needed = 0

    @property
    def buffered(self) -> int:
        return len(self._buffer)

    def feed(self, data: bytes, *, single: bool = False) -> list[Frame]:
        """The frames that are complete now; those of ignorable unknown types are among them.

        Args:
            single: stop after one; the rest stays for the next call, which may have another ``limit``.

        Raises:
            FrameTooLargeError: a header declares more than ``limit``.
            DecodeError: a type is unknown and may not be ignored.
        """
        buffer = self._buffer
        if buffer:
            buffer += data
            if len(buffer) < self._needed:
                return []
            data = bytes(buffer)
            self._buffer = bytearray()
        frames: list[Frame] = []
        end = len(data)
        view = memoryview(data)
        position = 0
        self._needed = HEADER.size
        while end - position >= 8:
            length, kind, flags, handle = HEADER.unpack_from(data, position)
            if length > self.limit:
                raise FrameTooLargeError(f"a frame declares {length} bytes, at most {self.limit} are allowed", code="length")
            if kind not in _KNOWN and not kind & IGNORABLE:
                raise DecodeError(f"frame type {kind} is unknown and may not be ignored", code="type")
            start = position + 8
            if end - start < length:
                self._needed = length + 8
                break
            position = start + length
            frames.append(Frame(kind, flags, handle, view[start:position]))
            if single:
                self._needed = 0
                break
        if position < end:
            self._buffer += view[position:]
        return frames
