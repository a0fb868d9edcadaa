"""The core: one virtual clock, one heap of events, one seed, one trace.

Rules:

* Everything random comes from ``Simulation.stream(name)``; a stream's numbers depend on the seed and its name alone, so that a
  new part that draws from its own stream does not change what the others draw.
* Events at the same instant run in the order in which they were scheduled. Nothing depends on the order of a set or on hash().
* The trace is hashed in chunks (``marshal`` version 0 of tuples of plain data: no references, no interning), so that a
  traced line costs about 0.2 us.
"""

from __future__ import annotations

import heapq
import marshal
import random
import re
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b

import attrs

from ha_core.errors import InvariantError

TraceField = int | str | bytes | None
"""What a trace line may consist of."""

_CHUNK = 512
_INVARIANT = re.compile(r"[A-Z]\d+\b")
_MAX_VIOLATIONS = 20

MICROSECOND = 1_000
MILLISECOND = 1_000_000
SECOND = 1_000_000_000


@attrs.frozen
class Violation:
    """An invariant that did not hold: ``invariant`` is its number in docs/guarantees.md (``I2``), or ``error`` for an
    exception out of a machine; ``at`` is in virtual seconds."""

    invariant: str
    at: float
    text: str


class TooManyViolationsError(Exception):
    """Play cannot usefully go on: too many violations, or too many steps. The runner ends the seed here."""


class Timer:
    """A scheduled call; ``cancel`` takes it back."""

    __slots__ = ("_entry",)

    def __init__(self, entry: list[object]) -> None:
        self._entry = entry

    def cancel(self) -> None:
        self._entry[2] = None

    @property
    def when_ns(self) -> int:
        when_ns = self._entry[0]
        assert isinstance(when_ns, int)
        return when_ns


