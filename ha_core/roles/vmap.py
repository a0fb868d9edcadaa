"""VMAP: the plug-in that translates between vpxa and aam.

It is loaded into vpxa when the host joins a cluster, and unloaded when it leaves. vpxa -> VMAP -> aam -> committed and flushed
-> VMAP -> vpxa: what vpxa reports is answered after the commit, never before (I50). What aam has applied comes the other way,
as records. aam may be replaced at any moment: the stream of records then begins anew with the whole state.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import trio

from ha_core.errors import HAError, TransportError
from ha_core.machines.failover.commands import Command, Outcome
from ha_core.machines.failover.host_agent import RecordsSeen
from ha_core.machines.keyvalue.model import Plain
from ha_core.roles.rundir import AAM_SOCKET
from ha_core.runtime.rpc import ITEM, RpcClient, dial_rpc

RETRY_S = 0.05
CALL_S = 15.0
"""Longer than the database takes to say that an outcome is unknown."""

Records = Callable[[RecordsSeen], None]


class Vmap:
    """One connection to the aam of this host, remade when it breaks; run ``run`` in a task."""

    def __init__(self, run_dir: Path, on_records: Records) -> None:
        """``on_records`` gets every change of the HA records that this host's replica has applied."""
        self._path = run_dir / AAM_SOCKET
        self._on_records = on_records
        self._client: RpcClient | None = None
        self._changed = trio.Event()

    async def run(self) -> None:
        """Keep a connection and follow the records until cancelled."""
        while True:
            try:
                async with dial_rpc(self._path) as client:
                    self._set(client)
                    await self._follow(client)
            except* HAError:
                pass
            finally:
                self._set(None)
            await trio.sleep(RETRY_S)

    def _set(self, client: RpcClient | None) -> None:
        self._client = client
        self._changed.set()
        self._changed = trio.Event()

    async def _follow(self, client: RpcClient) -> None:
        gathered: list[tuple[bytes, bytes | None]] = []
        async with client.stream("records.watch") as items:
            async for kind, value in items:
                if kind == ITEM:
                    index, restored, changes, more = cast(tuple[int, bool, Sequence[Sequence[bytes | None]], bool], value)
                    gathered += [(cast(bytes, key), item) for key, item in changes]
                    if not more:
                        self._on_records(RecordsSeen(index, gathered, restored))
                        gathered = []

    async def propose(self, command: Command) -> Outcome:
        """Put a command into the log; returns once it is committed and flushed, with what it came to.

        Raises:
            TransportError: the aam went away or there is no quorum; ask again.
        """
        answer = await self.call("records.call", name=command.name, args=list(command.args()))
        return Outcome.decode(tuple(cast(Sequence[Plain], answer)))

    async def call(self, method: str, /, **params: object) -> object:
        """Ask the aam, waiting for it if it is being restarted.

        Raises:
            TransportError: it did not answer in time, or went away before it answered.
            HAError: what it answered.
        """
        with trio.move_on_after(CALL_S):
            while self._client is None:
                await self._changed.wait()
            return await self._client.call(method, **params)
        raise TransportError(f"{method}: the aam of this host did not answer in {CALL_S:g} s")


@asynccontextmanager
async def open_vmap(run_dir: Path, on_records: Records) -> AsyncIterator[Vmap]:
    """Load the plug-in; leaving unloads it."""
    vmap = Vmap(run_dir, on_records)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(vmap.run)
        yield vmap
        nursery.cancel_scope.cancel()
