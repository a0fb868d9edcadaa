"""A simulated process: one machine, driven through the contract's ``feed`` as the trio driver does it.

What others post within its wake-up delay is one batch. Between two effects of one batch it can be killed (``crash_within``).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from ha_core.machines.contract import Effect, Event, Machine, Persist, Persisted, PersistFailed, WriteCheckpoint, feed
from ha_core.testing.simulator.clock import SimClock
from ha_core.testing.simulator.core import MICROSECOND, SECOND, Simulation, TooManyViolationsError
from ha_core.testing.simulator.disk import SimDisk

E = TypeVar("E", bound=Effect)


class Observer(Protocol):
    """Told when a process ends and begins; the networks are."""

    def process_down(self, process: SimProcess, *, silent: bool) -> None: ...
    def process_up(self, process: SimProcess) -> None: ...


class Host(Protocol):
    """What a process needs to know of its host; SimHost has it."""

    is_up: bool


class _CrashedInStepError(Exception):
    """Unwinds a step whose process was killed between two effects."""


class SimProcess:
    """Runs the machine that ``build(process)`` makes, at start and again after each crash, from what its disk holds then."""

    def __init__(
        self,
        sim: Simulation,
        name: str,
        build: Callable[[SimProcess], Machine],
        *,
        disk: SimDisk | None = None,
        clock: SimClock | None = None,
        wake_ns: int = 50 * MICROSECOND,
        fail_stop: bool = True,
        start: bool = True,
    ) -> None:
        """``wake_ns`` is the mean time from a post, or a due timer, to the step. ``fail_stop``: after the step that tells the
        machine of a failed write the process ends, and starts again some time later. ``start`` begins its first life at once.
        """
        self.sim = sim
        self.name = name
        self.disk = disk
        self.clock = clock or SimClock(sim)
        self.rng: random.Random = sim.stream(f"process/{name}")
        """The machine's own randomness: one stream for all its lives."""
        self.machine: Machine | None = None
        self.host: Host | None = None
        """Where it runs, if that is more than itself (``SimHost.add``)."""
        self.lives = 0
        self.failed = ""
        """The text of the write error that poisoned its disk in this life."""
        self._build = build
        self._fail_stop = fail_stop
        self._wake_ns = wake_ns
        self._lag = sim.stream(f"lag/{name}")
        self._handlers: dict[type[Effect], Callable[[Effect], None]] = {}
        self._observers: list[Observer] = []
        self._events: list[Event] = []
        self._due_ns: int | None = None
        self._ticket = 0
        self._thaw_ns = 0
        self._fuse = -1
        self._stepping = False
        if start:
            self.start()

    @property
    def alive(self) -> bool:
        return self.machine is not None

    @property
    def frozen(self) -> bool:
        return self._thaw_ns > self.sim.now_ns

    def now_ns(self) -> int:
        """Its host's clock."""
        return self.clock.now_ns()

    # -- for build and for shells --

    def on(self, kind: type[E], perform: Callable[[E], None]) -> None:
        """Carry out effects of class ``kind`` with ``perform``; kept over restarts, the last call wins."""
        self._handlers[kind] = perform  # type: ignore[assignment]  # called with this kind alone

    def observe(self, observer: Observer) -> None:
        if observer not in self._observers:
            self._observers.append(observer)

    def post(self, *events: Event) -> None:
        """Queue events for its next step; dropped while it is down."""
        if self.machine is not None:
            self._events.extend(events)
            if not self._stepping:
                self._schedule(self.sim.now_ns + self._delay())

    # -- life and death --

    def start(self) -> None:
        """Begin a life: build the machine and let it make its first step. Nothing happens while its host is down: booting
        starts it."""
        if self.machine is not None or (self.host is not None and not self.host.is_up):
            return
        self.lives += 1
        self.failed = ""
        self._fuse = -1
        self._events = []
        self._ticket += 1
        self._due_ns = None
        self.sim.trace("start", self.name, self.lives)
        try:
            self.machine = self._build(self)
        except Exception as error:
            self.sim.violate_error(f"{self.name} (start)", error)
            return
        for observer in self._observers:
            observer.process_up(self)
        self._schedule(self.sim.now_ns + self._delay())

    def crash(self, *, silent: bool = False, kind: str = "crash") -> None:
        """Kill it: unsynced writes are lost, connections reset (``silent``: without a packet, as in a power loss)."""
        if self.machine is None:
            return
        self.sim.fault(kind)
        self._die(silent=silent)

    def end(self, *, silent: bool = False) -> None:
        """End it without counting a fault; its writes in flight may be lost nevertheless."""
        if self.machine is not None:
            self._die(silent=silent)

    def restart(self) -> None:
        """Start again; crash first if it runs."""
        self.crash()
        self.start()

    def crash_within(self, effect_count: int) -> None:
        """Kill it just before it carries out its ``effect_count``-th effect from now (0: the next one; -1: not at all)."""
        self._fuse = effect_count

    def freeze(self, duration_ns: int) -> None:
        """Stand still (SIGSTOP): no step until then, events wait."""
        self.sim.fault("freeze")
        self.sim.trace("freeze", self.name, duration_ns)
        self._thaw_ns = max(self._thaw_ns, self.sim.now_ns + duration_ns)

    def thaw(self) -> None:
        self._thaw_ns = self.sim.now_ns
        if self.machine is not None:
            self._schedule(self.sim.now_ns)

    def _die(self, *, silent: bool) -> None:
        self.sim.trace("down", self.name, int(silent))
        self.machine = None
        self._ticket += 1
        self._due_ns = None
        self._events = []
        self._thaw_ns = 0
        if self.disk is not None:
            self.disk.crash()
        for observer in self._observers:
            observer.process_down(self, silent=silent)

    # -- steps --

    def _delay(self) -> int:
        return int(self._lag.random() * 2 * self._wake_ns)

    def _schedule(self, when_ns: int) -> None:
        if self._due_ns is None or when_ns < self._due_ns:
            self._due_ns = when_ns
            self._ticket += 1
            self.sim.at(when_ns, self._wake, self._ticket)

    def _wake(self, ticket: int) -> None:
        if ticket != self._ticket or self.machine is None:
            return
        self._due_ns = None
        if self._thaw_ns > self.sim.now_ns:
            self._schedule(self._thaw_ns)
            return
        self._step(self.machine)

    def _step(self, machine: Machine) -> None:
        events, self._events = self._events, []
        sim = self.sim
        sim.trace("step", self.name, self.lives, *[type(event).__name__ for event in events])
        self._stepping = True
        try:
            feed(machine, events, self.clock.now_ns(), self)
            check = getattr(machine, "check", None)
            if check is not None and self.machine is machine:
                check()
        except _CrashedInStepError:
            pass
        except TooManyViolationsError:
            raise
        except Exception as error:
            sim.violate_error(self.name, error)
            if self.machine is machine:
                self._die(silent=False)
        finally:
            self._stepping = False
        if self.failed and self._fail_stop and self.machine is machine and not _failure_queued(self._events):
            self._die(silent=False)
            sim.after(int(self._lag.uniform(0.05, 0.5) * SECOND), self.start)
        elif self._events and self.machine is machine:
            self._schedule(sim.now_ns + self._delay())
        sim.stepped(self.name)

    def perform(self, effects: Sequence[Effect]) -> None:
        machine = self.machine
        handlers = self._handlers
        trace = self.sim.trace
        for effect in effects:
            if self._fuse >= 0:
                if self._fuse == 0:
                    self.crash()
                    raise _CrashedInStepError
                self._fuse -= 1
            kind = type(effect)
            trace("effect", self.name, kind.__name__)
            handler = handlers.get(kind)
            if handler is not None:
                handler(effect)
            elif kind is Persist or kind is WriteCheckpoint:
                self._write(effect)
            else:
                raise TypeError(f"{self.name}: nothing carries out {kind.__name__}; say process.on({kind.__name__}, ...)")
            if self.machine is not machine:
                raise _CrashedInStepError

    def wake_at(self, when_ns: int | None) -> None:
        if when_ns is not None and self.machine is not None:
            due = self.clock.virtual(when_ns)
            self._schedule((due if due > self.sim.now_ns else self.sim.now_ns) + self._delay())

    def _write(self, effect: Effect) -> None:
        disk, lives = self.disk, self.lives
        if disk is None:
            raise TypeError(f"{self.name}: {type(effect).__name__} without a disk; give SimProcess one")

        def done(error: str | None) -> None:
            if self.lives != lives or self.machine is None:
                return
            assert isinstance(effect, (Persist, WriteCheckpoint))
            if error is None:
                if self._events and isinstance(self._events[-1], Persisted):
                    self._events.pop()
                self.post(Persisted(effect.number))
            else:
                self.failed = error
                self.post(PersistFailed(effect.number, error))

        if isinstance(effect, Persist):
            disk.append(effect.record, done)
        elif isinstance(effect, WriteCheckpoint):
            disk.checkpoint(effect.state, effect.records, done)


def _failure_queued(events: Sequence[Event]) -> bool:
    return any(isinstance(event, PersistFailed) for event in events)
