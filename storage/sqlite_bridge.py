"""aiosqlite under trio: its whole API, with futures that are trio's and no asyncio loop anywhere.

aiosqlite runs every call on one thread per connection and answers through an asyncio future. ``Connection`` replaces only
what makes and awaits that future, so cursors, iteration and ``async with`` are aiosqlite's own code.

Rules:

* A call that the thread has begun is waited for, also by a cancelled task: its result comes back, and the cancellation is
  delivered at the task's next checkpoint. A cancelled task therefore never leaves half a call behind.
* The thread is a daemon: whatever is forgotten or stuck inside SQLite, the process can always exit.
* This relies on private names of aiosqlite (``RELIED_ON``); setup.cfg pins the versions that have them and a test checks it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, TypeVar, cast

import aiosqlite
import outcome
import trio
from aiosqlite.core import _STOP_RUNNING_SENTINEL

if TYPE_CHECKING:
    import asyncio

RELIED_ON = ("_execute", "_connect", "stop", "_conn")
"""Methods of aiosqlite.Connection that are replaced or called; the attributes are _running, _connection, _connector, _tx,
_thread, and the module's _STOP_RUNNING_SENTINEL."""

T = TypeVar("T")
P = ParamSpec("P")


class _Answer:
    """What aiosqlite's thread takes for a future and for its loop: one result, handed over to one waiting task."""

    __slots__ = ("_result", "_task", "_token", "_waiting")

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._task = trio.lowlevel.current_task()
        self._result: outcome.Outcome[object] | None = None
        self._waiting = False

    def get_loop(self) -> _Answer:
        return self

    def call_soon_threadsafe(self, function: Callable[..., object], *args: object) -> None:
        try:
            self._token.run_sync_soon(function, *args)
        except trio.RunFinishedError:
            pass  # nobody is left to hear it

    def done(self) -> bool:
        return self._result is not None

    def set_result(self, value: object) -> None:
        self._set(outcome.Value(value))

    def set_exception(self, exc: BaseException) -> None:
        self._set(outcome.Error(exc))

    def _set(self, result: outcome.Outcome[object]) -> None:
        self._result = result
        if self._waiting:
            trio.lowlevel.reschedule(self._task)

    async def wait(self, abort: trio.lowlevel.Abort = trio.lowlevel.Abort.FAILED) -> object:
        """The result; a cancelled task goes on waiting, or leaves with ``Abort.SUCCEEDED``."""

        def abort_fn(_: object) -> trio.lowlevel.Abort:
            if abort is trio.lowlevel.Abort.SUCCEEDED:
                self._waiting = False
            return abort

        while self._result is None:
            self._waiting = True
            await trio.lowlevel.wait_task_rescheduled(abort_fn)
        return self._result.unwrap()

    def __await__(self) -> Generator[object, object, object]:
        return self.wait().__await__()

    def as_future(self) -> asyncio.Future[object]:
        """The type that aiosqlite's signatures name."""
        return cast("asyncio.Future[object]", self)


class Connection(aiosqlite.Connection):
    """An aiosqlite connection for trio; make it with ``connect`` and use it with ``async with``."""

    def __init__(self, connector: Callable[[], sqlite3.Connection], iter_chunk_size: int) -> None:
        super().__init__(connector, iter_chunk_size)
        self._thread.daemon = True

    def __await__(self) -> Generator[object, object, Connection]:
        return cast(Generator[object, object, Connection], super().__await__())

    async def __aenter__(self) -> Connection:
        return await self

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``function`` on the connection's thread: one hop for a whole transaction."""
        return cast(T, await self._execute(function, *args, **kwargs))

    async def run_or_leave(self, function: Callable[[], object]) -> None:
        """``run`` for closing: a cancelled task does not wait for a thread that may be stuck."""
        if not self._running or not self._connection:
            raise ValueError("Connection closed")
        answer = _Answer()
        self._tx.put_nowait((answer.as_future(), function))
        await answer.wait(trio.lowlevel.Abort.SUCCEEDED)

    def post(self, function: Callable[[], object]) -> None:
        """Run ``function`` on the thread and return at once; it must not raise, nobody would hear it."""
        if not self._running or not self._connection:
            raise ValueError("Connection closed")
        self._tx.put_nowait((None, function))

    def database(self) -> sqlite3.Connection:
        """The connection itself, for functions that run on the thread."""
        return self._conn

    def abandon(self) -> None:
        """Let go of a thread that is stuck; what it was doing is lost with the process."""
        self._running = False
        self._connection = None

    async def _execute(self, fn: Callable[..., object], *args: object, **kwargs: object) -> object:
        if not self._running or not self._connection:
            raise ValueError("Connection closed")
        await trio.lowlevel.checkpoint_if_cancelled()
        answer = _Answer()
        self._tx.put_nowait((answer.as_future(), partial(fn, *args, **kwargs)))
        return await answer.wait()

    async def _connect(self) -> Connection:
        if self._connection is None:
            answer = _Answer()
            self._tx.put_nowait((answer.as_future(), self._connector))
            try:
                self._connection = cast(sqlite3.Connection, await answer.wait())
            except BaseException:
                self.stop()
                raise
        return self

    def stop(self) -> asyncio.Future[object] | None:
        self._running = False

        def close_and_stop() -> object:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            return _STOP_RUNNING_SENTINEL

        try:
            answer = _Answer().as_future()
        except RuntimeError:
            answer = None  # outside of trio: the interpreter is going down
        self._tx.put_nowait((answer, close_and_stop))
        return answer

    async def close(self) -> None:
        if not self._running:  # its thread is ending, and would never answer
            return
        with trio.CancelScope(shield=True):
            await super().close()


def connect(path: str, *, timeout_s: float = 0.0, cached_statements: int = 256) -> Connection:
    """A connection in autocommit mode, whose transactions are begun and ended by hand: ``async with connect(path) as db``."""

    def connector() -> sqlite3.Connection:
        return sqlite3.connect(path, timeout=timeout_s, isolation_level=None, cached_statements=cached_statements)

    return Connection(connector, 64)
