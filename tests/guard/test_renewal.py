from __future__ import annotations

import random
import struct
from dataclasses import replace

import pytest

from ha_core.guard.renewal import (
    MAGIC,
    MAX_PACKET_BYTES,
    Arrival,
    Renewal,
    RenewalAnswer,
    RenewalCodec,
    RenewalError,
    ReplayFilter,
    Status,
)

KEY = bytes(range(32))
BOOT = b"b" * 16
INSTANCE = b"i" * 16
RENEWAL = Renewal("h1.example", BOOT, INSTANCE, 12, 7, 1_000_000)
ANSWER = RenewalAnswer(
    INSTANCE, 7, Status.CONFIRMED, 12, 2_000_000_000, 300_000_000, 9, True, (("a", "127.1.0.1:7400"), ("b", "127.2.0.1:7400"))
)
CODEC = RenewalCodec("prod", KEY)


def test_renewal_and_answer_arrive_as_they_were_sent() -> None:
    assert CODEC.decode_renewal(CODEC.encode_renewal(RENEWAL)) == RENEWAL
    assert CODEC.decode_answer(CODEC.encode_answer(ANSWER)) == ANSWER
    revoked = RenewalAnswer(INSTANCE, 8, Status.REVOKED, 12, armed=False)
    assert CODEC.decode_answer(CODEC.encode_answer(revoked)) == revoked


def test_packets_of_another_cluster_are_refused() -> None:
    packet = RenewalCodec("test", KEY).encode_renewal(RENEWAL)

    with pytest.raises(RenewalError) as caught:
        CODEC.decode_renewal(packet)

    assert caught.value.code == "cluster"


def test_packets_sealed_with_another_key_are_refused() -> None:
    packet = RenewalCodec("prod", bytes(32)).encode_answer(ANSWER)

    with pytest.raises(RenewalError) as caught:
        CODEC.decode_answer(packet)

    assert caught.value.code == "tag"


def test_every_flipped_bit_is_refused() -> None:
    packet = CODEC.encode_answer(ANSWER)
    for bit in range(len(packet) * 8):
        damaged = bytearray(packet)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RenewalError):
            CODEC.decode_answer(bytes(damaged))


def test_a_renewal_reflected_as_an_answer_is_refused() -> None:
    with pytest.raises(RenewalError) as caught:
        CODEC.decode_answer(CODEC.encode_renewal(RENEWAL))

    assert caught.value.code == "kind"


def test_any_bytes_are_refused_without_any_other_error() -> None:
    rng = random.Random(7)
    for size in (0, 1, 4, 20, 21, 36, 37, 60, 200, MAX_PACKET_BYTES, MAX_PACKET_BYTES + 1, 65_000):
        for head in (b"", MAGIC, MAGIC + b"\1", MAGIC + b"\2"):
            data = (head + rng.randbytes(size))[: max(size, len(head))]
            for decode in (CODEC.decode_renewal, CODEC.decode_answer):
                with pytest.raises(RenewalError):
                    decode(data)


def test_sealed_packets_with_fields_out_of_range_are_refused() -> None:
    bad = [
        replace(ANSWER, margin_ns=ANSWER.lease_ns + 1),
        replace(ANSWER, continued_token=13),
        replace(ANSWER, lease_token=1 << 63),
    ]
    for answer in bad:
        with pytest.raises(RenewalError):
            CODEC.decode_answer(CODEC.encode_answer(answer))
    with pytest.raises(RenewalError):
        CODEC.decode_renewal(CODEC.encode_renewal(replace(RENEWAL, number=0)))


def test_a_text_that_reaches_beyond_the_packet_is_refused() -> None:
    body = struct.pack(">16s16sQQQB", BOOT, INSTANCE, 1, 1, 1, 200) + b"short"

    with pytest.raises(RenewalError) as caught:
        CODEC.decode_renewal(CODEC._seal(1, body))

    assert caught.value.code == "short"


def test_a_field_added_at_the_end_by_a_later_version_is_ignored() -> None:
    packet = CODEC.encode_renewal(RENEWAL)
    later = CODEC._seal(1, packet[21:-16] + b"something new")

    assert CODEC.decode_renewal(later) == RENEWAL


def test_what_does_not_fit_is_refused_by_the_encoder() -> None:
    with pytest.raises(RenewalError):
        CODEC.encode_renewal(replace(RENEWAL, host="h" * 254))
    with pytest.raises(RenewalError):
        CODEC.encode_renewal(replace(RENEWAL, instance=b"short"))
    with pytest.raises(RenewalError):
        CODEC.encode_answer(replace(ANSWER, hints=(("a", "x"),) * 17))
    with pytest.raises(RenewalError):
        RenewalCodec("prod", b"too short")


def test_copies_over_other_paths_are_told_from_replays() -> None:
    seen = ReplayFilter()

    assert seen.receive(RENEWAL, ("a", "1")) is Arrival.NEW
    assert seen.receive(RENEWAL, ("b", "2")) is Arrival.COPY
    assert seen.receive(RENEWAL, ("a", "1")) is Arrival.OLD
    assert seen.receive(RENEWAL, ("b", "2")) is Arrival.OLD


def test_an_overtaken_or_replayed_number_is_old() -> None:
    seen = ReplayFilter()
    newer = replace(RENEWAL, number=8, created_ns=RENEWAL.created_ns + 5)

    assert seen.receive(newer, "a") is Arrival.NEW
    assert seen.receive(RENEWAL, "a") is Arrival.OLD
    assert seen.receive(replace(RENEWAL, created_ns=newer.created_ns + 9), "b") is Arrival.OLD


def test_a_delayed_ask_of_a_dead_guard_never_passes_for_a_new_one() -> None:
    seen = ReplayFilter()
    of_new_guard = Renewal("h1.example", BOOT, b"n" * 16, 0, 1, 5_000_000)

    assert seen.receive(of_new_guard, "a") is Arrival.NEW
    assert seen.receive(replace(RENEWAL, lease_token=0), "a") is Arrival.OLD


def test_a_rebooted_host_is_heard_although_its_clock_began_again() -> None:
    seen = ReplayFilter()
    seen.receive(replace(RENEWAL, created_ns=10**15), "a")

    assert seen.receive(replace(RENEWAL, boot_id=b"c" * 16, number=1, created_ns=5), "a") is Arrival.NEW


def test_the_filter_stays_bounded() -> None:
    seen = ReplayFilter(max_hosts=3, max_sources=2)
    for number in range(10):
        assert seen.receive(replace(RENEWAL, host=f"h{number}"), "a") is Arrival.NEW
    assert len(seen._newest) == 3

    assert seen.receive(replace(RENEWAL, host="h9"), "b") is Arrival.COPY
    assert seen.receive(replace(RENEWAL, host="h9"), "c") is Arrival.OLD
