"""When leases run out, as the leader counts (rules L2, L3, L5 and L6 of docs/guarantees.md, for the database's own leases).

Renewals live in the leader's memory only. A lease whose end was proposed is never renewed again, whatever becomes of the
proposal. A new leader counts the leases that it finds from the last moment at which an earlier leader can have confirmed one.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from ha_core.machines.keyvalue.model import LeaseState


class LeaseTimes:
    __slots__ = ("_deadlines", "_ending", "_heap")

    def __init__(self) -> None:
        self._deadlines: dict[int, int] = {}
        self._ending: dict[int, None] = {}
        self._heap: list[tuple[int, int]] = []
        """(deadline, token); an entry that is older than the token's deadline is skipped."""

    def lead(self, leases: Mapping[int, LeaseState], counted_from_ns: int) -> None:
        """Begin to count: this replica leads and has applied its own first entry."""
        self.clear()
        for token, lease in leases.items():
            self._set(token, counted_from_ns + lease.ttl_ns)

    def clear(self) -> None:
        """This replica does not lead (any more)."""
        self._deadlines.clear()
        self._ending.clear()
        self._heap.clear()

    def granted(self, token: int, ttl_ns: int, now_ns: int) -> None:
        if token not in self._ending:
            self._set(token, now_ns + ttl_ns)

    def renew(self, token: int, ttl_ns: int, arrived_ns: int) -> bool:
        """Count from ``arrived_ns``; a quorum round that began after it has confirmed that we lead. False: it is ending."""
        deadline = self._deadlines.get(token)
        if deadline is None or token in self._ending:
            return False
        if arrived_ns + ttl_ns > deadline:
            self._set(token, arrived_ns + ttl_ns)
        return True

    def end(self, token: int) -> None:
        """Its Revoke is being proposed."""
        self._ending[token] = None

    def take_expired(self, now_ns: int, leases: Mapping[int, LeaseState]) -> Sequence[int]:
        """The leases whose end must be proposed now; each is tried again as long as it is not gone."""
        expired: list[int] = []
        heap = self._heap
        while heap and heap[0][0] <= now_ns:
            deadline, token = heapq.heappop(heap)
            if self._deadlines.get(token) != deadline:
                continue
            del self._deadlines[token]
            if token in leases:
                self._ending[token] = None
                expired.append(token)
            else:
                self._ending.pop(token, None)
        return expired

    def retry(self, token: int, at_ns: int) -> None:
        """The proposal to end it was dropped."""
        self._set(token, at_ns)

    def prune(self, leases: Mapping[int, LeaseState]) -> None:
        """Forget what is gone."""
        self._deadlines = {token: deadline for token, deadline in self._deadlines.items() if token in leases}
        self._ending = {token: None for token in self._ending if token in leases}

    def next_timer(self) -> int | None:
        return self._heap[0][0] if self._heap else None

    def _set(self, token: int, deadline_ns: int) -> None:
        self._deadlines[token] = deadline_ns
        heapq.heappush(self._heap, (deadline_ns, token))
