"""Runs one machine under trio: collects events into batches, keeps its timer, hands its effects to ``perform``.

``post`` defers to the end of the current scheduler tick, so that what many tasks ask for in one tick is one batch; ``step``
feeds at once, for a reader that has a whole batch in its hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from ha_core.machines.contract import Effect, Event, Machine, feed
from ha_core.runtime.clock import now_ns


class Driver:
    def __init__(
        self,
        machine: Machine,
        perform: Callable[[Sequence[Effect]], None],
        collect: Callable[[], Sequence[Event]] | None = None,
    ) -> None:
        """``perform`` must not wait; events that it posts are fed in the same run of the driver.

        ``collect`` is asked for further events before each feeding: of what many tasks gather into one (``post()`` wakes).
        """
        self._collect = collect
        self._machine = machine
        self._perform = perform
        self._events: list[Event] = []
        self._timer_ns: int | None = None
        self._wake = trio.Event()
        self._feeding = False

    def post(self, *events: Event) -> None:
        """Queue events for the next tick; from the trio thread only."""
        self._events.extend(events)
        self._wake.set()

    def step(self, *events: Event) -> None:
        """Feed these events, after what was posted before, at once; inside ``perform`` the same as ``post``."""
        self._events.extend(events)
        if self._feeding:
            return
        self._feeding = True
        try:
            while True:
                batch, self._events = self._events, []
                if self._collect is not None:
                    batch.extend(self._collect())
                feed(self._machine, batch, now_ns(), self)
                if not self._events:
                    break
        finally:
            self._feeding = False

    def perform(self, effects: Sequence[Effect]) -> None:
        self._perform(effects)

    def wake_at(self, when_ns: int | None) -> None:
        if when_ns != self._timer_ns:
            earlier = when_ns is not None and (self._timer_ns is None or when_ns < self._timer_ns)
            self._timer_ns = when_ns
            if earlier:
                self._wake.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve the machine until cancelled."""
        self.step()
        task_status.started()
        while True:
            timer_ns = self._timer_ns
            if not self._events:
                wait_s = float("inf") if timer_ns is None else max(0.0, (timer_ns - now_ns()) / 1e9)
                with trio.move_on_after(wait_s):
                    await self._wake.wait()
            else:
                await trio.lowlevel.checkpoint()
            self._wake = trio.Event()
            self.step()
