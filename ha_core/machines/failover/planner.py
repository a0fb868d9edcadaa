"""Inventory and policy in, the next commands out: a pure function that any leader can call at any moment with the same result.

Nothing is remembered between two plans: each step is derived from the records, so that a new coordinator goes on where the old
one died (H8). A plan asks only for what may be done now; what waits is listed with its reason.

Order of starts (I48): by priority (a VM that others depend on has the highest priority of theirs), then by name. A VM starts
only once all that it depends on are *up*, on hosts that live (H11). The next lower priority is issued once the higher ones are
seen starting, or after ``tier_ns``: a host that just died must not hold up the rest. Who waits for a dependency keeps its place
reserved.

Placement: where a rule, an order or a retry wants it; else on the host with the most free capacity, ties by name. Running VMs
move only because a rule, a maintenance or an administrator wants it, and only once their new place is known.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import attrs

from ha_core.ids import HostName, VmName
from ha_core.machines.failover.commands import Assign, Command, Recall, Settle
from ha_core.machines.failover.inventory import Inventory
from ha_core.machines.failover.placement import Room, apart_from, together_with, usable, weight_of
from ha_core.machines.failover.records import (
    AdmissionPolicy,
    HostState,
    Mode,
    Priority,
    RuleKind,
    Run,
    RunState,
    Vm,
    Wanted,
)


@attrs.frozen
class Waiting:
    """A VM that should run or move and cannot yet, and why."""

    vm: VmName
    reason: str


@attrs.frozen
class Plan:
    commands: Sequence[Command]
    waiting: Sequence[Waiting]
    wake_ns: int | None
    """When time alone changes the plan; None: only an event does."""


def plan(inventory: Inventory, fresh: Collection[HostName], tier_ns: int, now_ns: int) -> Plan:
    """What to propose now.

    Args:
        fresh: hosts whose lease this leader confirmed a moment ago; nothing is placed on others.
        tier_ns: how long a lower priority waits for a higher one to be seen starting.
    """
    if inventory.settings.mode is not Mode.ARMED:
        return Plan((), (), None)
    planner = _Planner(inventory, fresh, tier_ns, now_ns)
    planner.start_what_should_run()
    planner.move_what_should_move()
    planner.settle_what_lasted()
    return Plan(tuple(planner.commands), tuple(planner.waiting), planner.wake_ns)


def effective_priorities(vms: dict[VmName, Vm]) -> dict[VmName, int]:
    """Each VM's priority, raised to that of whatever depends on it, directly or not."""
    priorities = {name: int(vm.priority) for name, vm in vms.items()}
    for name in sorted(vms, key=lambda name: (priorities[name], name)):
        queue = [(VmName(other), priorities[name]) for other in vms[name].after]
        while queue:
            other, priority = queue.pop()
            if other in priorities and priority < priorities[other]:
                priorities[other] = priority
                queue.extend((VmName(further), priority) for further in vms[other].after)
    return priorities


