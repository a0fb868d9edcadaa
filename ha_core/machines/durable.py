"""``DurableMachine``: exactly-once messages between stores, over sessions that may break at any moment.

The way of a message: the sender's transaction gives it a number and puts it into the outbox (RunsCommitted) -> a Run frame on
the session -> the receiver's RunBatch, whose transaction steps the cursor (BatchDone) -> a Report frame with cursor and digest
-> the sender forgets it (Acknowledged). Whatever breaks in between, the next session begins with a complete Report of what the
receiver has, and the sender goes on from there. The two halves are in durable_sender.py and durable_receiver.py.

It persists nothing by itself: the transaction store does (durable_events.py has the seam), so ``persisted`` is never called.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from ha_core.errors import DecodeError, invariant
from ha_core.ids import ChannelName, NodeId, SessionId, StoreId
from ha_core.machines.contract import Effect, Event
from ha_core.machines.durable_events import (
    BatchDone,
    HandlerClosed,
    HandlerOpened,
    IncomingState,
    OutboxLoaded,
    OutgoingState,
    RunsCommitted,
)
from ha_core.machines.durable_receiver import Receiver
from ha_core.machines.durable_sender import Sender
from ha_core.machines.durable_wire import (
    ForkNotice,
    Report,
    RunFrame,
    decode,
    encode_report,
)
from ha_core.machines.handshake import SeenBoot
from ha_core.machines.messages import Consumed, DeliverRun, PeerRefused, Priority, SendRun, SessionDown, SessionUp

RUNS_CHANNEL: Final = ChannelName("ha.durable")
"""The session channel of Run frames."""
REPORTS_CHANNEL: Final = ChannelName("ha.durable-reports")
"""That of Reports and notices, which must not stand behind bulk."""
REPLY_PREFIX: Final = "ha.reply/"
"""Replies to the requests on channel ``c`` come back on the durable channel of this prefix and ``c``."""


class DurableMachine:
    """Durable channels of one node; give it what the store held when it was opened.

    It is told what comes from the session layer (SessionUp, SessionDown, DeliverRun on its two channels) and the events of
    durable_events.py; it asks for SendRun and Consumed, and for the effects there.
    """

    def __init__(
        self,
        *,
        outgoing: Sequence[OutgoingState],
        incoming: Sequence[IncomingState],
        unclean: bool = False,
        max_attempts: int = 5,
        seen: Iterable[SeenBoot] = (),
    ) -> None:
        """``unclean``: the store was not closed by its last owner, a handler may have ended it. ``seen``: what RememberBoot
        has written."""
        self.sender = Sender(outgoing)
        self.receiver = Receiver(incoming, unclean=unclean, max_attempts=max_attempts, seen=seen)
        self._sessions: dict[NodeId, tuple[SessionId, StoreId]] = {}
        self._refused: dict[NodeId, SessionId] = {}
        self._effects: list[Effect | Event] = []

    def receive(self, events: Sequence[Event | Effect], now_ns: int) -> None:
        for event in events:
            match event:
                case DeliverRun():
                    self._deliver(event, now_ns)
                case BatchDone():
                    self.receiver.done(event, now_ns)
                case RunsCommitted():
                    self.sender.committed(event.runs)
                case OutboxLoaded():
                    self.sender.loaded(event.to, event.name, event.runs)
                case HandlerOpened():
                    self.receiver.handler_opened(event.name, event.max_count, now_ns)
                case HandlerClosed():
                    self.receiver.handler_closed(event.name)
                case SessionUp():
                    self._session_up(event)
                case SessionDown():
                    self._session_down(event)
                case _:
                    invariant(False, "an event that is none of the durable machine's", event=event)

    def handle_timer(self, now_ns: int) -> None:
        self.receiver.retry_due(now_ns)

    def next_timer(self) -> int | None:
        return self.receiver.next_retry()

    def take_effects(self) -> list[Effect | Event]:
        """Effects of durable_events.py, and SendRun and Consumed for the endpoint."""
        self._collect()
        effects, self._effects = self._effects, []
        return effects

    def persisted(self, number: int, now_ns: int) -> None:
        invariant(False, "the durable machine writes nothing by itself", number=number)

    def persist_failed(self, number: int, error: str, now_ns: int) -> None:
        invariant(False, "the durable machine writes nothing by itself", number=number)

    def check(self) -> None:
        """The invariants of every channel, for tests and the simulator."""
        for outgoing in self.sender.channels.values():
            outgoing.check()
        for incoming in self.receiver.channels.values():
            incoming.check()

    # -- sessions --

    def _session_up(self, event: SessionUp) -> None:
        if event.peer in self._sessions:
            self._forget_session(event.peer)
        owner = self.receiver.owner_of(event.store)
        if owner is not None and owner != event.peer:
            # two live owners of one store: only the first is served (I11)
            self._refused[event.peer] = event.session
            self._effects.append(
                PeerRefused(event.peer, "clone", f"{event.peer} runs on a copy of the store of {owner}: stop one of them")
            )
            return
        self._refused.pop(event.peer, None)
        self._sessions[event.peer] = (event.session, event.store)
        self.sender.session_up(event.peer)
        reports = self.receiver.session_up(event.seen)
        self._send(event.peer, REPORTS_CHANNEL, [encode_report(Report(True, reports))])

    def _session_down(self, event: SessionDown) -> None:
        session = self._sessions.get(event.peer)
        if session is not None and session[0] == event.session:
            self._forget_session(event.peer)

    def _forget_session(self, peer: NodeId) -> None:
        self._collect()  # what was said in the old session belongs before its end
        del self._sessions[peer]
        self.sender.session_down(peer)
        self.receiver.session_down(peer)

    def _deliver(self, event: DeliverRun, now_ns: int) -> None:
        session = self._sessions.get(event.peer)
        session_id = session[0] if session is not None else self._refused.get(event.peer)
        self._effects.append(
            Consumed(event.peer, event.channel, len(event.bodies), sum(len(body) for body in event.bodies), session_id)
        )  # memory is bounded by the channels' own credit
        if session is None:
            return
        for body in event.bodies:
            try:
                frame = decode(body)
            except DecodeError as exc:
                self._effects.append(PeerRefused(event.peer, "durable", f"{event.peer}: {exc}"))
                continue
            match frame:
                case RunFrame():
                    self.receiver.run(event.peer, session[1], frame, now_ns)
                case Report():
                    self.sender.reported(event.peer, frame.complete, frame.channels)
                case ForkNotice(outgoing=True):
                    self.receiver.noticed(session[1], frame)
                case ForkNotice():
                    self.sender.refused(event.peer, frame.name, frame.text)

    # -- out --

    def _send(self, peer: NodeId, channel: ChannelName, bodies: Sequence[bytes]) -> None:
        priority = Priority.BULK if channel == RUNS_CHANNEL else Priority.NORMAL
        self._effects.append(SendRun(peer, channel, bodies, priority, session=self._sessions[peer][0]))

    def _collect(self) -> None:
        """Take what both halves want; one SendRun per peer and channel."""
        for half in (self.sender, self.receiver):
            self._effects.extend(half.effects)
            half.effects = []
        for peer, changed in self.receiver.changed.items():
            report = Report(False, [channel.report() for channel in changed.values()])
            self._send(peer, REPORTS_CHANNEL, [encode_report(report)])
        self.receiver.changed = {}
        for peer, frames in self.receiver.frames.items():
            self._send(peer, REPORTS_CHANNEL, frames)
        self.receiver.frames = {}
        for peer, frames in self.sender.frames.items():
            if peer in self._sessions:  # a channel may fork while its peer is away
                self._send(peer, RUNS_CHANNEL, frames)
        self.sender.frames = {}
