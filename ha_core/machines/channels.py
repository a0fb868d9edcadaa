"""The two ends of one session channel: numbers, credit, exact deduplication. No connections, no time.

Rules:

* Units count 1, 2, 3, ... in one direction of one channel for the life of the session; a unit is a message or a fragment of
  one. What is encoded once as a ``Segment`` is sent in exactly that form on every connection and every repetition, so a
  segment is received whole or not at all, and deduplication is exact: a cursor, and a set above it bounded by credit.
* Credit is absolute, in bytes and messages, and never decreases. The receiver grants it on consumption.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import attrs

from ha_core.errors import DecodeError, FrameTooLargeError, LocalProtocolError, RemoteProtocolError, invariant
from ha_core.ids import ChannelName
from ha_core.machines import wire
from ha_core.machines.messages import Priority

QUEUE_BYTES = 512 << 10
QUEUE_COUNT = 4096
QUEUE_LIMIT_BYTES = 64 << 20
"""A caller that does not heed ``has_room`` is stopped here."""
INITIAL_WINDOW_BYTES = 256 << 10
INITIAL_WINDOW_MESSAGES = 2048
WINDOW_BYTES = 2 << 20
"""Once the application consumes, so much may be under way to it on one channel ..."""
WINDOW_MESSAGES = 16384
PEER_WINDOW_BYTES = 16 << 20
"""... and on all channels of one peer together (or the initial window of each, if that is more)."""
COALESCE_BYTES = 8 << 10
COALESCE_COUNT = 256
_COMPACT = 1024


class Segment(NamedTuple):
    """Units ``first`` to ``first + units - 1``, encoded."""

    first: int
    units: int
    size: int
    frame: bytes


@attrs.define(eq=False)
class SendChannel:
    """Sending end. ``pending`` (from ``start`` on) is not yet encoded; ``segments`` base .. top-1 are not yet acknowledged.

    Invariants: used credit never exceeds granted; ``base <= top``; a fragmented message is ``pending[start]`` from
    ``offset`` on.
    """

    handle: int
    name: ChannelName
    priority: Priority
    redundant: bool
    credit_bytes: int
    credit_messages: int
    pending: list[bytes] = attrs.field(factory=list)
    start: int = 0
    offset: int = 0
    pending_bytes: int = 0
    segments: dict[int, Segment] = attrs.field(factory=dict)
    base: int = 0
    top: int = 0
    next_unit: int = 1
    acked: int = 0
    used_bytes: int = 0
    used_messages: int = 0
    full: bool = False
    busy: bool = False
    """It is in a queue of its session, ..."""
    waiting: bool = False
    """... namely of those that wait for the writer."""

    @property
    def pending_count(self) -> int:
        return len(self.pending) - self.start

    def has_room(self) -> bool:
        return self.pending_bytes < QUEUE_BYTES and len(self.pending) - self.start < QUEUE_COUNT

    def is_small(self) -> bool:
        """So little to send that it may wait while the writer is at work, and be sent with what comes meanwhile."""
        return self.pending_bytes < COALESCE_BYTES and 0 < len(self.pending) - self.start < COALESCE_COUNT

    def drained(self) -> bool:
        """Room again, and not just barely."""
        return self.pending_bytes <= QUEUE_BYTES // 2 and self.pending_count <= QUEUE_COUNT // 2

    def queue(self, bodies: Sequence[bytes]) -> None:
        """Raises LocalProtocolError: a message is longer than 8 MiB, or the caller ignores ``has_room``."""
        sizes = list(map(len, bodies))
        if max(sizes, default=0) > wire.MAX_MESSAGE_BYTES:
            raise LocalProtocolError(f"channel {self.name}: a message may have at most {wire.MAX_MESSAGE_BYTES} bytes")
        if self.pending_bytes > QUEUE_LIMIT_BYTES:
            raise LocalProtocolError(f"channel {self.name}: more than {QUEUE_LIMIT_BYTES} bytes queued: wait for room")
        self.pending.extend(bodies)
        self.pending_bytes += sum(sizes)

    def make_segment(self) -> bool:
        """Encode what comes next as segment ``top``, as far as credit goes; False if there is nothing or no credit."""
        pending, start = self.pending, self.start
        waiting = len(pending) - start
        messages_left = self.credit_messages - self.used_messages
        bytes_left = self.credit_bytes - self.used_bytes
        if waiting == 0 or messages_left <= 0:
            return False
        if self.offset or len(pending[start]) > wire.RUN_BYTES:
            return self._make_fragment(bytes_left)
        room = min(wire.RUN_BYTES, bytes_left)
        # As many as will fit if all are of average size; the exact end is found below.
        guess = min(room * waiting // (self.pending_bytes or 1) + 1, waiting, messages_left, wire.RUN_COUNT)
        bodies = pending[start : start + guess]
        size = sum(map(len, bodies))
        if size > room:
            ends = list(accumulate(map(len, bodies)))
            fits = bisect_right(ends, room)
            if fits == 0:
                return False
            del bodies[fits:]
            size = ends[fits - 1]
        count = len(bodies)
        self._append(Segment(self.next_unit, count, size, wire.encode_run(self.handle, self.next_unit, bodies)))
        self.used_messages += count
        self._drop(count)
        return True

    def _make_fragment(self, bytes_left: int) -> bool:
        body = self.pending[self.start]
        size = min(wire.FRAGMENT_BYTES, len(body) - self.offset)
        if size > bytes_left:
            return False
        piece = body[self.offset : self.offset + size]
        self.offset += size
        more = self.offset < len(body)
        self._append(Segment(self.next_unit, 1, size, wire.encode_fragment(self.handle, self.next_unit, piece, more=more)))
        if not more:
            self.used_messages += 1
            self.offset = 0
            self._drop(1)
        return True

    def _append(self, segment: Segment) -> None:
        self.segments[self.top] = segment
        self.top += 1
        self.next_unit += segment.units
        self.used_bytes += segment.size
        self.pending_bytes -= segment.size

    def _drop(self, count: int) -> None:
        self.start += count
        if self.start == len(self.pending):
            self.pending.clear()
            self.start = 0
        elif self.start > _COMPACT and self.start * 2 > len(self.pending):
            del self.pending[: self.start]
            self.start = 0

    def acknowledge(self, received: int, credit_bytes: int, credit_messages: int) -> bool:
        """Absolute: ``received`` is the last unit before the peer's first gap. True if there is new credit.

        Raises:
            RemoteProtocolError: a unit that was never sent is acknowledged.
        """
        if received >= self.next_unit:
            raise RemoteProtocolError(f"channel {self.name}: unit {received} acknowledged, but never sent", code="ack")
        if received > self.acked:
            self.acked = received
            segments = self.segments
            while self.base < self.top:
                segment = segments[self.base]
                if segment.first + segment.units - 1 > received:
                    break
                del segments[self.base]
                self.base += 1
        more = credit_bytes > self.credit_bytes or credit_messages > self.credit_messages
        self.credit_bytes = max(self.credit_bytes, credit_bytes)
        self.credit_messages = max(self.credit_messages, credit_messages)
        return more

    def check(self) -> None:
        invariant(self.base <= self.top, "segments are ordered", base=self.base, top=self.top)
        invariant(len(self.segments) == self.top - self.base, "every unacknowledged segment is kept", channel=self.name)
        invariant(self.used_bytes <= self.credit_bytes, "I18 credit in bytes exceeded", channel=self.name)
        invariant(self.used_messages <= self.credit_messages, "I18 credit in messages exceeded", channel=self.name)


class Piece(NamedTuple):
    """A DATA frame's content: whole messages, or one fragment."""

    units: int
    size: int
    flags: int
    bodies: list[bytes]


