"""Between received durable messages and those who handle them: served functions, inboxes, and replies to requests."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar, TypeVarTuple, cast

import attrs
import outcome
import trio

from ha_core.errors import HAError, InvariantError, LocalProtocolError, NodeFailedError, StorageFullError
from ha_core.events import DeadLetterEvent, NodeEvent
from ha_core.ids import ChannelName, MessageId, NodeId
from ha_core.machines.contract import Event
from ha_core.machines.durable import REPLY_PREFIX
from ha_core.machines.durable_events import Batch, BatchDone, HandlerClosed, HandlerOpened, Message, RunBatch
from ha_core.machines.durable_receiver import BATCH_COUNT
from ha_core.storage.sqlite_delivery import Delivered, commit_inbox, deliver, record_attempt, set_aside, store_replies, text_of
from ha_core.storage.sqlite_outbox import check_name
from ha_core.storage.sqlite_transaction import Transaction, name_of
from ha_core.storage.sqlite_transactions import Job, TransactionStore

logger = logging.getLogger(__name__)
T = TypeVar("T")
Ts = TypeVarTuple("Ts")
Handler = Callable[[Transaction, Sequence[Message]], object]


@attrs.frozen
class _Served:
    """A function that handles a channel on the store's thread."""

    apply: Handler
    max_batch: int


class Inbox:
    """Batches of one channel, one at a time: ``async for batch in inbox: ...; await inbox.commit(apply)``.

    No transaction is held while the body works on a batch. A batch that is not committed when the inbox closes is handed out
    again to the next one.
    """

    def __init__(self, deliveries: Deliveries, name: ChannelName) -> None:
        self._deliveries = deliveries
        self._name = name
        self._waiting: deque[RunBatch] = deque()
        self._wake = trio.Event()
        self._current: RunBatch | None = None
        self._failure: HAError | None = None

    def __aiter__(self) -> Inbox:
        return self

    async def __anext__(self) -> Batch:
        """The next batch.

        Raises:
            LocalProtocolError: the one before it was not committed.
            NodeFailedError: the node has stopped.
        """
        if self._current is not None:
            raise LocalProtocolError(f"channel {self._name!r}: commit the batch in hand before taking the next one")
        await trio.lowlevel.checkpoint()
        while not self._waiting:
            if self._failure is not None:
                raise NodeFailedError(str(self._failure)) from self._failure
            await self._wake.wait()
            self._wake = trio.Event()
        self._current = self._waiting.popleft()
        return self._deliveries.batch_of(self._current)

    async def commit(self, apply: Callable[[Transaction, Sequence[Message], *Ts], T], *args: *Ts) -> T:
        """Run ``apply(tx, batch, *args)`` and step the channel's cursor over the batch, in one transaction.

        If it raises, nothing of it happened and the batch is still in hand.
        """
        batch = self._in_hand()
        messages = self._deliveries.batch_of(batch)
        run: Callable[[Transaction], outcome.Outcome[object]] = lambda tx: commit_inbox(tx, batch, messages, apply, *args)  # noqa: E731
        done = cast(Delivered, await self._deliveries.store.perform(run, name_of(apply)))
        self._current = None
        self._deliveries.done(batch, done)
        return cast(T, done.value)

    async def set_aside(self, reason: str) -> None:
        """Make the batch in hand dead letters and go on after it."""
        batch = attrs.evolve(self._in_hand(), dead_letter=reason or "set aside")
        run: Callable[[Transaction], outcome.Outcome[object]] = lambda tx: outcome.Value(set_aside(tx, batch))  # noqa: E731
        done = cast(Delivered, await self._deliveries.store.perform(run, "set_aside"))
        self._current = None
        self._deliveries.done(batch, done)

    def _in_hand(self) -> RunBatch:
        if self._current is None:
            raise LocalProtocolError(f"channel {self._name!r}: there is no batch in hand to commit")
        return self._current

    def put(self, batch: RunBatch) -> None:
        self._waiting.append(batch)
        self._wake.set()

    def fail(self, error: HAError) -> None:
        self._failure = error
        self._wake.set()

    def take_back(self) -> list[RunBatch]:
        """What was handed out and not committed."""
        batches = [*([self._current] if self._current is not None else []), *self._waiting]
        self._waiting.clear()
        self._current = None
        return batches


