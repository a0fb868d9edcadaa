"""Durable channels: exactly once in order through cuts, crashes, restored backups and clones."""

from __future__ import annotations

import random

import pytest

from ha_core.errors import InvariantError
from ha_core.ids import ChannelName, NodeId, SessionId, StoreId
from ha_core.machines.durable import REPORTS_CHANNEL, RUNS_CHANNEL
from ha_core.machines.durable_events import Attempt, Batch, BatchDone, HandlerClosed, HandlerOpened, IncomingState, RunBatch
from ha_core.machines.durable_sender import PEER_BYTES
from ha_core.machines.durable_wire import (
    FLIGHT_BYTES,
    START_DIGEST,
    WINDOW_COUNT,
    ForkNotice,
    RunFrame,
    chain,
    decode,
    encode_fork,
    encode_run,
    pack_run,
    unpack_run,
)
from ha_core.machines.messages import DeliverRun, SessionDown
from tests.machines.durable_model import Crashed, Failing, ModelNode, Wire

C = ChannelName("orders")


def pair(*, handler: bool = True) -> tuple[ModelNode, ModelNode, Wire]:
    one, two = ModelNode("a@h1.example"), ModelNode("b@h2.example")
    wire = Wire(one, two)
    wire.up()
    if handler:
        two.feed(HandlerOpened(C, 2048))
    wire.settle()
    return one, two, wire


def exchanged(count: int) -> tuple[ModelNode, ModelNode, Wire]:
    """A pair, the first of which has sent so many messages, all of them received and acknowledged."""
    one, two, wire = pair()
    one.commit(two.name, C, some(1, count))
    wire.settle()
    return one, two, wire


def some(first: int, count: int) -> list[bytes]:
    return [b"message %d" % number for number in range(first, first + count)]


def test_messages_arrive_once_in_order_and_are_forgotten_by_the_sender() -> None:
    one, two, wire = pair()

    one.commit(two.name, C, some(1, 5))
    one.commit(two.name, C, some(6, 3))
    wire.settle()

    assert two.bodies() == some(1, 8)
    assert [effect[2] for effect in two.disk.effects] == list(range(1, 9))
    assert one.disk.outbox[two.name, C] == []
    assert one.disk.outgoing[two.name, C].acked == 8


def test_nothing_is_sent_before_a_handler_gives_credit() -> None:
    one, two, wire = pair(handler=False)

    one.commit(two.name, C, some(1, 5))
    wire.settle()
    assert two.machine.receiver.channels == {}
    assert (two.name, RUNS_CHANNEL) not in one.out

    two.feed(HandlerOpened(C, 10))
    wire.settle()
    assert two.bodies() == some(1, 5)


def test_closed_handler_leaves_the_rest_at_the_sender() -> None:
    one, two, wire = exchanged(5)

    two.feed(HandlerClosed(C))
    for first in range(6, 20_006, 100):
        one.commit(two.name, C, some(first, 100))
    wire.settle()

    channel = two.machine.receiver.channels[one.disk.store, C]
    assert channel.cursor == 5
    assert channel.received <= 5 + WINDOW_COUNT
    two.feed(HandlerOpened(C, 2048))
    wire.settle()
    assert two.bodies() == some(1, 20_005)


def test_credit_moves_with_commits_not_with_receipts() -> None:
    one, two, wire = pair()
    for first in range(1, 10_001, 100):
        one.commit(two.name, C, some(first, 100))

    wire.carry()  # nothing is handled meanwhile

    channel = two.machine.receiver.channels[one.disk.store, C]
    assert channel.received <= WINDOW_COUNT
    assert channel.limit == WINDOW_COUNT
    assert one.acknowledged == []
    wire.settle()
    assert two.bodies() == some(1, 10_000)


def test_bytes_on_their_way_are_bounded() -> None:
    one, two, wire = pair()
    big = b"x" * 200_000
    for _ in range(40):
        one.commit(two.name, C, [big])

    wire.carry()

    channel = two.machine.receiver.channels[one.disk.store, C]
    assert channel.staged_bytes <= FLIGHT_BYTES
    assert one.machine.sender.channels[two.name, C].held_bytes <= 3 * FLIGHT_BYTES
    wire.settle()
    assert two.bodies() == [big] * 40


