from __future__ import annotations

import sys

import pytest
import trio

from ha_core.errors import DriverTimeoutError, OperationFailedError, StaleFencingTokenError, StartRefusedError
from ha_core.hypervisors.process import ProcessHypervisor
from ha_core.ids import FencingToken, VmName
from ha_core.interfaces import Hypervisor, VmSpec
from tests.integration.guard_world import WITNESS, World

pytestmark = pytest.mark.integration

A = VmName("a")


def spec(world: World, **options: object) -> VmSpec:
    argv = [sys.executable, "-I", "-S", "-c", WITNESS, f"{world.dir}/a"]
    return VmSpec(name=A, options={"argv": argv} | options)


async def lease_of(world: World) -> int:
    return (await trio.to_thread.run_sync(world.wait_for_lease)).lease_token


async def test_a_vm_is_started_listed_and_stopped_idempotently() -> None:
    with World() as world:
        world.start_guard()
        lease = await lease_of(world)
        driver: Hypervisor = ProcessHypervisor(world.run_dir)

        for _ in range(2):
            await driver.start(spec(world), lease=lease, token=FencingToken(1000))
        assert [(run.name, run.state) for run in await driver.list()] == [("a", "running")]
        await trio.to_thread.run_sync(world.wait_until, lambda: world.starts("a"))
        for _ in range(2):
            await driver.stop(A, token=FencingToken(1000), shutdown_s=5)

        assert [(run.name, run.state) for run in await driver.list()] == [("a", "stopped")]
        assert not world.lock_held("a")
        assert len(world.journal("a")) == 1


async def test_what_the_guard_refuses_is_raised_as_what_it_is() -> None:
    with World() as world:
        world.start_guard()
        lease = await lease_of(world)
        driver = ProcessHypervisor(world.run_dir)
        await driver.start(spec(world), lease=lease, token=FencingToken(1000))

        with pytest.raises(StaleFencingTokenError) as stale:
            await driver.start(spec(world), lease=lease, token=FencingToken(999))
        with pytest.raises(StartRefusedError) as refused:
            await driver.start(spec(world), lease=lease, token=FencingToken(1001))
        with pytest.raises(StartRefusedError) as other:
            await driver.start(VmSpec(name=VmName("b"), options={"argv": ["true"]}), lease=lease + 1, token=FencingToken(1))
        with pytest.raises(OperationFailedError, match="No such file"):
            await driver.start(VmSpec(name=VmName("c"), options={"argv": ["/no/such"]}), lease=lease, token=FencingToken(1))
        with pytest.raises(OperationFailedError, match="argv"):
            await driver.start(VmSpec(name=VmName("d"), options={"argv": "true"}), lease=lease, token=FencingToken(1))
        with pytest.raises(OperationFailedError, match="nice"):
            await driver.start(spec(world, nice=3), lease=lease, token=FencingToken(1002))

        assert stale.value.current == 1000
        assert (refused.value.code, other.value.code) == ("not-reaped", "other-lease")


async def test_calls_and_reports_go_on_over_a_change_of_guard() -> None:
    with World(stop_vms=False) as world:
        guard = world.start_guard()
        lease = await lease_of(world)
        driver = ProcessHypervisor(world.run_dir)
        async with driver.reports() as reports:
            await driver.start(spec(world), lease=lease, token=FencingToken(1000))
            seen = await reports.__anext__()
            guard.kill()
            guard.wait()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(driver.status)
                world.start_guard()
            adopted = await reports.__anext__()
            await driver.stop(A, token=FencingToken(1000), shutdown_s=5)
            ended = [await reports.__anext__() for _ in range(2)]

        assert (seen.state, adopted.state) == ("running", "running")
        assert adopted.instance != seen.instance
        assert [run.state for run in ended] == ["stopping", "stopped"]
        events = [run.event for run in (seen, adopted, *ended)]
        assert events == sorted(events)


async def test_a_missing_guard_is_named_after_the_timeout() -> None:
    with World() as world:
        with pytest.raises(DriverTimeoutError, match=r"guard\.sock"):
            await ProcessHypervisor(world.run_dir, timeout_s=0.1).list()