class Simulation:
    """Virtual time, randomness, trace, counted faults and checked invariants of one seed."""

    def __init__(self, seed: int, *, keep_trace: bool = False, max_steps: int = 1_000_000) -> None:
        """``keep_trace`` keeps every trace line for display (``lines``); more than ``max_steps`` steps count as a livelock."""
        self.seed = seed
        self.now_ns = 0
        self.steps = 0
        """Steps of machines so far."""
        self.rng = self.stream("main")
        self.faults: dict[str, int] = {}
        self.checks: dict[str, int] = {}
        self.violations: list[Violation] = []
        self.lines: list[tuple[TraceField, ...]] | None = [] if keep_trace else None
        self._heap: list[list[object]] = []
        self._number = 0
        self._max_steps = max_steps
        self._pending: list[tuple[TraceField, ...]] = []
        self._digest = blake2b(digest_size=16)
        self._children: dict[str, int] = {}
        self._watchers: list[Callable[[str], None]] = []
        self._finishers: list[Callable[[], None]] = []

    # -- randomness --

    def stream(self, name: str) -> random.Random:
        """A generator of its own, drawn from the seed and ``name``."""
        return random.Random(f"{self.seed}/{name}")

    def child_stream(self, name: str) -> random.Random:
        """The same for each of several that have one name: those after the first draw from ``name/2``, ``name/3``, ..."""
        number = self._children[name] = self._children.get(name, 0) + 1
        return self.stream(name if number == 1 else f"{name}/{number}")

    def swarm(self, kinds: Sequence[str], *, share: float = 0.6) -> dict[str, float]:
        """Which fault kinds this seed uses, and how much: kind -> intensity in (0, 1], or 0.0 for off.

        Leaving some out on purpose finds more than always using all of them ("swarm testing"); one seed in ten gets none.
        """
        rng = self.stream("swarm")
        quiet = rng.random() < 0.1
        chosen: dict[str, float] = {}
        for kind in kinds:
            on, amount = rng.random() < share, rng.uniform(0.05, 1.0)
            chosen[kind] = amount if on and not quiet else 0.0
        return chosen

    # -- time --

    def at(self, when_ns: int, call: Callable[..., None], *args: object) -> Timer:
        """Call ``call(*args)`` at a virtual instant (now, if that has passed)."""
        self._number += 1
        entry: list[object] = [when_ns if when_ns > self.now_ns else self.now_ns, self._number, call, args]
        heapq.heappush(self._heap, entry)
        return Timer(entry)

    def after(self, delay_ns: int, call: Callable[..., None], *args: object) -> Timer:
        return self.at(self.now_ns + delay_ns, call, *args)

    def every(self, interval_ns: int, call: Callable[[], None]) -> None:
        """Call again and again, until the simulation ends."""

        def again() -> None:
            call()
            self.after(interval_ns, again)

        self.after(interval_ns, again)

    def run_until(self, when_ns: int, *, stop: Callable[[], bool] | None = None) -> bool:
        """Play up to ``when_ns``; with ``stop``, end early as soon as it holds.

        Returns:
            True if ``stop`` held (False without one).
        """
        heap = self._heap
        pop = heapq.heappop
        if stop is not None and stop():
            return True
        while heap and heap[0][0] <= when_ns:  # type: ignore[operator]  # the entry is a list, for its speed
            when, _, call, args = pop(heap)
            if call is None:
                continue
            self.now_ns = when  # type: ignore[assignment]
            call(*args)  # type: ignore[operator, misc]
            if stop is not None and stop():
                return True
        self.now_ns = max(self.now_ns, when_ns)
        return False

    def run_for(self, duration_ns: int, *, stop: Callable[[], bool] | None = None) -> bool:
        return self.run_until(self.now_ns + duration_ns, stop=stop)

    # -- trace --

    def trace(self, *fields: TraceField) -> None:
        """Add a line to the trace: plain data only, ``bytes`` short (a checksum in place of a body)."""
        self._pending.append((self.now_ns, *fields))
        if len(self._pending) >= _CHUNK:
            self._flush_trace()

    def _flush_trace(self) -> None:
        pending = self._pending
        if pending:
            self._digest.update(marshal.dumps(pending, 0))
            if self.lines is not None:
                self.lines.extend(pending)
            self._pending = []

    @property
    def trace_hash(self) -> str:
        """Digest of everything traced so far."""
        self._flush_trace()
        return self._digest.hexdigest()

    # -- faults and invariants --

    def fault(self, kind: str, count: int = 1) -> None:
        """Count a fault that took effect."""
        self.faults[kind] = self.faults.get(kind, 0) + count

    def checked(self, invariant: str, count: int = 1) -> None:
        """Count that ``invariant`` was checked on something that could have violated it."""
        self.checks[invariant] = self.checks.get(invariant, 0) + count

    def violate(self, invariant: str, text: str) -> None:
        """Report that ``invariant`` does not hold; play goes on, so that one seed shows what follows from it."""
        self.trace("violation", invariant, text)
        self.violations.append(Violation(invariant, self.now_ns / SECOND, text))
        if len(self.violations) >= _MAX_VIOLATIONS:
            raise TooManyViolationsError(invariant)

    def violate_error(self, who: str, error: BaseException) -> None:
        """Report an exception out of a machine; an InvariantError that begins with a number (``I42 ...``) counts as that."""
        text = f"{who}: {type(error).__name__}: {error}"
        found = _INVARIANT.match(str(error)) if isinstance(error, InvariantError) else None
        self.violate(found.group() if found else "error", text)

    def watch(self, check: Callable[[str], None]) -> None:
        """Call ``check(process name)`` after every step of every process."""
        self._watchers.append(check)

    def at_end(self, check: Callable[[], None]) -> None:
        """Call ``check`` when the runner ends the seed."""
        self._finishers.append(check)

    def stepped(self, who: str) -> None:
        """A process made a step: count it and let the watchers look."""
        self.steps += 1
        if self.steps > self._max_steps:
            self.violate("error", f"no end in sight after {self.steps:,} steps: {who} was last")
            raise TooManyViolationsError(who)
        for check in self._watchers:
            check(who)

    def finish(self) -> None:
        for check in self._finishers:
            check()


def merge_counts(into: dict[str, int], more: Mapping[str, int]) -> None:
    for key, count in more.items():
        into[key] = into.get(key, 0) + count
