"""Frames: what is encoded is decoded, and any other bytes give a clean error in bounded memory."""

from __future__ import annotations

import random
import tracemalloc

import msgpack
import pytest

from ha_core.errors import DecodeError, FrameTooLargeError, RemoteProtocolError
from ha_core.machines import wire
from ha_core.machines.wire import FrameDecoder, FrameType


def decoded(data: bytes, limit: int = wire.MAX_BODY_BYTES) -> list[wire.Frame]:
    return FrameDecoder(limit).feed(data)


@pytest.mark.parametrize(
    "bodies",
    [
        [b""],
        [b"x"],
        [b"a", b"", b"ccc"],
        [bytes(255), bytes(256)],
        [b"n%d" % n for n in range(16)],
        [b""] * 4096,
        [bytes(32768)],
    ],
)
def test_a_run_comes_back_as_it_went(bodies: list[bytes]) -> None:
    (frame,) = decoded(wire.encode_run(7, 1 << 63, bodies))

    assert (frame.kind, frame.flags, frame.handle) == (FrameType.DATA, 0, 7)
    assert wire.decode_run(frame.body) == (1 << 63, bodies, sum(map(len, bodies)))


def test_a_fragment_comes_back_as_it_went() -> None:
    piece = bytes(range(256)) * 8

    (frame,) = decoded(wire.encode_fragment(3, 9, piece, more=True))

    assert frame.flags == wire.FRAGMENT | wire.MORE
    assert wire.decode_fragment(frame.body, frame.flags) == (9, piece)


def test_frames_may_arrive_in_any_pieces(rng: random.Random) -> None:
    frames = [wire.encode_run(1, n, [bytes(rng.randrange(200)) for _ in range(1 + rng.randrange(20))]) for n in range(50)]
    data = b"".join(frames)
    whole = [(f.kind, f.handle, bytes(f.body)) for f in decoded(data)]

    decoder = FrameDecoder(wire.MAX_BODY_BYTES)
    found, at = [], 0
    while at < len(data):
        size = rng.choice([1, 2, 7, 8, 9, 100, 5000])
        found += [(f.kind, f.handle, bytes(f.body)) for f in decoder.feed(data[at : at + size])]
        at += size

    assert found == whole
    assert len(found) == 50
    assert decoder.buffered == 0


def test_single_leaves_the_rest_for_a_higher_limit() -> None:
    decoder = FrameDecoder(100)
    data = wire.encode_frame(FrameType.PING, b"x") + wire.encode_frame(FrameType.PING, bytes(5000))

    (first,) = decoder.feed(data, single=True)
    decoder.limit = wire.MAX_BODY_BYTES
    (second,) = decoder.feed(b"")

    assert bytes(first.body) == b"x"
    assert len(second.body) == 5000


def test_a_declared_length_beyond_the_limit_is_refused_from_the_header_alone() -> None:
    with pytest.raises(FrameTooLargeError, match="declares 4294967295 bytes"):
        decoded(b"\xff\xff\xff\xff\x06\x00\x00\x00")


def test_unknown_types_are_skipped_only_if_they_may_be() -> None:
    data = wire.encode_frame(0xC7, b"whatever") + wire.encode_frame(FrameType.PING, b"")

    assert [frame.kind for frame in decoded(data)] == [0xC7, FrameType.PING]
    with pytest.raises(DecodeError, match="type 77 is unknown"):
        decoded(wire.encode_frame(77, b""))


def test_grease_is_ignorable_and_not_ours(rng: random.Random) -> None:
    for _ in range(100):
        (frame,) = decoded(wire.grease_frame(rng))
        assert frame.kind & wire.IGNORABLE
        assert frame.kind not in set(FrameType)
        assert wire.grease_field(rng)[0] >= 1000


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x01", b"\xc0", b"\xc3", b"\x80", b"\x90", b"\xa0", b"\xa1x", b"\x91\xc4\x00", b"\xc4\x05abc",
        b"\xc6\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff\x01", b"\xd4\x01x",
        b"\xc4\x01a\xc0", b"\xc1", b"\x91" * 60000, b"\xc4\x00" * 5000, b"\xcb" + bytes(8), b"\xc7\x00\x05",
    ],
)  # fmt: skip
def test_a_run_of_anything_but_messages_is_refused(content: bytes) -> None:
    with pytest.raises(DecodeError):
        wire.decode_run(memoryview(bytes(8) + content))


