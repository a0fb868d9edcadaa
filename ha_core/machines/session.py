"""A session: a pair of live processes; its channels survive the failure of any path.

Rules:

* Data goes on the active connection only; the others are kept warm by probes. Never is one channel striped over paths.
* From the first probe timeout on the active connection until evidence, what is unacknowledged (up to 16 KiB) and what is new
  is also sent on a second one, within a budget. At SUSPECT, or when the connection is lost, a second one becomes active and
  sends whatever was not yet sent *on it*. The receiver's cursors make every copy harmless.
* Channels that are ``redundant`` go on every connection; the first copy wins.
* Acknowledgements and credit are absolute and go where data came in, and everywhere while that path is in doubt. A grant
  must not get lost, since a sender without credit sends nothing that could reveal the loss: it asks for evidence.
* Control frames first, then by priority; lower ones have a floor, so that none starves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import attrs

from ha_core.errors import DecodeError, LocalProtocolError, RemoteProtocolError, invariant
from ha_core.ids import ChannelName, SessionId
from ha_core.machines import wire
from ha_core.machines.channels import INITIAL_WINDOW_BYTES, PEER_WINDOW_BYTES, WINDOW_BYTES, ReceiveChannel, SendChannel
from ha_core.machines.connection import UNFLUSHED_BYTES, Connection
from ha_core.machines.contract import Effect
from ha_core.machines.handshake import Hello
from ha_core.machines.messages import Consumed, DeliverRun, PathState, Priority, RoomChanged, SendRun
from ha_core.machines.paths import ACK_DELAY_NS, SECOND_NS
from ha_core.machines.wire import Frame, FrameType, Plain

MAX_CHANNELS = 128
MAX_CHANNEL_NAME = 128
ACK_BYTES = 64 << 10
"""So many bytes received are acknowledged at once, fewer within ACK_DELAY_NS."""
HEDGE_OLD_BYTES = 16 << 10
HEDGE_BYTES = 64 << 10
"""The budget of copies: so much in a burst, refilled by a twentieth of what is sent and by HEDGE_REFILL each second."""
HEDGE_REFILL_BYTES_PER_S = 32 << 10
ROOM: Mapping[Priority, int] = {
    Priority.URGENT: UNFLUSHED_BYTES + (64 << 10),
    Priority.NORMAL: UNFLUSHED_BYTES,
    Priority.BULK: UNFLUSHED_BYTES,
    Priority.BACKGROUND: UNFLUSHED_BYTES // 2,
}
"""How much may be transmitted and not yet flushed before frames of a priority must wait."""
FLOOR: Mapping[Priority, int] = {Priority.BULK: 10, Priority.BACKGROUND: 20}
"""While others go first, one part in so many is theirs."""
_RANK = {PathState.UP: 0, PathState.PROBING: 1, PathState.NEW: 1, PathState.SUSPECT: 2, PathState.DOWN: 3}


@attrs.define(eq=False)
class Session:
    """Its state at one end. ``theirs`` is what the peer said in its first handshake."""

    id: SessionId
    ours: Hello
    theirs: Hello
    effects: list[Effect] = attrs.field(repr=False)
    """The endpoint's; what the session wants done is appended."""
    connections: dict[int, Connection] = attrs.field(factory=dict)
    active: Connection | None = None
    hedge: Connection | None = None
    hedged_bytes: int = 0
    _hedge_budget: int = HEDGE_BYTES
    _hedge_refilled_ns: int = 0
    _hedge_old: int = 0
    _hedge_tops: dict[int, int] = attrs.field(factory=dict)
    _sending: dict[ChannelName, SendChannel] = attrs.field(factory=dict)
    _by_handle: list[SendChannel] = attrs.field(factory=list)
    _redundant: list[SendChannel] = attrs.field(factory=list)
    _receiving: dict[int, ReceiveChannel] = attrs.field(factory=dict)
    _by_name: dict[ChannelName, ReceiveChannel] = attrs.field(factory=dict)
    _busy: tuple[deque[SendChannel], ...] = attrs.field(factory=lambda: tuple(deque() for _ in Priority))
    _debts: list[int] = attrs.field(factory=lambda: [0] * len(Priority))
    _waiting: list[SendChannel] = attrs.field(factory=list)
    """They have a little to send, and wait for the next Flushed."""
    _full: dict[int, SendChannel] = attrs.field(factory=dict)
    _dirty: dict[int, ReceiveChannel] = attrs.field(factory=dict)

    @property
    def tag(self) -> int:
        """The part of the id that control frames carry: none of an earlier generation can act on this one."""
        return int.from_bytes(self.id[:6], "big")

    # -- from above --

    def send(self, run: SendRun) -> None:
        """Queue a run; ``pump`` sends it."""
        channel = self._sending.get(run.channel)
        if channel is None:
            channel = self._open(run)
        channel.queue(run.bodies)
        if not channel.full and not channel.has_room():
            channel.full = True
            self._full[channel.handle] = channel
        if channel.waiting and not channel.is_small():
            self.flushed()
        self._want(channel)

    def has_room(self, name: ChannelName) -> bool:
        channel = self._sending.get(name)
        return channel is None or channel.has_room()

    def _open(self, run: SendRun) -> SendChannel:
        if len(self._by_handle) >= MAX_CHANNELS or len(run.channel) > MAX_CHANNEL_NAME or not run.channel.isprintable():
            raise LocalProtocolError(f"channel {run.channel[:MAX_CHANNEL_NAME]!r}: at most {MAX_CHANNELS} channels to a peer, "
                                     f"names of at most {MAX_CHANNEL_NAME} printable characters")  # fmt: skip
        channel = SendChannel(
            len(self._by_handle),
            run.channel,
            run.priority,
            run.redundant,
            self.theirs.window_bytes,
            self.theirs.window_messages,
        )
        self._sending[run.channel] = channel
        self._by_handle.append(channel)
        if run.redundant:
            self._redundant.append(channel)
        return channel

    def consumed(self, event: Consumed, now_ns: int) -> None:
        """Renew a channel's credit; the peer is told once that is worth a frame."""
        channel = self._by_name.get(event.channel)
        if channel is None:
            raise LocalProtocolError(f"channel {event.channel}: nothing was delivered that could be consumed")
        channel.consume(event.count, event.byte_count)
        window = max(INITIAL_WINDOW_BYTES, min(WINDOW_BYTES, PEER_WINDOW_BYTES // len(self._by_name)))
        channel.grant(window)
        if channel.worth_telling():
            self._tell_credit(channel, now_ns)

    def _tell_credit(self, channel: ReceiveChannel, now_ns: int) -> None:
        self._dirty[channel.handle] = channel
        if self.active is not None:
            self.active.queue_ack(now_ns)
            self.active.ack_eliciting = True

    # -- connections --

    def join(self, connection: Connection, now_ns: int) -> None:
        """A connection of this session is established."""
        self.connections[connection.number] = connection
        self.consider(now_ns)

    def leave(self, connection: Connection, now_ns: int) -> None:
        """A connection is gone: what it had not delivered is sent on another one at once."""
        del self.connections[connection.number]
        if self.hedge is connection:
            self.hedge = None
        if self.active is connection:
            self.active = None
            self.consider(now_ns)
        elif self.active is not None:
            self._tell_everything(self.active, now_ns)

    def consider(self, now_ns: int) -> None:
        """Choose the active connection anew if there is none, or if its path is in doubt and another one is better."""
        if not self.connections:
            return
        best = min(self.connections.values(), key=_rank)
        active = self.active
        if active is None or (_rank(best)[:2] < _rank(active)[:2] and _rank(active)[0] >= _RANK[PathState.SUSPECT]):
            self._switch(best, now_ns)

    def _switch(self, connection: Connection, now_ns: int) -> None:
        self.active = connection
        self.hedge = None
        self.flushed()
        for channel in self._by_handle:
            self._want(channel)
        self._tell_everything(connection, now_ns)

    def _tell_everything(self, connection: Connection, now_ns: int) -> None:
        """What was acknowledged and granted on a path in doubt may never have arrived: say all of it here."""
        if self._receiving:
            self._dirty.update(self._receiving)
            connection.queue_ack(now_ns)

    def doubt(self, now_ns: int) -> None:
        """The first probe timeout on the active connection: begin to copy to a second one."""
        if self.hedge is not None or self.active is None:
            return
        others = [connection for connection in self.connections.values() if connection is not self.active]
        if not others:
            return
        self.hedge = min(others, key=_rank)
        self.flushed()
        self._hedge_old = HEDGE_OLD_BYTES
        self._hedge_tops = {channel.handle: channel.top for channel in self._by_handle}
        self._tell_everything(self.hedge, now_ns)

    def trust(self, connection: Connection) -> None:
        """Evidence on a connection: no more copies if it is the active one."""
        if connection is self.active:
            self.hedge = None

    # -- frames --

    def receive_open(self, frame: Frame) -> None:
        fields = wire.decode_fields(frame.body)
        if wire.int_field(fields, 0) != self.tag:
            return
        name = ChannelName(wire.str_field(fields, 1, limit=MAX_CHANNEL_NAME))
        known = self._receiving.get(frame.handle)
        if known is not None:
            if known.name != name:
                raise RemoteProtocolError(f"channel handle {frame.handle} is {known.name!r}, not {name!r}", code="open")
            return
        if name in self._by_name or len(self._receiving) >= MAX_CHANNELS:
            raise RemoteProtocolError(f"channel {name!r} has another handle, or there are too many", code="open")
        channel = ReceiveChannel(frame.handle, name, self.ours.window_bytes, self.ours.window_messages)
        self._receiving[frame.handle] = self._by_name[name] = channel

    def receive_data(self, connection: Connection, frame: Frame, now_ns: int) -> None:
        channel = self._receiving.get(frame.handle)
        if channel is None:
            raise DecodeError(f"data on channel handle {frame.handle}, which was not opened", code="data")
        bodies = channel.accept(frame.body, frame.flags)
        self._dirty[channel.handle] = channel
        connection.ack_bytes += len(frame.body)
        # A duplicate or a gap means that a path is in doubt: the sender should know at once.
        at_once = bodies is None or bool(channel.early) or connection.ack_bytes >= ACK_BYTES
        connection.queue_ack(now_ns if at_once else now_ns + ACK_DELAY_NS)
        if bodies:
            first = channel.number(len(bodies))
            self.effects.append(DeliverRun(self.theirs.node, channel.name, first, bodies))
        elif channel.partial:
            channel.grant(WINDOW_BYTES)
            if channel.worth_telling():
                self._tell_credit(channel, now_ns)

    def receive_ack(self, fields: wire.Fields) -> None:
        if wire.int_field(fields, 0) != self.tag:
            return
        values = fields.get(2)
        if type(values) is not list or len(values) % 4 or any(type(value) is not int or value < 0 for value in values):
            raise DecodeError("an ACK without a list of numbers", code="ack")
        for at in range(0, len(values), 4):
            handle, received, credit_bytes, credit_messages = values[at : at + 4]
            if handle >= len(self._by_handle):
                raise RemoteProtocolError(f"channel handle {handle} acknowledged, but never opened", code="ack")
            channel = self._by_handle[handle]
            if channel.acknowledge(received, credit_bytes, credit_messages):
                self._want(channel)

    def _encode_ack(self, connection: Connection) -> bytes:
        values: list[Plain] = []
        for handle in self._dirty:
            channel = self._dirty[handle]
            channel.told_bytes, channel.told_messages = channel.granted_bytes, channel.granted_messages
            values += (handle, channel.next_unit - 1, channel.granted_bytes, channel.granted_messages)
        flags = wire.ELICITING if connection.ack_eliciting else 0
        body = wire.encode_fields({0: self.tag, 1: connection.liveness.received, 2: values})
        return wire.encode_frame(FrameType.ACK, body, flags=flags)

    def send_acks(self, now_ns: int) -> None:
        """Acknowledge on each connection where that is due; everywhere while such a one is in doubt."""
        if not any(item.ack_ns is not None and item.ack_ns <= now_ns for item in self.connections.values()):
            return
        # All that wait at once: each must say the news, since the frame of any one may get lost with its connection.
        due = [item for item in self.connections.values() if item.ack_ns is not None]
        if any(connection.liveness.timeouts for connection in due):
            due = list(self.connections.values())
        self._acknowledge(due)

    def _ride(self, active: Connection) -> None:
        """Data goes out on ``active``: an acknowledgement that is soon due goes along, if nothing is owed elsewhere."""
        if active.liveness.timeouts or any(item.ack_ns is not None for item in self.connections.values() if item is not active):
            return
        self._acknowledge([active])

    def _acknowledge(self, due: Sequence[Connection]) -> None:
        for connection in due:
            connection.put(self._encode_ack(connection), eliciting=connection.ack_eliciting)
            connection.ack_ns = None
            connection.ack_bytes = 0
            connection.ack_eliciting = False
        self._dirty.clear()

    # -- sending --

    def _want(self, channel: SendChannel) -> None:
        if not channel.busy:
            channel.busy = True
            self._busy[channel.priority].append(channel)

    def pump(self, now_ns: int) -> None:
        """Send what may go now: on the active connection, copies on the second one, redundant channels on all."""
        active = self.active
        if active is None:
            return
        sent = self._fill(active)
        if sent and active.ack_ns is not None and active.ack_ns <= now_ns + ACK_DELAY_NS // 2:
            self._ride(active)
        if self._hedge_budget < HEDGE_BYTES or self.hedge is not None:
            self._refill(sent, now_ns)
        if self.hedge is not None:
            self._copy(self.hedge)
        if self._redundant:
            for connection in self.connections.values():
                if connection is not active:
                    self._repeat(connection)
        if self._full:
            self._announce_room()

    def _fill(self, connection: Connection) -> int:
        sent = 0
        while (priority := self._next(connection)) is not None:
            queue = self._busy[priority]
            channel = queue[0]
            if connection.unflushed and self._may_wait(connection, channel):
                # The writer is at work: what gathers until it is done goes out as one run (RFC 896, by flush, not by ack).
                queue.popleft()
                channel.waiting = True
                self._waiting.append(channel)
                continue
            size = self._send_next(connection, channel, extend=True)
            if size == 0:
                queue.popleft()
                channel.busy = False
                continue
            sent += size
            if len(queue) > 1:
                queue.rotate(-1)
            for lower, share in FLOOR.items():
                if lower > priority and self._busy[lower]:
                    self._debts[lower] = min(self._debts[lower] + size // share, 2 * wire.RUN_BYTES)
        return sent

    def _may_wait(self, connection: Connection, channel: SendChannel) -> bool:
        """Whether a little data may wait for the next Flushed: nothing urgent, no path in doubt, all older data sent."""
        return (
            channel.priority is not Priority.URGENT
            and self.hedge is None
            and channel.is_small()
            and connection.cursors.get(channel.handle, 0) == channel.top
        )

    def may_send(self) -> bool:
        """Whether room on a connection may let more go out."""
        return any(self._busy) or bool(self._waiting) or self.hedge is not None or bool(self._redundant)

    def flushed(self) -> None:
        """A writer has less to write, or none of this may wait any longer."""
        waiting, self._waiting = self._waiting, []
        for channel in waiting:
            channel.waiting = False
            self._busy[channel.priority].append(channel)

    def _next(self, connection: Connection) -> Priority | None:
        """The priority whose turn it is, if its frames may be transmitted now."""
        unflushed = connection.unflushed
        for lower in FLOOR:
            if self._debts[lower] >= wire.RUN_BYTES and self._busy[lower] and unflushed < UNFLUSHED_BYTES:
                self._debts[lower] -= wire.RUN_BYTES
                return lower
        for priority in Priority:
            if self._busy[priority]:
                return priority if unflushed < ROOM[priority] else None
        return None

    def _send_next(self, connection: Connection, channel: SendChannel, *, extend: bool) -> int:
        """Send the next segment that this connection has not carried; its bytes, 0 if there is none.

        ``extend``: encode a new one if all that exist were sent here.
        """
        handle = channel.handle
        cursor = connection.cursors.get(handle, 0)
        if cursor < channel.base:
            cursor = channel.base
        if cursor == channel.top and not (extend and channel.make_segment()):
            return 0
        segment = channel.segments[cursor]
        connection.cursors[handle] = cursor + 1
        if handle not in connection.opened:
            connection.opened.add(handle)
            fields: dict[int, Plain] = {0: self.tag, 1: channel.name, 2: int(channel.priority)}
            connection.put(wire.encode_frame(FrameType.OPEN, wire.encode_fields(fields), handle=handle), eliciting=True)
        connection.put(segment.frame, eliciting=True)
        connection.busy = True
        return len(segment.frame)

    def _refill(self, sent: int, now_ns: int) -> None:
        passed_ns = now_ns - self._hedge_refilled_ns
        self._hedge_refilled_ns = now_ns
        earned = sent // 20 + min(passed_ns * HEDGE_REFILL_BYTES_PER_S // SECOND_NS, HEDGE_BYTES)
        self._hedge_budget = min(self._hedge_budget + earned, HEDGE_BYTES)

    def _copy(self, connection: Connection) -> None:
        """Copies within the budget; old segments first, at most HEDGE_OLD_BYTES of them, since order needs them first."""
        for channel in sorted(self._by_handle, key=lambda item: item.priority):
            while True:
                cursor = max(connection.cursors.get(channel.handle, 0), channel.base)
                if cursor == channel.top:
                    break
                size = len(channel.segments[cursor].frame)
                old = cursor < self._hedge_tops.get(channel.handle, 0)
                if size > self._hedge_budget or (old and size > self._hedge_old) or connection.unflushed >= UNFLUSHED_BYTES:
                    return
                self._send_next(connection, channel, extend=False)
                self._hedge_budget -= size
                self.hedged_bytes += size
                if old:
                    self._hedge_old -= size

    def _repeat(self, connection: Connection) -> None:
        for channel in self._redundant:
            while connection.unflushed < UNFLUSHED_BYTES and self._send_next(connection, channel, extend=False):
                pass

    def _announce_room(self) -> None:
        for channel in [channel for channel in self._full.values() if channel.drained()]:
            channel.full = False
            del self._full[channel.handle]
            self.effects.append(RoomChanged(self.theirs.node, channel.name))

    def channels(self) -> Sequence[SendChannel]:
        return self._by_handle

    def check(self) -> None:
        """Raises InvariantError: a rule of this state does not hold."""
        for channel in self._by_handle:
            channel.check()
        for received in self._receiving.values():
            received.check()
        invariant(self.active is None or self.active.number in self.connections, "the active connection is one of ours")
        invariant(0 <= self._hedge_budget <= HEDGE_BYTES, "I25 hedging beyond its budget")


def _rank(connection: Connection) -> tuple[int, int, str, int]:
    state = connection.path.state if connection.path is not None else PathState.NEW
    return _RANK[state], min(connection.liveness.timeouts, 2), connection.link, connection.number
