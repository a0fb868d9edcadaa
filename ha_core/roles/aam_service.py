"""What the aam answers on its Unix socket: VMAP's calls, the stream of records, and its state."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import cast

import trio

from ha_core.config import Config
from ha_core.errors import RemoteProtocolError, TransportError
from ha_core.ids import LinkName, NodeId
from ha_core.machines.aam import RecordsChanged
from ha_core.machines.database_events import DatabaseOutcome, Range
from ha_core.machines.endpoint import EndpointMachine
from ha_core.machines.failover.records import PREFIX, plain
from ha_core.machines.host import HostMachine
from ha_core.machines.keyvalue.model import Call as ProcedureCall
from ha_core.machines.keyvalue.model import Called, Page, Plain, Refused
from ha_core.runtime.database_calls import DatabaseCalls, raise_refusal
from ha_core.runtime.rpc import Call

MAX_WATCHERS = 16
MAX_BACKLOG = 10_000
"""Record changes that a watcher may lag behind; then it is cut off and begins anew."""
PAGE = 1000
PIECE_BYTES = 256 << 10
"""Of records in one frame of the stream."""


class _Watcher:
    def __init__(self) -> None:
        self.queue: deque[RecordsChanged] = deque()
        self.wake = trio.Event()
        self.scope = trio.CancelScope()
        """Cancelled when it is too far behind: it may stand in the middle of a send to a process that is stopped."""


class AamService:
    """The handler of aam.sock; ``handle`` is what ``serve_unix`` calls."""

    def __init__(self, config: Config, machine: HostMachine, endpoint: EndpointMachine, calls: DatabaseCalls) -> None:
        self._config = config
        self._machine = machine
        self._endpoint = endpoint
        self._calls = calls
        self._watchers: list[_Watcher] = []
        self.primaries: Mapping[NodeId, Mapping[LinkName, str]] = {}

    async def handle(self, call: Call) -> object:
        match call.method:
            case "records.call":
                return await self._call(call)
            case "records.read":
                return await read_page(self._calls.submit, call)
            case "records.watch":
                await self._watch(call)
                return None
            case "cluster.status":
                return self._status()
        raise RemoteProtocolError(f"the aam has no method {call.method[:40]!r}", code="method")

    def records_changed(self, change: RecordsChanged) -> None:
        """Hand a change to all watchers."""
        for watcher in self._watchers:
            watcher.queue.append(change)
            watcher.wake.set()
            if len(watcher.queue) > MAX_BACKLOG:
                watcher.queue.clear()
                watcher.scope.cancel()

    async def _call(self, call: Call) -> object:
        """Run a procedure; the answer comes after its commit (I50)."""
        args = call.params.get("args")
        if not isinstance(args, list):
            raise RemoteProtocolError("records.call: args: expected a list", code="params")
        outcome = await self._calls.submit(ProcedureCall(call.text("name"), cast(tuple[Plain, ...], plain(args))))
        if isinstance(outcome, Refused):
            raise_refusal(outcome)
        assert isinstance(outcome, Called)
        return outcome.value

    async def _watch(self, call: Call) -> None:
        """What this replica has applied: everything first, then every change; never ends by itself."""
        if len(self._watchers) >= MAX_WATCHERS:
            raise TransportError(f"records.watch: {MAX_WATCHERS} watchers already")
        watcher = _Watcher()
        records = [(record.key, record.value) for record in self._machine.aam.database.state.range(PREFIX)]
        watcher.queue.append(RecordsChanged(self._machine.aam.inventory.applied_index, records, restored=True))
        watcher.wake.set()
        self._watchers.append(watcher)
        try:
            with watcher.scope:
                while True:
                    await watcher.wake.wait()
                    watcher.wake = trio.Event()
                    while watcher.queue:
                        change = watcher.queue.popleft()
                        for item in pieces(change):
                            await call.send(item)
        finally:
            self._watchers.remove(watcher)
        raise TransportError("records.watch: too far behind, begin anew")

    def _status(self) -> dict[str, object]:
        aam = self._machine.aam
        database = aam.database
        configuration = database.configuration
        return {
            "cluster": self._config.cluster,
            "node": self._config.node,
            "leader": database.leader or "",
            "term": database.term,
            "voters": list(configuration.voters) if configuration else [],
            "learners": list(configuration.learners) if configuration else [],
            "primaries": {node: dict(links) for node, links in self.primaries.items()},
            "applied": aam.inventory.applied_index,
            "revision": database.state.revision,
            "hash": database.state.state_hash().hex(),
            "leases": {name: "revoked" if lease.revoked else "held" for name, lease in sorted(aam.inventory.leases.items())},
            "verdict": aam.isolation.verdict.value,
            "verdict_reason": aam.isolation.reason,
            "coordinating": aam.coordinating,
            "waiting": [[str(one.vm), one.reason] for one in aam.waiting],
            "paths": [
                {"peer": path.peer, "link": path.link, "state": state.value, "rtt_ms": round_trip_ns / 1e6}
                for path, state, round_trip_ns in self._endpoint.paths()
            ],
        }


async def read_page(ask: Callable[[Range], Awaitable[DatabaseOutcome]], call: Call) -> dict[str, object]:
    """Records under a prefix of ours, linearizably: as many as fit a frame, from the key ``after`` on, as of the revision ``at``
    that the first page named. ``more``: there are others behind the last one.

    Raises:
        CompactedError: that revision is no longer there; begin anew.
    """
    prefix, after, at = call.params.get("prefix"), call.params.get("after", b""), call.params.get("at", 0)
    if not isinstance(prefix, bytes) or not prefix.startswith(PREFIX):
        raise RemoteProtocolError("records.read: prefix: expected one of HA's tables", code="params")
    if not isinstance(after, bytes) or not isinstance(at, int) or at < 0:
        raise RemoteProtocolError("records.read: after, at: expected a key and a revision", code="params")
    outcome = await ask(Range(prefix, PAGE, after, at))
    if isinstance(outcome, Refused):
        raise_refusal(outcome)
    assert isinstance(outcome, Page)
    records = [(record.key, record.value) for record in outcome.records]
    return {"records": records, "revision": outcome.revision, "more": outcome.more}


def pieces(change: RecordsChanged) -> Iterator[tuple[int, bool, list[tuple[bytes, bytes | None]], bool]]:
    """A change in pieces that fit a frame. The last field says that more of it follows: whoever acts on a part sees runs without
    their VMs."""
    piece, size_bytes = list[tuple[bytes, bytes | None]](), 0
    for key, value in change.changes:
        record_bytes = len(key) + len(value or b"")
        if piece and size_bytes + record_bytes > PIECE_BYTES:
            yield change.index, change.restored, piece, True
            piece, size_bytes = [], 0
        piece.append((key, value))
        size_bytes += record_bytes
    yield change.index, change.restored, piece, False
