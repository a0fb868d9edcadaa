"""When a machine is fed: how many feedings a burst, an answered call and a moved timer cost."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import trio
import trio.testing

from ha_core.machines.contract import Effect, Event
from ha_core.runtime.clock import now_ns
from ha_core.runtime.driver import Driver

SECOND_NS = 1_000_000_000


@attrs.frozen
class Something(Event):
    number: int = 0


@attrs.define
class Recorder:
    """A machine that keeps each batch."""

    batches: list[list[Event]] = attrs.field(factory=list)
    timer_ns: int | None = None
    fed: int = 0

    def receive(self, events: Sequence[Event], now: int) -> None:
        self.batches.append(list(events))

    def handle_timer(self, now: int) -> None:
        self.timer_ns = None

    def next_timer(self) -> int | None:
        return self.timer_ns

    def take_effects(self) -> list[Effect]:
        self.fed += 1
        return []

    def persisted(self, number: int, now: int) -> None: ...

    def persist_failed(self, number: int, error: str, now: int) -> None: ...


async def test_what_many_tasks_call_for_in_one_tick_is_one_batch_in_the_next(autojump_clock: trio.testing.MockClock) -> None:
    machine = Recorder()
    driver = Driver(machine, lambda effects: None)

    async with trio.open_nursery() as nursery:
        await nursery.start(driver.run)
        await trio.testing.wait_all_tasks_blocked()

        async def client(number: int) -> None:
            driver.call(Something(number))

        for number in range(64):
            nursery.start_soon(client, number)
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        assert [len(batch) for batch in machine.batches] == [64]
        nursery.cancel_scope.cancel()


async def test_a_task_that_posts_once_a_tick_does_not_cost_a_feeding_each_time(autojump_clock: trio.testing.MockClock) -> None:
    machine = Recorder()
    driver = Driver(machine, lambda effects: None)

    async with trio.open_nursery() as nursery:
        await nursery.start(driver.run)
        for number in range(20):
            driver.post(Something(number))
            await trio.lowlevel.checkpoint()
        await trio.sleep(0.01)
        nursery.cancel_scope.cancel()

    assert [event for batch in machine.batches for event in batch] == [Something(number) for number in range(20)]
    assert len(machine.batches) <= 5


async def test_a_timer_that_is_put_off_and_set_again_wakes_nobody() -> None:
    machine = Recorder(timer_ns=now_ns() + 3600 * SECOND_NS)
    driver = Driver(machine, lambda effects: None)

    async with trio.open_nursery() as nursery:
        await nursery.start(driver.run)
        await trio.testing.wait_all_tasks_blocked()
        machine.timer_ns = None
        driver.step(Something())
        machine.timer_ns = now_ns() + 7200 * SECOND_NS
        driver.step(Something())
        fed = machine.fed
        await trio.testing.wait_all_tasks_blocked()
        assert machine.fed == fed

        machine.timer_ns = now_ns()
        driver.wake_at(machine.timer_ns)
        await trio.testing.wait_all_tasks_blocked()
        assert machine.timer_ns is None, "an earlier one does"
        nursery.cancel_scope.cancel()
