"""The clock of every shell: CLOCK_BOOTTIME, which counts suspend and never jumps."""

from __future__ import annotations

import time


def now_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
