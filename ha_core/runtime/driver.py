"""Runs one machine under trio: collects events into batches, keeps its timer, hands its effects to ``perform``.

``post`` defers, so that what many tasks ask for in one tick, or one task in a row of awaited calls, is one batch; ``call`` waits
for the next tick only, for tasks that wait for an answer; ``step`` feeds at once, for a reader that has a whole batch in its hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from ha_core.machines.contract import Effect, Event, Machine, feed
from ha_core.runtime.clock import now_ns

SETTLE_TICKS = 6
"""Something posted alone waits two ticks of the scheduler longer; while more keeps coming, the driver waits for so many ticks ..."""
FLOW_S = 0.0004
"""... and then once for this long, so that a task which sends one message a tick does not pay for a feeding with each."""


class Driver:
    def __init__(
        self,
        machine: Machine,
        perform: Callable[[Sequence[Effect]], None],
        collect: Callable[[], Sequence[Event]] | None = None,
    ) -> None:
        """``perform`` must not wait; events that it posts are fed in the same run of the driver.

        ``collect`` is asked for further events after what was posted has settled: of what many tasks gather into one
        (``post()`` wakes). A ``step`` between leaves it alone, or each acknowledgement would tear a batch in two.
        """
        self._collect = collect
        self._machine = machine
        self._perform = perform
        self._events: list[Event] = []
        self._timer_ns: int | None = None
        self._asleep_until_ns: int | None = 0
        """A timer that is put off and set again in the meantime wakes nobody; 0: awake."""
        self._wake = trio.Event()
        self._feeding = False
        self._posts = 0
        self._called = False

    def post(self, *events: Event) -> None:
        """Queue events for the next tick; from the trio thread only."""
        self._events.extend(events)
        self._posts += 1
        self._wake.set()

    def call(self, *events: Event) -> None:
        """``post`` for a task that waits for the answer: what all such tasks ask for in this tick is fed in the next one."""
        self._events.extend(events)
        self._called = True
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
                feed(self._machine, batch, now_ns(), self)
                if not self._events:
                    break
        finally:
            self._feeding = False

    def perform(self, effects: Sequence[Effect]) -> None:
        self._perform(effects)

    def wake_at(self, when_ns: int | None) -> None:
        self._timer_ns = when_ns
        if when_ns is not None and (self._asleep_until_ns is None or when_ns < self._asleep_until_ns):
            self._wake.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve the machine until cancelled."""
        self.step()
        task_status.started()
        while True:
            posts = self._posts
            if not self._events:
                await self._sleep()
            if not self._called and (self._posts != posts or self._events):
                await self._settle()
            self._called = False
            self._wake = trio.Event()
            self.step(*(self._collect() if self._collect is not None else ()))

    async def _sleep(self) -> None:
        """Until something is posted or the timer is due."""
        self._asleep_until_ns = timer_ns = self._timer_ns
        wait_s = float("inf") if timer_ns is None else max(0.0, (timer_ns - now_ns()) / 1e9)
        with trio.move_on_after(wait_s):
            await self._wake.wait()
        self._asleep_until_ns = 0

    async def _settle(self) -> None:
        """Until nothing more is posted, within bounds; two ticks at least, because tasks of one tick run in any order."""
        quiet = 0
        for _ in range(SETTLE_TICKS):
            posts = self._posts
            await trio.lowlevel.checkpoint()
            quiet = quiet + 1 if self._posts == posts else 0
            if quiet == 2:
                return
        await trio.sleep(FLOW_S)