def test_bytes_on_their_way_to_one_peer_are_bounded_over_all_channels() -> None:
    one, two, wire = pair(handler=False)
    names = [ChannelName(f"channel {number}") for number in range(40)]
    body = b"x" * 250_000
    for name in names:
        two.feed(HandlerOpened(name, 2048))
    wire.settle()
    for name in names:
        for _ in range(5):
            one.commit(two.name, name, [body])

    queued = sum(len(frame) for frame in one.out[two.name, RUNS_CHANNEL])
    assert PEER_BYTES // 2 < queued <= PEER_BYTES

    wire.settle()
    assert len(two.disk.effects) == 5 * len(names)


def test_what_is_not_in_memory_is_loaded() -> None:
    one, two, wire = pair(handler=False)
    for first in range(1, 5_001, 50):
        one.commit(two.name, C, [body.ljust(1000) for body in some(first, 50)])
    assert one.machine.sender.channels[two.name, C].held_bytes <= 3 * FLIGHT_BYTES

    two.feed(HandlerOpened(C, 2048))
    wire.settle()

    assert two.bodies() == [body.ljust(1000) for body in some(1, 5_000)]


def test_cut_session_resumes_where_the_receiver_stands() -> None:
    one, two, wire = pair()
    for first in range(1, 101, 10):
        one.commit(two.name, C, some(first, 10))
    wire.carry(4)

    wire.down()
    wire.up()
    wire.settle()

    assert two.bodies() == some(1, 100)


def test_batch_in_progress_outlives_the_session() -> None:
    one, two, wire = pair()
    one.commit(two.name, C, some(1, 10))
    wire.carry()
    assert len(two.jobs) == 1

    wire.down()
    one.commit(two.name, C, some(11, 10))
    wire.up()
    wire.carry()
    two.work()
    wire.settle()

    assert two.bodies() == some(1, 20)


@pytest.mark.parametrize("tell", [True, False])
def test_sender_that_died_before_or_after_hearing_of_its_commit_sends_it(tell: bool) -> None:
    one, two, wire = exchanged(3)

    one.commit(two.name, C, some(4, 3), tell=tell)
    wire.down()
    one.start()
    wire.up()
    wire.settle()

    assert two.bodies() == some(1, 6)


def test_receiver_that_died_between_commit_and_ack_does_not_do_it_twice() -> None:
    one, two, wire = pair()
    one.commit(two.name, C, some(1, 3))
    wire.carry()
    two.work(tell=False)
    assert two.bodies() == some(1, 3)

    wire.down()
    two.start()
    two.feed(HandlerOpened(C, 2048))
    wire.up()
    wire.settle()

    assert two.bodies() == some(1, 3)
    assert one.disk.outbox[two.name, C] == []


def test_cursor_in_the_middle_of_a_row_resumes_there() -> None:
    one, two, wire = pair()

    def handler(body: bytes) -> None:
        if body == b"message 5":
            raise Failing

    two.handler = handler
    one.commit(two.name, C, some(1, 10))
    wire.settle()
    assert two.bodies() == some(1, 4)

    wire.down()
    two.start(unclean=False)
    two.handler = lambda body: None
    two.feed(HandlerOpened(C, 2048))
    one.start()
    wire.up()
    wire.settle()

    assert two.bodies() == some(1, 10)
    assert one.disk.outbox[two.name, C] == []


# -- failures of handlers --


def test_poison_message_is_set_aside_after_its_attempts_with_the_cursor() -> None:
    one, two, wire = pair()
    calls: list[bytes] = []

    def handler(body: bytes) -> None:
        calls.append(body)
        if body == b"message 3":
            raise Failing("no such order")

    two.handler = handler
    one.commit(two.name, C, some(1, 5))
    wire.settle()
    assert two.bodies() == some(1, 2)

    for _ in range(5):
        two.wait(10_000_000_000)
        wire.settle()

    assert two.bodies() == [*some(1, 2), *some(4, 2)]
    assert two.disk.dead == [(one.disk.store, C, 3, "no such order")]
    assert calls.count(b"message 3") == 3
    assert one.disk.outbox[two.name, C] == []