@attrs.define(eq=False)
class ReceiveChannel:
    """Receiving end: ``next_unit`` is the cursor, ``early`` what came before its turn.

    Invariants: consumed <= delivered <= received <= granted, in bytes and in messages; ``granted_*`` never decrease.
    """

    handle: int
    name: ChannelName
    granted_bytes: int
    granted_messages: int
    next_unit: int = 1
    next_seq: int = 1
    early: dict[int, Piece] = attrs.field(factory=dict)
    received_bytes: int = 0
    received_messages: int = 0
    delivered_bytes: int = 0
    consumed_bytes: int = 0
    consumed_messages: int = 0
    told_bytes: int = attrs.field(default=attrs.Factory(lambda self: self.granted_bytes, takes_self=True))
    """The grant that the peer was last told."""
    told_messages: int = attrs.field(default=attrs.Factory(lambda self: self.granted_messages, takes_self=True))
    partial: list[bytes] = attrs.field(factory=list)
    partial_bytes: int = 0
    duplicates: int = 0

    def accept(self, body: memoryview, flags: int) -> list[bytes] | None:
        """Take a DATA frame: the messages that are deliverable now, maybe none; None: it was a duplicate.

        Raises:
            RemoteProtocolError: malformed, beyond credit, or too long.
        """
        if len(body) < 8:
            raise DecodeError("a DATA frame without a number", code="data")
        first = int.from_bytes(body[:8], "big")
        if first < self.next_unit or first in self.early:
            self.duplicates += 1
            return None
        if flags & wire.FRAGMENT:
            _, data = wire.decode_fragment(body, flags)
            piece = Piece(1, len(data), flags, [data])
            self.received_messages += not flags & wire.MORE
        else:
            _, bodies, size = wire.decode_run(body)
            piece = Piece(len(bodies), size, flags, bodies)
            self.received_messages += piece.units
        self.received_bytes += piece.size
        if self.received_bytes > self.granted_bytes or self.received_messages > self.granted_messages:
            raise RemoteProtocolError(f"channel {self.name}: more was sent than credit allows", code="credit")
        if first != self.next_unit:
            self.early[first] = piece
            return []
        if not self.early and not flags and not self.partial:
            self.next_unit += piece.units
            self.delivered_bytes += piece.size
            return piece.bodies
        delivered: list[bytes] = []
        self._take(piece, delivered)
        while self.early:
            following = self.early.pop(self.next_unit, None)
            if following is None:
                break
            self._take(following, delivered)
        if self.early and min(self.early) < self.next_unit:
            raise DecodeError(f"channel {self.name}: frames overlap", code="data")
        return delivered

    def _take(self, piece: Piece, delivered: list[bytes]) -> None:
        self.next_unit += piece.units
        if not piece.flags & wire.FRAGMENT:
            if self.partial:
                raise DecodeError(f"channel {self.name}: a message begins within another", code="data")
            delivered.extend(piece.bodies)
            self.delivered_bytes += piece.size
            return
        self.partial.append(piece.bodies[0])
        self.partial_bytes += piece.size
        if self.partial_bytes > wire.MAX_MESSAGE_BYTES:
            raise FrameTooLargeError(f"channel {self.name}: a message exceeds {wire.MAX_MESSAGE_BYTES} bytes", code="length")
        if not piece.flags & wire.MORE:
            delivered.append(b"".join(self.partial))
            self.delivered_bytes += self.partial_bytes
            self.partial = []
            self.partial_bytes = 0

    def number(self, count: int) -> int:
        """The number of the first of ``count`` messages being delivered."""
        first = self.next_seq
        self.next_seq += count
        return first

    def consume(self, count: int, byte_count: int) -> None:
        """Raises LocalProtocolError: more was consumed than delivered."""
        self.consumed_messages += count
        self.consumed_bytes += byte_count
        if self.consumed_messages >= self.next_seq or self.consumed_bytes > self.delivered_bytes:
            raise LocalProtocolError(f"channel {self.name}: more was consumed than delivered")

    def grant(self, window_bytes: int) -> None:
        """Renew credit from what was consumed; a message being put together has its own room, up to its limit."""
        if self.consumed_messages or self.partial:
            self.granted_bytes = max(self.granted_bytes, self.consumed_bytes + window_bytes + self.partial_bytes)
            self.granted_messages = max(self.granted_messages, self.consumed_messages + WINDOW_MESSAGES)

    def worth_telling(self) -> bool:
        """Whether the grant grew by half of what the peer knows that it has left, or more: it should hear of it now."""
        more_bytes = self.granted_bytes - self.told_bytes
        more_messages = self.granted_messages - self.told_messages
        return (more_bytes > 0 and 2 * more_bytes >= self.told_bytes - self.received_bytes) or (
            more_messages > 0 and 2 * more_messages >= self.told_messages - self.received_messages
        )

    def check(self) -> None:
        invariant(self.received_bytes <= self.granted_bytes, "I18 credit exceeded by the peer", channel=self.name)
        invariant(self.consumed_bytes <= self.delivered_bytes <= self.received_bytes, "consumed before delivered")
