"""What the flash store does to flash: bytes programmed per byte appended, and how even the wear is. On a simulated NAND.

200-byte values under 1,000 keys, checkpoints as they fall due. The padding floor is what whole program units alone would cost.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import lru_cache

import attrs

from benchmarks.harness import Case, Goal, at_most
from ha_core.storage.flash_device import Geometry
from ha_core.storage.flash_log import FlashLog, FlashStats
from ha_core.storage.flash_nand import SimulatedNand

VALUE_BYTES = 200


@attrs.frozen
class Parameters:
    puts: int
    keys: int


SIZES: Mapping[str, Parameters] = {
    "smoke": Parameters(600, 20),
    "quick": Parameters(60_000, 500),
    "full": Parameters(200_000, 1000),
}
GEOMETRIES = {"4k-16": (4096, 16), "4k-256": (4096, 256), "128k-2k": (131_072, 2048), "128k-4k": (131_072, 4096)}
STATE_SHARE = 0.08
"""How much of the device the state fills; more leaves less room for the log and takes more checkpoints."""


@lru_cache(maxsize=1)
def live(block: int, unit: int, group: int, share: float, parameters: Parameters, seed: int) -> FlashStats:
    state_bytes = parameters.keys * (VALUE_BYTES + 2)
    blocks = max(16, int(state_bytes / share / block))
    log = FlashLog(SimulatedNand(Geometry(block, unit, blocks)), "nand", incarnation=bytes(16), clock_ns=lambda: 0)
    log.recover()
    draw = random.Random(seed)
    for _ in range(parameters.puts // group):
        log.append([draw.randbytes(VALUE_BYTES) for _ in range(group)])
        if log.stats().checkpoint_due:
            log.checkpoint(draw.randbytes(state_bytes), [])
    return log.stats()


def cases(parameters: Parameters, seed: int) -> Sequence[Case]:
    found = []
    for name, (block, unit) in GEOMETRIES.items():
        for group in (1, 10):
            found.append(
                _amplification(f"amplification-{name}-group{group}", (block, unit, group, STATE_SHARE), parameters, seed)
            )
    found.append(_amplification("amplification-4k-16-group1-state22", (4096, 16, 1, 0.22), parameters, seed))
    found.append(_wear(parameters, seed))
    return found


def _amplification(name: str, life: tuple[int, int, int, float], parameters: Parameters, seed: int) -> Case:
    _, unit, group, share = life
    payload = VALUE_BYTES * group
    floor = -(-payload // unit) * unit / payload
    limit = max(1.3, 1.3 * floor)

    def measure() -> Sequence[float]:
        stats = live(*life, parameters, seed)
        return [stats.programmed_bytes / stats.appended_bytes]

    words = f"at most {limit:.2f} (1.3, or 1.3 times the padding floor of {floor:.2f}), the state filling {share:.0%}"
    return Case(
        name=name, unit="programmed/appended", measure=measure, goal=Goal(words=words, met=at_most(limit)), warm_up=False
    )


def _wear(parameters: Parameters, seed: int) -> Case:
    def measure() -> Sequence[float]:
        stats = live(4096, 16, 1, 0.22, parameters, seed)
        return [stats.wear_max / max(1, stats.wear_min)]

    goal = Goal(words="at most 1.25", met=at_most(1.25))
    return Case(name="wear", unit="max/min erases", measure=measure, goal=goal, warm_up=False)