def test_failed_message_is_tried_again_after_a_pause_and_not_before() -> None:
    one, two, wire = pair()
    failing = [True]

    def handler(body: bytes) -> None:
        if failing[0]:
            raise Failing

    two.handler = handler
    one.commit(two.name, C, some(1, 2))
    wire.settle()
    failing[0] = False
    wire.settle()
    assert two.bodies() == []
    timer = two.machine.next_timer()
    assert timer is not None
    assert timer > two.now_ns

    two.wait(50_000_000)
    wire.settle()

    assert two.bodies() == some(1, 2)
    assert two.machine.next_timer() is None


def test_message_that_ends_the_process_is_found_counted_and_set_aside() -> None:
    one, two, wire = pair()

    def handler(body: bytes) -> None:
        if body == b"message 77":
            raise Crashed

    two.handler = handler
    for first in range(1, 201, 50):
        one.commit(two.name, C, some(first, 50))
    crashes = 0
    while crashes < 20:
        try:
            wire.settle()
            break
        except Crashed:
            crashes += 1
            wire.down()
            two.start(unclean=True)
            two.feed(HandlerOpened(C, 2048))
            wire.up()

    assert [number for _, _, number, _ in two.disk.dead] == [77]
    assert two.bodies() == [*some(1, 76), *some(78, 123)]
    assert crashes <= 9
    assert two.machine.receiver.channels[one.disk.store, C].suspect is False


def test_message_that_only_was_near_a_crash_is_not_set_aside() -> None:
    one, two, wire = pair()
    one.commit(two.name, C, some(1, 100))
    wire.carry()

    for _ in range(4):  # killed from outside while a batch is with the handler, again and again
        wire.down()
        two.start(unclean=True)
        two.feed(HandlerOpened(C, 2048))
        wire.up()
        wire.carry()
        job = two.jobs[0]
        assert isinstance(job, RunBatch)
        assert job.attempt is not None
        key = (one.disk.store, C)
        two.disk.incoming[key] = IncomingState(one.name, one.disk.store, C, attempt=job.attempt)
    wire.settle()

    assert two.bodies() == some(1, 100)
    assert two.disk.dead == []


def test_returned_batch_is_handed_out_again() -> None:
    one, two, wire = pair()
    one.commit(two.name, C, some(1, 3))
    wire.carry()
    two.feed(HandlerClosed(C))
    two.jobs.clear()
    two.feed(BatchDone(one.disk.store, C, 0, START_DIGEST))
    assert not two.jobs

    two.feed(HandlerOpened(C, 1))
    wire.settle()

    assert two.bodies() == some(1, 3)


# -- what cannot be repaired is reported before any later effect --


def forked(node: ModelNode) -> list[tuple[str, bool]]:
    return [(fork.name, fork.outgoing) for fork in node.forks]


def test_restored_sender_is_found_out() -> None:
    one, two, wire = exchanged(10)
    old = one.backup()
    one.commit(two.name, C, some(11, 10))
    wire.settle()

    wire.down()
    one.disk = old
    one.start()
    wire.up()
    wire.settle()

    assert forked(one) == [(C, True)]
    assert forked(two) == [(C, False)]
    assert "restored from an older copy" in one.forks[0].text


def test_restored_sender_whose_numbers_caught_up_is_found_out() -> None:
    one, two, wire = exchanged(100)
    old = one.backup()
    one.commit(two.name, C, some(101, 20))
    wire.settle()
    wire.down()

    one.disk = old
    one.start()
    one.commit(two.name, C, [b"another"] * 26)
    wire.up()
    wire.settle()

    assert forked(one) == [(C, True)]
    assert b"another" not in two.bodies()
    assert two.bodies() == some(1, 120)


def test_restored_receiver_is_found_out_and_repeats_nothing() -> None:
    one, two, wire = exchanged(10)
    old = two.backup()
    one.commit(two.name, C, some(11, 10))
    wire.settle()
    wire.down()

    two.disk = old
    two.start()
    two.feed(HandlerOpened(C, 2048))
    one.commit(two.name, C, some(21, 10))
    wire.up()
    wire.settle()

    assert forked(one) == [(C, True)]
    assert two.bodies() == some(1, 10)


