"""The bytes of the flash store: what decodes, what is torn and what has rotted."""

from __future__ import annotations

import random

import attrs
import pytest

from ha_core.storage.flash_format import (
    FIRST,
    FRAGMENT_HEADER_BYTES,
    LAST,
    Kind,
    Place,
    SegmentHeader,
    decode_commit,
    decode_fragment,
    decode_header,
    decode_records,
    encode_commit,
    encode_fragment,
    encode_header,
    encode_records,
    is_rotten,
    rotten_header,
)

PLACE = Place(b"s" * 16, 7, 96)
HEADER = SegmentHeader(
    store=b"s" * 16, generation=3, number=1 << 40, previous=(1 << 40) - 1, previous_end=4096, previous_crc=0xDEADBEEF,
    erase_count=12, erase_bytes=4096, program_bytes=16, block_count=64, flags=1,
)  # fmt: skip


def flipped(data: bytes, bit: int) -> bytes:
    return bytes(byte ^ (1 << bit % 8 if at == bit // 8 else 0) for at, byte in enumerate(data))


def test_header_comes_back_and_belongs_to_its_block() -> None:
    for unit in (16, 512):
        header = attrs.evolve(HEADER, program_bytes=unit)
        data = encode_header(header, 5)
        assert len(data) % unit == 0
        assert decode_header(data, 5) == header
        assert decode_header(data, 6) is None


def test_format_of_the_first_version_still_decodes() -> None:
    """Bytes as version 1 wrote them: another layout needs another FORMAT."""
    assert encode_header(HEADER, 5).hex() == (
        "4841464c415348000001000173737373737373737373737373737373000000030000010000000000000000ffffffffff"
        "00001000deadbeef0000000c000010000000001000000040641bc14b00000000"
    )
    fragment = encode_fragment(PLACE, Kind.RECORDS, FIRST | LAST, encode_records([b"record", b""]), 16)
    assert fragment.hex() == "380066d8535dab7000000008c1000007067265636f7264000000000000000000"


@pytest.mark.parametrize("body", [b"", b"x", b"\xff" * 111 + b"\xfe", random.Random(1).randbytes(300)])
@pytest.mark.parametrize("unit", [16, 64])
def test_fragment_torn_at_any_byte_is_torn_and_no_rot(body: bytes, unit: int) -> None:
    data = encode_fragment(PLACE, Kind.CHECKPOINT, FIRST, body, unit)
    found = decode_fragment(PLACE, data, unit)
    assert found is not None
    assert (found.body, found.first, found.last, found.size) == (body, True, False, len(data))
    for at in range(len(data) - 1):
        torn = data[:at] + b"\xff" * (len(data) - at)
        assert decode_fragment(PLACE, torn, unit) is None
        assert not is_rotten(PLACE, torn, unit)


def test_every_flipped_bit_is_seen_and_told_from_a_torn_program() -> None:
    data = encode_fragment(PLACE, Kind.RECORDS, FIRST | LAST, b"payload" * 5, 16)
    for bit in range(len(data) * 8):
        assert decode_fragment(PLACE, flipped(data, bit), 16) is None
        assert is_rotten(PLACE, flipped(data, bit), 16)
    header = encode_header(HEADER, 5)
    for bit in range(len(header) * 8):
        assert decode_header(flipped(header, bit), 5) is None
        assert rotten_header(flipped(header, bit), 5) == HEADER


@pytest.mark.parametrize("other", [Place(b"t" * 16, 7, 96), Place(b"s" * 16, 8, 96), Place(b"s" * 16, 7, 112)])
def test_fragment_of_another_store_segment_or_place_is_none(other: Place) -> None:
    """I53."""
    data = encode_fragment(PLACE, Kind.RECORDS, FIRST | LAST, b"payload", 16)
    assert decode_fragment(other, data, 16) is None
    assert not is_rotten(other, data, 16)


def test_records_and_commits_come_back_or_are_refused() -> None:
    records = [b"", b"a", b"b" * 127, b"c" * 128, b"d" * 20_000]
    body = encode_records(records)
    assert decode_records(body) == records
    for cut in (body[:-1], b"\x80", b"\xff" * 12):
        with pytest.raises(ValueError, match="cut off"):
            decode_records(cut)
    assert decode_commit(encode_commit(b"state", [3, 9]))[1:] == (5, [3, 9])
    for wrong in (b"", b"123456789"):
        with pytest.raises(ValueError, match="wrong length"):
            decode_commit(wrong)
    assert FRAGMENT_HEADER_BYTES == 16


def test_declared_lengths_allocate_nothing() -> None:
    junk = random.Random(2)
    for _ in range(300):
        data = junk.randbytes(64)
        assert decode_fragment(PLACE, data, 16) is None
        assert decode_header(data.ljust(96, b"\0"), 0) is None
