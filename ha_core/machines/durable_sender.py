"""The sending half of durable channels: what of the outbox is in memory, what is on its way, what the peer has durably.

Rules:

* Nothing is sent on a channel before the peer's report of this session was compared with our own digests (I10, M33).
* ``acked <= sent <= last``; ``held`` is a piece of the outbox in order: rows that are on their way (the first ``on_way`` of
  them) and rows that are next. Whatever is not held is loaded when its turn comes, so memory is bounded (I17).
* A row is forgotten only for a report whose digest at that number is ours (I5, P4).
* There is no resending by time: a session delivers what it took, and a new session begins with a report.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import attrs

from ha_core.errors import DecodeError, invariant
from ha_core.ids import ChannelName, NodeId
from ha_core.machines.contract import Effect
from ha_core.machines.durable_events import Acknowledged, ChannelForked, LoadOutbox, OutboxRun, OutgoingState
from ha_core.machines.durable_wire import (
    FLIGHT_BYTES,
    START_DIGEST,
    ChannelReport,
    ForkNotice,
    RunFrame,
    chain,
    encode_fork,
    encode_run,
    pack_run,
    unpack_run,
)

HELD_BYTES = 2 * FLIGHT_BYTES
"""What of one channel's outbox is kept in memory."""
PEER_BYTES = 16 * FLIGHT_BYTES
"""What may be on its way to one peer on all channels together: a session's queue is bounded."""


@attrs.define
class OutgoingChannel:
    to: NodeId
    name: ChannelName
    last: int = 0
    acked: int = 0
    acked_digest: bytes = START_DIGEST
    forked: str = ""
    open: bool = False
    """The peer's report of this session was checked."""
    sent: int = 0
    limit: int = 0
    held: deque[OutboxRun] = attrs.field(factory=deque)
    held_bytes: int = 0
    on_way: int = 0
    on_way_bytes: int = 0
    loading: int = 0
    """The number that was asked for with LoadOutbox; 0: nothing is being loaded."""
    unchecked: ChannelReport | None = None
    """The peer's first report, to be compared when the rows that it names are loaded."""

    @classmethod
    def restore(cls, state: OutgoingState) -> OutgoingChannel:
        return cls(
            state.to, state.name, state.last, state.acked, state.acked_digest, state.forked, sent=state.acked
        )  # fmt: skip

    def check(self) -> None:
        """The invariants of this channel, for tests and the simulator."""
        invariant(self.acked <= self.sent <= self.last or self.forked, "acked <= sent <= last", channel=self)
        invariant(self.on_way_bytes == sum(run.size for run in list(self.held)[: self.on_way]), "bytes on their way")
        invariant(self.held_bytes == sum(run.size for run in self.held), "bytes held")
        for one, two in zip(self.held, list(self.held)[1:], strict=False):
            invariant(one.last + 1 == two.first and one.digest == two.before, "held rows follow each other", one=one, two=two)

    def held_end(self) -> int:
        return self.held[-1].last if self.held else self.sent

    def digest_at(self, number: int) -> bytes | None:
        """Our prefix digest at ``number``; None if no row that tells it is held."""
        if number == self.acked:
            return self.acked_digest
        for run in self.held:
            if number == run.last:
                return run.digest
            if number == run.first - 1:
                return run.before
            if run.first <= number < run.last:
                return chain(run.before, run.first, unpack_run(run.blob)[: number - run.first + 1])[-1]
        return None