def test_receiver_that_lost_its_store_is_found_out() -> None:
    one, two, wire = exchanged(10)
    wire.down()

    fresh = ModelNode(two.name, b"fresh store-----")
    wire = Wire(one, fresh)
    wire.up()
    wire.settle()

    assert forked(one) == [(C, True)]
    assert fresh.bodies() == []


def test_sender_that_lost_its_channel_with_its_backup_is_found_out() -> None:
    one, two, wire = pair()
    old = one.backup()
    one.commit(two.name, C, some(1, 10))
    wire.settle()
    wire.down()

    one.disk = old
    one.start()
    wire.up()
    wire.settle()

    assert forked(one) == [(C, True)]


def test_fork_is_remembered_over_a_restart() -> None:
    one, two, wire = exchanged(10)
    old = one.backup()
    one.commit(two.name, C, some(11, 1))
    wire.settle()
    wire.down()
    one.disk = old
    one.start()
    wire.up()
    wire.settle()
    wire.down()

    one.start()
    wire.up()
    one.commit(two.name, C, [b"other"] * 5)
    wire.settle()

    assert two.bodies() == some(1, 11)
    assert forked(two) == [(C, False)] * 2


def test_clone_with_another_history_advances_nothing() -> None:
    one, two, wire = exchanged(10)
    wire.down()
    clone = ModelNode(one.name)
    clone.disk = one.backup()
    clone.start()

    one.commit(two.name, C, some(11, 1))
    wire.up()
    wire.settle()
    wire.down()
    other = Wire(clone, two)
    other.number = 50
    clone.commit(two.name, C, [b"from the clone"])
    other.up()
    other.settle()

    assert forked(clone) == [(C, True)]
    assert two.bodies() == some(1, 11)


def test_second_live_owner_of_a_store_is_not_served() -> None:
    one, two, wire = exchanged(3)
    clone = ModelNode("a@h9.example")
    clone.disk = one.backup()
    clone.start()
    other = Wire(clone, two)
    other.number = 50

    clone.commit(two.name, C, [b"from the clone"])
    other.up()
    other.settle()

    assert [refused.code for refused in two.refused] == ["clone"]
    assert two.bodies() == some(1, 3)


def test_damaged_payload_stops_the_channel_before_its_effect() -> None:
    one, two, wire = pair()
    frame = RunFrame(C, 1, START_DIGEST, chain(START_DIGEST, 1, [b"right"])[-1], pack_run([b"wrong"]))

    two.feed(DeliverRun(one.name, RUNS_CHANNEL, 1, [encode_run(frame)]))
    two.work()

    assert forked(two) == [(C, False)]
    assert two.bodies() == []


def test_run_beyond_the_credit_stops_the_channel() -> None:
    one, two, wire = pair(handler=False)
    two.feed(HandlerOpened(C, 1))
    two.machine.receiver.channels[one.disk.store, C].limit = 1
    bodies = some(1, 2)
    frame = RunFrame(C, 1, START_DIGEST, chain(START_DIGEST, 1, bodies)[-1], pack_run(bodies))

    two.feed(DeliverRun(one.name, RUNS_CHANNEL, 1, [encode_run(frame)]))

    assert forked(two) == [(C, False)]
    assert not two.jobs


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"\x93\x02\x01\x01", b"\x90", b"\x9f" * 100, b"\xdd\xff\xff\xff\xff", b"\x93\x01\xc3\x91\x90"]
)
def test_garbage_is_refused_and_changes_nothing(data: bytes) -> None:
    one, two, wire = pair()

    two.feed(DeliverRun(one.name, REPORTS_CHANNEL, 1, [data]))
    one.commit(two.name, C, some(1, 3))
    wire.settle()

    assert [refused.code for refused in two.refused] == ["durable"]
    assert two.bodies() == some(1, 3)


def test_frames_decode_to_what_was_encoded() -> None:
    frame = RunFrame(C, 7, bytes(16), b"d" * 16, pack_run([b"a", b""]))

    assert decode(encode_run(frame)) == frame
    assert unpack_run(frame.blob) == [b"a", b""]


def test_what_a_peer_says_of_a_fork_is_one_line() -> None:
    notice = decode(encode_fork(ForkNotice(C, True, "cloned\n2026-01-01 \x1b[31mall is well")))

    assert isinstance(notice, ForkNotice)
    assert notice.text == r"'cloned\n2026-01-01 \x1b[31mall is well'"


