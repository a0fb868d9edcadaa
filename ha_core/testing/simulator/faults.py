"""Fault kinds, and ``Chaos``, which begins and ends them at random as the seed's swarm allows.

A kind is counted when it takes effect (a packet was lost, an unsynced write was gone), not when it is merely possible, so that
"never exercised" means what it says.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import attrs

from ha_core.testing.simulator.core import MILLISECOND, SECOND, Simulation, Timer
from ha_core.testing.simulator.network import Cut, Flow, SimNetwork

PACKET_FAULTS = ("loss", "delay", "reorder", "duplicate", "replay", "corrupt")
PATH_FAULTS = ("path-cut", "one-way-cut", "partition", "clog")
NETWORK_FAULTS = (*PACKET_FAULTS, *PATH_FAULTS, "reset")
DISK_FAULTS = ("disk-crash", "disk-torn", "disk-error", "disk-full", "disk-slow")
PROCESS_FAULTS = ("crash", "power-loss", "freeze")

End = Callable[[], None]


@attrs.frozen
class Fault:
    """``begin(rng, amount)`` starts one instance and answers what ends it (None: it ends by itself)."""

    kind: str
    begin: Callable[[random.Random, float], End | None]
    weight: float = 1.0


class Device(Protocol):
    """What disk faults need; SimDevice has it."""

    def slow(self, extra_ns: int) -> None: ...
    def set_full(self, full: bool) -> None: ...
    def fail_next(self, error: str = ...) -> None: ...


class Mortal(Protocol):
    """What process faults need; SimProcess and SimHost have it."""

    @property
    def alive(self) -> bool: ...
    def start(self) -> None: ...
    def crash(self, *, silent: bool = ..., kind: str = ...) -> None: ...
    def crash_within(self, effect_count: int) -> None: ...
    def freeze(self, duration_ns: int) -> None: ...
    def thaw(self) -> None: ...


class Chaos:
    """Begins a fault every now and then, ends it after a while; ``stop`` ends all and lets everything recover."""

    def __init__(
        self,
        sim: Simulation,
        faults: Sequence[Fault],
        swarm: Mapping[str, float],
        *,
        mean_interval_ns: int = 300 * MILLISECOND,
        longest_ns: int = 5 * SECOND,
    ) -> None:
        """Kinds that ``swarm`` (of ``Simulation.swarm``) has at 0.0 are left out; ``longest_ns`` bounds one instance."""
        self._sim = sim
        self._faults = [fault for fault in faults if swarm.get(fault.kind, 0.0) > 0.0]
        self._swarm = swarm
        self._rng = sim.child_stream("chaos")
        self._mean_interval_ns = mean_interval_ns
        self._longest_ns = longest_ns
        self._running = False
        self._timer: Timer | None = None
        self._ends: dict[int, End] = {}
        self._number = 0

    def start(self) -> None:
        self._running = True
        self._next()

    def stop(self) -> None:
        """End every fault that still lasts, and begin no more."""
        self._running = False
        if self._timer is not None:
            self._timer.cancel()
        for number in list(self._ends):
            self._end(number)

    def _next(self) -> None:
        self._timer = self._sim.after(int(self._rng.expovariate(1.0) * self._mean_interval_ns), self._strike)

    def _strike(self) -> None:
        if not self._running or not self._faults:
            return
        rng = self._rng
        fault = rng.choices(self._faults, [fault.weight for fault in self._faults])[0]
        longest = math.log10(self._longest_ns / MILLISECOND)
        duration = int(10 ** rng.uniform(1.0, longest) * MILLISECOND)
        end = fault.begin(rng, self._swarm[fault.kind])
        if end is not None:
            self._number += 1
            self._ends[self._number] = end
            self._sim.after(duration, self._end, self._number)
        self._next()

    def _end(self, number: int) -> None:
        end = self._ends.pop(number, None)
        if end is not None:
            end()


def network_faults(network: SimNetwork, *, worst_loss: float = 0.3) -> list[Fault]:
    """Packets and paths of a network, each time on some flows drawn at random."""

    def some_flows(rng: random.Random) -> list[Flow]:
        match rng.randrange(4):
            case 0:
                return network.flows()
            case 1:
                return network.flows(link=rng.choice(network.links))
            case 2:
                host = rng.choice(network.hosts)
                return network.between(host, None)
            case _:
                return [rng.choice(network.flows())]

    def packets(kind: str) -> Fault:
        def begin(rng: random.Random, amount: float) -> End:
            flows = some_flows(rng)
            for flow in flows:
                if kind == "delay":
                    flow.delay_ns, flow.jitter_ns = int(amount * 20 * MILLISECOND), int(amount * 100 * MILLISECOND)
                else:
                    setattr(flow, kind, amount * worst_loss)

            def end() -> None:
                for flow in flows:
                    if kind == "delay":
                        flow.delay_ns = flow.jitter_ns = 0
                    else:
                        setattr(flow, kind, 0.0)

            return end

        return Fault(kind, begin)

    def two(rng: random.Random) -> tuple[str, str]:
        one, other = rng.sample(network.hosts, 2)
        return one, other

    def path_cut(rng: random.Random, amount: float) -> End:
        link = rng.choice(network.links)
        cut = (
            network.cut_path(*two(rng), link) if rng.random() < 0.6 else network.cut_path(rng.choice(network.hosts), None, link)
        )
        return cut.heal

    def one_way(rng: random.Random, amount: float) -> End:
        source, target = two(rng)
        link = rng.choice(network.links) if rng.random() < 0.6 else None
        return network.cut_one_way(source, target if rng.random() < 0.7 else None, link).heal

    def partition(rng: random.Random, amount: float) -> End:
        cut: Cut
        if rng.random() < 0.5:
            cut = network.isolate(rng.choice(network.hosts))
        else:
            cut = network.partition(rng.sample(network.hosts, rng.randrange(1, len(network.hosts))))
        return cut.heal

    def clog(rng: random.Random, amount: float) -> None:
        network.clog(some_flows(rng), int(rng.uniform(5, 1500 * amount + 6)) * MILLISECOND)

    return [
        *(packets(kind) for kind in PACKET_FAULTS),
        Fault("path-cut", path_cut, 2.0),
        Fault("one-way-cut", one_way),
        Fault("partition", partition),
        Fault("clog", clog),
    ]


def reset_faults(reset: Callable[[str, str], object], names: Sequence[str]) -> list[Fault]:
    """Resets between two of ``names`` by ``reset(one, other)`` (of SimMessages or SimConnections)."""

    def begin(rng: random.Random, amount: float) -> None:
        one, other = rng.sample(list(names), 2)
        reset(one, other)

    return [Fault("reset", begin)]


def disk_faults(devices: Sequence[Device]) -> list[Fault]:
    """Errors, a full device, slow flushes. What a crash does to a disk comes with the process faults."""

    def error(rng: random.Random, amount: float) -> End:
        device = rng.choice(devices)
        device.fail_next()
        return lambda: device.fail_next("")

    def full(rng: random.Random, amount: float) -> End:
        device = rng.choice(devices)
        device.set_full(True)
        return lambda: device.set_full(False)

    def slow(rng: random.Random, amount: float) -> End:
        device = rng.choice(devices)
        device.slow(int(rng.uniform(1, 2 + 500 * amount)) * MILLISECOND)
        return lambda: device.slow(0)

    return [Fault("disk-error", error, 0.5), Fault("disk-full", full, 0.5), Fault("disk-slow", slow)]


def process_faults(processes: Sequence[Mortal], *, min_alive: int = 0, longest_freeze_ns: int = 3 * SECOND) -> list[Fault]:
    """Crashes (at once, or between two effects soon), power losses and freezes; the dead start again when the fault ends."""

    def victim(rng: random.Random) -> Mortal | None:
        alive = [process for process in processes if process.alive]
        return rng.choice(alive) if len(alive) > min_alive else None

    def crash(rng: random.Random, amount: float) -> End | None:
        process = victim(rng)
        if process is None:
            return None
        if rng.random() < 0.5:
            process.crash_within(rng.randrange(0, 30))
        else:
            process.crash()

        def end() -> None:
            process.crash_within(-1)
            process.start()

        return end

    def power_loss(rng: random.Random, amount: float) -> End | None:
        process = victim(rng)
        if process is None:
            return None
        process.crash(silent=True, kind="power-loss")
        return process.start

    def freeze(rng: random.Random, amount: float) -> End | None:
        process = victim(rng)
        if process is None:
            return None
        process.freeze(int(10 ** rng.uniform(0.0, math.log10(longest_freeze_ns / MILLISECOND)) * MILLISECOND))
        return process.thaw

    return [Fault("crash", crash, 2.0), Fault("power-loss", power_loss), Fault("freeze", freeze)]
