"""Between tasks and the database machine: a call is an event, and its reply wakes the task that waits for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NoReturn

import trio

from ha_core.config import ns
from ha_core.errors import (
    CompactedError,
    ConsensusError,
    HAError,
    LeaseLostError,
    LocalProtocolError,
    NodeFailedError,
    NotLeaderError,
    OutcomeUnknownError,
    ProposalDroppedError,
    SessionExpiredError,
    StorageFullError,
)
from ha_core.machines.contract import Effect, Event
from ha_core.machines.database_events import (
    CloseWatch,
    DatabaseOutcome,
    DatabaseReply,
    DatabaseRequest,
    OpenWatch,
    Operation,
    WatchClosed,
    WatchEvents,
    WatchTaken,
)
from ha_core.machines.keyvalue import ProcedureError
from ha_core.machines.keyvalue.model import Refusal, Refused, RequestId, RevisionEvents

REPLY_SLACK_S = 5.0
"""The machine answers every request in time; a node that does not do even that has failed."""


class WatchQueue:
    """What a watch delivered and nobody has taken yet; bounded, because taking is what lets more come."""

    def __init__(self, number: int, post: Callable[[Event], None]) -> None:
        self.number = number
        self.revision = -1
        """Everything up to here was put into the queue; -1: the watch does not stand yet."""
        self.error: HAError | None = None
        self.changes: deque[RevisionEvents] = deque()
        self._post = post
        self._wake = trio.Event()
        self._taken = 0

    def put(self, revision: int, changes: Sequence[RevisionEvents]) -> None:
        self.revision = revision
        self.changes.extend(changes)
        self._wake.set()

    def end(self, error: HAError) -> None:
        self.error = error
        self._wake.set()

    async def wait(self) -> None:
        """Until something was put or the watch ended."""
        await self._wake.wait()
        self._wake = trio.Event()

    def take(self) -> RevisionEvents:
        group = self.changes.popleft()
        self._taken += len(group.events)
        if not self.changes or self._taken >= 1024:
            self._post(WatchTaken(self.number, self._taken))
            self._taken = 0
        return group


class DatabaseCalls:
    """``post`` and ``call`` take events to the machine, ``handle`` its effects to the tasks."""

    def __init__(self, post: Callable[[Event], None], call: Callable[[Event], None]) -> None:
        self._post = post
        self._call = call
        self._next = 0
        self._waiting: dict[int, trio.lowlevel.Task] = {}
        self._replies: dict[int, DatabaseOutcome] = {}
        self._watches: dict[int, WatchQueue] = {}
        self._failure: HAError | None = None

    async def submit(
        self, operation: Operation, *, timeout_s: float = 10.0, identity: RequestId | None = None
    ) -> DatabaseOutcome:
        """The machine's answer, refusals included, after ``timeout_s`` at the latest.

        Raises:
            NodeFailedError: the node stopped.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check()
        self._next += 1
        number = self._next
        self._waiting[number] = trio.lowlevel.current_task()
        self._call(DatabaseRequest(number, operation, ns(timeout_s), identity))

        def abort(_: object) -> trio.lowlevel.Abort:
            del self._waiting[number]
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        self._check()
        return self._replies.pop(number)

    def open_watch(self, prefix: bytes, after: int | None) -> WatchQueue:
        self._check()
        self._next += 1
        queue = self._watches[self._next] = WatchQueue(self._next, self._post)
        self._post(OpenWatch(self._next, prefix, after))
        return queue

    def close_watch(self, queue: WatchQueue) -> None:
        if self._watches.pop(queue.number, None) is not None and self._failure is None:
            self._post(CloseWatch(queue.number))

    def handle(self, effect: Effect) -> bool:
        """Carry out an effect of the machine; False if it is none of ours."""
        match effect:
            case DatabaseReply(request, outcome):
                task = self._waiting.pop(request, None)
                if task is not None:
                    self._replies[request] = outcome
                    trio.lowlevel.reschedule(task)
            case WatchEvents(watch, revision, changes):
                queue = self._watches.get(watch)
                if queue is not None:
                    queue.put(revision, changes)
            case WatchClosed(watch, resume, compacted):
                queue = self._watches.pop(watch, None)
                if queue is not None:
                    text = f"revision {resume} is compacted up to {compacted}: read anew and watch after that read's revision"
                    queue.end(CompactedError(text, first_index=compacted))
            case _:
                return False
        return True

    def fail(self, error: HAError) -> None:
        """The node stops: every call raises ``error``, now and later."""
        self._failure = error
        waiting, self._waiting = self._waiting, {}
        for task in waiting.values():
            trio.lowlevel.reschedule(task)
        for queue in self._watches.values():
            queue.end(error)
        self._watches.clear()

    def _check(self) -> None:
        if self._failure is not None:
            raise NodeFailedError(str(self._failure)) from self._failure


def raise_refusal(refused: Refused) -> NoReturn:
    """The refusal as the exception of our error tree."""
    text, detail = refused.text, refused.detail
    match refused.code:
        case Refusal.BAD | Refusal.RESERVED:
            raise LocalProtocolError(text)
        case Refusal.QUOTA:
            raise StorageFullError(text)
        case Refusal.LEASE_NOT_FOUND:
            raise LeaseLostError(text)
        case Refusal.SESSION_EXPIRED | Refusal.SETTLED:
            raise SessionExpiredError(text)
        case Refusal.PROCEDURE:
            raise ProcedureError(text)
        case Refusal.COMPACTED:
            raise CompactedError(text, first_index=detail if isinstance(detail, int) else 0)
        case Refusal.NOT_LEADER:
            raise NotLeaderError(text, leader=detail if isinstance(detail, str) else None)
        case Refusal.UNKNOWN:
            session, sequence = detail if isinstance(detail, tuple) and len(detail) == 2 else (0, 0)
            request = RequestId(session, sequence) if isinstance(session, int) and isinstance(sequence, int) else None
            raise OutcomeUnknownError(text, request=request)
        case Refusal.MEMBERS:
            raise ConsensusError(text)
        case Refusal.TOO_MANY | Refusal.UNAVAILABLE:
            raise ProposalDroppedError(text)
