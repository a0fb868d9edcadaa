"""What the durable machine is told and what it asks for: the seam to the transaction store and to the handlers.

``TransactionStore`` (storage/sqlite_transactions.py) is the store behind it; the simulator has its own. In short:

* A committed transaction that sent messages -> ``RunsCommitted``. ``LoadOutbox`` -> ``OutboxLoaded``.
* ``RunBatch`` -> run the handler, step the cursor in the same transaction -> ``BatchDone``. One batch per incoming channel.
* ``Acknowledged`` -> delete those rows with the next transaction; no answer.
* ``RememberBoot`` -> write it; no answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

import attrs

from ha_core.ids import ChannelName, MessageId, NodeId, StoreId
from ha_core.machines.contract import Effect, Event
from ha_core.machines.durable_wire import START_DIGEST
from ha_core.machines.handshake import SeenBoot

# -- messages as handlers see them --


class Message(NamedTuple):
    """A durable message; (store, channel, number) names it for ever. A tuple, because a handler may see 100,000 a second."""

    sender: NodeId
    store: StoreId
    to: NodeId
    channel: ChannelName
    number: int
    body: bytes

    @property
    def id(self) -> MessageId:
        return MessageId(self.store, self.to, self.channel, self.number)


class Batch(Sequence[Message]):
    """Consecutive messages of one sender on one channel; a Message is made only when it is asked for.

    A handler in a hurry takes the columns: ``enumerate(batch.bodies, batch.first)`` are its numbers and bodies.
    """

    __slots__ = ("bodies", "channel", "first", "sender", "store", "to")

    def __init__(
        self, sender: NodeId, store: StoreId, to: NodeId, channel: ChannelName, first: int, bodies: Sequence[bytes]
    ) -> None:
        self.sender = sender
        self.store = store
        self.to = to
        self.channel = channel
        self.first = first
        self.bodies = bodies

    def __len__(self) -> int:
        return len(self.bodies)

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> Batch: ...
    def __getitem__(self, index: int | slice) -> Message | Batch:
        if type(index) is slice:
            start, stop, step = index.indices(len(self.bodies))
            if step != 1:
                raise ValueError("messages of a batch follow each other: a slice has no step")
            return Batch(self.sender, self.store, self.to, self.channel, self.first + start, self.bodies[start:stop])
        at = index if index >= 0 else index + len(self.bodies)
        if not 0 <= at < len(self.bodies):
            raise IndexError(index)
        return Message(self.sender, self.store, self.to, self.channel, self.first + at, self.bodies[at])

    def __iter__(self) -> Iterator[Message]:
        sender, store, to, channel = self.sender, self.store, self.to, self.channel
        for number, body in enumerate(self.bodies, self.first):
            yield Message(sender, store, to, channel, number, body)

    def __repr__(self) -> str:
        last = self.first + len(self.bodies) - 1
        return f"<Batch {self.channel!r} of {self.sender} {self.first}..{last}>"


# -- what the store held when it was opened --


@attrs.frozen
class OutboxRun:
    """A row of the outbox: messages ``first``..``last`` of the channel to ``to``."""

    to: NodeId
    name: ChannelName
    first: int
    last: int
    size: int
    """What it counts against the outbox's bound and the flight window."""
    before: bytes
    """The prefix digest at ``first`` - 1."""
    digest: bytes
    """The prefix digest at ``last``."""
    blob: bytes


@attrs.frozen
class OutgoingState:
    to: NodeId
    name: ChannelName
    last: int
    acked: int
    acked_digest: bytes
    forked: str = ""


@attrs.frozen
class Attempt:
    """Written before a batch is handled whose last handling may have ended the process: ``size`` messages from ``number``,
    for the ``count``-th time; suspicion ends at ``upto``."""

    number: int
    size: int
    count: int
    upto: int


@attrs.frozen
class IncomingState:
    peer: NodeId
    store: StoreId
    name: ChannelName
    cursor: int = 0
    digest: bytes = START_DIGEST
    attempt: Attempt | None = None


# -- events --


@attrs.frozen
class RunsCommitted(Event):
    """A transaction with these sends is durable; runs of one channel are in order."""

    runs: Sequence[OutboxRun]


@attrs.frozen
class OutboxLoaded(Event):
    """The answer to LoadOutbox: rows in order, the first holds the number that was asked for."""

    to: NodeId
    name: ChannelName
    runs: Sequence[OutboxRun]


@attrs.frozen
class HandlerOpened(Event):
    """Somebody takes the messages of ``name``, at most ``max_count`` in one RunBatch."""

    name: ChannelName
    max_count: int


@attrs.frozen
class HandlerClosed(Event):
    name: ChannelName


@attrs.frozen
class BatchDone(Event):
    """The transaction that handled a batch is durable: the channel's cursor stands at (``cursor``, ``digest``).

    ``error``: what the handler raised for message ``cursor`` + 1; empty if there was no failure. A batch that nobody
    handled (its inbox closed) is done with the old cursor and no error; so is one for which there was no room just now, on
    the disk or in the outbox (``blocked``): it is tried again after a pause and that counts as no failure.
    """

    store: StoreId
    name: ChannelName
    cursor: int
    digest: bytes
    error: str = ""
    blocked: bool = False


# -- effects --


@attrs.frozen
class LoadOutbox(Effect):
    """Read the rows from the one that holds number ``start`` on, about ``byte_count`` in all, at least one."""

    to: NodeId
    name: ChannelName
    start: int
    byte_count: int


@attrs.frozen
class Acknowledged(Effect):
    """The peer's cursor is durable at ``cursor``, with the digest that is ours: forget everything up to it."""

    to: NodeId
    name: ChannelName
    cursor: int
    digest: bytes


@attrs.frozen
class RunBatch(Effect):
    """Handle these messages in one transaction with the step of the cursor, or set the one message aside.

    ``attempt``: make this record durable first. ``dead_letter``: do not call the handler again; the one message goes to the
    dead letters with this text, in the transaction that steps the cursor (I12).
    """

    peer: NodeId
    store: StoreId
    name: ChannelName
    first: int
    bodies: Sequence[bytes]
    digests: Sequence[bytes]
    """The prefix digest at each message."""
    attempt: Attempt | None = None
    dead_letter: str = ""


@attrs.frozen
class RememberBoot(Effect):
    """Write down which process of another store was seen, soon and before any RunBatch that follows; no answer. Comes once
    for each boot of a peer."""

    seen: SeenBoot


@attrs.frozen
class ChannelForked(Effect):
    """The histories of the two ends differ: the channel stands still until an administrator decides.

    ``outgoing``: we send on it; the store must remember it. Otherwise we receive on it.
    """

    peer: NodeId
    name: ChannelName
    outgoing: bool
    text: str
