"""The contract of every machine, the gate that orders durable writes before what depends on them, and the one feeding function.

Rules:

* A machine takes batches of events and hands out batches of effects. It never waits, reads no clock (``now_ns`` is given:
  integer nanoseconds of a clock that counts suspend) and draws randomness only from the ``Rng`` that it was given.
* Every effect has an ``after``: the number of the write that must be durable before the effect may be carried out, 0 for at
  once. Write numbers count up per store, 1, 2, 3, ...; they are never log indexes. ``Gate`` keeps what may not go yet.
* The trio driver and the simulator both call ``feed`` and differ only in the ``Ports`` behind it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import attrs

from ha_core.errors import invariant


class Effect:
    """Something that a machine wants done; subclasses are frozen attrs classes with slots."""

    __slots__ = ()


class Event:
    """Something that a machine is told; subclasses are frozen attrs classes with slots."""

    __slots__ = ()


@attrs.frozen
class Persist(Effect):
    """Append ``record`` to the machine's record store as write ``number``; answer with Persisted or PersistFailed."""

    number: int
    record: bytes


@attrs.frozen
class WriteCheckpoint(Effect):
    """Atomically replace the record store by ``state`` and the ``records`` that follow it, as write ``number``; answered the
    same way."""

    number: int
    state: bytes
    records: Sequence[bytes]


@attrs.frozen
class Persisted(Event):
    """Every write up to ``number`` is durable."""

    number: int


@attrs.frozen
class PersistFailed(Event):
    """Write ``number`` failed; the store is poisoned and nothing later will succeed."""

    number: int
    error: str


@attrs.frozen
class CheckpointDue(Event):
    """The store runs out of room, or its log has outgrown the state by far: a WriteCheckpoint should come soon."""


class Rng(Protocol):
    """The part of ``random.Random`` that machines use."""

    def random(self) -> float: ...
    def randrange(self, start: int, stop: int, /) -> int: ...
    def getrandbits(self, k: int, /) -> int: ...
    def uniform(self, a: float, b: float, /) -> float: ...


class Machine(Protocol):
    def receive(self, events: Sequence[Event], now_ns: int) -> None: ...
    def handle_timer(self, now_ns: int) -> None: ...
    def next_timer(self) -> int | None: ...
    def take_effects(self) -> list[Effect]: ...
    def persisted(self, number: int, now_ns: int) -> None: ...
    def persist_failed(self, number: int, error: str, now_ns: int) -> None: ...


class Ports(Protocol):
    """The world as a machine's driver sees it."""

    def perform(self, effects: Sequence[Effect]) -> None:
        """Carry out, or hand to those who do; never waits."""

    def wake_at(self, when_ns: int | None) -> None:
        """Call ``feed`` again at ``when_ns`` at the latest; None: only when an event arrives."""


class Gate:
    """Keeps effects until the write that they wait for is durable; what may go leaves in the order it was put in.

    Invariants: ``durable < written`` only while a write is in flight; an effect never waits for a write not yet handed out.
    """

    __slots__ = ("_failed", "_ready", "_waiting", "durable", "written")

    def __init__(self) -> None:
        self.written = 0
        self.durable = 0
        self._ready: list[Effect] = []
        self._waiting: deque[tuple[int, Effect]] = deque()
        self._failed = False

    def put(self, effect: Effect, after: int = 0) -> None:
        invariant(after <= self.written, "an effect waits for a write that was never handed out", after=after)
        if after <= self.durable:
            self._ready.append(effect)
        elif not self._failed:
            self._waiting.append((after, effect))

    def put_run(self, effects: Iterable[Effect]) -> None:
        """Effects that wait for nothing."""
        self._ready.extend(effects)

    def persist(self, record: bytes) -> int:
        """Hand out the next write; its number is what dependent effects pass as ``after``."""
        self.written += 1
        self._ready.append(Persist(self.written, record))
        return self.written

    def write_checkpoint(self, state: bytes, records: Sequence[bytes]) -> int:
        """The same for a checkpoint."""
        self.written += 1
        self._ready.append(WriteCheckpoint(self.written, state, records))
        return self.written

    def persisted(self, number: int) -> None:
        invariant(self.durable <= number <= self.written, "a write was confirmed that was never handed out", number=number)
        self.durable = number
        waiting = self._waiting
        held: deque[tuple[int, Effect]] = deque()
        while waiting:
            after, effect = waiting.popleft()
            if after <= number:
                self._ready.append(effect)
            else:
                held.append((after, effect))
        self._waiting = held

    def fail(self) -> None:
        """A write failed: what waits for it, or for any later one, will never be carried out."""
        self._failed = True
        self._waiting.clear()

    def take(self) -> list[Effect]:
        ready, self._ready = self._ready, []
        return ready

    def __iter__(self) -> Iterator[tuple[int, Effect]]:
        """What still waits, for checks and traces."""
        return iter(self._waiting)


def feed(machine: Machine, events: Sequence[Event], now_ns: int, ports: Ports) -> None:
    """One step: completions and events in, a due timer fired, effects out, the next timer asked for."""
    batch: list[Event] = []
    for event in events:
        if isinstance(event, (Persisted, PersistFailed)):
            if batch:
                machine.receive(batch, now_ns)
                batch = []
            if isinstance(event, Persisted):
                machine.persisted(event.number, now_ns)
            else:
                machine.persist_failed(event.number, event.error, now_ns)
        else:
            batch.append(event)
    if batch:
        machine.receive(batch, now_ns)
    timer = machine.next_timer()
    if timer is not None and timer <= now_ns:
        machine.handle_timer(now_ns)
    effects = machine.take_effects()
    if effects:
        ports.perform(effects)
    ports.wake_at(machine.next_timer())
