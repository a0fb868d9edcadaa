"""What an outbox has room for (I19): the rule that every store follows.

A channel may hold as much as is free. So one busy channel gets half of the outbox, two a third each, and a channel that was
quiet always finds room. Replies are always taken: their requests were counted when they were made.
"""

from __future__ import annotations

from typing import Final

MESSAGE_BYTES: Final = 32
"""What a message counts beyond its body."""


def admits(used_bytes: int, size: int, total_bytes: int, limit_bytes: int) -> bool:
    """Whether a channel that holds ``used_bytes`` of ``total_bytes`` in an outbox for ``limit_bytes`` may add ``size``."""
    return used_bytes + size <= limit_bytes - total_bytes
