"""``NodeMachine``: the endpoint, the durable channels and whatever else lives on a node's sessions, as one machine.

Rules:

* Everything between the children is synchronous: one ``receive`` carries a batch through all of them until nothing moves.
* A child names the events that are its own, the session channels and datagram topics that are its own, and how it wants to be
  told of what the endpoint says. What nobody claims goes to the shell: it is the application's.
* At most one child persists (there is one node.db); write numbers are that child's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol, cast

import attrs

from ha_core.errors import invariant
from ha_core.ids import ChannelName
from ha_core.machines.contract import CheckpointDue, Effect, Event, Machine
from ha_core.machines.database_events import (
    CHANNELS as DATABASE_CHANNELS,
)
from ha_core.machines.database_events import (
    CloseWatch,
    DatabaseRequest,
    OpenWatch,
    Send,
    WatchTaken,
    from_endpoint,
)
from ha_core.machines.durable import REPORTS_CHANNEL, RUNS_CHANNEL, DurableMachine
from ha_core.machines.durable_events import BatchDone, HandlerClosed, HandlerOpened, OutboxLoaded, RunsCommitted
from ha_core.machines.messages import (
    Accepted,
    Connected,
    Consumed,
    DatagramReceived,
    DeliverDatagram,
    DeliverRun,
    Disconnected,
    Flushed,
    ForgetPeer,
    PeerReachable,
    Received,
    RoomChanged,
    SendDatagram,
    SendRun,
    SessionDown,
    SessionUp,
    SetPeer,
)

ENDPOINT_EVENTS: tuple[type[Event], ...] = (
    Received, Flushed, SendRun, Consumed, SendDatagram, DatagramReceived, SetPeer, ForgetPeer, Accepted, Connected,
    Disconnected,
)  # fmt: skip
_FOR_ALL = frozenset({SessionUp, SessionDown, PeerReachable})


class ChildMachine(Protocol):
    """The contract, but for what a child may also take and give: the endpoint's effects in, the endpoint's events out."""

    def receive(self, events: Sequence[Event], now_ns: int) -> None: ...
    def handle_timer(self, now_ns: int) -> None: ...
    def next_timer(self) -> int | None: ...
    def take_effects(self) -> Sequence[Effect | Event]: ...
    def persisted(self, number: int, now_ns: int) -> None: ...
    def persist_failed(self, number: int, error: str, now_ns: int) -> None: ...


@attrs.frozen(eq=False)
class Child:
    """One machine on a node's sessions, and what is its own."""

    machine: ChildMachine
    handles: Collection[type[Event]]
    hears: Callable[[Effect], Event | None]
    """What of the endpoint it is told, and as what; it is asked only for its own channels and for sessions and peers."""
    channels: Collection[ChannelName] = ()
    """Session channels and datagram topics."""
    persists: bool = False


def _heard(effect: Effect) -> Event | None:
    """The durable machine takes the endpoint's effects as they are."""
    return cast(Event, effect) if isinstance(effect, SessionUp | SessionDown | DeliverRun) else None


def durable_child(machine: DurableMachine) -> Child:
    handles = (RunsCommitted, OutboxLoaded, HandlerOpened, HandlerClosed, BatchDone)
    return Child(machine, handles, _heard, (RUNS_CHANNEL, REPORTS_CHANNEL))


def database_child(machine: ChildMachine, handles: Collection[type[Event]] = (), *, persists: bool = True) -> Child:
    """A DatabaseMachine, a DatabaseClientMachine, or a parent of one that takes ``handles`` beside its events."""
    events = (DatabaseRequest, OpenWatch, WatchTaken, CloseWatch, *handles)
    return Child(machine, events, from_endpoint, DATABASE_CHANNELS, persists)


@attrs.define(eq=False)
class _Seat:
    """A child at work: what it will be told, whether it may have something to say, and when it wants to be woken."""

    child: Child
    told: list[Event] = attrs.field(factory=list)
    fed: bool = True
    timer_ns: int | None = attrs.field(default=attrs.Factory(lambda self: self.child.machine.next_timer(), takes_self=True))


