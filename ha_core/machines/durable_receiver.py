"""The receiving half of durable channels: credit, the order of runs, hand-out to handlers, retries and dead letters.

Rules:

* ``cursor <= received <= limit``. Only what a transaction committed moves the cursor, and only the cursor moves the credit
  (M13); without a handler no credit is given and messages wait at their sender (M34).
* A run is taken only if the digest before it is ours, and if its messages give the digest that it names (I8, I9, I10).
* One batch per channel is with the handler at a time. A message whose handler raises is tried again after a pause, and set
  aside after ``max_attempts``; what stands behind it waits.
* After an unclean start the last handling may be what ended the process. So an ``Attempt`` is made durable before a batch is
  handled; if it is found at the next start, the batch is cut down until the one message is found, and that one is counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

import attrs

from ha_core.errors import DecodeError, invariant
from ha_core.ids import ChannelName, NodeId, StoreId
from ha_core.machines.contract import Effect
from ha_core.machines.durable_events import Attempt, BatchDone, ChannelForked, IncomingState, RememberBoot, RunBatch
from ha_core.machines.durable_wire import (
    FLIGHT_BYTES,
    START_DIGEST,
    WINDOW_COUNT,
    ChannelReport,
    ForkNotice,
    RunFrame,
    chain,
    encode_fork,
    unpack_run,
)
from ha_core.machines.handshake import SeenBoot

BATCH_COUNT: Final = 2048
"""Messages in one RunBatch, at most: they are handled in one transaction."""
FIRST_RETRY_NS: Final = 50_000_000
BLOCKED_NS: Final = 100_000_000
MAX_RETRY_NS: Final = 5_000_000_000
NARROWING: Final = 8
"""By what a suspected batch shrinks with each crash."""


@attrs.frozen
class Staged:
    first: int
    bodies: Sequence[bytes]
    digests: Sequence[bytes]
    size: int

    @property
    def last(self) -> int:
        return self.first + len(self.bodies) - 1


@attrs.define
class IncomingChannel:
    store: StoreId
    name: ChannelName
    peer: NodeId
    cursor: int = 0
    digest: bytes = START_DIGEST
    received: int = 0
    received_digest: bytes = START_DIGEST
    limit: int = 0
    """Credit given in this session; never goes back."""
    staged: deque[Staged] = attrs.field(factory=deque)
    staged_bytes: int = 0
    busy: bool = False
    failures: int = 0
    """How often message ``cursor`` + 1 has failed in this process."""
    error: str = ""
    retry_ns: int = 0
    attempt: Attempt | None = None
    crashed: bool = False
    """``attempt`` was found in the store: it ended the last process."""
    suspect: bool = False
    """The last process ended without closing: count before handling."""
    stopped: bool = False

    @classmethod
    def restore(cls, state: IncomingState, unclean: bool) -> IncomingChannel:
        return cls(
            state.store, state.name, state.peer, state.cursor, state.digest, state.cursor, state.digest,
            attempt=state.attempt, crashed=state.attempt is not None, suspect=unclean,
        )  # fmt: skip

    def check(self) -> None:
        invariant(self.cursor <= self.received, "cursor <= received", channel=self)
        at = self.staged[0].first - 1 if self.staged else self.received
        invariant(self.busy or at == self.cursor, "what is staged begins at the cursor", channel=self)
        for run in self.staged:
            invariant(run.first == at + 1 and len(run.bodies) == len(run.digests), "staged runs follow each other", run=run)
            at = run.last
        invariant(at == self.received, "staged up to received", channel=self)
        invariant(self.staged_bytes == sum(run.size for run in self.staged), "bytes staged", channel=self)

    def report(self) -> ChannelReport:
        return ChannelReport(self.name, self.cursor, self.digest, self.received, self.received_digest, self.limit)


class Receiver:
    """All incoming channels of a node."""

    def __init__(
        self, channels: Sequence[IncomingState], *, unclean: bool, max_attempts: int, seen: Iterable[SeenBoot]
    ) -> None:
        self.channels: dict[tuple[StoreId, ChannelName], IncomingChannel] = {}
        self._by_store: dict[StoreId, dict[ChannelName, IncomingChannel]] = {}
        self._handlers: dict[ChannelName, int] = {}
        self._unclean = unclean
        self._max_attempts = max_attempts
        self._live: dict[NodeId, StoreId] = {}
        self._seen: dict[StoreId, SeenBoot] = {boot.store: boot for boot in seen}
        """What is written down of the processes that run other stores."""
        self.effects: list[Effect] = []
        self.frames: dict[NodeId, list[bytes]] = {}
        self._retrying: dict[tuple[StoreId, ChannelName], IncomingChannel] = {}
        self.changed: dict[NodeId, dict[ChannelName, IncomingChannel]] = {}
        """Channels with news for their sender."""
        for state in channels:
            self._add(IncomingChannel.restore(state, unclean))

    def _add(self, channel: IncomingChannel) -> IncomingChannel:
        self.channels[channel.store, channel.name] = channel
        self._by_store.setdefault(channel.store, {})[channel.name] = channel
        return channel

    # -- sessions --

    def owner_of(self, store: StoreId) -> NodeId | None:
        """The peer that is served for this store in a live session."""
        for peer, known in self._live.items():
            if known == store:
                return peer
        return None

    def session_up(self, seen: SeenBoot) -> Sequence[ChannelReport]:
        """What we have of everything that this store sent, for the first report of the session."""
        peer, store = seen.peer, seen.store
        self._live[peer] = store
        if seen.boot.counter and self._seen.get(store) != seen:
            # A receiver that restarts still knows which process of a store it served (I11). Count 0: nothing to remember.
            self._seen[store] = seen
            self.effects.append(RememberBoot(seen))
        for name in self._handlers:
            if name not in self._by_store.get(store, {}):
                self._add(IncomingChannel(store, name, peer, suspect=self._unclean))
        channels = self._by_store.get(store, {}).values()
        for channel in channels:
            channel.peer = peer
            channel.stopped = False
            channel.limit = channel.received
            self._grant(channel)
        return [channel.report() for channel in channels]

    def session_down(self, peer: NodeId) -> None:
        self._live.pop(peer, None)
        self.changed.pop(peer, None)
        self.frames.pop(peer, None)

    def _grant(self, channel: IncomingChannel) -> None:
        if channel.name in self._handlers:
            channel.limit = max(channel.limit, channel.cursor + WINDOW_COUNT)

    def _announce(self, channel: IncomingChannel) -> None:
        if self._live.get(channel.peer) == channel.store and not channel.stopped:
            self.changed.setdefault(channel.peer, {})[channel.name] = channel

    # -- handlers --

    def handler_opened(self, name: ChannelName, max_count: int, now_ns: int) -> None:
        self._handlers[name] = min(max_count, BATCH_COUNT)
        for peer, store in self._live.items():
            if (store, name) not in self.channels:
                self._add(IncomingChannel(store, name, peer, suspect=self._unclean))
        for channel in list(self.channels.values()):
            if channel.name == name:
                self._grant(channel)
                self._announce(channel)
                self._hand_out(channel, now_ns)

    def handler_closed(self, name: ChannelName) -> None:
        self._handlers.pop(name, None)

    def done(self, event: BatchDone, now_ns: int) -> None:
        channel = self.channels[event.store, event.name]
        invariant(channel.busy, "a batch is done that was never handed out", name=event.name)
        channel.busy = False
        if event.cursor > channel.cursor:
            channel.cursor = event.cursor
            channel.digest = event.digest
            channel.failures = 0
            channel.error = ""
            self._drop_staged(channel, event.cursor)
            if channel.suspect and (channel.attempt is None or event.cursor >= channel.attempt.upto):
                channel.suspect = False
                channel.attempt = None
            self._grant(channel)
            self._announce(channel)
        if event.blocked:
            channel.retry_ns = now_ns + BLOCKED_NS
            self._retrying[event.store, event.name] = channel
        elif event.error:
            channel.failures += 1
            channel.error = event.error
            pause_ns = min(FIRST_RETRY_NS << min(channel.failures - 1, 20), MAX_RETRY_NS)
            if channel.failures < self._max_attempts:
                channel.retry_ns = now_ns + pause_ns
                self._retrying[event.store, event.name] = channel
        self._hand_out(channel, now_ns)

    def retry_due(self, now_ns: int) -> None:
        for key, channel in list(self._retrying.items()):
            if channel.retry_ns <= now_ns:
                del self._retrying[key]
                channel.retry_ns = 0
                self._hand_out(channel, now_ns)

    def next_retry(self) -> int | None:
        return min([channel.retry_ns for channel in self._retrying.values()], default=None)

    # -- messages --

    def run(self, peer: NodeId, store: StoreId, frame: RunFrame, now_ns: int) -> None:
        channel = self.channels.get((store, frame.name))
        if channel is None or channel.stopped:
            return  # no credit was ever given, or the histories differ
        if frame.first != channel.received + 1 or frame.before != channel.received_digest:
            self._stop(
                channel, f"message {frame.first} of {frame.name!r} from {peer} does not follow what this store has: "
                "one of the stores was restored from an older copy, or cloned",
            )  # fmt: skip
            return
        try:
            bodies = unpack_run(frame.blob)
        except DecodeError as exc:
            self._stop(channel, f"message {frame.first} of {frame.name!r} from {peer}: {exc}")
            return
        last = frame.first + len(bodies) - 1
        digests = chain(frame.before, frame.first, bodies)
        if digests[-1] != frame.digest:
            self._stop(channel, f"messages {frame.first}..{last} of {frame.name!r} from {peer} do not match their digest")
        elif last > channel.limit or (channel.staged and channel.staged_bytes + len(frame.blob) > FLIGHT_BYTES):
            self._stop(channel, f"message {last} of {frame.name!r} from {peer} exceeds its credit ({channel.limit})")
        else:
            channel.staged.append(Staged(frame.first, bodies, digests, len(frame.blob)))
            channel.staged_bytes += len(frame.blob)
            channel.received = last
            channel.received_digest = frame.digest
            self._hand_out(channel, now_ns)

    def noticed(self, store: StoreId, notice: ForkNotice) -> None:
        """The sender found that the histories differ."""
        channel = self.channels.get((store, notice.name))
        if channel is not None and not channel.stopped:
            channel.stopped = True
            self.effects.append(ChannelForked(channel.peer, channel.name, False, notice.text))

    def _stop(self, channel: IncomingChannel, text: str) -> None:
        channel.stopped = True
        self.effects.append(ChannelForked(channel.peer, channel.name, False, text))
        self.frames.setdefault(channel.peer, []).append(encode_fork(ForkNotice(channel.name, False, text)))

    # -- hand-out --

    def _hand_out(self, channel: IncomingChannel, now_ns: int) -> None:
        handler_count = self._handlers.get(channel.name)
        if handler_count is None or channel.busy or not channel.staged or channel.retry_ns:
            return
        if channel.failures >= self._max_attempts:
            self._emit(channel, 1, None, channel.error)
            return
        count = 1 if channel.failures else handler_count
        attempt = None
        if channel.suspect:
            attempt = self._next_attempt(channel, count)
            if attempt.count > self._max_attempts:
                self._emit(channel, 1, None, f"handling it ended the process {self._max_attempts} times")
                return
            channel.attempt = attempt
            count = attempt.size
        self._emit(channel, count, attempt, "")

    def _next_attempt(self, channel: IncomingChannel, count: int) -> Attempt:
        """What to write down before the next batch; the record found at the start is that of a crash."""
        number = channel.cursor + 1
        found, crashed = channel.attempt, channel.crashed
        channel.crashed = False
        if found is None or not found.number <= number <= found.upto:
            size = min(count, channel.received - channel.cursor)
            return Attempt(number, size, 1, number + size - 1)
        size = min(count, found.size)
        if found.number < number:
            return Attempt(number, size, 1, found.upto)  # what was suspected before it is through
        if not crashed:
            return Attempt(number, size, found.count, found.upto)
        if found.size > 1:
            return Attempt(number, max(1, found.size // NARROWING), 1, found.upto)
        return Attempt(number, 1, found.count + 1, found.upto)

    def _emit(self, channel: IncomingChannel, count: int, attempt: Attempt | None, dead_letter: str) -> None:
        staged = channel.staged
        run = staged[0]
        bodies: Sequence[bytes] = run.bodies
        digests: Sequence[bytes] = run.digests
        if len(bodies) < count and len(staged) > 1:
            gathered: list[bytes] = []
            gathered_digests: list[bytes] = []
            for run in staged:
                gathered.extend(run.bodies)
                gathered_digests.extend(run.digests)
                if len(gathered) >= count:
                    break
            bodies, digests = gathered, gathered_digests
        if len(bodies) > count:
            bodies, digests = bodies[:count], digests[:count]
        channel.busy = True
        self.effects.append(
            RunBatch(
                channel.peer, channel.store, channel.name, channel.cursor + 1, bodies, digests, attempt, dead_letter
            )
        )  # fmt: skip

    def _drop_staged(self, channel: IncomingChannel, cursor: int) -> None:
        staged = channel.staged
        while staged and staged[0].last <= cursor:
            channel.staged_bytes -= staged.popleft().size
        if staged and staged[0].first <= cursor:
            run = staged[0]
            skip = cursor + 1 - run.first
            staged[0] = Staged(cursor + 1, run.bodies[skip:], run.digests[skip:], run.size)
