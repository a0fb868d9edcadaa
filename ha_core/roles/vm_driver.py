"""Carries out what the host agent machine asks for: driver calls, proposals; and brings it the guard's reports."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import aclosing

import trio

from ha_core.errors import HAError, HypervisorError, StaleFencingTokenError, StartRefusedError
from ha_core.ids import HostName, VmName
from ha_core.interfaces import Hypervisor, VmReport, VmSpec
from ha_core.machines.contract import Effect
from ha_core.machines.failover.host_agent import (
    BEHIND,
    GuardLost,
    GuardReport,
    GuardReports,
    HostAgent,
    ProposalDone,
    Propose,
    RecordsSeen,
    StartRefused,
    StartVm,
    StopVm,
)
from ha_core.machines.failover.records import Vm
from ha_core.roles.vmap import Vmap
from ha_core.runtime.driver import Driver

logger = logging.getLogger(__name__)

RETRY_S = 0.1


class VmDriver:
    """The shell of a HostAgent; ``vmap`` is set while the plug-in is loaded."""

    def __init__(self, host: HostName, drivers: Mapping[str, Hypervisor], environment: Mapping[str, str]) -> None:
        """``environment`` is added to that of every VM."""
        self.agent = HostAgent(host)
        self._drivers = drivers
        self._environment = dict(environment)
        self._driver = Driver(self.agent, self._perform)
        self._nursery: trio.Nursery | None = None
        self.vmap: Vmap | None = None

    def records(self, seen: RecordsSeen) -> None:
        self._driver.post(seen)

    async def run(self) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._driver.run)
            for driver in self._drivers.values():
                self._nursery.start_soon(self._follow, driver)

    async def _follow(self, driver: Hypervisor) -> None:
        """The driver's reports; its whole list first, and again after every break."""
        while True:
            try:
                self._driver.post(GuardReports([_report(one) for one in await driver.list()], complete=True))
                async with aclosing(driver.reports()) as reports:
                    async for report in reports:
                        self._driver.post(GuardReports([_report(report)]))
            except HAError as exc:
                logger.warning("%s: %s", driver.name, exc)
            self._driver.post(GuardLost())
            await trio.sleep(RETRY_S)

    def _perform(self, effects: Sequence[Effect]) -> None:
        assert self._nursery is not None
        for effect in effects:
            match effect:
                case StartVm():
                    self._nursery.start_soon(self._start, effect)
                case StopVm():
                    self._nursery.start_soon(self._stop, effect)
                case Propose():
                    self._nursery.start_soon(self._propose, effect)

    async def _start(self, order: StartVm) -> None:
        vm = order.vm
        try:
            driver = self._drivers.get(vm.driver)
            if driver is None:
                raise HypervisorError(f"{vm.name}: this host has no driver {vm.driver!r}, only {', '.join(self._drivers)}")
            await driver.start(self._spec(order), lease=order.lease, token=order.token)
        except StaleFencingTokenError as exc:
            self._refuse(order, BEHIND, str(exc))
        except StartRefusedError as exc:
            self._refuse(order, exc.code, str(exc))
        except HAError as exc:
            self._refuse(order, "failed", str(exc))

    def _spec(self, order: StartVm) -> VmSpec:
        options = dict(order.vm.options)
        env = {**self._environment, **_pairs(options.pop("env", ()))}
        return _spec_of(order.vm, {**options, "env": env}, order.shutdown_ns)

    def _refuse(self, order: StartVm, code: str, text: str) -> None:
        logger.warning("%s (token %d) not started: %s", order.vm.name, order.token, text)
        self._driver.post(StartRefused(order.vm.name, order.token, code, text))

    async def _stop(self, order: StopVm) -> None:
        driver = self._drivers.get(order.driver)
        if driver is None:
            return
        try:
            await driver.stop(VmName(order.vm), token=order.token, shutdown_s=order.grace_ns / 1e9)
        except HAError as exc:
            logger.warning("%s (token %d) not stopped: %s", order.vm, order.token, exc)

    async def _propose(self, proposal: Propose) -> None:
        done = False
        if self.vmap is not None:
            try:
                done = (await self.vmap.propose(proposal.command)).done
            except HAError as exc:
                logger.info("%s: %s", proposal.command.name, exc)
        self._driver.post(ProposalDone(proposal.number, done))


def _pairs(value: object) -> dict[str, str]:
    """A table as records keep it: a tuple of pairs."""
    return {str(key): str(item) for key, item in value} if isinstance(value, tuple) else {}


def _spec_of(vm: Vm, options: Mapping[str, object], shutdown_ns: int) -> VmSpec:
    return VmSpec(
        name=vm.name, driver=vm.driver, options=options, shutdown_s=shutdown_ns / 1e9, cpu_mhz=vm.cpu_mhz,
        memory_mib=vm.memory_mib,
    )  # fmt: skip


def _report(report: VmReport) -> GuardReport:
    return GuardReport(
        report.name, report.token, report.state, report.event, bytes.fromhex(report.instance), report.exit_code, report.text
    )  # fmt: skip
