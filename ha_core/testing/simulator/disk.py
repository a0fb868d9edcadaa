"""A simulated disk: writes become durable in groups and in order, after a delay; a crash loses what was not yet durable.

``SimDevice`` is the device alone: it carries any payload and hands it to ``keep`` once it is durable. ``SimDisk`` is a record
store on it (Persist and WriteCheckpoint of the machine contract).

A crash keeps a prefix of the writes in flight, as a real disk may: a write that was never confirmed can still be there
afterwards. The first write after that prefix may be torn; a record store drops a torn tail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar
from zlib import crc32

import attrs

from ha_core.interfaces import Recovered
from ha_core.testing.simulator.core import MICROSECOND, MILLISECOND, Simulation

P = TypeVar("P")
Done = Callable[[str | None], None]
"""Called with None when a write is durable, with the error's text when it failed."""


@attrs.frozen
class _Write(Generic[P]):
    payload: P
    done: Done


class SimDevice(Generic[P]):
    """Order, group flushes, latency and faults; what the payloads mean is the owner's business."""

    def __init__(self, sim: Simulation, name: str, keep: Callable[[P], None], *, flush_ns: int = 300 * MICROSECOND) -> None:
        """``keep(payload)`` is called when a write is durable, before its ``done``; ``flush_ns`` is the mean of a flush."""
        self._sim = sim
        self.name = name
        self._keep = keep
        self._flush_ns = flush_ns
        self._rng = sim.stream(f"disk/{name}")
        self._queued: list[_Write[P]] = []
        self._flushing: list[_Write[P]] = []
        self._slow_ns = 0
        self._full = False
        self._error = ""
        self._poisoned = ""
        self._life = 0

    def write(self, payload: P, done: Done) -> None:
        """Queue a write; it joins the next flush."""
        self._queued.append(_Write(payload, done))
        if not self._flushing:
            self._begin_flush()

    @property
    def idle(self) -> bool:
        return not self._queued and not self._flushing

    @property
    def poisoned(self) -> bool:
        return bool(self._poisoned)

    # -- faults --

    def slow(self, extra_ns: int) -> None:
        """Every flush takes so much longer; 0 ends it."""
        self._slow_ns = extra_ns
        if extra_ns:
            self._sim.fault("disk-slow")

    def set_full(self, full: bool) -> None:
        """While full, writes fail and nothing of them is kept."""
        self._full = full

    def fail_next(self, error: str = "input/output error") -> None:
        """The next flush fails and poisons the device until it is opened again; a prefix may be durable. Empty: not so."""
        self._error = error

    def crash(self) -> None:
        """Power lost or process killed: keep a prefix of the writes in flight, forget the rest, call no ``done``."""
        self._life += 1
        flight = self._flushing + self._queued
        kept = 0
        if flight:
            # After a failed flush nothing later may become durable: that would be a hole, not a prefix.
            kept = 0 if self._poisoned else self._rng.randrange(len(flight) + 1)
            for write in flight[:kept]:
                self._keep(write.payload)
            if kept < len(flight):
                self._sim.fault("disk-crash", len(flight) - kept)
                if self._rng.random() < 0.5:
                    self._sim.fault("disk-torn")
        self._sim.trace("disk crash", self.name, len(flight), kept)
        self._queued, self._flushing = [], []
        self._poisoned = ""
        self._error = ""

    def reopen(self) -> None:
        """The owner closed and opened it in good order: nothing is in flight, poison is gone."""
        self.crash()

    # -- flushes --

    def _begin_flush(self) -> None:
        self._flushing, self._queued = self._queued, []
        delay = int(self._rng.expovariate(1.0) * self._flush_ns) + 20 * MICROSECOND + self._slow_ns
        self._sim.after(min(delay, 20 * self._flush_ns + MILLISECOND + self._slow_ns), self._end_flush, self._life)

    def _end_flush(self, life: int) -> None:
        if life != self._life:
            return
        group, self._flushing = self._flushing, []
        if not self._poisoned:
            if self._full:
                self._sim.fault("disk-full")
                self._poisoned = "no space left on device"
            elif self._error:
                self._sim.fault("disk-error")
                self._poisoned, self._error = self._error, ""
                for write in group[: self._rng.randrange(len(group) + 1)]:
                    self._keep(write.payload)
            else:
                for write in group:
                    self._keep(write.payload)
        for write in group:
            if life != self._life:
                return
            write.done(self._poisoned or None)
        if self._queued and not self._flushing and life == self._life:
            self._begin_flush()


@attrs.frozen
class DiskImage:
    """A copy of a record store, to be restored later (an old backup) or elsewhere (a clone)."""

    incarnation: bytes
    checkpoint: bytes | None
    records: tuple[bytes, ...]


@attrs.frozen
class _Append:
    record: bytes


@attrs.frozen
class _Replace:
    state: bytes
    records: tuple[bytes, ...]


class SimDisk:
    """A record store with one owner; hand it to SimProcess, which carries out Persist and WriteCheckpoint with it."""

    def __init__(self, sim: Simulation, name: str, *, flush_ns: int = 300 * MICROSECOND) -> None:
        self._sim = sim
        self.name = name
        self.device: SimDevice[_Append | _Replace] = SimDevice(sim, name, self._keep, flush_ns=flush_ns)
        self._rng = sim.stream(f"incarnation/{name}")
        self.incarnation = self._rng.randbytes(16)
        self._checkpoint: bytes | None = None
        self._records: list[bytes] = []

    def append(self, record: bytes, done: Done) -> None:
        self._sim.trace("write", self.name, len(record), crc32(record))
        self.device.write(_Append(record), done)

    def checkpoint(self, state: bytes, records: Sequence[bytes], done: Done) -> None:
        self._sim.trace("checkpoint", self.name, len(state), crc32(state), len(records))
        self.device.write(_Replace(state, tuple(records)), done)

    def recover(self) -> Recovered:
        """What is durable now, as a RecordStore would find it at start."""
        return Recovered(self._checkpoint, tuple(self._records))

    def crash(self) -> None:
        self.device.crash()

    def image(self) -> DiskImage:
        return DiskImage(self.incarnation, self._checkpoint, tuple(self._records))

    def restore(self, image: DiskImage) -> None:
        """Put an older copy, or another node's, in place; only while the owner is down."""
        self.device.crash()
        self.incarnation, self._checkpoint, self._records = image.incarnation, image.checkpoint, list(image.records)

    def lose(self) -> None:
        """Replace it by an empty disk: a new incarnation."""
        self.restore(DiskImage(self._rng.randbytes(16), None, ()))
        self._sim.fault("disk-lost")

    def _keep(self, payload: _Append | _Replace) -> None:
        if isinstance(payload, _Append):
            self._records.append(payload.record)
        else:
            self._checkpoint, self._records = payload.state, list(payload.records)
