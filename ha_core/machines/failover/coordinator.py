"""The active primary's hand: proposes what the planner finds, one plan at a time.

Volatile. A plan is proposed only once everything of the plan before is decided, so no plan is made on a view that its own
commands are about to change; and since each command names what it was derived from, one that a dead coordinator left behind is
either applied or refused, never done twice (H8). Nothing is decided without a quorum: a proposal that does not commit is no
decision (I47).

Who takes office first lets the hosts report: the first plan waits until every host has renewed, but not for long. Else, after a
cold start, everything would be placed on the host that happens to be first.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from ha_core.ids import HostName
from ha_core.machines.failover.commands import Command
from ha_core.machines.failover.inventory import Inventory
from ha_core.machines.failover.planner import Plan, Waiting, plan
from ha_core.machines.failover.records import HostState, Role

GATHER_RENEWALS: Final = 4
"""How many renewals the first plan waits at most: a guard's ask, its first renewal, and as much again. Far less than a lease, so
no failover waits for it."""


class Coordinator:
    def __init__(self, inventory: Inventory, renewal_ns: int) -> None:
        self._inventory = inventory
        self._renewal_ns = renewal_ns
        self._leading = False
        self._led_ns = 0
        self._office = 0
        self._open = 0
        self._plan = Plan((), (), None)
        self._again_ns: int | None = None

    def lead(self, now_ns: int) -> None:
        """This node leads and has applied all that was decided before it."""
        self._leading = True
        self._led_ns = now_ns
        self._office += 1
        self._open = 0
        self._again_ns = now_ns

    def follow(self) -> None:
        self._leading = False
        self._open = 0
        self._again_ns = None
        self._plan = Plan((), (), None)

    def look(self, now_ns: int) -> None:
        """The records or the hosts' leases have changed: plan again with the next ``run``."""
        if self._leading:
            self._again_ns = now_ns

    def decided(self, office: int, done: bool, now_ns: int) -> None:
        """One of our proposals was applied (``done``), or refused or lost; ``office`` came with it."""
        if not self._leading or office != self._office:
            return
        self._open -= 1
        self._again_ns = now_ns if done else now_ns + self._renewal_ns

    def next_timer(self) -> int | None:
        return self._again_ns if not self._open else None

    def due(self, now_ns: int) -> bool:
        return self._leading and not self._open and self._again_ns is not None and now_ns >= self._again_ns

    def run(self, fresh: Collection[HostName], now_ns: int) -> tuple[int, Sequence[Command]]:
        """When ``due``: what to propose now, and the office that ``decided`` wants back with each of them."""
        if self._is_gathering(fresh, now_ns):
            self._again_ns = min(now_ns + self._renewal_ns, self._led_ns + GATHER_RENEWALS * self._renewal_ns)
            return self._office, ()
        self._plan = plan(self._inventory, fresh, 2 * self._renewal_ns, now_ns)
        self._again_ns = self._plan.wake_ns
        if self._plan.waiting:
            # A host may become fresh, or stop being so, without a change in the records.
            soon_ns = now_ns + self._renewal_ns
            self._again_ns = soon_ns if self._again_ns is None else min(self._again_ns, soon_ns)
        self._open = len(self._plan.commands)
        return self._office, self._plan.commands

    def _is_gathering(self, fresh: Collection[HostName], now_ns: int) -> bool:
        if now_ns >= self._led_ns + GATHER_RENEWALS * self._renewal_ns:
            return False
        return any(
            name not in fresh and host.state is not HostState.MAINTENANCE and host.role is not Role.WITNESS
            for name, host in self._inventory.hosts.items()
        )

    @property
    def waiting(self) -> Sequence[Waiting]:
        """Who cannot start or move now, and why: for status and explain."""
        return self._plan.waiting
