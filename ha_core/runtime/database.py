"""The replicated database as a program uses it: ``node.database``.

Reads are linearizable, writes are acknowledged after a quorum flushed them and are applied once. A call whose fate stays
unknown raises OutcomeUnknownError with the request's identity; ``commit(change, request=...)`` repeats it without doing it
twice.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar

import trio

from ha_core.config import ns
from ha_core.errors import CompactedError, HAError, InvariantError, LeaseLostError, LocalProtocolError, OutcomeUnknownError
from ha_core.ids import FencingToken, LeaseToken, Revision
from ha_core.machines.database_events import DatabaseOutcome, Found, Operation, Range, Renew, Renewed
from ha_core.machines.keyvalue.codec import is_key
from ha_core.machines.keyvalue.model import (
    Change,
    Delete,
    Get,
    Grant,
    Granted,
    Outcome,
    Page,
    Put,
    Record,
    Refusal,
    Refused,
    RequestId,
    RevisionEvents,
    Revoke,
)
from ha_core.machines.keyvalue.plain import is_number
from ha_core.runtime.clock import now_ns
from ha_core.runtime.database_calls import WatchQueue, raise_refusal

T = TypeVar("T")

TIMEOUT_S = 10.0
LOCKS = b"\x00lock/"
"""Keys of ``lock``: this, the name, a zero byte, the holder's lease token. The holder is the one that was created first."""
HOLDER_MARGIN = 0.02
"""A lease's holder stops this part of its ttl earlier than the leader lets it end: clocks' rates may differ by 1 %."""


class DatabasePort(Protocol):
    """What the database needs of a node; ``runtime.database_calls.DatabaseCalls`` is one."""

    async def submit(
        self, operation: Operation, *, timeout_s: float = 10.0, identity: RequestId | None = None
    ) -> DatabaseOutcome: ...
    def open_watch(self, prefix: bytes, after: int | None) -> WatchQueue: ...
    def close_watch(self, queue: WatchQueue) -> None: ...


class Watch:
    """``async for revision in watch``: each revision's changes under the prefix, whole and in order, none twice, none left out.

    ``revision`` is the bookmark: everything up to it was delivered; ``watch(prefix, after=bookmark)`` resumes there. Iteration
    raises CompactedError once what should come next is no longer held.
    """

    def __init__(self, queue: WatchQueue) -> None:
        self._queue = queue
        self._revision = queue.revision

    @property
    def revision(self) -> Revision:
        return Revision(self._queue.revision if not self._queue.changes else self._revision)

    def __aiter__(self) -> Watch:
        return self

    async def __anext__(self) -> RevisionEvents:
        await trio.lowlevel.checkpoint()
        queue = self._queue
        while not queue.changes:
            if queue.error is not None:
                raise queue.error
            await queue.wait()
        group = queue.take()
        self._revision = group.revision
        return group


class Lease:
    """Kept alive by its node until its context ends. ``lost`` is set before anybody else can be told that it is over."""

    def __init__(self, token: LeaseToken, ttl_s: float, created_ns: int) -> None:
        self.token = token
        self.ttl_s = ttl_s
        self.lost = trio.Event()
        self.ended = False
        """Its context is over."""
        self._deadline_ns = 0
        self._scopes: list[trio.CancelScope] = []
        self.extend(created_ns)

    def extend(self, created_ns: int) -> None:
        """The leader confirmed a renewal that was made at ``created_ns``."""
        self._deadline_ns = created_ns + ns(self.ttl_s * (1 - HOLDER_MARGIN))

    @property
    def remaining_s(self) -> float:
        """How long it is certain to last, on the clock that counts suspend."""
        return (self._deadline_ns - now_ns()) / 1e9

    def lose(self) -> None:
        self.lost.set()
        for scope in self._scopes:
            scope.cancel()

    @asynccontextmanager
    async def _guarding(self) -> AsyncIterator[None]:
        """Cancel the body when the lease is lost, and raise LeaseLostError for it."""
        with trio.CancelScope() as scope:  # noqa: ASYNC100 - the body that is yielded to has them
            self._scopes.append(scope)
            try:
                if self.lost.is_set():
                    scope.cancel()
                yield
            finally:
                self._scopes.remove(scope)
        if self.lost.is_set():
            raise LeaseLostError(f"lease {self.token} ran out; what it protected was cancelled")


