"""Which process hangs, and when a dead one is started again: decided without I/O, for the guard and for the agents' watchdogs.

A process hangs when its beats stay away for longer than its limit. Never counted against it: time in which the watcher itself
stood still (its ticks came late), and time in which the process waited for a processor (the kernel's run delay), up to once
the limit, so that a busy loop on a full machine is still found. A stopped process (state T) is judged at once.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass


class Verdict(enum.Enum):
    HUNG = "hung"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Sample:
    """What the kernel says of a process: ``state`` letter of /proc/PID/stat, and its main thread's total run delay."""

    state: str
    run_delay_ns: int


@dataclass(slots=True)
class _Watched:
    limit_ns: int
    last_ns: int
    delay_seen_ns: int
    excused_ns: int
    beaten: bool


class Watch:
    """The watched processes by name. Call ``tick`` every ``tick_ns``, after the beats that have arrived were told."""

    def __init__(self, tick_ns: int, start_ns: int) -> None:
        """``start_ns``: how long a new process may take until its first beat."""
        self.tick_ns = tick_ns
        self._start_ns = start_ns
        self._watched: dict[str, _Watched] = {}
        self._last_tick_ns = 0

    def add(self, name: str, limit_ns: int, now_ns: int, *, started: bool) -> None:
        """Begin to watch; ``started`` False: it has just been launched and gets its time until the first beat."""
        self._watched[name] = _Watched(limit_ns, now_ns, -1, 0, started)

    def remove(self, name: str) -> None:
        self._watched.pop(name, None)

    def __contains__(self, name: str) -> bool:
        return name in self._watched

    def beat(self, name: str, now_ns: int) -> None:
        watched = self._watched.get(name)
        if watched is not None:
            watched.last_ns, watched.beaten, watched.excused_ns = now_ns, True, 0

    def silence_ns(self, name: str, now_ns: int) -> int:
        return now_ns - self._watched[name].last_ns

    def tick(self, samples: Mapping[str, Sample], now_ns: int) -> list[tuple[str, Verdict]]:
        """Judge all; ``samples`` has those processes whose /proc entry could be read."""
        lag_ns = now_ns - self._last_tick_ns - self.tick_ns if self._last_tick_ns else 0
        self._last_tick_ns = now_ns
        verdicts: list[tuple[str, Verdict]] = []
        for name in sorted(self._watched):
            watched = self._watched[name]
            if lag_ns > self.tick_ns:
                watched.last_ns = min(now_ns, watched.last_ns + lag_ns)
            sample = samples.get(name)
            if sample is not None:
                self._excuse(watched, sample)
                if sample.state == "T":
                    verdicts.append((name, Verdict.STOPPED))
                    continue
            limit_ns = watched.limit_ns if watched.beaten else max(watched.limit_ns, self._start_ns)
            if now_ns - watched.last_ns > limit_ns + watched.excused_ns:
                verdicts.append((name, Verdict.HUNG))
        return verdicts

    def _excuse(self, watched: _Watched, sample: Sample) -> None:
        if watched.delay_seen_ns >= 0:
            waited_ns = max(0, sample.run_delay_ns - watched.delay_seen_ns)
            watched.excused_ns = min(watched.limit_ns, watched.excused_ns + waited_ns)
        watched.delay_seen_ns = sample.run_delay_ns


@dataclass(slots=True)
class Restarts:
    """When to launch a process again: at once, but ever later while it dies young."""

    first_ns: int = 100_000_000
    longest_ns: int = 5_000_000_000
    young_ns: int = 5_000_000_000
    count: int = 0
    _early: int = 0
    _launched_ns: int = 0

    def launched(self, now_ns: int) -> None:
        self._launched_ns = now_ns

    def died(self, now_ns: int) -> int:
        """The instant from which it may be launched again."""
        self.count += 1
        if now_ns - self._launched_ns >= self.young_ns:
            self._early = 0
        self._early += 1
        if self._early <= 2:
            return now_ns
        return now_ns + min(self.longest_ns, self.first_ns << min(self._early - 3, 20))
