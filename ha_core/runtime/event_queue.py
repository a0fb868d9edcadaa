"""``Node.open_events``: what a node tells its program, in bounded queues."""

from __future__ import annotations

import logging
from collections import deque

import trio

from ha_core.errors import HAError, NodeFailedError
from ha_core.events import NodeEvent

logger = logging.getLogger(__name__)


class Events:
    """``async for event in events``; when nobody takes them the oldest are dropped, and ``dropped`` says how many."""

    def __init__(self, max_queue: int) -> None:
        self._queue: deque[NodeEvent] = deque()
        self._max_queue = max_queue
        self._wake = trio.Event()
        self._failure: HAError | None = None
        self.dropped = 0

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> NodeEvent:
        """Raises NodeFailedError once the node has stopped and everything was taken."""
        await trio.lowlevel.checkpoint()
        while not self._queue:
            if self._failure is not None:
                raise NodeFailedError(str(self._failure)) from self._failure
            await self._wake.wait()
            self._wake = trio.Event()
        return self._queue.popleft()

    def put(self, event: NodeEvent) -> None:
        if len(self._queue) >= self._max_queue:
            self._queue.popleft()
            self.dropped += 1
        self._queue.append(event)
        self._wake.set()

    def fail(self, error: HAError) -> None:
        self._failure = error
        self._wake.set()
