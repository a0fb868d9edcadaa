"""What can be plugged in: transports, stores, hypervisors, fencing devices, roles.

``ha_core.testing`` has a conformance suite for transports (``check_transport``) and stores (``check_record_store``); ours and
the simulator's pass them, and so should yours. ``ha_core/registry.py`` finds implementations by name.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import attrs
import trio

from ha_core.ids import FencingToken, HostName, VmName

# -- transports --


class StreamTransport(Protocol):
    """Reliable byte streams between ``host:port`` addresses."""

    name: str

    async def dial(self, remote: str, *, local: str | None = None) -> trio.abc.Stream:
        """Connect from the host part of ``local`` (any port).

        Raises:
            TransportError: nobody answers, or the address cannot be used.
        """

    async def listen(self, address: str) -> trio.abc.Listener[trio.abc.Stream]:
        """Raises TransportError with the address and what is in the way (a port in use)."""

    def address_of(self, end: trio.abc.Listener[trio.abc.Stream] | trio.abc.Stream) -> str:
        """A listener's bound ``host:port`` (port 0 resolved); for a stream, its remote end."""


class DatagramSocket(Protocol):
    address: str

    def send_nowait(self, data: bytes, remote: str) -> None:
        """Send or drop; never waits, never raises for a remote that is not there."""

    async def receive(self) -> Sequence[tuple[bytes, str]]:
        """Wait for at least one datagram; all that are there, with where each came from."""

    async def aclose(self) -> None: ...


class DatagramTransport(Protocol):
    name: str

    async def bind(self, address: str) -> DatagramSocket:
        """Raises TransportError."""


# -- stores --


@attrs.frozen
class Recovered:
    """What a store held: the newest checkpoint (None: none yet) and the records appended after it, in order."""

    checkpoint: bytes | None
    records: Sequence[bytes]


@attrs.frozen
class StoreStats:
    """Counters since the store was opened, for metrics and the write budget."""

    appended_bytes: int
    programmed_bytes: int
    flushes: int
    checkpoints: int
    size_bytes: int
    checkpoint_due: bool = False
    """The log has outgrown the state so far, or the room left is so small, that a checkpoint should be written soon."""


class RecordStore(Protocol):
    """An append-only log of records with whole-state checkpoints: all that Raft needs. One owner, one call at a time.

    A store that fails a write or a flush is poisoned: that call and every later one raise StorageError, and only opening it
    again tells what is durable. A failed flush is never retried.
    """

    incarnation: bytes
    """16 random bytes, made with the store."""

    async def recover(self) -> Recovered:
        """Called once, first.

        Raises:
            CorruptRecordError: a record is damaged that is not a torn tail.
        """

    async def append(self, records: Sequence[bytes]) -> None:
        """Append all or, if the power fails, a prefix; durable on return, with one flush. Records may be up to 8 MiB.

        Raises:
            StorageFullError: nothing was written; the store is not poisoned.
            StorageError: the store is poisoned.
        """

    async def checkpoint(self, state: bytes, records: Sequence[bytes]) -> None:
        """Atomically replace everything by ``state`` and the ``records`` that follow it."""

    def stats(self) -> StoreStats: ...

    async def aclose(self) -> None: ...


class RecordStoreEngine(Protocol):
    """Opens RecordStores of one kind; what the registry names."""

    name: str

    def open(self, location: str, options: Mapping[str, object]) -> AbstractAsyncContextManager[RecordStore]:
        """Open or create the store at ``location`` (a path).

        Raises:
            StoreLockedError: another process owns it.
            StorageError: it is no store of this kind, or damaged.
        """


# -- hypervisors and fencing --


@attrs.frozen(kw_only=True)
class VmSpec:
    """What to run: ``driver`` names the hypervisor, ``options`` are its own (for ``process``: argv, env, workdir)."""

    name: VmName
    driver: str = "process"
    options: Mapping[str, object] = attrs.field(factory=dict)
    shutdown_s: float = 0.0
    cpu_mhz: int = 500
    memory_mib: int = 512


@attrs.frozen
class VmReport:
    """``state``: starting, running, stopping, stopped (reaped), failed. ``event`` orders reports of one guard ``instance``;
    within one kernel boot a later instance's numbers are higher too."""

    name: VmName
    token: FencingToken
    state: str
    event: int
    exit_code: int | None = None
    text: str = ""
    instance: str = ""


class ReportStream(Protocol):
    """``async for report in stream``; to be closed."""

    def __aiter__(self) -> AsyncIterator[VmReport]: ...
    async def aclose(self) -> None: ...


class Hypervisor(Protocol):
    """Starts and stops VMs on this host. All calls are idempotent by (name, token)."""

    name: str
    outlives_agents: bool
    """True if its VMs survive killed agents: they need fencing or a hardware watchdog."""

    async def start(self, spec: VmSpec, *, lease: int, token: FencingToken) -> None:
        """Raises StaleFencingTokenError for a lower token, OperationFailedError if it could not start."""

    async def stop(self, name: VmName, *, token: FencingToken, shutdown_s: float) -> None:
        """Ask it to end and kill it after ``shutdown_s`` seconds; returns once it is gone."""

    async def list(self) -> Sequence[VmReport]: ...

    def reports(self) -> ReportStream:
        """Each change, as it happens; begins with the present state of all."""


class FenceDevice(Protocol):
    name: str

    async def fence(self, host: HostName) -> None:
        """Cut the host off for certain; returns only when that is confirmed.

        Raises:
            FenceFailedError: not confirmed.
        """
