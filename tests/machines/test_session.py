"""The two ends of a channel without a network: numbers, credit, exact deduplication, fragments."""

from __future__ import annotations

import random

import pytest

from ha_core.errors import DecodeError, FrameTooLargeError, LocalProtocolError, RemoteProtocolError
from ha_core.ids import ChannelName
from ha_core.machines import channels, wire
from ha_core.machines.channels import ReceiveChannel, Segment, SendChannel
from ha_core.machines.messages import Priority


def sender(credit_bytes: int = 1 << 30, credit_messages: int = 1 << 20) -> SendChannel:
    return SendChannel(0, ChannelName("c"), Priority.NORMAL, False, credit_bytes, credit_messages)


def receiver(granted_bytes: int = 1 << 30, granted_messages: int = 1 << 20) -> ReceiveChannel:
    return ReceiveChannel(0, ChannelName("c"), granted_bytes, granted_messages)


def segments(channel: SendChannel) -> list[Segment]:
    while channel.make_segment():
        channel.check()
    return [channel.segments[n] for n in range(channel.base, channel.top)]


def take(channel: ReceiveChannel, segment: Segment) -> list[bytes] | None:
    _, flags = segment.frame[4], segment.frame[5]
    found = channel.accept(memoryview(segment.frame)[8:], flags)
    if found:
        channel.number(len(found))
    channel.check()
    return found


def test_runs_fill_frames_and_never_exceed_them(rng: random.Random) -> None:
    channel = sender()
    bodies = [bytes(rng.choice([0, 1, 200, 5_000, 32_768, 32_769, 100_000])) for _ in range(300)]

    channel.queue(bodies)
    made = segments(channel)

    assert all(len(segment.frame) <= wire.MAX_FRAME_BYTES for segment in made)
    assert sum(segment.size for segment in made) == sum(map(len, bodies))
    assert channel.pending_bytes == channel.pending_count == 0


