"""Before t = 0: the cluster forms, and what the file says has been running runs.

All AAMs come up first, without guards: hosts are registered while none has a lease, so nothing is placed. Then either
everything ends (a cold start), or the hosts that are on get their agents and leases, and each VM with a ``host`` is started
there before dependencies and capacities are set that might keep it from starting. Rules, and the VMs that run anywhere, come at
t = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import attrs

from ha_core.ids import NodeId, VmName
from ha_core.machines.database_events import Transfer
from ha_core.machines.failover import commands as c
from ha_core.machines.failover.commands import Command, Outcome
from ha_core.machines.failover.records import AdmissionPolicy, Priority, Wanted
from ha_core.testing.scenario.model import ScenarioError, VmSpec
from ha_core.testing.scenario.world import ScenarioWorld, rules_of, vm_of
from ha_core.testing.simulator import SECOND

PATIENCE_NS: Final = 120 * SECOND
"""Forming takes some election timeouts and boots; longer means that it never comes about."""


class Forming:
    def __init__(self, world: ScenarioWorld) -> None:
        self.world = world
        self.scenario = world.scenario
        self._refused: ScenarioError | None = None
        self._added = {step.words[1] for step in self.scenario.steps if step.words[0] == "vm" and step.words[2] == "add"}

    def run(self, begin: Callable[[], None]) -> None:
        """``begin`` is called when it is t = 0.

        Raises:
            ScenarioError: the cluster refuses something of what the file describes, or cannot form.
        """
        self._register()
        if self.scenario.formed:
            self._come_up()
            self._start_where_they_were()
            self._define([vm for vm in self._known if self._ran_before(vm)])
            self._settle()
            begin()
            self._rule()
            self._define([vm for vm in self._known if not self._ran_before(vm)])
            self._order(c.SetSettings.of(self.world.settings), "cluster")
        else:
            self._define(self._known)
            self._rule()
            self._order(c.SetSettings.of(self.world.settings), "cluster")
            self._settle()
            self._go_dark()
            begin()
            self._power_up()

    @property
    def refused(self) -> ScenarioError | None:
        """What the cluster did not take of the file; orders given at t = 0 may be answered a little later."""
        return self._refused

    # -- steps of the way --

    def _register(self) -> None:
        world = self.world
        known = [host for host in world.hosts.values() if host.name not in world.later]
        for host in known:
            assert host.aam is not None
            host.aam.start()
        opening = attrs.evolve(world.settings, admission=AdmissionPolicy.NONE)
        self._order(c.SetSettings.of(opening), "cluster")
        for host in known:
            self._order(c.RegisterHost.of(world.record_of(host)), "host", self._number("host", host.name))
        self._wait(lambda: world.orders_done, "the voters find no leader")
        index = world.checker.truth.applied_index
        self._wait(lambda: all(self._applied(host.name) >= index for host in known), "the hosts do not catch up")

    def _applied(self, host: str) -> int:
        aam = self.world.aam_of(self.world.hosts[host])
        return aam.database.state.index if aam is not None else 0

    def _come_up(self) -> None:
        world, scenario = self.world, self.scenario
        on = [host.name for host in scenario.hosts if host.power and host.name not in world.later]
        for host in scenario.hosts:
            if not host.power:
                world.hosts[host.name].power_off()
            elif host.name in on:
                world.hosts[host.name].start()
        self._wait(lambda: any(world.leads(host) for host in world.hosts.values()), "no host leads")
        if scenario.leader:
            self._hand_over(scenario.leader)

        def leased() -> bool:
            aam = next((world.aam_of(host) for host in world.hosts.values() if world.leads(host)), None)
            return aam is not None and set(on) <= set(aam.leases.fresh(world.hosts[self._leader()].host.clock.now_ns()))

        self._wait(leased, "not every host that is on gets a lease")

    def _leader(self) -> str:
        return next((name for name, host in self.world.hosts.items() if self.world.leads(host)), "")

    def _hand_over(self, heir: str) -> None:
        world = self.world
        until_ns = world.sim.now_ns + PATIENCE_NS
        while self._leader() != heir and world.sim.now_ns < until_ns:
            leader = self._leader()
            process = world.hosts[leader].aam if leader else None
            if process is not None:
                world.ask(process, Transfer(NodeId(f"aam@{heir}")), lambda outcome: None)
            world.sim.run_for(2 * SECOND, stop=lambda: self._leader() == heir)
        if self._leader() != heir:
            raise self.scenario.error(f"[cluster]: leader = {heir!r}: it cannot come to lead", "cluster", 0, "leader")

    def _start_where_they_were(self) -> None:
        world = self.world
        placed = [vm for vm in self.scenario.vms if self._ran_before(vm)]
        for vm in placed:
            plain = attrs.evolve(
                vm_of(vm), priority=Priority.MEDIUM, after=(), cpu_mhz=0, memory_mib=0, start_ns=0, wanted=Wanted.STARTED
            )  # fmt: skip
            self._order(c.DefineVm.of(plain), "vm", self._number("vm", vm.name))

        def running() -> bool:
            runs = world.checker.truth.runs
            return all((run := runs.get(VmName(vm.name))) is not None and run.up and run.host == vm.host for vm in placed)

        self._wait(running, "not every VM comes to run on its host")

    def _ran_before(self, vm: VmSpec) -> bool:
        power = {host.name: host.power and host.name not in self.world.later for host in self.scenario.hosts}
        return vm.state == "started" and power.get(vm.host, False) and vm.name not in self._added

    # -- what the file says of VMs, rules and policies, as it is --

    @property
    def _known(self) -> list[VmSpec]:
        return [vm for vm in self.scenario.vms if vm.name not in self._added]

    def _define(self, vms: Sequence[VmSpec]) -> None:
        for vm in vms:
            self._order(c.DefineVm.of(vm_of(vm)), "vm", self._number("vm", vm.name))

    def _rule(self) -> None:
        for number, rule in enumerate(rules_of(self.scenario)):
            self._order(c.SetRule.of(rule), "rule", number)

    def _settle(self) -> None:
        self._wait(lambda: self.world.orders_done, "orders are not carried out")

    # -- a cold start --

    def _go_dark(self) -> None:
        """Everything was flushed, then every host lost its power."""
        world = self.world
        world.sim.run_for(2 * SECOND)
        for spec in self.scenario.hosts:
            host = world.hosts[spec.name]
            assert host.aam is not None
            host.aam.end(silent=True)
            if not spec.power:
                host.power_off()
        world.sim.run_for(SECOND)

    def _power_up(self) -> None:
        for spec in self.scenario.hosts:
            if spec.power and spec.name not in self.world.later:
                self.world.hosts[spec.name].start()

    # -- tools --

    def _number(self, table: str, name: str) -> int:
        names = [host.name for host in self.scenario.hosts] if table == "host" else [vm.name for vm in self.scenario.vms]
        return names.index(name)

    def _order(self, command: Command, table: str, number: int = 0) -> None:
        def answered(outcome: Outcome) -> bool:
            if not outcome.done and self._refused is None:
                self._refused = self.scenario.error(f"[{table}]: the cluster refuses it: {outcome.reason}", table, number)
            return True

        self.world.order(command, answered)

    def _wait(self, until: Callable[[], bool], problem: str) -> None:
        formed = self.world.sim.run_for(PATIENCE_NS, stop=lambda: self._refused is not None or until())
        if self._refused is not None:
            raise self._refused
        if not formed:
            raise self.scenario.error(f"[cluster]: it does not form: {problem}", "cluster")
