"""A host loses its power: how long until the starts of all its VMs are issued on other hosts. Profile lan, three hosts, six VMs.

In the simulator, in virtual time, with the real machines (guard, host agent, AAM with Raft and leases); clocks drift by up to
0.49 %. ``lan-follower-p99``: the host of a follower; ``lan-leader-p99``: the host of the active primary. ``overlaps``: how often
a VM ran twice, or another invariant of the cluster campaign broke, in all of these runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Literal

import attrs

from benchmarks.harness import Case, Goal, at_most, p99
from ha_core.config import LAN
from ha_core.ids import HostName, VmName
from ha_core.machines.aam import AamMachine
from ha_core.machines.failover.commands import DefineVm, MoveVm, SetSettings
from ha_core.machines.failover.records import Vm
from ha_core.testing.campaigns.cluster import CampaignWorld
from ha_core.testing.campaigns.cluster_hosts import ClusterHost
from ha_core.testing.simulator import MILLISECOND, SECOND, Simulation

VMS = 6
Victim = Literal["follower", "leader"]


@attrs.frozen
class Parameters:
    runs: int


SIZES: Mapping[str, Parameters] = {"smoke": Parameters(1), "quick": Parameters(20), "full": Parameters(300)}


@attrs.frozen
class Failover:
    issued_ms: float
    overlaps: int


def cases(parameters: Parameters, seed: int) -> Sequence[Case]:
    def times(victim: Victim) -> Sequence[float]:
        return [run.issued_ms for run in play_all(parameters, seed, victim)]

    def overlaps() -> Sequence[float]:
        return [sum(run.overlaps for victim in ("follower", "leader") for run in play_all(parameters, seed, victim))]

    three_seconds = Goal(words="p99 at most 3,000 ms from the power loss to the last start issued", met=at_most(3000))
    return [
        Case(
            name="lan-follower-p99",
            unit="ms",
            measure=partial(times, "follower"),
            goal=three_seconds,
            warm_up=False,
            figure=p99,
        ),
        Case(name="lan-leader-p99", unit="ms", measure=partial(times, "leader"), goal=three_seconds, warm_up=False, figure=p99),
        Case(name="overlaps", unit="count", measure=overlaps, goal=Goal(words="none", met=at_most(0)), warm_up=False),
    ]


@lru_cache(maxsize=2)
def play_all(parameters: Parameters, seed: int, victim: Victim) -> Sequence[Failover]:
    return [play(seed + number, victim) for number in range(parameters.runs)]


def play(seed: int, victim: Victim) -> Failover:
    """One cluster, one power loss."""
    sim = Simulation(seed)
    world = CampaignWorld(sim, profile=LAN, size=3)
    for host in world.hosts.values():
        host.start()
    world.order(SetSettings.of(world.settings))
    for number in range(VMS):
        world.order(DefineVm.of(Vm(VmName(f"vm{number}"))))
    if not sim.run_for(20 * SECOND, stop=lambda: world.orders_done and not world.checker.missing()):
        raise RuntimeError(f"seed {seed}: the cluster did not come up: {world.checker.missing()}")
    _spread(world, seed)
    sim.run_for(2 * SECOND + sim.stream("phase").randrange(SECOND))
    host = _choose(world, victim)
    lost = {name: host.hypervisor.shims[name].token for name in _running(host)}
    others = [other for other in world.hosts.values() if other is not host]
    began_ns = sim.now_ns
    host.power_off()

    def issued() -> bool:
        newest = {
            name: max((o.hypervisor.shims[name].token for o in others if name in o.hypervisor.shims), default=0)
            for name in lost
        }
        return all(newest[name] > token for name, token in lost.items())

    if not sim.run_for(30 * SECOND, stop=issued):
        raise RuntimeError(f"seed {seed}: the VMs of {host.name} were not started elsewhere")
    issued_ms = (sim.now_ns - began_ns) / MILLISECOND
    sim.run_for(2 * SECOND)
    return Failover(issued_ms, len(sim.violations))


def _spread(world: CampaignWorld, seed: int) -> None:
    """Two VMs on each host: some came up before the other hosts had joined."""
    hosts = list(world.hosts.values())
    for number in range(VMS):
        target = hosts[number % len(hosts)]
        if f"vm{number}" not in target.hypervisor.shims:
            world.order(MoveVm(VmName(f"vm{number}"), HostName(target.name)))

    def spread() -> bool:
        return world.orders_done and all(_running(host) == [f"vm{at}", f"vm{at + 3}"] for at, host in enumerate(hosts))

    if not world.sim.run_for(30 * SECOND, stop=spread):
        raise RuntimeError(f"seed {seed}: the VMs were not spread: {[_running(host) for host in hosts]}")


def _running(host: ClusterHost) -> list[str]:
    return [name for name, shim in sorted(host.hypervisor.shims.items()) if shim.executes]


def _choose(world: CampaignWorld, victim: Victim) -> ClusterHost:
    """The active primary's host, or another one."""
    wanted = [host for host in world.hosts.values() if _leads(host) is (victim == "leader")]
    if not wanted:
        raise RuntimeError("nobody leads")
    return world.rng.choice(wanted)


def _leads(host: ClusterHost) -> bool:
    machine = host.aam.machine if host.aam is not None else None
    return isinstance(machine, AamMachine) and machine.database.is_leading
