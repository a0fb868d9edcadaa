"""Datagrams: authenticated, at most once, newest wins, bounded age.

A packet is ``"HAM1" | MAC | session id | number | sender's clock | length of topic | topic | body``. The MAC is BLAKE2b, keyed
with the cluster's key, over cluster, sender, receiver and the rest. The session id covers both ends' boots, so nothing that
an earlier process sent, or that was sent to one, is accepted.

Clocks are not synchronised: a packet's age is how much longer it took than the quickest one of late.
"""

from __future__ import annotations

import hmac
import struct
from hashlib import blake2b

import attrs

from ha_core.errors import LocalProtocolError
from ha_core.ids import ChannelName, NodeId, SessionId

MAGIC = b"HAM1"
MAC_BYTES = 16
MAX_DATAGRAM_BYTES = 1200
MAX_AGE_NS = 1_000_000_000
OFFSET_WINDOW_NS = 10_000_000_000
MAX_OLD = 16
"""So many too old in a row, and it is the sender's clock that stood still: measure anew."""
MAX_TOPICS = 64
_HEAD = struct.Struct(">16sQQB")
_START = len(MAGIC) + MAC_BYTES


def session_of(data: bytes) -> SessionId | None:
    """The session that a packet claims to belong to; None if it is no packet of ours."""
    if len(data) < _START + _HEAD.size or data[:4] != MAGIC:
        return None
    return SessionId(data[_START : _START + 16])


@attrs.define(eq=False)
class DatagramPort:
    """The datagrams of one session at one end."""

    cluster: str
    key: bytes = attrs.field(repr=False)
    session: SessionId
    ours: NodeId
    theirs: NodeId
    dropped: int = 0
    _sent: dict[ChannelName, int] = attrs.field(factory=dict)
    _received: dict[ChannelName, int] = attrs.field(factory=dict)
    _offset_ns: int | None = None
    _next_offset_ns: int | None = None
    _window_end_ns: int = 0
    _old: int = 0

    def encode(self, topic: ChannelName, body: bytes, now_ns: int) -> bytes:
        """Raises LocalProtocolError: the body or the topic is too long, or there are too many topics."""
        name = topic.encode()
        if len(body) > MAX_DATAGRAM_BYTES or len(name) > 64:
            raise LocalProtocolError(f"datagram {topic}: at most {MAX_DATAGRAM_BYTES} bytes of body and 64 of topic")
        if topic not in self._sent and len(self._sent) >= MAX_TOPICS:
            raise LocalProtocolError(f"datagram {topic}: at most {MAX_TOPICS} topics")
        number = self._sent[topic] = self._sent.get(topic, 0) + 1
        rest = _HEAD.pack(self.session, number, now_ns, len(name)) + name + body
        return MAGIC + self._mac(self.ours, self.theirs, rest) + rest

    def decode(self, data: bytes, now_ns: int) -> tuple[ChannelName, bytes] | None:
        """Topic and body if the packet is authentic, young enough, and newer than all of its topic; else None."""
        rest = data[_START:]
        if not hmac.compare_digest(data[len(MAGIC) : _START], self._mac(self.theirs, self.ours, rest)):
            self.dropped += 1
            return None
        _, number, sent_ns, length = _HEAD.unpack_from(rest)
        head = _HEAD.size + length
        topic = ChannelName(rest[_HEAD.size : head].decode(errors="replace"))
        too_old = self._age_ns(now_ns - sent_ns, now_ns) > MAX_AGE_NS
        self._old = self._old + 1 if too_old else 0
        if self._old > MAX_OLD:
            self._offset_ns = self._next_offset_ns = None
        full = topic not in self._received and len(self._received) >= MAX_TOPICS
        if too_old or full or number <= self._received.get(topic, 0):
            self.dropped += 1
            return None
        self._received[topic] = number
        return topic, rest[head:]

    def _age_ns(self, offset_ns: int, now_ns: int) -> int:
        """How much longer it took than the quickest of the last one to two windows."""
        if now_ns >= self._window_end_ns:
            self._offset_ns, self._next_offset_ns = self._next_offset_ns, None
            self._window_end_ns = now_ns + OFFSET_WINDOW_NS
        if self._next_offset_ns is None or offset_ns < self._next_offset_ns:
            self._next_offset_ns = offset_ns
        quickest = self._next_offset_ns if self._offset_ns is None else min(self._offset_ns, self._next_offset_ns)
        return offset_ns - quickest

    def _mac(self, sender: NodeId, receiver: NodeId, rest: bytes) -> bytes:
        mac = blake2b(
            f"{self.cluster}\0{sender}\0{receiver}\0".encode(), digest_size=MAC_BYTES, key=self.key, person=b"ha-core datagram"
        )
        mac.update(rest)
        return mac.digest()
