"""The bytes of a flash store: pure encoding and decoding, and the tests that tell a torn program from a flipped bit.

A device is erase blocks; a *segment* is the content of one block, a header and then *fragments*, each programmed at once and
padded with zeros to whole program units. A *group* (the records of one append, a checkpoint, a commit) is one fragment, or
several that follow each other, across segments too.

* Every CRC is seeded with the store, the segment's number and the offset: what is stale, misplaced or of another store fails.
* Every program ends in at least ``SEAL`` zero bytes, which a torn program leaves erased or random. So bytes that are a *single*
  flipped bit away from a valid fragment were programmed completely and have rotted since; anything else is torn.
* A header carries the number of the segment before it and where its valid bytes end: the live chain is read backwards from
  the newest header, and what a torn tail left behind that end is never looked at again.

Integers are big-endian. All zeros or all ones is *blank*.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Iterable, Sequence

import attrs

MAGIC = b"HAFLASH\0"
FORMAT = 1
SEAL = 4

_SEGMENT = struct.Struct(">8sHH16sIQQIIIIII")
_CRC = struct.Struct(">I")
_FRAGMENT = struct.Struct(">II")  # what follows the header's CRC: the body's CRC, its length ...
_SEED = struct.Struct(">16sQI")
FRAGMENT_HEADER_BYTES = 16
SEGMENT_HEADER_BYTES = _SEGMENT.size + _CRC.size + SEAL
STARTS_CHECKPOINT = 1
_POLYNOMIAL = 0xEDB88320


class Kind(enum.IntEnum):
    """What a group is. FIRST and LAST mark the ends of one that is split into fragments."""

    RECORDS = 1
    CHECKPOINT = 2
    COMMIT = 3


FIRST, LAST = 0x40, 0x80


@attrs.frozen(kw_only=True)
class SegmentHeader:
    store: bytes
    """16 random bytes made with the store."""
    generation: int
    """How often the store had been opened when the segment was made."""
    number: int
    """Counts up through the life of the store, from 1."""
    previous: int
    """The number of the segment before it in the chain, 0 for the first; and where that one's valid bytes end, ..."""
    previous_end: int
    previous_crc: int
    """... with the running CRC up to there."""
    erase_count: int
    erase_bytes: int
    program_bytes: int
    block_count: int
    flags: int = 0


def padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def header_bytes(program_bytes: int) -> int:
    """The room that a segment's header takes."""
    return padded(SEGMENT_HEADER_BYTES, program_bytes)


def is_blank(data: bytes) -> bool:
    return not data.strip(b"\xff") or not data.strip(b"\0")


def encode_header(header: SegmentHeader, block: int) -> bytes:
    body = _SEGMENT.pack(
        MAGIC, FORMAT, header.flags, header.store, header.generation, header.number, header.previous, header.previous_end,
        header.previous_crc, header.erase_count, header.erase_bytes, header.program_bytes, header.block_count,
    )  # fmt: skip
    data = body + _CRC.pack(zlib.crc32(body, block))
    return data.ljust(header_bytes(header.program_bytes), b"\0")


def decode_header(data: bytes, block: int) -> SegmentHeader | None:
    """The header at the start of ``block``; None if these bytes are none."""
    size = _SEGMENT.size
    if len(data) < SEGMENT_HEADER_BYTES or data[size + _CRC.size :].strip(b"\0"):
        return None
    if data[:8] != MAGIC or _CRC.unpack_from(data, size)[0] != zlib.crc32(data[:size], block):
        return None
    _, format_, flags, store, generation, number, previous, end, crc, erases, erase_bytes, unit, count = _SEGMENT.unpack_from(
        data
    )
    if format_ != FORMAT:
        return None
    return SegmentHeader(
        store=store, generation=generation, number=number, previous=previous, previous_end=end, previous_crc=crc,
        erase_count=erases, erase_bytes=erase_bytes, program_bytes=unit, block_count=count, flags=flags,
    )  # fmt: skip


