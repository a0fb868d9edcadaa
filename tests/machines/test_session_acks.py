"""Where a session says what it received and granted: no loss of a connection may take the last word with it."""

from __future__ import annotations

import attrs
import pytest

from ha_core.ids import Boot, ChannelName, LinkName, NodeId, SessionId, StoreId
from ha_core.machines import wire
from ha_core.machines.channels import INITIAL_WINDOW_BYTES, INITIAL_WINDOW_MESSAGES
from ha_core.machines.connection import Connection
from ha_core.machines.handshake import Hello
from ha_core.machines.messages import SendRun
from ha_core.machines.paths import ACK_DELAY_NS, MILLISECOND_NS, Liveness
from ha_core.machines.session import Session
from ha_core.machines.wire import Frame, FrameType

OURS, THEIRS = NodeId("app@h1"), NodeId("app@h2")
C = ChannelName("c")


def hello(node: NodeId) -> Hello:
    return Hello(
        cluster="c1", node=node, store=StoreId(node.encode().ljust(16)), boot=Boot(1, 1), boots_digest=b"", epoch=0,
        link=LinkName("l1"), address="", session=b"", window_bytes=INITIAL_WINDOW_BYTES,
        window_messages=INITIAL_WINDOW_MESSAGES, nonce=bytes(16),
    )  # fmt: skip


@attrs.define
class Half:
    """One end of a session with two connections, the first of them active; what it says is read from their queues."""

    session: Session = attrs.field(factory=lambda: Session(SessionId(b"s" * 16), hello(OURS), hello(THEIRS), []))
    one: Connection = attrs.field(
        factory=lambda: Connection(2, LinkName("l1"), "h2:1", True, Liveness(25 * MILLISECOND_NS), None)
    )
    two: Connection = attrs.field(
        factory=lambda: Connection(4, LinkName("l2"), "h2:2", True, Liveness(25 * MILLISECOND_NS), None)
    )

    def __attrs_post_init__(self) -> None:
        self.session.join(self.one, 0)
        self.session.join(self.two, 0)
        assert self.session.active is self.one

    def frame(self, kind: int, fields: dict[int, wire.Plain], handle: int = 0) -> Frame:
        return Frame(kind, 0, handle, memoryview(wire.encode_fields(fields)))

    def receive(self, connection: Connection, number: int = 1) -> None:
        self.session.receive_open(self.frame(FrameType.OPEN, {0: self.session.tag, 1: C, 2: 1}))
        data = wire.encode_run(0, number, [b"body"])
        self.session.receive_data(connection, Frame(FrameType.DATA, 0, 0, memoryview(data)[8:]), 0)

    def said(self, connection: Connection) -> list[int]:
        """Up to which unit each acknowledgement on the connection reaches, since it was last asked."""
        found = []
        for data in connection.out:
            if data[4] == FrameType.ACK:
                values = wire.decode_fields(data[8:], max_array=64)[2]
                assert isinstance(values, list)
                found += values[1::4]
        connection.out.clear()
        return found

    def settle(self) -> None:
        """Everything that is due has been said."""
        self.session.send_acks(ACK_DELAY_NS)


@pytest.fixture
def half() -> Half:
    return Half()


def test_what_was_said_on_a_connection_that_is_lost_is_said_again_on_the_active_one(half: Half) -> None:
    half.receive(half.two)
    half.settle()
    assert (half.said(half.one), half.said(half.two)) == ([], [1])

    half.session.leave(half.two, 0)
    half.settle()

    assert half.said(half.one) == [1]


def test_what_was_said_on_the_active_connection_is_said_again_on_the_one_that_follows_it(half: Half) -> None:
    half.receive(half.one)
    half.settle()
    assert (half.said(half.one), half.said(half.two)) == ([1], [])

    half.session.leave(half.one, 0)
    half.settle()

    assert half.said(half.two) == [1]


def test_what_was_said_on_a_connection_in_doubt_is_said_on_the_second_one(half: Half) -> None:
    half.receive(half.one)
    half.settle()
    half.said(half.one)

    half.session.doubt(0)
    half.settle()

    assert half.said(half.two) == [1]


def test_while_a_connection_is_in_doubt_everything_is_said_on_all(half: Half) -> None:
    half.one.liveness.timeouts = 1
    half.receive(half.one)

    half.settle()

    assert (half.said(half.one), half.said(half.two)) == ([1], [1])


def test_control_frames_of_another_generation_change_nothing(half: Half) -> None:
    half.session.send(SendRun(THEIRS, C, [b"1"]))
    half.session.pump(0)
    stale = half.session.tag ^ 1

    half.session.receive_ack({0: stale, 1: 0, 2: [0, 1, 1 << 40, 1 << 40]})
    half.session.receive_open(half.frame(FrameType.OPEN, {0: stale, 1: "theirs", 2: 1}, handle=7))

    (channel,) = half.session.channels()
    assert (channel.acked, channel.credit_bytes) == (0, INITIAL_WINDOW_BYTES)
    half.session.receive_open(half.frame(FrameType.OPEN, {0: half.session.tag, 1: "ours", 2: 1}, handle=7))
