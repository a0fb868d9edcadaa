"""One connection as the endpoint sees it: what is decoded, what is to be transmitted, and how far each channel got on it."""

from __future__ import annotations

import attrs

from ha_core.ids import LinkName, NodeId
from ha_core.machines import wire
from ha_core.machines.contract import Effect
from ha_core.machines.handshake import Handshake, Hello
from ha_core.machines.messages import Transmit
from ha_core.machines.paths import Liveness, Path

UNFLUSHED_BYTES = 128 << 10
"""Transmitted and not yet flushed, at most, per connection: an urgent frame never sits behind more than this."""


@attrs.define(eq=False)
class Connection:
    """``handshake`` is None once the peer has proved itself; then ``path`` is the path that the connection carries."""

    number: int
    link: LinkName
    remote: str
    dialled: bool
    liveness: Liveness
    deadline_ns: int | None
    """When the handshake must be done."""
    peer: NodeId | None = None
    """Whom we dialled, or who has proved itself."""
    path: Path | None = None
    handshake: Handshake | None = None
    ours: Hello | None = None
    theirs: Hello | None = None
    """What both ends said in the handshake, once it is done."""
    version: int = 0
    features: int = 0
    """What both ends agreed to speak."""
    closed: bool = False
    decoder: wire.FrameDecoder = attrs.field(factory=wire.FrameDecoder)
    out: list[bytes] = attrs.field(factory=list)
    eliciting: bool = False
    """``out`` holds a frame that asks for evidence."""
    unflushed: int = 0
    opened: set[int] = attrs.field(factory=set)
    """Handles of channels that were named to the peer on this connection."""
    cursors: dict[int, int] = attrs.field(factory=dict)
    """Per handle, the segment to send next: all before it were sent here or acknowledged."""
    ack_ns: int | None = None
    """When what was received here must be acknowledged."""
    ack_bytes: int = 0
    ack_eliciting: bool = False
    """The next acknowledgement carries credit that must not get lost."""
    ping_ns: int = 0
    busy: bool = False
    """Data went over it since the last probe."""
    held: bytearray | None = None
    """Bytes received while it is being decided whether the peer is a clone."""

    def put(self, frame: bytes, *, eliciting: bool) -> None:
        """Queue a frame that counts."""
        self.out.append(frame)
        self.unflushed += len(frame)
        self.liveness.sent += 1
        if eliciting:
            self.eliciting = True

    def put_handshake(self, data: bytes) -> None:
        """Queue bytes that do not count: neither end counts before both are proved."""
        self.out.append(data)
        self.unflushed += len(data)

    def flush(self, now_ns: int, effects: list[Effect]) -> None:
        """Hand everything queued to the shell as one effect."""
        if not self.out:
            return
        if self.eliciting:
            self.liveness.note_sent(now_ns)
            self.eliciting = False
        data = self.out[0] if len(self.out) == 1 else b"".join(self.out)
        self.out.clear()
        effects.append(Transmit(self.number, data))

    def queue_ack(self, at_ns: int) -> None:
        if self.ack_ns is None or at_ns < self.ack_ns:
            self.ack_ns = at_ns