class Deliveries:
    """Carries out RunBatch effects: each goes to its channel's handler, and BatchDone back to the machine."""

    def __init__(
        self, store: TransactionStore, node: NodeId, post: Callable[[Event], None], emit: Callable[[NodeEvent], None],
        fail: Callable[[BaseException], None],
    ) -> None:  # fmt: skip
        self.store = store
        self._node = node
        self._post = post
        self._emit = emit
        self._fail = fail
        self._handlers: dict[ChannelName, _Served | Inbox] = {}
        self._replies: set[ChannelName] = set()
        self._replied = trio.Event()
        self._failure: HAError | None = None

    # -- handlers --

    def serve(self, name: str, apply: Handler, max_batch: int) -> None:
        """Give the channel's messages to ``apply``, at most ``max_batch`` at a time."""
        if max_batch < 1:
            raise LocalProtocolError(f"max_batch: expected at least 1, found {max_batch}")
        self._open(ChannelName(name), _Served(apply, max_batch), BATCH_COUNT)

    def open_inbox(self, name: str, max_batch: int) -> Inbox:
        if max_batch < 1:
            raise LocalProtocolError(f"max_batch: expected at least 1, found {max_batch}")
        inbox = Inbox(self, ChannelName(name))
        self._open(ChannelName(name), inbox, max_batch)
        return inbox

    def _open(self, name: ChannelName, handler: _Served | Inbox, max_count: int) -> None:
        check_name(name)
        if name in self._handlers:
            raise LocalProtocolError(f"channel {name!r} has a handler already: one function serves a channel of a node")
        self._handlers[name] = handler
        self._post(HandlerOpened(name, max_count))

    def close(self, name: str) -> None:
        """The channel's handler goes; what it has not committed is handed out again to the next one."""
        channel = ChannelName(name)
        handler = self._handlers.pop(channel)
        self._post(HandlerClosed(channel))
        if isinstance(handler, Inbox):
            for batch in handler.take_back():
                self._give_back(batch)

    def expect_replies(self, names: frozenset[ChannelName]) -> None:
        """Requests were made on these channels: take what comes back."""
        for name in sorted(names - self._replies):
            self._replies.add(name)
            self._post(HandlerOpened(ChannelName(REPLY_PREFIX + name), BATCH_COUNT))

    def fail(self, error: HAError) -> None:
        """The node stops: whoever waits for messages or replies hears why."""
        self._failure = error
        self._replied.set()
        for handler in self._handlers.values():
            if isinstance(handler, Inbox):
                handler.fail(error)

    # -- batches --

    def batch_of(self, batch: RunBatch) -> Batch:
        return Batch(batch.peer, batch.store, self._node, batch.name, batch.first, batch.bodies)

    def run(self, batch: RunBatch) -> None:
        """Carry out one RunBatch."""
        if batch.attempt is not None:
            attempt = batch.attempt

            def note(tx: Transaction) -> outcome.Outcome[object]:
                record_attempt(tx, batch, attempt)
                return outcome.Value(None)

            self.store.submit(Job(note, "record_attempt", partial(self._noted, batch)))
        else:
            self._handle(batch)

    def _noted(self, batch: RunBatch, result: outcome.Outcome[object]) -> None:
        if isinstance(result, outcome.Value):
            self._handle(batch)
        else:
            self._handled(batch, result)

    def _handle(self, batch: RunBatch) -> None:
        handler = self._handlers.get(batch.name)
        if batch.dead_letter:
            work: Callable[[Transaction], Delivered] = lambda tx: set_aside(tx, batch)  # noqa: E731
        elif batch.name.startswith(REPLY_PREFIX):
            work = lambda tx: store_replies(tx, batch)  # noqa: E731
        elif isinstance(handler, Inbox):
            handler.put(batch)
            return
        elif handler is None:
            self._give_back(batch)
            return
        else:
            run = partial(self._deliver, batch, handler)
            self.store.submit(Job(run, name_of(handler.apply), partial(self._served, batch)))
            return
        self.store.submit(Job(lambda tx: outcome.Value(work(tx)), batch.name, partial(self._handled, batch)))

    def _deliver(self, batch: RunBatch, served: _Served, tx: Transaction) -> outcome.Outcome[object]:
        """On the store's thread."""
        if self._handlers.get(batch.name) is not served:  # cancelled, while this stood in the queue
            return outcome.Value(Delivered(batch.first - 1, b""))
        return outcome.Value(deliver(tx, batch, self._node, served.apply, served.max_batch))

    def _served(self, batch: RunBatch, result: outcome.Outcome[object]) -> None:
        """What ended the group's transaction under a handler (OR ROLLBACK, too long) is a failure of its message, not ours."""
        error = result.error if isinstance(result, outcome.Error) else None
        if error is None or isinstance(error, StorageFullError | InvariantError) or self.store.failed:
            self._handled(batch, result)
        elif len(batch.bodies) > 1:  # of which one? The first alone will show, then the next
            self._handle(attrs.evolve(batch, bodies=batch.bodies[:1], digests=batch.digests[:1]))
        else:
            self.done(batch, Delivered(batch.first - 1, b"", text_of(error)))

    def _handled(self, batch: RunBatch, result: outcome.Outcome[object]) -> None:
        if isinstance(result, outcome.Value):
            self.done(batch, cast(Delivered, result.value))
            return
        error = result.error if isinstance(result, outcome.Error) else None
        if isinstance(error, StorageFullError):
            logger.error("channel %r from %s: %s", batch.name, batch.peer, error)
            self.done(batch, Delivered(batch.first - 1, b"", blocked=True))
        elif error is not None:
            self._fail(error)

    def done(self, batch: RunBatch, done: Delivered) -> None:
        """A transaction that handled ``batch`` is durable."""
        if done.error:
            number = done.cursor + 1
            logger.warning("channel %r from %s, message %d failed: %s", batch.name, batch.peer, number, done.error)
        if batch.dead_letter:
            for number in range(batch.first, done.cursor + 1):
                self._emit(DeadLetterEvent(batch.peer, batch.name, number, batch.dead_letter))
        if batch.name.startswith(REPLY_PREFIX):
            self._replied.set()
            self._replied = trio.Event()
        self._post(BatchDone(batch.store, batch.name, done.cursor, done.digest, done.error, done.blocked))

    def _give_back(self, batch: RunBatch) -> None:
        self._post(BatchDone(batch.store, batch.name, batch.first - 1, b""))

    # -- replies --

    async def receive_reply(self, request: MessageId, apply: Callable[[Transaction, Message], T]) -> T:
        """Wait for the reply and consume it in the transaction of ``apply``.

        Raises:
            LocalProtocolError: ``request`` is no request of this store that still waits for its reply.
        """
        while True:
            replied = self._replied
            found, value = await self.store.transact(_take_reply, request, apply)
            if found:
                return cast(T, value)
            if self._failure is not None:
                raise NodeFailedError(str(self._failure)) from self._failure
            await replied.wait()


def _take_reply(tx: Transaction, request: MessageId, apply: Callable[[Transaction, Message], T]) -> tuple[bool, T | None]:
    key = (request.to, request.channel, request.number)
    row = tx.own(
        "SELECT reply, reply_store, reply_number FROM ha_requests WHERE peer=? AND name=? AND number=?", key
    ).fetchone()
    if row is None:
        raise LocalProtocolError(
            f"request {request.number} to {request.to} on {request.channel!r}: never made here, or its reply was received already"
        )
    body, store, number = row
    if body is None:
        return False, None
    tx.own("DELETE FROM ha_requests WHERE peer=? AND name=? AND number=?", key)
    reply = Message(request.to, store, NodeId(""), ChannelName(REPLY_PREFIX + request.channel), number, body)
    return True, apply(tx, reply)
