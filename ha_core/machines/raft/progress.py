"""The leader's view of one follower.

```
PROBE       one append at a time until the logs are found to agree; again after a reset or silence
REPLICATE   appends go out ahead of the answers, bounded by messages and bytes
SNAPSHOT    the log no longer holds what the follower lacks: chunks go out in a window
```
"""

from __future__ import annotations

import enum
from collections import deque

import attrs

from ha_core.errors import invariant
from ha_core.machines.raft.records import Snapshot
from ha_core.machines.raft.types import Limits


class ProgressState(enum.Enum):
    PROBE = "probe"
    REPLICATE = "replicate"
    SNAPSHOT = "snapshot"


@attrs.define(eq=False)
class Transfer:
    """A snapshot on its way: bytes before ``acked`` are staged there, those before ``sent`` are on the way."""

    snapshot: Snapshot
    digest: bytes
    acked: int = 0
    sent: int = 0


@attrs.define(eq=False)
class Progress:
    """Invariants: ``match < next``; in PROBE nothing is in flight but one append; a transfer exists only in SNAPSHOT."""

    limits: Limits
    next: int
    match: int = 0
    state: ProgressState = ProgressState.PROBE
    ready: bool = True
    """False while the session is down."""
    probing: bool = False
    """PROBE: an append is out; the next heartbeat allows another."""
    transfer: Transfer | None = None
    contact_ns: int = 0
    """Last answer of any kind in this term."""
    advanced_ns: int = 0
    """Last time that ``match`` or a transfer grew, or that it began to owe an answer: TCP works."""
    round: int = 0
    """The newest heartbeat round that it answered."""
    replica: bytes = b""
    """Its incarnation as it states it."""
    inflight: deque[tuple[int, int]] = attrs.field(factory=deque)
    inflight_bytes: int = 0

    def can_send(self) -> bool:
        if not self.ready or self.state is ProgressState.SNAPSHOT:
            return False
        if self.state is ProgressState.PROBE:
            return not self.probing
        return not self.inflight or (
            len(self.inflight) < self.limits.max_inflight_messages and self.inflight_bytes < self.limits.max_inflight_bytes
        )

    def sent(self, last: int, size: int, now_ns: int) -> None:
        """An append up to ``last`` (its previous index, if it was empty) went out."""
        if self.state is ProgressState.PROBE:
            self.probing = True
        elif size:
            if not self.inflight:
                self.advanced_ns = now_ns
            self.next = last + 1
            self.inflight.append((last, size))
            self.inflight_bytes += size

    def matched(self, index: int, now_ns: int) -> bool:
        """The follower has everything up to ``index`` durably; True if that is news."""
        while self.inflight and self.inflight[0][0] <= index:
            self.inflight_bytes -= self.inflight.popleft()[1]
        news = index > self.match
        if news:
            self.match = index
            self.advanced_ns = now_ns
        self.next = max(self.next, index + 1)
        done = self.state is ProgressState.SNAPSHOT and self.transfer is not None and index >= self.transfer.snapshot.index
        if self.state is ProgressState.PROBE or done:
            self._enter(ProgressState.REPLICATE)
            self.next = self.match + 1
        return news

    def refused(self, previous: int, hint: int) -> bool:
        """The follower does not hold what the append at ``previous`` builds on; True if that was our newest question."""
        if self.state is ProgressState.SNAPSHOT or previous <= self.match:
            return False
        if self.state is ProgressState.PROBE and previous != self.next - 1:
            return False
        self._enter(ProgressState.PROBE)
        self.next = max(self.match + 1, min(previous, hint + 1))
        return True

    def probe(self) -> None:
        """Start over from what is known to match: the session was reset, or no answers come."""
        self._enter(ProgressState.PROBE)
        self.next = self.match + 1

    def start_transfer(self, transfer: Transfer) -> None:
        self._enter(ProgressState.SNAPSHOT)
        self.transfer = transfer

    def _enter(self, state: ProgressState) -> None:
        self.state = state
        self.probing = False
        self.transfer = None
        self.inflight.clear()
        self.inflight_bytes = 0

    def check(self) -> None:
        invariant(self.match < self.next, "match < next", match=self.match, next=self.next)
        invariant((self.transfer is not None) == (self.state is ProgressState.SNAPSHOT), "a transfer only in SNAPSHOT")
        invariant(self.state is ProgressState.REPLICATE or not self.inflight, "appends ahead only in REPLICATE")
        invariant(self.inflight_bytes == sum(size for _, size in self.inflight), "the size of what is in flight")
        indexes = [last for last, _ in self.inflight]
        invariant(indexes == sorted(indexes), "appends are in flight in order")
