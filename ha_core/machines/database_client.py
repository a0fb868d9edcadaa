"""``DatabaseClientMachine``: the database of a node without a replica: its requests and watches, carried to replicas."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from ha_core.errors import DecodeError
from ha_core.ids import NodeId, SessionId
from ha_core.machines.contract import Effect, Event
from ha_core.machines.database_events import (
    DATABASE,
    Arrived,
    CloseWatch,
    DatabaseRequest,
    OpenWatch,
    PeerDown,
    PeerUp,
    Send,
    WatchClosed,
    WatchEvents,
    WatchTaken,
)
from ha_core.machines.database_requests import DatabaseClient, consumed, send_requests
from ha_core.machines.database_wire import (
    Replies,
    WatchClose,
    WatchDeliver,
    WatchEnd,
    WatchOpen,
    WatchTake,
    decode_message,
    encode_watch,
)
from ha_core.machines.messages import Priority, SendRun


@attrs.define
class _Watch:
    prefix: bytes
    after: int | None
    position: int = -1
    target: NodeId | None = None


class DatabaseClientMachine:
    """The database of a node without a replica: the same events and effects as the DatabaseMachine, carried to replicas."""

    def __init__(self, node: NodeId, servers: Sequence[NodeId], *, retry_ns: int, resend_ns: int) -> None:
        self._client = DatabaseClient(node, replica=False, retry_ns=retry_ns, resend_ns=resend_ns, servers=servers)
        self._watches: dict[int, _Watch] = {}
        self._sessions: dict[NodeId, SessionId | None] = {}
        self._effects: list[Effect] = []

    def receive(self, events: Sequence[Event], now_ns: int) -> None:
        client = self._client
        for event in events:
            match event:
                case DatabaseRequest():
                    client.request(event, now_ns)
                case Arrived():
                    self._arrived(event, now_ns)
                case OpenWatch(watch, prefix, after):
                    self._watches[watch] = _Watch(prefix, after)
                    self._place_watches()
                case WatchTaken(watch, count):
                    self._tell(watch, WatchTake(watch, count))
                case CloseWatch(watch):
                    self._tell(watch, WatchClose(watch))
                    self._watches.pop(watch, None)
                case PeerUp(peer, session):
                    self._sessions[peer] = session
                    client.peer_up(peer, now_ns)
                    self._place_watches()
                case PeerDown(peer):
                    client.peer_down(peer, now_ns)
                    for one in self._watches.values():
                        if one.target == peer:
                            one.target = None
                    self._place_watches()

    def _arrived(self, event: Arrived, now_ns: int) -> None:
        if event.channel != DATABASE:
            return
        for body in event.bodies:
            try:
                message = decode_message(body)
            except DecodeError:
                continue  # counted by the peer's version; a reply that cannot be read is one that did not come
            match message:
                case Replies(replies):
                    for number, outcome in replies:
                        self._client.replied(event.peer, number, outcome, now_ns)
                case WatchDeliver():
                    self._deliver(event.peer, message)
                case WatchEnd(watch, resume, compacted):
                    if self._watches.pop(watch, None) is not None:
                        self._effects.append(WatchClosed(watch, resume, compacted))
        self._effects.append(consumed(event.peer, self._sessions.get(event.peer), event))

    def _deliver(self, peer: NodeId, message: WatchDeliver) -> None:
        watch = self._watches.get(message.watch)
        if watch is None or watch.target != peer or message.revision < watch.position:
            return
        changes = [group for group in message.changes if group.revision > watch.position]
        watch.position = message.revision
        watch.after = message.revision
        self._effects.append(WatchEvents(message.watch, message.revision, changes))

    def _place_watches(self) -> None:
        for number, watch in self._watches.items():
            if watch.target is None:
                watch.target = self._client.any_server()
                self._tell(number, WatchOpen(number, watch.prefix, watch.after))

    def _tell(self, number: int, message: WatchOpen | WatchTake | WatchClose) -> None:
        watch = self._watches.get(number)
        if watch is not None and watch.target is not None:
            session = self._sessions.get(watch.target)
            run = SendRun(watch.target, DATABASE, [encode_watch(message)], Priority.URGENT, session=session)
            self._effects.append(Send(run))

    def handle_timer(self, now_ns: int) -> None:
        timer = self._client.next_timer()
        if timer is not None and timer <= now_ns:
            self._client.handle_timer(now_ns)

    def next_timer(self) -> int | None:
        return self._client.next_timer()

    def take_effects(self) -> list[Effect]:
        for target, requests in self._client.take_out().items():
            self._effects.append(send_requests(target, self._sessions.get(target), requests))
        effects = self._effects + self._client.effects
        self._effects, self._client.effects = [], []
        return effects

    def persisted(self, number: int, now_ns: int) -> None:
        """It has no store."""

    def persist_failed(self, number: int, error: str, now_ns: int) -> None:
        """It has no store."""
