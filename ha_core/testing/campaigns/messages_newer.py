"""A node of the next version (I30): it speaks versions 1 to 2, offers features that nobody has, and says more than we know.

Every few frames it adds a key of its own to a control frame, or a frame of a type from the ignorable range: what it says
beyond version 1 must change nothing at a node that speaks version 1 only.
"""

from __future__ import annotations

from typing import ClassVar

import attrs

from ha_core.machines import wire
from ha_core.machines.connection import Connection
from ha_core.machines.connections import Connections
from ha_core.machines.endpoint import EndpointMachine
from ha_core.machines.wire import FrameType, Plain

NEWER = (1, 2)
_CONTROL = frozenset((FrameType.OPEN, FrameType.ACK, FrameType.PING, FrameType.PONG))
_KEY = 77
_KIND = 0x90
_KEY_EVERY = 3
_FRAME_EVERY = 5


@attrs.define(eq=False)
class NewerConnection(Connection):
    def put(self, frame: bytes, *, eliciting: bool) -> None:
        at = self.liveness.sent
        _, kind, flags, handle = wire.HEADER.unpack_from(frame)
        if kind in _CONTROL and at % _KEY_EVERY == 0:
            fields = wire.decode_fields(frame[wire.HEADER.size :], max_array=1024)
            more: dict[int, Plain] = {**fields, _KEY: at, _KEY + 1: [b"more", at]}  # type: ignore[dict-item]  # checked plain
            frame = wire.encode_frame(kind, wire.encode_fields(more), flags=flags, handle=handle)
        super().put(frame, eliciting=eliciting)
        if at % _FRAME_EVERY == 0:
            super().put(wire.encode_frame(_KIND + at % 16, bytes(at % 300), flags=at % 256, handle=at % 3), eliciting=False)


@attrs.define(eq=False)
class NewerConnections(Connections):
    connection_kind: ClassVar[type[Connection]] = NewerConnection


class NewerEndpoint(EndpointMachine):
    table_kind: ClassVar[type[Connections]] = NewerConnections

    def offer_features(self) -> NewerEndpoint:
        """Name features in its handshakes that version 1 does not have."""
        self._lower.identity = attrs.evolve(self._lower.identity, features=0b101)
        return self
