"""Agents killed and stopped in every combination on a real host, judged by the witnesses in its VMs.

While at least one agent lives, the others are back in time and no VM notices. When all are stopped, the VMs die by the shims'
deadlines before a copy starts elsewhere; when all are killed, likewise, and the host comes back when its agents are started.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from ha_core.demo.judge import read_starts
from ha_core.demo.report import Report
from ha_core.demo.story import AGENTS, Story
from ha_core.demo.world import open_world
from ha_core.runtime.clock import now_ns

pytestmark = pytest.mark.integration

SOME = [names for count in (1, 2) for names in itertools.combinations(AGENTS, count)]


@asynccontextmanager
async def loaded_cluster(tmp_path: Path) -> AsyncIterator[Story]:
    async with open_world(keep=tmp_path, profile="lan", store="sqlite") as world:
        story = Story(world, Report(), lambda _: None, world.center_address)
        await story.found()
        await story.load()
        yield story


async def test_while_one_agent_lives_no_vm_notices(tmp_path: Path) -> None:
    async with loaded_cluster(tmp_path) as story:
        host = story.roles["third"]
        before = {vm: (start.pid, start.token) for vm, start in story.running().items()}

        for number, names in itertools.product((signal.SIGKILL, signal.SIGSTOP), SOME):
            hurt = await story.world.signal_agents(host, number, names)
            assert set(hurt) == set(names)

            async def all_back(hurt: dict[str, int] = hurt) -> bool:
                pids = await host.agent_pids()
                return len(pids) == len(AGENTS) and all(pids[name] != pid for name, pid in hurt.items())

            await story.until(f"{names} are back after signal {number}", all_back, 5)
            await story.until("the host is whole", lambda: story.is_whole(host), 10)

        assert {vm: (start.pid, start.token) for vm, start in story.running().items()} == before
        assert not any(start.overlap for start in read_starts(story.world.shared))


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
async def test_without_any_agent_vms_die_before_their_copies_start(tmp_path: Path, number: signal.Signals) -> None:
    async with loaded_cluster(tmp_path) as story:
        host = story.roles["isolated"]
        doomed = {vm: start for vm, start in story.running().items() if start.host == host.fqdn}
        assert doomed
        descriptors = {vm: os.pidfd_open(start.pid) for vm, start in doomed.items()}

        await story.world.signal_agents(host, number, AGENTS)
        died_ns = {vm: await _death(descriptor) for vm, descriptor in descriptors.items()}
        await story.until("they run elsewhere", lambda: set(doomed) <= _moved(story, doomed), 15)

        for start in read_starts(story.world.shared):
            assert not start.overlap, start
            if start.vm in doomed and start.token > doomed[start.vm].token:
                assert start.at_ns > died_ns[start.vm]
                assert start.host != host.fqdn


def _moved(story: Story, doomed: Mapping[str, object]) -> set[str]:
    return {vm for vm, start in story.running().items() if vm in doomed and start.host != story.roles["isolated"].fqdn}


async def _death(descriptor: int) -> int:
    try:
        await trio.lowlevel.wait_readable(descriptor)
        return now_ns()
    finally:
        os.close(descriptor)