def test_batch_is_a_sequence_of_messages() -> None:
    batch = Batch(NodeId("a@h1"), StoreId(b"s" * 16), NodeId("b@h2"), C, 5, [b"x", b"y", b"z"])

    assert len(batch) == 3
    assert batch[-1].number == 7
    assert [message.body for message in batch[1:]] == [b"y", b"z"]
    assert batch[1:].first == 6
    assert batch[0].id.number == 5
    with pytest.raises(IndexError):
        batch[3]


def test_events_of_nobody_are_a_bug() -> None:
    one, _, _ = pair()
    with pytest.raises(InvariantError):
        one.feed(RunBatch(one.name, one.disk.store, C, 1, [], []))


def test_attempts_narrow_only_after_a_crash() -> None:
    one, two, wire = pair()
    one.commit(two.name, C, some(1, 64))
    wire.carry()
    wire.down()
    two.start(unclean=True)
    wire.up()
    two.feed(HandlerOpened(C, 2048))
    wire.carry()

    job = two.jobs[0]
    assert isinstance(job, RunBatch)
    assert job.attempt == Attempt(1, 64, 1, 64)


def heal(wire: Wire, names: list[ChannelName]) -> None:
    """Handlers that work, a fresh session, and time."""
    for node in (wire.one, wire.two):
        node.handler = lambda body: None
        for name in names:
            node.feed(HandlerOpened(name, 2048))
    wire.down()
    wire.up()
    for _ in range(20):
        wire.settle()
        for node in (wire.one, wire.two):
            node.wait(10_000_000_000)


@pytest.mark.parametrize("seed", range(30))
def test_exactly_once_through_random_cuts_crashes_and_failures(seed: int) -> None:
    """Both directions, two channels, everything at random; then heal and demand everything."""
    rng = random.Random(seed)
    one, two, wire = pair(handler=False)
    names = [C, ChannelName("more")]
    sent: dict[tuple[NodeId, str], int] = {}

    def shaky(body: bytes) -> None:
        if rng.random() < 0.02:
            raise Failing

    def open_handlers(node: ModelNode) -> None:
        for name in names:
            if rng.random() < 0.8:
                node.feed(HandlerOpened(name, rng.choice([1, 7, 2048])))

    for node in (one, two):
        node.handler = shaky
        node.start(unclean=False, max_attempts=1000)
        open_handlers(node)
    wire.up()
    for _ in range(300):
        node, peer = rng.choice([(one, two), (two, one)])
        action = rng.random()
        if action < 0.4:
            name = rng.choice(names)
            first = sent.get((peer.name, name), 0) + 1
            count = rng.choice([1, 3, 40])
            sent[peer.name, name] = first + count - 1
            node.commit(peer.name, name, some(first, count), tell=rng.random() < 0.9)
            if node.machine.sender.channels.get((peer.name, name)) is None or (
                node.machine.sender.channels[peer.name, name].last != sent[peer.name, name]
            ):
                wire.down()
                node.start(max_attempts=1000)
                open_handlers(node)
                wire.up()
        elif action < 0.6:
            wire.carry(rng.randrange(1, 20))
        elif action < 0.8:
            node.work(rng.randrange(1, 5))
        elif action < 0.86:
            node.wait(rng.randrange(1, 200_000_000))
        elif action < 0.93:
            wire.down()
            if rng.random() < 0.8:
                wire.up()
        else:
            wire.down()
            if rng.random() < 0.5:
                node.work(1, tell=False)
            node.start(max_attempts=1000)
            open_handlers(node)
            wire.up()

    heal(wire, names)
    for node, peer in ((one, two), (two, one)):
        assert node.forks == []
        assert node.disk.dead == []
        for name in names:
            got = [body for store, channel, _, body in node.disk.effects if (store, channel) == (peer.disk.store, name)]
            assert got == some(1, sent.get((node.name, name), 0))
            assert peer.disk.outbox.get((node.name, name), []) == []


def test_old_session_down_changes_nothing() -> None:
    one, two, wire = pair()
    one.feed(SessionDown(two.name, SessionId(b"older"), "late"))
    one.commit(two.name, C, some(1, 3))
    wire.settle()

    assert two.bodies() == some(1, 3)