def rotten_header(data: bytes, block: int) -> SegmentHeader | None:
    """The header that these bytes were before one bit flipped; None if they never were one."""
    for at in range(len(data) * 8):
        if at < SEGMENT_HEADER_BYTES * 8 or data[at // 8]:
            header = decode_header(_flip(data, at), block)
            if header is not None:
                return header
    return None


# -- fragments --


@attrs.frozen
class Place:
    """Where a fragment stands: the seed of its CRCs."""

    store: bytes
    segment: int
    offset: int

    def seed(self) -> int:
        return zlib.crc32(_SEED.pack(self.store, self.segment, self.offset))


@attrs.frozen
class Fragment:
    kind: Kind
    first: bool
    last: bool
    body: bytes
    size: int
    """With header and padding: the next fragment begins so many bytes later."""
    crc: int
    """CRC of its header, for the chain."""


def fragment_room(space: int, unit: int) -> int:
    """How many bytes of body fit into one fragment of ``space`` bytes; negative: none."""
    return space // unit * unit - FRAGMENT_HEADER_BYTES - SEAL


def encode_fragment(place: Place, kind: Kind, ends: int, body: bytes | memoryview, unit: int) -> bytes:
    """One program: header, body, and zeros to the end of the last unit."""
    seed = place.seed()
    size = padded(FRAGMENT_HEADER_BYTES + len(body) + SEAL, unit)
    sealed = bytes(body).ljust(size - FRAGMENT_HEADER_BYTES, b"\0")
    tail = bytes([kind | ends]) + (place.segment & 0xFFFFFF).to_bytes(3, "big")
    rest = _FRAGMENT.pack(zlib.crc32(sealed, seed), len(body)) + tail
    return _CRC.pack(zlib.crc32(rest, seed)) + rest + sealed


def decode_fragment(place: Place, data: bytes | memoryview, unit: int) -> Fragment | None:
    """The fragment at the start of ``data``; None if there is no intact one."""
    head = bytes(data[:FRAGMENT_HEADER_BYTES])
    seed = place.seed()
    found = _decode_head(head, seed, len(data), unit)
    if found is None:
        return None
    kind, crc, length, size = found
    sealed = bytes(data[FRAGMENT_HEADER_BYTES:size])
    if zlib.crc32(sealed, seed) != crc:
        return None
    ends = head[12]
    return Fragment(kind, bool(ends & FIRST), bool(ends & LAST), sealed[:length], size, _CRC.unpack_from(head)[0])


def _decode_head(head: bytes, seed: int, space: int, unit: int) -> tuple[Kind, int, int, int] | None:
    """(kind, CRC of the body, its length, whole size) of an intact fragment header."""
    if len(head) < FRAGMENT_HEADER_BYTES or _CRC.unpack_from(head)[0] != zlib.crc32(head[4:], seed):
        return None
    crc, length = _FRAGMENT.unpack_from(head, 4)
    size = padded(FRAGMENT_HEADER_BYTES + length + SEAL, unit)
    kind = head[12] & ~(FIRST | LAST)
    if size > space or kind not in (Kind.RECORDS, Kind.CHECKPOINT, Kind.COMMIT):
        return None
    return Kind(kind), crc, length, size


def segment_hint(data: bytes | memoryview) -> int:
    """The low 24 bits of the segment's number that an intact fragment at the start of ``data`` would carry."""
    return int.from_bytes(data[13:16], "big")


def is_rotten(place: Place, data: bytes | memoryview, unit: int) -> bool:
    """Whether these bytes, which are no intact fragment, are one with a single flipped bit."""
    head = bytes(data[:FRAGMENT_HEADER_BYTES])
    seed = place.seed()
    found = _decode_head(head, seed, len(data), unit)
    if found is not None:
        _, crc, _, size = found
        sealed = data[FRAGMENT_HEADER_BYTES:size]
        return _is_one_bit(zlib.crc32(sealed, seed) ^ crc, len(sealed))
    for at in range(len(head) * 8):
        found = _decode_head(_flip(head, at), seed, len(data), unit)
        if found is not None and zlib.crc32(data[FRAGMENT_HEADER_BYTES : found[3]], seed) == found[1]:
            return True
    return False


def _is_one_bit(syndrome: int, size: int) -> bool:
    """Whether one flipped bit in ``size`` bytes changes their CRC by ``syndrome``: CRCs are linear, so walk it back."""
    register = 1
    for _ in range(size * 8):
        register = (register >> 1) ^ (_POLYNOMIAL if register & 1 else 0)
        if register == syndrome:
            return True
    return False


def _flip(data: bytes, at: int) -> bytes:
    flipped = bytearray(data)
    flipped[at // 8] ^= 1 << at % 8
    return bytes(flipped)


# -- what groups hold --


def _encode_length(size: int) -> bytes:
    """Seven bits a byte, lowest first: two bytes for records of usual size, so that groups fit their units."""
    out = bytearray()
    while size > 0x7F:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    out.append(size)
    return bytes(out)


def encode_records(records: Iterable[bytes]) -> bytes:
    return b"".join(part for record in records for part in (_encode_length(len(record)), record))


def decode_records(body: bytes) -> list[bytes]:
    """Raises ValueError if the bytes are no records."""
    records = []
    at = 0
    while at < len(body):
        size = shift = 0
        while True:
            if at == len(body) or shift > 63:
                raise ValueError("a record's length is cut off")
            byte = body[at]
            at += 1
            size |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
        if at + size > len(body):
            raise ValueError("a record is cut off")
        records.append(body[at : at + size])
        at += size
    return records


def encode_commit(checkpoint: bytes, bad_blocks: Sequence[int]) -> bytes:
    return struct.pack(f">II{len(bad_blocks)}I", zlib.crc32(checkpoint), len(checkpoint), *bad_blocks)


def decode_commit(body: bytes) -> tuple[int, int, list[int]]:
    """(CRC and length of the checkpoint's body, bad blocks); ValueError if the bytes are no commit."""
    if len(body) < 8 or len(body) % 4:
        raise ValueError("a commit has a wrong length")
    crc, length, *bad = struct.unpack(f">{len(body) // 4}I", body)
    return crc, length, bad
