"""The shell of a record store: carries out a machine's writes in order, one call of the store at a time.

Whatever was queued while a flush was on its way shares the next one.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence

import trio

from ha_core.errors import StorageError
from ha_core.interfaces import RecordStore, Recovered
from ha_core.machines.contract import CheckpointDue, Event, Persist, Persisted, PersistFailed, WriteCheckpoint
from ha_core.machines.raft.records import encode_mark, last_mark

logger = logging.getLogger(__name__)

ASK_AGAIN = 16
"""After so many writes without a checkpoint a machine that was asked for one is asked again."""


async def mark_boot(store: RecordStore, recovered: Recovered, mark: bytes, marks: Sequence[bytes], where: str) -> None:
    """Begin a process life in a record store: neither it nor the file that counts the boots is an older copy (R12).

    Args:
        recovered: what the store held.
        mark: names this life.
        marks: those that the other file knows; empty if it is new and cannot tell.
        where: both files, for the administrator.

    Raises:
        StorageError: one of the two was restored from an older copy, or the mark cannot be written.
    """
    if marks and last_mark(recovered) not in marks:
        raise StorageError(
            f"{where}: they are not of the same time, one of them was restored from an older copy: this replica may have voted "
            "and acknowledged what it no longer knows; remove both and let the node join anew"
        )
    await store.append([encode_mark(mark)])


class RecordShell:
    def __init__(self, store: RecordStore, deliver: Callable[[Event], None]) -> None:
        """``deliver`` takes Persisted, PersistFailed and CheckpointDue to the machine that asked."""
        self.failure: StorageError | None = None
        """Why ``run`` has returned."""
        self._store = store
        self._deliver = deliver
        self._queue: deque[Persist | WriteCheckpoint] = deque()
        self._wake = trio.Event()
        self._patience = 0

    def perform(self, effect: Persist | WriteCheckpoint) -> None:
        """Queue a write; never waits."""
        self._queue.append(effect)
        self._wake.set()

    async def run(self) -> None:
        """Serve until cancelled, or until a write fails: its machine has been told by PersistFailed then, and the store is
        poisoned; the node has to stop."""
        queue = self._queue
        while True:
            self._ask()
            if not queue:
                await self._wake.wait()
            self._wake = trio.Event()
            batch = self._take()
            try:
                # A write that has begun ends; the store would not know how much of a cancelled one is durable.
                with trio.CancelScope(shield=True):
                    await self._write(batch)
            except StorageError as exc:
                logger.error("write %d of node.db failed: %s", batch[0].number, exc)
                self.failure = exc
                self._deliver(PersistFailed(batch[0].number, str(exc)))
                return
            self._deliver(Persisted(batch[-1].number))

    def _ask(self) -> None:
        """A store knows best when it needs a checkpoint; at the start, too, lest one that is nearly full fills with restarts."""
        self._patience -= 1
        if self._patience < 0 and self._store.stats().checkpoint_due:
            self._patience = ASK_AGAIN
            self._deliver(CheckpointDue())

    def _take(self) -> list[Persist | WriteCheckpoint]:
        """A checkpoint by itself, or all records up to the next one."""
        batch = [self._queue.popleft()]
        if isinstance(batch[0], Persist):
            while self._queue and isinstance(self._queue[0], Persist):
                batch.append(self._queue.popleft())
        return batch

    async def _write(self, batch: list[Persist | WriteCheckpoint]) -> None:
        first = batch[0]
        if isinstance(first, WriteCheckpoint):
            await self._store.checkpoint(first.state, first.records)
            self._patience = 0
        else:
            await self._store.append([one.record for one in batch if isinstance(one, Persist)])