def test_every_truncation_of_a_run_is_refused() -> None:
    body = wire.encode_run(1, 1, [b"a" * 10, b"b" * 300, b"c"])[8:]

    for end in range(len(body)):
        if end in (8 + 12, 8 + 12 + 303):  # the ends of the messages: a shorter, but whole run
            continue
        with pytest.raises(DecodeError):
            wire.decode_run(memoryview(body[:end]))


def test_small_fragments_are_refused_unless_they_are_the_last() -> None:
    assert wire.decode_fragment(memoryview(bytes(8) + b"x"), wire.FRAGMENT) == (0, b"x")
    for size, flags in ((0, wire.FRAGMENT), (1023, wire.FRAGMENT | wire.MORE)):
        with pytest.raises(DecodeError, match="fragment"):
            wire.decode_fragment(memoryview(bytes(8 + size)), flags)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\x01", b"\x90", b"\xc0", b"\x81", b"\x81\xa1x\x01", b"\x81\x90\x01", b"\x81\x80\x01", b"\xdf\xff\xff\xff\xff",
        b"\x81\x01\xdd\xff\xff\xff\xff", b"\x81\x01" + b"\x91" * 4000, b"\x81\x01\xd4\x01x", b"\x81\x01\xc6\xff\xff\xff\xff",
        b"\x81\xc3\x01", b"\x81\x01\x01\x01", msgpack.packb({n: n for n in range(65)}), b"\x81\x01\xa2\xff\xff",
    ],
)  # fmt: skip
def test_a_control_frame_that_is_no_small_map_of_numbers_is_refused(body: bytes) -> None:
    with pytest.raises(DecodeError):
        wire.decode_fields(body)


def test_nothing_is_allocated_from_a_declared_length() -> None:
    bombs = [b"\xdc\x10\x00" * 20000, b"\xdd\x00\x00\xff\xff" * 12000, b"\xc6\x7f\xff\xff\xff", b"\xde\xff\xff" * 20000]
    tracemalloc.start()
    try:
        for bomb in bombs:
            with pytest.raises(DecodeError):
                wire.decode_run(memoryview(bytes(8) + bomb))
            with pytest.raises(DecodeError):
                wire.decode_fields(bomb[: wire.MAX_HELLO_BYTES])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 2 << 20


@pytest.mark.parametrize("key", [0, 1, 2, 3])
def test_fields_of_wrong_type_or_range_are_refused(key: int) -> None:
    fields = {0: -1, 1: True, 2: "1", 3: 1 << 64}

    with pytest.raises(DecodeError, match=f"field {key}"):
        wire.int_field(fields, key)
    with pytest.raises(DecodeError, match="field 9"):
        wire.int_field(fields, 9)


def test_text_that_could_forge_a_log_line_is_refused() -> None:
    assert wire.str_field({0: "good"}, 0) == "good"
    for text in ("two\nlines", "\x1b[2J", "x" * 401, b"bytes"):
        with pytest.raises(DecodeError):
            wire.str_field({0: text}, 0)
    with pytest.raises(DecodeError):
        wire.bytes_field({0: b"short"}, 0, length=16)


def test_random_bytes_give_frames_or_a_clean_error(rng: random.Random) -> None:
    for _ in range(2_000):
        decoder = FrameDecoder(rng.choice([wire.MAX_HELLO_BYTES, wire.MAX_BODY_BYTES]))
        data = rng.randbytes(rng.randrange(200))
        if rng.random() < 0.7:
            kind = rng.choice([*FrameType, 0x80, 0xFF])
            data = wire.encode_frame(kind, data, flags=rng.randrange(8), handle=rng.randrange(4))
        try:
            for frame in decoder.feed(data):
                if frame.kind == FrameType.DATA:
                    wire.decode_fragment(frame.body, frame.flags) if frame.flags & 1 else wire.decode_run(frame.body)
                else:
                    wire.decode_fields(frame.body)
        except RemoteProtocolError:
            pass


def test_bytes_changed_in_a_good_frame_give_frames_or_a_clean_error(rng: random.Random) -> None:
    good = wire.encode_run(1, 5, [b"abc", bytes(300), b""]) + wire.encode_frame(
        FrameType.ACK, wire.encode_fields({0: 1, 2: [1, 2]})
    )
    for _ in range(2_000):
        data = bytearray(good)
        for _ in range(1 + rng.randrange(3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            for frame in decoded(bytes(data)):
                if frame.kind == FrameType.DATA:
                    wire.decode_run(frame.body)
                elif not frame.kind & wire.IGNORABLE:
                    wire.decode_fields(frame.body)
        except RemoteProtocolError:
            pass