class Database:
    def __init__(self, port: DatabasePort, nursery: trio.Nursery, *, lock_ttl_s: float = 2.0) -> None:
        """``nursery`` renews leases; ``lock_ttl_s``: how soon a lock passes on when its holder dies."""
        self._port = port
        self._nursery = nursery
        self._lock_ttl_s = lock_ttl_s

    # -- reads and writes --

    async def get(self, key: bytes) -> Record | None:
        """The record as it is now, linearizably; None if there is none.

        Raises:
            ProposalDroppedError: no quorum could be asked in time.
        """
        outcome = await self._submit(Get(key))
        if not isinstance(outcome, Found):
            raise InvariantError(f"a get was answered by {outcome!r}")
        return outcome.record

    async def range(self, prefix: bytes, *, limit: int = 1000, after: bytes = b"", at: int = 0) -> Page:
        """Up to ``limit`` records under ``prefix`` with keys greater than ``after``, in key order.

        To read on consistently pass the last key as ``after`` and the first page's ``revision`` as ``at``.

        Raises:
            CompactedError: ``at`` is no longer held.
        """
        outcome = await self._submit(Range(prefix, limit, after, at))
        if not isinstance(outcome, Page):
            raise InvariantError(f"a range was answered by {outcome!r}")
        return outcome

    async def put(self, key: bytes, value: bytes, *, lease: Lease | None = None) -> Revision:
        """Raises LeaseLostError (the lease is over), StorageFullError, OutcomeUnknownError."""
        change = Change((), (Put(key, value, 0 if lease is None else lease.token),), ())
        outcome = await self._port.submit(change, timeout_s=TIMEOUT_S)
        if type(outcome) is not Outcome:
            outcome = _outcome_of(outcome)
        return outcome.revision

    async def delete(self, key: bytes) -> Revision:
        return (await self.commit(Change(then=(Delete(key),)))).revision

    async def commit(self, change: Change, *, request: RequestId | None = None, timeout_s: float = TIMEOUT_S) -> Outcome:
        """Carry a transaction out once.

        Args:
            request: repeat the one whose fate was unknown (``OutcomeUnknownError.request``); ``change`` must be the same.
            timeout_s: after this the fate is reported as unknown.

        Raises:
            OutcomeUnknownError: no answer in time; it may have been carried out.
            ProposalDroppedError: no leader in time; it was not carried out.
            SessionExpiredError: what became of ``request`` is no longer known.
            LocalProtocolError: the change breaks a rule, or writes reserved keys.
        """
        return _outcome_of(await self._port.submit(change, timeout_s=timeout_s, identity=request))

    async def _submit(
        self, operation: Operation, *, timeout_s: float = TIMEOUT_S, identity: RequestId | None = None
    ) -> DatabaseOutcome:
        outcome = await self._port.submit(operation, timeout_s=timeout_s, identity=identity)
        if isinstance(outcome, Refused):
            raise_refusal(outcome)
        return outcome

    # -- watches --

    @asynccontextmanager
    async def watch(self, prefix: bytes, *, after: Revision | None = None) -> AsyncIterator[Watch]:
        """Watch what changes under ``prefix`` after revision ``after``; by default after now, as a read at entry would see it.

        Raises:
            CompactedError: what comes after ``after`` is no longer held.
            LocalProtocolError: ``prefix`` is no beginning of a key, or ``after`` no revision.
        """
        if not is_key(prefix) or not (after is None or is_number(after)):
            raise LocalProtocolError(f"watch: expected bytes and a revision, found {str(prefix)[:40]!r} and {after!r}")
        queue = self._port.open_watch(prefix, after)
        try:
            while queue.revision < 0 and queue.error is None:
                await queue.wait()
            if queue.error is not None:
                raise queue.error
            yield Watch(queue)
        finally:
            self._port.close_watch(queue)

    # -- leases and locks --

    @asynccontextmanager
    async def lease(self, ttl_s: float) -> AsyncIterator[Lease]:
        """A lease that is renewed while the body runs and revoked when it ends; keys put with it go with it.

        Losing it sets ``lost`` and does not cancel the body; ``lock`` does.
        """
        lease = await self._grant(ttl_s)
        scope = trio.CancelScope()
        self._nursery.start_soon(self._keep, lease, scope)
        try:
            yield lease
        finally:
            lease.ended = True
            scope.cancel()
            # Left alone it would end by itself after its ttl: so this is a courtesy, tried once and for a short time.
            if not lease.lost.is_set():
                with trio.move_on_after(1.0, shield=True):
                    await self._courtesy(Revoke(lease.token))

    async def _grant(self, ttl_s: float) -> Lease:
        """A new lease, most of which still lies ahead however long its Grant took."""
        created_ns = now_ns()
        outcome = await self._submit(Grant(ns(ttl_s)))
        if not isinstance(outcome, Granted):
            raise InvariantError(f"a grant was answered by {outcome!r}")
        lease = Lease(outcome.token, ttl_s, created_ns)
        while lease.remaining_s < ttl_s / 2:
            created_ns = now_ns()
            renewed = await self._port.submit(Renew(lease.token), timeout_s=TIMEOUT_S)
            if not isinstance(renewed, Renewed):
                return await self._grant(ttl_s)
            lease.extend(created_ns)
        return lease

    async def _courtesy(self, operation: Operation) -> None:
        try:
            await self._port.submit(operation, timeout_s=1.0)
        except HAError:
            return

    async def _keep(self, lease: Lease, scope: trio.CancelScope) -> None:
        """Renew it; it is lost when the leader says so, the deadline has come or the node closes."""
        try:
            with scope:
                await self._renew(lease)
        finally:
            if not lease.ended:
                lease.lose()

    async def _renew(self, lease: Lease) -> None:
        """Until it is lost: a renewal as soon as a third of the ttl is used up."""
        while True:
            await trio.sleep(max(lease.ttl_s / 50, lease.remaining_s - lease.ttl_s * 2 / 3))
            remaining_s = lease.remaining_s
            if remaining_s <= 0:
                return
            created_ns = now_ns()
            with trio.move_on_after(remaining_s):
                try:
                    outcome = await self._port.submit(Renew(lease.token), timeout_s=remaining_s)
                except HAError:
                    return
                if isinstance(outcome, Renewed):
                    lease.extend(created_ns)
                elif isinstance(outcome, Refused) and outcome.code is Refusal.LEASE_NOT_FOUND:
                    return

    @asynccontextmanager
    async def lock(self, name: str) -> AsyncIterator[FencingToken]:
        """Hold the lock ``name`` while the body runs; waits for its turn, first come first served.

        The token grows with every hold: hand it to whatever the body changes, and let that refuse lower ones, because
        cancellation reaches only code that awaits.

        Raises:
            LeaseLostError: the lock was lost; the body was cancelled.
        """
        if "\0" in name:
            raise LocalProtocolError(f"lock {name!r}: a name has no zero byte")
        prefix = LOCKS + name.encode() + b"\0"
        async with self.lease(self._lock_ttl_s) as lease, lease._guarding():
            key = prefix + b"%016x" % lease.token
            revision = await self._enqueue(key, lease)
            await self._wait_for_turn(prefix, revision)
            yield FencingToken(revision)

    async def _enqueue(self, key: bytes, lease: Lease) -> int:
        change = Change(then=(Put(key, b"", lease.token),))
        request: RequestId | None = None
        while True:
            try:
                return (await self.commit(change, request=request)).revision
            except OutcomeUnknownError as exc:
                if not isinstance(exc.request, RequestId):
                    raise
                request = exc.request

    async def _wait_for_turn(self, prefix: bytes, revision: int) -> None:
        """Until nobody that came before ``revision`` is left."""
        while True:
            before, seen = await self._queued_before(prefix, revision)
            if not before:
                return
            try:
                async with self.watch(prefix, after=seen) as watch:
                    async for group in watch:
                        before -= {event.key for event in group.events if event.record is None}
                        if not before:
                            return
            except CompactedError:
                continue

    async def _queued_before(self, prefix: bytes, revision: int) -> tuple[set[bytes], Revision]:
        page = await self.range(prefix)
        records, seen = list(page.records), page.revision
        while page.more:
            page = await self.range(prefix, after=records[-1].key, at=seen)
            records += page.records
        return {record.key for record in records if record.create_revision < revision}, seen

    async def run_on_one_host(self, name: str, body: Callable[[FencingToken], Awaitable[T]]) -> T:
        """Run ``body`` while this node holds the lock ``name``, which others wait for; raises LeaseLostError if it was lost."""
        async with self.lock(name) as token:
            return await body(token)


def _outcome_of(outcome: DatabaseOutcome) -> Outcome:
    if isinstance(outcome, Refused):
        raise_refusal(outcome)
    if not isinstance(outcome, Outcome):
        raise InvariantError(f"a change was answered by {outcome!r}")
    return outcome