class _Planner:
    def __init__(self, inventory: Inventory, fresh: Collection[HostName], tier_ns: int, now_ns: int) -> None:
        self.inventory = inventory
        self.fresh = fresh
        self.fresh = fresh
        self.now_ns = now_ns
        self.tier_ns = tier_ns
        self.commands: list[Command] = []
        self.waiting: list[Waiting] = []
        self.wake_ns: int | None = None
        self.rules = [inventory.rules[name] for name in sorted(inventory.rules)]
        self.priorities = effective_priorities(inventory.vms)
        self.rooms = {
            name: Room.of(host)
            for name, host in sorted(inventory.hosts.items())
            if usable(host) and name in fresh and inventory.lease(name) and inventory.leases[name].armed
        }
        self.occupied: dict[VmName, HostName] = {}
        self.heading: dict[VmName, HostName] = {}
        self._count_what_is_there()

    def _count_what_is_there(self) -> None:
        for name, run in sorted(self.inventory.runs.items()):
            if run.free:
                continue
            vm = self.inventory.vms.get(name) or Vm(name, cpu_mhz=0, memory_mib=0)
            self.occupied[name] = run.host
            self.heading[name] = HostName(run.target or run.host) if run.recalled else run.host
            if run.host in self.rooms:
                self.rooms[run.host].take(vm)
                self.rooms[run.host].starting += run.state in (RunState.ASSIGNED, RunState.STARTING)
            if run.recalled and run.target and run.target != run.host and run.target in self.rooms:
                self.rooms[HostName(run.target)].take(vm)

    def _wake(self, when_ns: int) -> None:
        self.wake_ns = when_ns if self.wake_ns is None else min(self.wake_ns, when_ns)

    def _wait(self, vm: VmName, reason: str, until_ns: int | None = None) -> None:
        self.waiting.append(Waiting(vm, reason))
        if until_ns is not None:
            self._wake(until_ns)

    # -- starts --

    def start_what_should_run(self) -> None:
        highest_unseen = self._highest_unseen_start()
        for vm in sorted(self.inventory.vms.values(), key=lambda vm: (self.priorities[vm.name], vm.priority, vm.name)):
            run = self.inventory.runs.get(vm.name)
            if vm.wanted is not Wanted.STARTED:
                continue
            if run is not None and run.held:
                if self._is_out_of_sight(run.host):
                    self._wait(
                        vm.name, f"it may still run on {run.host}, whose lease has no deadline: needs the host, or fencing"
                    )
                continue
            if run is not None and not self._may_start(vm, run):
                continue
            missing = self._missing(vm)
            until_up = f"until {', '.join(missing)} is up"
            if any(self._stays_down(name) for name in missing):
                self._wait(vm.name, until_up)  # an order may come or not: no room is kept for it
                continue
            host = self._choose(vm, run)
            if host is None:
                self._wait(vm.name, "no host has room and is allowed")
                continue
            self._take(vm, host)
            if missing:
                self._wait(vm.name, until_up)
                continue
            priority = self.priorities[vm.name]
            if highest_unseen is not None and highest_unseen < priority:
                self._wait(vm.name, "until those of higher priority are seen starting")
                continue
            highest_unseen = priority
            self.rooms[host].starting += 1
            token = run.token if run is not None else 0
            self.commands.append(Assign(vm.name, host, self.inventory.leases[host].token, token, _why(run)))  # type: ignore[arg-type]

    def _highest_unseen_start(self) -> int | None:
        """The highest priority among runs that were assigned a moment ago and not yet seen starting."""
        highest: int | None = None
        for name, run in sorted(self.inventory.runs.items()):
            until_ns = self.inventory.since_ns(name, self.now_ns) + self.tier_ns
            if run.state is RunState.ASSIGNED and self.now_ns < until_ns and name in self.priorities:
                highest = self.priorities[name] if highest is None else min(highest, self.priorities[name])
                self._wake(until_ns)
        return highest

    def _up(self, name: VmName) -> bool:
        """Up, and its host was heard of a moment ago: else it may have gone with its host, and nobody knows yet (H11)."""
        run = self.inventory.runs.get(name)
        return self.inventory.vms[name].wanted is Wanted.IGNORED or (run is not None and run.up and run.host in self.fresh)

    def _is_out_of_sight(self, host: HostName) -> bool:
        """It was disarmed, and has not renewed under this leader: its lease can neither go on nor be counted out."""
        lease = self.inventory.leases.get(host)
        return lease is not None and not lease.armed and host not in self.fresh

    def _missing(self, vm: Vm) -> list[VmName]:
        """What it depends on and is not up."""
        return [VmName(name) for name in vm.after if name in self.inventory.vms and not self._up(VmName(name))]

    def _stays_down(self, name: VmName) -> bool:
        """Whether it will not come up unless an administrator acts, or what it depends on will not."""
        vm, run = self.inventory.vms[name], self.inventory.runs.get(name)
        if vm.wanted is Wanted.STOPPED or (run is not None and (run.failed or self._is_disabled(vm, run))):
            return True
        return any(self._stays_down(other) for other in self._missing(vm))

    @staticmethod
    def _is_disabled(vm: Vm, run: Run) -> bool:
        return vm.priority is Priority.DISABLED and not run.held and not run.recalled and not run.ordered

    def _may_start(self, vm: Vm, run: Run) -> bool:
        """Whether its last run is over, and the time for the next try has come."""
        if run.state is RunState.UNFENCED:
            self._wait(vm.name, f"it may still run on {run.host}: needs a stop report, fencing or an administrator")
            return False
        if run.failed:
            self._wait(vm.name, "every try failed: needs an administrator")
            return False
        if self._is_disabled(vm, run):
            self._wait(vm.name, "its restart is disabled")
            return False
        home = self.inventory.hosts.get(HostName(run.home))
        if home is not None and home.state is HostState.FREEZE:
            self._wait(vm.name, f"until {run.home} is back")
            return False
        shutdown = self._shutdown_over(run), f"its orderly shutdown on {run.host} is over"
        for not_before_ns, what in (shutdown, self._retry(run)):
            if self.now_ns < not_before_ns:
                self._wait(vm.name, f"until {what}", not_before_ns)
                return False
        return True

    def _shutdown_over(self, run: Run) -> int:
        # L4: at the host's deadline an orderly shutdown begins, so its time, by the slowest clock, adds to the expiry.
        if run.state is not RunState.LOST:
            return 0
        return self.inventory.since_ns(run.vm, self.now_ns) + run.shutdown_ns * 102 // 100

    def _retry(self, run: Run) -> tuple[int, str]:
        # I49: try n comes retries[n] after the first, that is, retries[n] - retries[n - 1] after the one before.
        retries = self.inventory.settings.retries_ns
        attempt = min(run.attempts, len(retries) - 1)
        if attempt == 0:
            return 0, ""
        apart_ns = retries[attempt] - retries[attempt - 1]
        return self.inventory.assigned_ns(run.vm, self.now_ns) + apart_ns, f"its next try, {apart_ns // 10**9} s after the last"

    def _take(self, vm: Vm, host: HostName) -> None:
        self.rooms[host].take(vm)
        self.heading[vm.name] = host

    # -- placement --

    def _choose(self, vm: Vm, run: Run | None, *, leaving: HostName | None = None) -> HostName | None:
        """The best host for a VM that runs nowhere (or is ``leaving`` one); None: it must wait."""
        group = [name for name in together_with(self.rules, vm.name) if name in self.inventory.vms]
        settled = {} if self._relocating(vm, run) else self._settled(group, vm.name, leaving)
        coming = [self.inventory.vms[name] for name in group if name not in settled and self._wanted(name)]
        allowed = [
            name
            for name, room in self.rooms.items()
            if name != leaving
            and room.fits(coming)
            and room.starting < self.inventory.settings.starts_per_host
            and weight_of(self.rules, RuleKind.REQUIRE, vm.name, name) is not None
            and self._apart(vm.name, name)
            and (not settled or name in settled.values())
            and not (self._relocating(vm, run) and run is not None and name in run.avoid)
        ]
        return min(self._tried_first(vm, run, allowed), key=lambda name: self._rank(vm, run, name), default=None)

    def _settled(self, group: Sequence[VmName], but: VmName, leaving: HostName | None) -> dict[VmName, HostName]:
        """Where the others of a group are, or go."""
        heading = {name: self.heading[name] for name in group if name != but and name in self.heading}
        return {name: host for name, host in heading.items() if host != leaving}

    def _wanted(self, name: VmName) -> bool:
        return self.inventory.vms[name].wanted is Wanted.STARTED

    def _apart(self, vm: VmName, host: HostName) -> bool:
        others = apart_from(self.rules, vm)
        return all(host not in (self.occupied.get(other), self.heading.get(other)) for other in others)

    def _relocating(self, vm: Vm, run: Run | None) -> bool:
        """Its starts failed on the present host as often as they may."""
        return run is not None and run.state is RunState.RELEASED and run.attempts > vm.max_restart

    def _tried_first(self, vm: Vm, run: Run | None, allowed: Sequence[HostName]) -> Sequence[HostName]:
        """A failing start is tried ``max_restart`` times more on its host, as long as it may run there; then once on each of
        ``max_relocate`` others."""
        if run is None or run.attempts == 0 or run.state is RunState.LOST or self._relocating(vm, run):
            return allowed
        return [name for name in allowed if name == run.host] or allowed

    def _rank(self, vm: Vm, run: Run | None, host: HostName) -> tuple[int, int, int, int, int, int, str]:
        settings = self.inventory.settings
        preferred = [run.home, run.target] if run is not None else [vm.host]
        if run is not None and run.state is RunState.RELEASED and not run.recalled:
            preferred.append(run.host)
        wish = preferred.index(host) if host in preferred else len(preferred)
        weight = weight_of(self.rules, RuleKind.REQUIRE, vm.name, host) or 0
        weight += weight_of(self.rules, RuleKind.PREFER, vm.name, host) or 0
        outside = int(weight_of(self.rules, RuleKind.PREFER, vm.name, host) is None)
        kept_free = settings.admission is AdmissionPolicy.FAILOVER_HOSTS and host in settings.failover_hosts
        spare = int(kept_free == (run is None or run.state is not RunState.LOST))
        avoided = int(run is not None and host in run.avoid and run.attempts != 0 and host != run.host)
        return (avoided, wish, outside, -weight, spare, -self.rooms[host].free_share(vm), host)

    # -- moves and stops --

    def move_what_should_move(self) -> None:
        moving = sum(run.held and run.recalled and bool(run.target) for run in self.inventory.runs.values())
        for name, run in sorted(self.inventory.runs.items(), key=lambda item: (self.priorities.get(item[0], 0), item[0])):
            vm = self.inventory.vms.get(name)
            if vm is None or not run.held or run.recalled or vm.wanted is Wanted.IGNORED:
                continue
            if vm.wanted is Wanted.STOPPED:
                self.commands.append(Recall(name, run.token, "it shall not run"))
                continue
            wish = self._wish_to_move(vm, run)
            if wish is None:
                continue
            if run.state is not RunState.RUNNING and wish.target:
                continue
            if wish.target and moving >= self.inventory.settings.moves:
                self._wait(name, "until other moves are done")
                continue
            moving += bool(wish.target)
            if wish.target:
                self._take(vm, HostName(wish.target))
            self.commands.append(wish)

    def _wish_to_move(self, vm: Vm, run: Run) -> Recall | None:
        host = self.inventory.hosts.get(run.host)
        if host is not None and host.state is HostState.FREEZE:
            return Recall(vm.name, run.token, "its host goes down and comes back", home=run.host)
        if host is not None and host.state in (HostState.MAINTENANCE, HostState.SHUTDOWN):
            return self._leave(vm, run, host.state)
        if self._rule_broken(vm, run):
            return self._repair(vm, run)
        return self._failback(vm, run)

    def _leave(self, vm: Vm, run: Run, state: HostState) -> Recall | None:
        target = self._choose(vm, run, leaving=run.host)
        if target is not None:
            return Recall(vm.name, run.token, f"its host is in {state.value}", target, home=run.home or run.host)
        if state is HostState.SHUTDOWN:
            return Recall(vm.name, run.token, "its host shuts down and no other has room", home=run.home or run.host)
        self._wait(vm.name, f"its host is in {state.value} and no other has room")
        return None

    def _rule_broken(self, vm: Vm, run: Run) -> bool:
        if weight_of(self.rules, RuleKind.REQUIRE, vm.name, run.host) is None:
            return True
        # Of two that must be apart the one assigned later moves; a group follows its member that was assigned last.
        for other in apart_from(self.rules, vm.name):
            neighbour = self.inventory.runs.get(other)
            if neighbour is not None and neighbour.held and neighbour.host == run.host and neighbour.token < run.token:
                return not neighbour.recalled
        return self._newest_of_group(vm, run).host != run.host

    def _newest_of_group(self, vm: Vm, run: Run) -> Run:
        members = [self.inventory.runs.get(name) for name in together_with(self.rules, vm.name)]
        return max((member for member in members if member is not None and member.held), key=lambda member: member.token)

    def _repair(self, vm: Vm, run: Run) -> Recall | None:
        newest = self._newest_of_group(vm, run)
        if newest.host != run.host:
            room = self.rooms.get(newest.host)
            target = newest.host if room is not None and room.fits([vm]) and not newest.recalled else None
        else:
            target = self._choose(vm, run, leaving=run.host)
        if target is None:
            self._wait(vm.name, "a rule is broken, and no host has room to mend it")
            return None
        return Recall(vm.name, run.token, "a rule wants it elsewhere", target)

    def _failback(self, vm: Vm, run: Run) -> Recall | None:
        """Home after a maintenance, or to a host that a rule prefers; never where a start failed (H15), one alone never leaves
        its group."""
        if not vm.failback or run.state is not RunState.RUNNING or self.waiting:
            return None
        if len(together_with(self.rules, vm.name)) > 1:
            return None
        better = [
            name
            for name in self.rooms
            if name != run.host and name not in run.avoid and self._better(vm, run, name) and self._fits_rules(vm, name)
        ]
        if not better:
            return None
        target = min(better, key=lambda name: self._rank(vm, run, name))
        return Recall(vm.name, run.token, f"it goes back to {target}", target)

    def _better(self, vm: Vm, run: Run, host: HostName) -> bool:
        here, there = self._weight(vm, run.host), self._weight(vm, host)
        return there > here or (host == run.home and there >= here)

    def _weight(self, vm: Vm, host: HostName) -> int:
        prefer = weight_of(self.rules, RuleKind.PREFER, vm.name, host)
        require = weight_of(self.rules, RuleKind.REQUIRE, vm.name, host)
        return (prefer if prefer is not None else -1) + (require or 0)

    def _fits_rules(self, vm: Vm, host: HostName) -> bool:
        return (
            self.rooms[host].fits([vm])
            and weight_of(self.rules, RuleKind.REQUIRE, vm.name, host) is not None
            and self._apart(vm.name, host)
        )

    # -- what worked --

    def settle_what_lasted(self) -> None:
        for name, run in sorted(self.inventory.runs.items()):
            if run.up and (run.attempts or run.crashed):
                due_ns = self.inventory.since_ns(name, self.now_ns) + self.inventory.settings.settle_ns
                if self.now_ns >= due_ns:
                    self.commands.append(Settle(name, run.token))
                else:
                    self._wake(due_ns)


def _why(run: Run | None) -> str:
    if run is None:
        return "first start"
    if run.state is RunState.LOST:
        return f"{run.host} failed: {run.text}"
    if run.recalled:
        return f"moved from {run.host}" if run.target or run.home else "started again by an administrator"
    return f"it ended on {run.host}: {run.text}" if run.text else f"it ended on {run.host}"