def test_segments_in_any_order_and_number_are_delivered_once_in_order(rng: random.Random) -> None:
    send, receive = sender(), receiver()
    bodies = [b"%d:" % n + bytes(rng.choice([0, 50, 3_000, 50_000])) for n in range(400)]
    send.queue(bodies)
    made = segments(send)
    arrivals = made + rng.sample(made, len(made) // 2)
    rng.shuffle(arrivals)

    delivered: list[bytes] = []
    duplicates = 0
    for segment in arrivals:
        found = take(receive, segment)
        duplicates += found is None
        delivered += found or []

    assert delivered == bodies
    assert duplicates == len(made) // 2
    assert receive.early == {}


def test_acknowledgements_are_absolute_and_release_whole_segments() -> None:
    channel = sender()
    channel.queue([bytes(20_000)] * 4)
    made = segments(channel)
    assert len(made) == 4

    channel.acknowledge(2, 0, 0)
    assert sorted(channel.segments) == [2, 3]
    channel.acknowledge(1, 0, 0)
    assert channel.acked == 2
    channel.acknowledge(4, 0, 0)

    assert channel.segments == {}
    with pytest.raises(RemoteProtocolError, match="unit 5 acknowledged, but never sent"):
        channel.acknowledge(5, 0, 0)


def test_credit_is_absolute_never_taken_back_and_never_exceeded() -> None:
    channel = sender(credit_bytes=50_000, credit_messages=100)
    channel.queue([bytes(1_000)] * 300)
    segments(channel)
    assert channel.used_bytes == 50_000

    assert channel.acknowledge(0, 70_000, 100)
    assert not channel.acknowledge(0, 70_000, 100), "the same grant again is no new credit"
    assert not channel.acknowledge(0, 10, 10)
    segments(channel)
    assert channel.used_bytes == 70_000

    channel.acknowledge(0, 1 << 30, 100)
    segments(channel)
    assert channel.used_messages == 100


def test_a_message_larger_than_the_window_gets_through_on_renewed_credit() -> None:
    send, receive = sender(credit_bytes=100_000), receiver(100_000)
    big = random.Random(1).randbytes(1_000_000)
    send.queue([big])

    delivered: list[bytes] = []
    for _ in range(200):
        for segment in segments(send):
            delivered += take(receive, segment) or []
        receive.grant(100_000)
        send.acknowledge(receive.next_unit - 1, receive.granted_bytes, receive.granted_messages)

    assert delivered == [big]
    assert receive.received_bytes - receive.consumed_bytes <= channels.WINDOW_BYTES + wire.MAX_MESSAGE_BYTES


def test_more_than_credit_allows_is_the_peers_fault() -> None:
    send = sender()
    send.queue([bytes(1_000)] * 20)
    (segment,) = segments(send)

    with pytest.raises(RemoteProtocolError, match="more was sent than credit allows"):
        take(receiver(granted_bytes=19_999), segment)
    with pytest.raises(RemoteProtocolError, match="more was sent than credit allows"):
        take(receiver(granted_messages=19), segment)


def test_what_waits_for_a_gap_counts_against_credit_too() -> None:
    receive = receiver(granted_bytes=10_000)

    for first in range(2, 7):
        receive.accept(memoryview(wire.encode_run(0, first, [bytes(2_000)]))[8:], 0)
    with pytest.raises(RemoteProtocolError, match="credit"):
        receive.accept(memoryview(wire.encode_run(0, 7, [bytes(2_000)]))[8:], 0)


def test_frames_that_overlap_are_refused() -> None:
    receive = receiver()
    receive.accept(memoryview(wire.encode_run(0, 3, [b"c", b"d"]))[8:], 0)

    with pytest.raises(DecodeError, match="overlap"):
        receive.accept(memoryview(wire.encode_run(0, 1, [b"a", b"b", b"c"]))[8:], 0)


def test_a_message_may_not_begin_within_another() -> None:
    receive = receiver()
    receive.accept(memoryview(wire.encode_fragment(0, 1, bytes(2_000), more=True))[8:], wire.FRAGMENT | wire.MORE)

    with pytest.raises(DecodeError, match="begins within another"):
        receive.accept(memoryview(wire.encode_run(0, 2, [b"a"]))[8:], 0)


def test_fragments_without_an_end_are_refused_at_8_mib() -> None:
    receive = receiver()
    flags = wire.FRAGMENT | wire.MORE

    def flood() -> None:
        for unit in range(1, 1_000):
            receive.accept(memoryview(wire.encode_fragment(0, unit, bytes(16_384), more=True))[8:], flags)

    with pytest.raises(FrameTooLargeError, match="exceeds 8388608 bytes"):
        flood()


def test_a_grant_is_told_before_the_sender_can_run_dry() -> None:
    receive = receiver(channels.INITIAL_WINDOW_BYTES, channels.INITIAL_WINDOW_MESSAGES)
    send = sender(channels.INITIAL_WINDOW_BYTES, channels.INITIAL_WINDOW_MESSAGES)
    bodies = [bytes(30_000)] * 500
    delivered = 0
    for body in bodies:
        send.queue([body])
        for segment in segments(send):
            found = take(receive, segment) or []
            delivered += len(found)
            send.acknowledge(receive.next_unit - 1, 0, 0)
            receive.consume(len(found), sum(map(len, found)))
            receive.grant(channels.WINDOW_BYTES)
            if receive.worth_telling():
                receive.told_bytes, receive.told_messages = receive.granted_bytes, receive.granted_messages
                send.acknowledge(0, receive.granted_bytes, receive.granted_messages)

    assert delivered == 500


def test_the_queue_says_when_it_is_full_and_stops_who_does_not_listen() -> None:
    channel = sender(credit_bytes=0)
    channel.queue([bytes(1_000)] * 524)
    assert channel.has_room()
    channel.queue([bytes(1_000)])
    assert not channel.has_room()
    assert not channel.drained()

    for _ in range(13):
        channel.queue([bytes(5 << 20)])
    with pytest.raises(LocalProtocolError, match="wait for room"):
        channel.queue([b"x"])


def test_a_long_queue_gives_back_the_room_of_what_was_sent() -> None:
    channel = sender()
    for _ in range(200):
        channel.queue([b"x" * 100] * 500)
        channel.make_segment()
        channel.acknowledge(channel.next_unit - 1, 0, 0)

    assert len(channel.pending) < 2 * channel.pending_count + 2_000