class NodeMachine:
    """A machine by the contract, made of an EndpointMachine and children on top of it.

    Most steps concern one of the machines only: the others are not asked, since they can have nothing new to say.
    """

    def __init__(self, endpoint: Machine, children: Sequence[Child]) -> None:
        self._endpoint = endpoint
        self._endpoint_fed = True
        self._seats = tuple(_Seat(child) for child in children)
        self._effects: list[Effect] = []
        self._owner: dict[type[Event], _Seat] = {}
        self._claimed: dict[ChannelName, _Seat] = {}
        writers = [seat for seat in self._seats if seat.child.persists]
        invariant(len(writers) <= 1, "a node has one node.db: at most one child persists")
        self._writer = writers[0] if writers else None
        if self._writer is not None:
            self._owner[CheckpointDue] = self._writer
        for seat in self._seats:
            for event in seat.child.handles:
                invariant(event not in self._owner and event not in ENDPOINT_EVENTS, "an event has one owner", event=event)
                self._owner[event] = seat
            for channel in seat.child.channels:
                invariant(channel not in self._claimed, "a channel has one owner", channel=channel)
                self._claimed[channel] = seat

    # -- the contract --

    def receive(self, events: Sequence[Event], now_ns: int) -> None:
        endpoint: list[Event] = []
        for event in events:
            owner = self._owner.get(type(event))
            if owner is None:
                endpoint.append(event)
            else:
                owner.told.append(event)
        if endpoint:
            self._endpoint.receive(endpoint, now_ns)
            self._endpoint_fed = True
        self._tell(now_ns)
        self._settle(now_ns)

    def handle_timer(self, now_ns: int) -> None:
        timer_ns = self._endpoint.next_timer()
        if timer_ns is not None and timer_ns <= now_ns:
            self._endpoint.handle_timer(now_ns)
            self._endpoint_fed = True
        for seat in self._seats:
            if seat.timer_ns is not None and seat.timer_ns <= now_ns:
                seat.child.machine.handle_timer(now_ns)
                seat.fed = True
        self._settle(now_ns)

    def next_timer(self) -> int | None:
        earliest = self._endpoint.next_timer()
        for seat in self._seats:
            if seat.timer_ns is not None and (earliest is None or seat.timer_ns < earliest):
                earliest = seat.timer_ns
        return earliest

    def take_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    def persisted(self, number: int, now_ns: int) -> None:
        invariant(self._writer is not None, "a write was confirmed that nobody asked for", number=number)
        if self._writer is not None:
            self._writer.child.machine.persisted(number, now_ns)
            self._writer.fed = True
        self._settle(now_ns)

    def persist_failed(self, number: int, error: str, now_ns: int) -> None:
        if self._writer is not None:
            self._writer.child.machine.persist_failed(number, error, now_ns)
            self._writer.fed = True
        self._settle(now_ns)

    # -- between the children --

    def _settle(self, now_ns: int) -> None:
        """Carry everything on until nothing moves any more."""
        while True:
            if self._endpoint_fed:
                self._endpoint_fed = False
                self._spread()
                self._tell(now_ns)
            down: list[Event] = []
            for seat in self._seats:
                if seat.fed:
                    seat.fed = False
                    self._collect(seat, down)
            if not down:
                return
            self._endpoint.receive(down, now_ns)
            self._endpoint_fed = True

    def _collect(self, seat: _Seat, down: list[Event]) -> None:
        """What a child says: for the endpoint, and for the shell."""
        machine = seat.child.machine
        for effect in machine.take_effects():
            if isinstance(effect, Send):
                down.append(effect.event)
            elif isinstance(effect, Event):
                down.append(effect)
            else:
                self._effects.append(effect)
        seat.timer_ns = machine.next_timer()

    def _spread(self) -> None:
        """What the endpoint says: for the children whom it concerns, and for the shell."""
        for effect in self._endpoint.take_effects():
            if isinstance(effect, DeliverRun | RoomChanged):
                owner = self._claimed.get(effect.channel)
            elif isinstance(effect, DeliverDatagram):
                owner = self._claimed.get(effect.topic)
            else:
                owner = None
                if type(effect) in _FOR_ALL:
                    for seat in self._seats:
                        self._hear(seat, effect)
            if owner is not None:
                self._hear(owner, effect)
            else:
                self._effects.append(effect)

    def _hear(self, seat: _Seat, effect: Effect) -> None:
        heard = seat.child.hears(effect)
        if heard is not None:
            seat.told.append(heard)

    def _tell(self, now_ns: int) -> None:
        for seat in self._seats:
            if seat.told:
                told, seat.told = seat.told, []
                seat.child.machine.receive(told, now_ns)
                seat.fed = True