class Sender:
    """All outgoing channels of a node; ``frames`` collects what is to be sent, per peer."""

    def __init__(self, channels: Sequence[OutgoingState]) -> None:
        self.channels: dict[tuple[NodeId, ChannelName], OutgoingChannel] = {}
        self._by_peer: dict[NodeId, dict[ChannelName, OutgoingChannel]] = {}
        self._grants: dict[NodeId, dict[ChannelName, ChannelReport]] = {}
        """Credit in this session for channels on which nothing was ever sent."""
        self._peer_bytes: dict[NodeId, int] = {}
        """On their way to each peer, over all channels."""
        self._held_back: dict[NodeId, dict[ChannelName, OutgoingChannel]] = {}
        """Channels that wait until less is on its way to their peer."""
        self.effects: list[Effect] = []
        self.frames: dict[NodeId, list[bytes]] = {}
        for state in channels:
            self._add(OutgoingChannel.restore(state))

    def _add(self, channel: OutgoingChannel) -> OutgoingChannel:
        self.channels[channel.to, channel.name] = channel
        self._by_peer.setdefault(channel.to, {})[channel.name] = channel
        return channel

    # -- the store --

    def committed(self, runs: Sequence[OutboxRun]) -> None:
        touched: dict[tuple[NodeId, ChannelName], OutgoingChannel] = {}
        for run in runs:
            key = (run.to, run.name)
            channel = self.channels.get(key) or self._add(OutgoingChannel(run.to, run.name))
            invariant(run.first == channel.last + 1, "numbers follow each other", run=run.first, last=channel.last)
            channel.last = run.last
            fits = channel.held_bytes + run.size <= HELD_BYTES or not channel.held
            if fits and not channel.loading and channel.held_end() + 1 == run.first:
                channel.held.append(run)
                channel.held_bytes += run.size
            touched[key] = channel
        for channel in touched.values():
            granted = self._grants.get(channel.to)
            report = granted.pop(channel.name, None) if granted else None
            if report is not None:
                self._report(channel, report)
            else:
                self._pump(channel)

    def loaded(self, to: NodeId, name: ChannelName, runs: Sequence[OutboxRun]) -> None:
        channel = self.channels[to, name]
        start, channel.loading = channel.loading, 0
        if channel.forked or not start:
            return
        if start <= channel.acked:
            runs = ()  # a newer session made it needless, and the rows may be gone
        elif not runs or not runs[0].first <= start <= runs[0].last:
            self._fork(channel, f"the outbox has lost message {start} to {to} on {name!r}: the store is damaged")
            return
        report = channel.unchecked
        if report is None:
            if runs and start == channel.held_end() + 1:
                self._hold(channel, runs)
            self._pump(channel)
            return
        if runs and start == max(report.cursor, channel.acked + 1):
            self._drop_held(channel)
        elif not runs or start != channel.held_end() + 1 or channel.digest_at(report.cursor) is None:
            self._load(channel, max(report.cursor, channel.acked + 1))
            return
        self._hold(channel, runs)
        if channel.digest_at(report.received) is None:
            self._load(channel, channel.held_end() + 1)
        else:
            channel.unchecked = None
            self._compare(channel, report)

    def _hold(self, channel: OutgoingChannel, runs: Sequence[OutboxRun]) -> None:
        channel.held.extend(runs)
        channel.held_bytes += sum(run.size for run in runs)

    # -- the peer --

    def session_up(self, peer: NodeId) -> None:
        self._grants[peer] = {}

    def session_down(self, peer: NodeId) -> None:
        self._grants.pop(peer, None)
        self._held_back.pop(peer, None)
        self.frames.pop(peer, None)
        for channel in self._by_peer.get(peer, {}).values():
            channel.open = False
            channel.unchecked = None
            channel.limit = 0
            channel.sent = channel.acked
            self._count_on_way(channel, -channel.on_way, -channel.on_way_bytes)
            if channel.held and channel.held[0].first > channel.acked + 1:
                self._drop_held(channel)

    def reported(self, peer: NodeId, complete: bool, reports: Sequence[ChannelReport]) -> None:
        known = self._by_peer.get(peer, {})
        for report in reports:
            channel = known.get(report.name)
            if channel is not None:
                self._report(channel, report)
            elif report.received == 0:
                self._grants.setdefault(peer, {})[report.name] = report
            else:
                channel = self._add(OutgoingChannel(peer, report.name))
                known = self._by_peer[peer]
                self._report(channel, report)
        if complete:
            named = {report.name for report in reports}
            for channel in known.values():
                if channel.forked:
                    self._notify(channel)
                elif channel.name not in named and channel.acked > 0:
                    self._lost_by_peer(channel, 0)

    def refused(self, peer: NodeId, name: ChannelName, text: str) -> None:
        """The peer found that the histories differ."""
        channel = self.channels.get((peer, name))
        if channel is not None and not channel.forked:
            self._fork(channel, text)

    def _report(self, channel: OutgoingChannel, report: ChannelReport) -> None:
        if channel.forked:
            return
        if channel.open:
            self._acknowledge(channel, report)
            return
        if report.received > channel.last:
            self._fork(
                channel,
                f"{channel.to} has {report.received} messages of {channel.name!r}, this store sent only {channel.last}: "
                "this store was restored from an older copy",
            )
        elif report.cursor < channel.acked:
            self._lost_by_peer(channel, report.cursor)
        elif channel.digest_at(report.cursor) is None or channel.digest_at(report.received) is None:
            channel.unchecked = report
            self._load(channel, max(report.cursor, channel.acked + 1))
        else:
            self._compare(channel, report)

    def _compare(self, channel: OutgoingChannel, report: ChannelReport) -> None:
        """The first report of a session against our own digests; the channel opens if both agree."""
        try:
            same = (
                channel.digest_at(report.cursor) == report.digest
                and channel.digest_at(report.received) == report.received_digest
            )
        except DecodeError:
            self._fork(channel, f"a row of the outbox to {channel.to} on {channel.name!r} cannot be read: damaged")
            return
        if not same:
            self._differs(channel, report.cursor)
            return
        channel.open = True
        channel.limit = report.limit
        self._forget(channel, report.cursor, report.digest)
        channel.sent = report.received
        while channel.on_way < len(channel.held) and channel.held[channel.on_way].last <= report.received:
            self._count_on_way(channel, 1, channel.held[channel.on_way].size)
        self._go_on(channel)

    def _acknowledge(self, channel: OutgoingChannel, report: ChannelReport) -> None:
        if report.cursor > channel.sent:
            self._fork(channel, f"{channel.to} acknowledges message {report.cursor} of {channel.name!r}, never sent to it")
            return
        if report.cursor > channel.acked:
            if channel.digest_at(report.cursor) != report.digest:
                self._differs(channel, report.cursor)
                return
            self._forget(channel, report.cursor, report.digest)
        channel.limit = max(channel.limit, report.limit)
        self._go_on(channel)

    def _forget(self, channel: OutgoingChannel, cursor: int, digest: bytes) -> None:
        if cursor > channel.acked:
            channel.acked = cursor
            channel.acked_digest = digest
            self.effects.append(Acknowledged(channel.to, channel.name, cursor, digest))
        held = channel.held
        while held and held[0].last <= cursor:
            size = held.popleft().size
            channel.held_bytes -= size
            if channel.on_way:
                self._count_on_way(channel, -1, -size)

    # -- sending --

    def _count_on_way(self, channel: OutgoingChannel, rows: int, size: int) -> None:
        channel.on_way += rows
        channel.on_way_bytes += size
        self._peer_bytes[channel.to] = self._peer_bytes.get(channel.to, 0) + size

    def _go_on(self, channel: OutgoingChannel) -> None:
        """Something was acknowledged: those who waited for the peer's share come first, in their order."""
        waiting = self._held_back.get(channel.to)
        if not waiting:
            self._pump(channel)
            return
        waiting.setdefault(channel.name, channel)
        for name in list(waiting):
            if self._peer_bytes.get(channel.to, 0) >= PEER_BYTES:
                return
            self._pump(waiting.pop(name))

    def _pump(self, channel: OutgoingChannel) -> None:
        if not channel.open or channel.forked:
            return
        held = channel.held
        while channel.sent < channel.last:
            if channel.on_way == len(held):
                self._load(channel, channel.sent + 1)
                return
            run = held[channel.on_way]
            if run.last > channel.limit or (channel.on_way and channel.on_way_bytes + run.size > FLIGHT_BYTES):
                return
            on_way_bytes = self._peer_bytes.get(channel.to, 0)
            if on_way_bytes and on_way_bytes + run.size > PEER_BYTES:
                self._held_back.setdefault(channel.to, {})[channel.name] = channel
                return
            frame = self._frame(channel, run)
            if frame is None:
                return
            self.frames.setdefault(channel.to, []).append(frame)
            channel.sent = run.last
            self._count_on_way(channel, 1, run.size)

    def _frame(self, channel: OutgoingChannel, run: OutboxRun) -> bytes | None:
        if channel.sent + 1 == run.first:
            return encode_run(RunFrame(run.name, run.first, run.before, run.digest, run.blob))
        # the peer stands in the middle of a row: it set a message aside, or stopped there
        skip = channel.sent + 1 - run.first
        try:
            bodies = unpack_run(run.blob)
        except DecodeError:
            self._fork(channel, f"a row of the outbox to {channel.to} on {channel.name!r} cannot be read: damaged")
            return None
        before = chain(run.before, run.first, bodies[:skip])[-1]
        return encode_run(RunFrame(run.name, channel.sent + 1, before, run.digest, pack_run(bodies[skip:])))

    def _load(self, channel: OutgoingChannel, start: int) -> None:
        if channel.loading == 0:
            channel.loading = start
            self.effects.append(LoadOutbox(channel.to, channel.name, start, HELD_BYTES))

    def _drop_held(self, channel: OutgoingChannel) -> None:
        channel.held.clear()
        channel.held_bytes = 0
        self._count_on_way(channel, -channel.on_way, -channel.on_way_bytes)

    # -- what cannot be repaired --

    def _lost_by_peer(self, channel: OutgoingChannel, cursor: int) -> None:
        self._fork(
            channel,
            f"{channel.to} acknowledged {channel.acked} messages of {channel.name!r} and now has {cursor}: "
            "its store was lost or restored from an older copy",
        )

    def _differs(self, channel: OutgoingChannel, cursor: int) -> None:
        self._fork(
            channel,
            f"the first {cursor} messages of {channel.name!r} at {channel.to} are others than ours: "
            "one of the stores was restored from an older copy, or cloned",
        )

    def _fork(self, channel: OutgoingChannel, text: str) -> None:
        channel.forked = text
        channel.open = False
        channel.unchecked = None
        self._drop_held(channel)
        self.effects.append(ChannelForked(channel.to, channel.name, True, text))
        self._notify(channel)

    def _notify(self, channel: OutgoingChannel) -> None:
        notice = ForkNotice(channel.name, True, channel.forked)
        self.frames.setdefault(channel.to, []).append(encode_fork(notice))
