"""``Node``: what a program holds of its node: durable messages, sessions, the replicated database, events.

Behind it stands one NodeMachine; this shell carries its effects to whom they concern and their answers back. runtime/node.py
opens and closes the parts.

Rules:

* Cancelled means that nothing happened; once the store's writer has a function, the call completes.
* A part that fails stops the node: every call that waits, and every later one, raises NodeFailedError with the cause.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, Never, TypeVar, TypeVarTuple

import trio

from ha_core.config import Config, split_address
from ha_core.errors import ConfigError, HAError, LocalProtocolError, NodeFailedError, OutboxFullError, StorageError
from ha_core.events import (
    ForkedEvent,
    LeaderEvent,
    NodeEvent,
    OutboxFullEvent,
    PathEvent,
    PeerEvent,
    PeerRefusedEvent,
    SessionResetEvent,
)
from ha_core.ids import ChannelName, FencingToken, LinkName, MessageId, NodeId, Term, parse_node_id
from ha_core.machines import messages as m
from ha_core.machines.contract import Effect, Event, Persist, WriteCheckpoint
from ha_core.machines.database_events import DatabaseReply, LeaderChanged
from ha_core.machines.durable_events import (
    Acknowledged,
    ChannelForked,
    LoadOutbox,
    Message,
    OutboxLoaded,
    OutboxRun,
    RememberBoot,
    RunBatch,
    RunsCommitted,
)
from ha_core.machines.endpoint import EndpointMachine
from ha_core.machines.raft.types import MessageRefused, Reason
from ha_core.runtime.database import Database
from ha_core.runtime.database_calls import DatabaseCalls
from ha_core.runtime.deliveries import Deliveries, Inbox
from ha_core.runtime.driver import Driver
from ha_core.runtime.endpoint import EndpointShell
from ha_core.runtime.event_queue import Events
from ha_core.runtime.records import RecordShell
from ha_core.runtime.sessions import SessionChannel, Sessions
from ha_core.storage.sqlite_transaction import Transaction
from ha_core.storage.sqlite_transactions import TransactionStore

logger = logging.getLogger(__name__)
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

WATCH_S: Final = 0.2
HANG_S: Final = 5.0
"""A function that has been running for so long, or ten times max_transaction_s, does not return."""


class Node:
    """A running node; ``open_node`` makes it. All calls belong to the trio thread."""

    def __init__(
        self, config: Config, store: TransactionStore | None, endpoint: EndpointMachine, nursery: trio.Nursery
    ) -> None:
        self.config = config
        self.name = config.node
        self._store = store
        self._endpoint = endpoint
        self._failure: HAError | None = None
        self._on_failure: Callable[[], None] = lambda: None
        self._event_queues: list[Events] = []
        self._room = trio.Event()
        self._room_waiters = 0
        self._peers: dict[NodeId, Mapping[LinkName, str]] = {}
        self.calls = DatabaseCalls(self.post, self.call)
        self.database = Database(self.calls, nursery, lock_ttl_s=config.profile.lease_s)
        self._sessions = Sessions(self.post, endpoint.has_room)
        self._deliveries = None if store is None else Deliveries(store, self.name, self.post, self.emit, self.fail)
        self._driver: Driver | None = None
        self._shell: EndpointShell | None = None
        self._records: RecordShell | None = None

    # -- transactions and durable messages --

    async def transact(self, apply: Callable[[Transaction, *Ts], T], *args: *Ts) -> T:
        """Run the plain function ``apply(tx, *args)`` in a transaction of app.db; its value, once that is durable.

        The function must bear being run again: a full disk or an interrupt roll its whole group back.

        Raises:
            OutboxFullError: it sent more than there is room for: ``wait_for_room``, then call again.
            StorageFullError: the disk is full.
            NodeFailedError: the node stopped; whether the transaction is durable shows at the next start.
            Exception: what ``apply`` raised; nothing of it happened.
        """
        try:
            return await self._durable().transact(apply, *args)
        except OutboxFullError as exc:
            self.emit(OutboxFullEvent(NodeId(exc.to), ChannelName(exc.channel)))
            raise

    async def send(self, to: NodeId, channel: str, body: bytes) -> MessageId:
        """Send one durable message in a transaction of its own; on return it is accepted and will arrive exactly once."""
        return await self.transact(_send, to, channel, body)

    async def wait_for_room(self, to: NodeId, channel: str) -> None:
        """Until the outbox has room on the channel for what it refused last."""
        store = self._durable()
        await trio.lowlevel.checkpoint()
        self._room_waiters += 1
        try:
            while not store.has_room(to, ChannelName(channel)):
                room = self._room
                store.flush()
                await room.wait()
                self.check()
        finally:
            self._room_waiters -= 1

    async def serve(
        self, channel: str, apply: Callable[[Transaction, Sequence[Message]], object], *, max_batch: int = 256
    ) -> Never:
        """Handle the channel's messages with ``apply(tx, batch)`` until cancelled, each batch in one transaction with its cursor.

        A batch that raises is retried message by message; a message that keeps raising, or ends the process, becomes a dead
        letter after ``config.message_attempts`` (a DeadLetterEvent says so). ``batch`` is a Batch: its columns ``first`` and
        ``bodies`` spare the making of a Message for each.
        """
        self.check()
        deliveries = self._delivering()
        deliveries.serve(channel, apply, max_batch)
        try:
            await trio.sleep_forever()
        finally:
            deliveries.close(channel)

    @asynccontextmanager
    async def open_inbox(self, channel: str, *, max_batch: int = 1) -> AsyncIterator[Inbox]:
        """Take the channel's messages batch by batch and commit each: for handlers that must await between."""
        self.check()
        deliveries = self._delivering()
        inbox = deliveries.open_inbox(channel, max_batch)
        try:
            yield inbox
        finally:
            deliveries.close(channel)

    async def request(self, to: NodeId, channel: str, body: bytes) -> MessageId:
        """Send a durable request; ``receive_reply`` with the returned id takes its answer, also after a restart."""
        return await self.transact(_request, to, channel, body)

    async def receive_reply(self, request: MessageId, apply: Callable[[Transaction, Message], T]) -> T:
        """Wait for the answer to ``request`` and consume it in the transaction of ``apply(tx, reply)``.

        Raises:
            LocalProtocolError: no such request of this node waits for its answer.
        """
        self.check()
        return await self._delivering().receive_reply(request, apply)

    # -- sessions --

    @asynccontextmanager
    async def open_session(
        self, to: NodeId, channel: str, *, priority: m.Priority = m.Priority.NORMAL, redundant: bool = False
    ) -> AsyncIterator[SessionChannel]:
        """A session channel to ``to``, which opens one of the same name to us.

        Args:
            priority: what goes first when the path is busy.
            redundant: send everything on all live paths at once.
        """
        self.check()
        one = self._sessions.open(to, channel, priority, redundant)
        try:
            yield one
        finally:
            self._sessions.close(one)

    # -- locks and events --

    def lock(self, name: str) -> AbstractAsyncContextManager[FencingToken]:
        """The cluster's lock ``name``, while the body runs; see ``Database.lock``."""
        return self.database.lock(name)

    async def run_on_one_host(self, name: str, body: Callable[[FencingToken], Awaitable[T]]) -> T:
        """Run ``body`` on one node of the cluster at a time; see ``Database.run_on_one_host``."""
        return await self.database.run_on_one_host(name, body)

    @asynccontextmanager
    async def open_events(self, *, max_queue: int = 1000) -> AsyncIterator[Events]:
        """Everything that happens to this node from now on (ha_core.events)."""
        events = Events(max_queue)
        self._event_queues.append(events)
        try:
            yield events
        finally:
            self._event_queues.remove(events)

    # -- peers --

    @property
    def addresses(self) -> Mapping[LinkName, str]:
        """Where this node listens, per link."""
        return {} if self._shell is None else dict(self._shell.addresses)

    def set_peer(self, peer: NodeId, addresses: Mapping[LinkName, str]) -> None:
        """Know a node and its ``host:port`` per link; empty addresses: it dials us.

        Raises:
            ConfigError: the name or an address has the wrong form.
        """
        parse_node_id(peer)
        for link, address in addresses.items():
            split_address(address, f"peer {peer}, link {link}")
        if peer == self.name:
            raise ConfigError(f"{peer}: is this node itself", field="peer", value=peer)
        self._know(peer, addresses)
        self.post(m.SetPeer(peer, dict(addresses)))

    def forget_peer(self, peer: NodeId) -> None:
        """Drop a node; what the outbox holds for it stays."""
        self._peers.pop(peer, None)
        self._tell_store()
        self.post(m.ForgetPeer(peer))

    def _know(self, peer: NodeId, addresses: Mapping[LinkName, str]) -> None:
        if self._peers.get(peer) != addresses:
            self._peers[peer] = dict(addresses)
            self._tell_store()

    def _tell_store(self) -> None:
        if self._store is not None:
            self._store.set_peers(frozenset(self._peers))

    # -- for the agents and open_node --

    def post(self, *events: Event) -> None:
        """Give events to the node's machine."""
        if self._driver is not None:
            self._driver.post(*events)

    def call(self, *events: Event) -> None:
        """The same for a task that waits for the answer."""
        if self._driver is not None:
            self._driver.call(*events)

    def collect(self) -> Sequence[Event]:
        return self._sessions.collect()

    def emit(self, event: NodeEvent) -> None:
        for queue in self._event_queues:
            queue.put(event)

    def check(self) -> None:
        """Raises NodeFailedError: the node has stopped."""
        if self._failure is not None:
            raise NodeFailedError(str(self._failure)) from self._failure.__cause__

    @property
    def failure(self) -> HAError | None:
        return self._failure

    def fail(self, cause: BaseException) -> None:
        """A part of the node failed: stop, and let everybody who waits hear why."""
        if self._failure is not None:
            return
        failure = NodeFailedError(f"node {self.name} stopped: {cause}")
        failure.__cause__ = cause
        self._failure = failure
        logger.error("%s", failure)
        self.calls.fail(failure)
        self._sessions.fail(failure)
        if self._deliveries is not None:
            self._deliveries.fail(failure)
        if self._store is not None:
            self._store.abandon(failure)
        for queue in self._event_queues:
            queue.fail(failure)
        self._room.set()
        self._on_failure()

    def connect(
        self, driver: Driver, shell: EndpointShell, records: RecordShell | None, on_failure: Callable[[], None]
    ) -> None:
        """Join the parts; from here on events reach the machine."""
        self._driver, self._shell, self._records, self._on_failure = driver, shell, records, on_failure
        if self._store is not None and self._deliveries is not None:
            self._store.on_commit = self._committed
            self._store.on_failed = self.fail
            self._store.on_freed = self._freed
            self._deliveries.expect_replies(self._store.requested)
        for peer, addresses in self.config.bootstrap.items():
            if peer != self.name:
                self.set_peer(peer, addresses)
        self._tell_store()

    async def watch_store(self) -> None:
        """Name a function that does not return; delete acknowledged messages when no other transaction does."""
        store = self._store
        if store is None:
            return
        limit_s = max(HANG_S, 10 * self.config.max_transaction_s)
        while True:
            await trio.sleep(WATCH_S)
            running = store.running()
            if running is not None and running[1] > limit_s:
                raise StorageError(f"{store.path}: the function {running[0]} has not returned for {running[1]:.1f} s")
            store.flush()

    # -- effects --

    def perform(self, effects: Sequence[Effect]) -> None:
        """Carry out what the machine asks for; never waits."""
        shell = self._shell
        if shell is None:
            return
        for effect in effects:
            if type(effect) is DatabaseReply:  # by far the most frequent
                self.calls.handle(effect)
            elif not (shell.perform(effect) or self._perform_store(effect) or self.calls.handle(effect)):
                self._perform_rest(effect)

    def _perform_store(self, effect: Effect) -> bool:
        match effect:
            case RunBatch():
                self._delivering().run(effect)
            case Acknowledged(to, name, cursor, digest):
                store = self._durable()
                store.acknowledge(to, name, cursor, digest)
                if self._room_waiters:
                    store.flush()
            case RememberBoot(seen):
                self._durable().remember_boot(seen)
            case Persist() | WriteCheckpoint():
                if self._records is not None:
                    self._records.perform(effect)
            case LoadOutbox(to, name, start, byte_count):
                loaded: Callable[[list[OutboxRun]], None] = lambda runs: self.post(OutboxLoaded(to, name, runs))  # noqa: E731
                self._durable().load_outbox(to, name, start, byte_count, loaded)
            case ChannelForked(peer, name, outgoing, text):
                logger.error("%s", text)
                if outgoing:
                    self._durable().fork(peer, name, text)
                self.emit(ForkedEvent(peer, name, text))
            case _:
                return False
        return True

    def _perform_rest(self, effect: Effect) -> None:
        match effect:
            case m.DeliverRun():
                self._sessions.deliver(effect)
            case m.RoomChanged(peer, channel):
                self._sessions.room(peer, channel)
            case m.SessionUp(peer, session):
                self._know(peer, self._peers.get(peer, {}))
                self._sessions.up(peer, session)
            case m.SessionDown(peer, _, reason):
                self._sessions.down(peer, reason)
                self.emit(SessionResetEvent(peer, reason))
            case m.PathChanged(path, state, reason):
                self.emit(PathEvent(path.peer, path.link, path.remote, state.value, reason))
            case m.PeerReachable(peer, reachable):
                self.emit(PeerEvent(peer, reachable))
            case m.PeerRefused(peer_name, code, text):
                logger.warning("%s", text)
                self.emit(PeerRefusedEvent(peer_name, code, text))
            case MessageRefused(sender, Reason.REMOVED):
                logger.error("%s, says %s", Reason.REMOVED.value, sender)
            case LeaderChanged(leader, term):
                self.emit(LeaderEvent(leader, Term(term)))
            case _:
                pass  # of the database's part in agents: a program has no use for it

    # -- the store's news --

    def _committed(self, runs: Sequence[OutboxRun], requested: frozenset[ChannelName]) -> None:
        if requested and self._deliveries is not None:
            self._deliveries.expect_replies(requested)
        self.post(RunsCommitted(runs))

    def _freed(self) -> None:
        self._room.set()
        self._room = trio.Event()

    def _durable(self) -> TransactionStore:
        self.check()
        if self._store is None:
            raise StorageError(
                f"node {self.name} keeps its records on {self.config.store!r}: transactions and durable channels need store = 'sqlite'"
            )
        return self._store

    def _delivering(self) -> Deliveries:
        self._durable()
        if self._deliveries is None:
            raise LocalProtocolError(f"node {self.name} has no durable channels")
        return self._deliveries


def _send(tx: Transaction, to: NodeId, channel: str, body: bytes) -> MessageId:
    return tx.send(to, channel, body)


def _request(tx: Transaction, to: NodeId, channel: str, body: bytes) -> MessageId:
    return tx.request(to, channel, body)
