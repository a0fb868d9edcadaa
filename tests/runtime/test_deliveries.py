"""What becomes of messages whose handler goes while they are on their way to it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import trio

from ha_core.runtime.node import Message, Transaction, open_node
from tests.runtime.test_node import A, B, C, make_configs


async def test_a_function_that_no_longer_serves_is_not_called_again(tmp_path: Path) -> None:
    configs = make_configs(tmp_path, [A, B])
    entered, hold = threading.Event(), threading.Event()
    first: list[bytes] = []
    second: list[bytes] = []
    handled = trio.Event()

    def block(tx: Transaction) -> None:
        entered.set()
        hold.wait(4)

    def handle_first(tx: Transaction, batch: Sequence[Message]) -> None:
        first.extend(one.body for one in batch)

    def handle_second(tx: Transaction, batch: Sequence[Message]) -> None:
        second.extend(one.body for one in batch)
        trio.from_thread.run_sync(handled.set, trio_token=token)

    token = trio.lowlevel.current_trio_token()
    async with open_node(configs[A]) as a, open_node(configs[B]) as b, trio.open_nursery() as nursery:
        store = b._store
        assert store is not None
        with trio.fail_after(5):
            with trio.CancelScope() as serving:
                async with trio.open_nursery() as inner:
                    inner.start_soon(b.serve, C, handle_first)
                    nursery.start_soon(b.transact, block)
                    await trio.to_thread.run_sync(entered.wait, 2)
                    await a.send(B, C, b"late")
                    while not store._queue:  # it waits for the writer
                        await trio.sleep(0.005)
                    serving.cancel()
            hold.set()
            nursery.start_soon(b.serve, C, handle_second)
            await handled.wait()
            nursery.cancel_scope.cancel()
    assert (first, second) == ([], [b"late"])
