"""Agents killed, stopped and hung in every combination on a real host, judged by the witnesses in its VMs.

While at least one agent lives, the others are back in time and no VM notices. When none is left, whatever became of them, the
VMs die by the shims' deadlines before a copy starts elsewhere; when its agents live again, the host is whole again.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from ha_core.demo.judge import read_starts
from ha_core.demo.processes import send_signal
from ha_core.demo.report import Report
from ha_core.demo.story import AGENTS, Story
from ha_core.demo.world import DemoHost, open_world
from ha_core.guard.mapping import Field, RunMapping, open_run
from ha_core.runtime.clock import now_ns
from tests.integration import hang

pytestmark = pytest.mark.integration

FAULTS = ("hung", "stopped", "killed")
Faults = Mapping[str, str]


def part_of(faults: Sequence[str]) -> str:
    """In which test they are made; each has its own cluster, so that none takes long."""
    if "hung" not in faults:
        return "killed-or-stopped"
    return "hung-and-killed" if "killed" in faults else "hung"


def combinations(part: str) -> list[Faults]:
    """Every fault of each agent and of each pair of agents."""
    return [
        dict(zip(names, faults, strict=True))
        for count in (1, 2)
        for names in itertools.combinations(AGENTS, count)
        for faults in itertools.product(FAULTS, repeat=count)
        if part_of(faults) == part
    ]


def hang_socket(host: DemoHost) -> str:
    return str(host.folder / "hang")


@asynccontextmanager
async def loaded_cluster(tmp_path: Path, *, hung: bool) -> AsyncIterator[Story]:
    if hung:
        hang.skip_unless_possible()
    launcher = (lambda host: hang.launcher(hang_socket(host))) if hung else (lambda _: [])
    async with open_world(keep=tmp_path, profile="lan", store="sqlite", launcher=launcher) as world:
        story = Story(world, Report(), lambda _: None, world.center_address)
        await story.found()
        await story.load()
        yield story


async def hurt(host: DemoHost, faults: Faults) -> dict[str, int]:
    """Each agent named gets its fault; the pids that were hit."""
    pids = {name: pid for name, pid in (await host.agent_pids()).items() if name in faults}
    assert pids.keys() == faults.keys()
    for name, pid in pids.items():
        if faults[name] == "hung":
            hang.ask(hang_socket(host), f"hang {pid}")
        else:
            send_signal(pid, signal.SIGSTOP)
    # Stopped first: an agent hears of another's death at once, and would have replaced it before its own turn came.
    for name, pid in pids.items():
        if faults[name] == "killed":
            send_signal(pid, signal.SIGKILL)
    return pids


async def hurt_and_heal(story: Story, host: DemoHost, faults: Faults) -> None:
    pids = await hurt(host, faults)

    async def all_back() -> bool:
        found = await host.agent_pids()
        return len(found) == len(AGENTS) and all(found[name] != pid for name, pid in pids.items())

    await story.until(f"{faults} on {host.name}: they are back", all_back, 8)
    await story.until(f"{faults} on {host.name}: the host is whole", lambda: story.is_whole(host), 10)


async def hurt_the_leader(story: Story, fault: str) -> None:
    leader = (await story.status())["leader"]
    host = next(host for host in story.world.hosts.values() if leader == f"aam@{host.fqdn}")
    await hurt_and_heal(story, host, {"aam": fault})

    async def another_leads() -> bool:
        return (await story.status()).get("leader") not in ("", leader)

    await story.until(f"another host leads than {leader}, whose aam was {fault}", another_leads, 5)


def runs(story: Story) -> dict[str, tuple[int, int]]:
    return {vm: (start.pid, start.token) for vm, start in story.running().items()}


@pytest.mark.parametrize("part", ["killed-or-stopped", "hung", "hung-and-killed"])
async def test_while_one_agent_lives_no_vm_notices(tmp_path: Path, part: str) -> None:
    async with loaded_cluster(tmp_path, hung=part != "killed-or-stopped") as story:
        before = runs(story)

        async def hurt_one_after_the_other(role: str, *, aam: bool) -> None:
            for faults in combinations(part):
                if ("aam" in faults) == aam:
                    await hurt_and_heal(story, story.roles[role], faults)

        # On two hosts at once, but only one loses its aam: the third host and the other one are the quorum.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(hurt_one_after_the_other, "third", aam=True))
            nursery.start_soon(partial(hurt_one_after_the_other, "isolated", aam=False))

        assert runs(story) == before
        assert not any(start.overlap for start in read_starts(story.world.shared))


async def test_no_vm_notices_that_the_leaders_aam_is_hurt(tmp_path: Path) -> None:
    """Leases outlive the election of another leader."""
    async with loaded_cluster(tmp_path, hung=True) as story:
        before = runs(story)
        for fault in FAULTS:
            await hurt_the_leader(story, fault)

        assert runs(story) == before


@pytest.mark.parametrize("fault", FAULTS)
async def test_without_any_agent_vms_die_at_the_deadline_and_before_their_copies_start(tmp_path: Path, fault: str) -> None:
    """Their shims are stopped and hung with the agents; those of killed agents live on."""
    async with loaded_cluster(tmp_path, hung=fault == "hung") as story:
        host = story.roles["isolated"]
        doomed = {vm: start for vm, start in story.running().items() if start.host == host.fqdn}
        assert doomed
        descriptors = {vm: os.pidfd_open(start.pid) for vm, start in doomed.items()}

        pids = await hurt(host, dict.fromkeys(AGENTS, fault))
        if fault != "killed":
            pids |= hurt_shims(host, fault)
        # A shim that stands still does not read its deadline any more: what it armed last counts.
        deadlines_ns = {run.vm: run.get(Field.DEADLINE if fault == "killed" else Field.ARMED) for run in shims(host)}
        died_ns = {vm: await _death(descriptor) for vm, descriptor in descriptors.items()}
        await story.until("they run elsewhere", lambda: set(doomed) <= _moved(story, doomed), 15)

        for vm, at_ns in died_ns.items():
            assert 0 <= at_ns - deadlines_ns[vm] < 250_000_000
        for start in read_starts(story.world.shared):
            if start.vm in doomed and start.token > doomed[start.vm].token:
                assert start.at_ns > died_ns[start.vm]
                assert start.host != host.fqdn

        moved = runs(story)
        await bring_back(story, host, fault, pids.values())
        assert runs(story) == moved
        assert not any(start.overlap for start in read_starts(story.world.shared))


def shims(host: DemoHost) -> list[RunMapping]:
    """The files of the runs on a host; nothing else of it is asked."""
    return [found for path in sorted(host.run_dir.glob("*.run")) if (found := open_run(str(path)))]


def hurt_shims(host: DemoHost, fault: str) -> dict[str, int]:
    pids = {run.vm: run.get(Field.SHIM_PID) for run in shims(host)}
    for pid in pids.values():
        if fault == "hung":
            hang.ask(hang_socket(host), f"hang {pid}")
        else:
            send_signal(pid, signal.SIGSTOP)
    return pids


async def bring_back(story: Story, host: DemoHost, fault: str, pids: Iterable[int]) -> None:
    if fault == "hung":
        hang.ask(hang_socket(host), "release")
    elif fault == "stopped":
        for pid in pids:
            send_signal(pid, signal.SIGCONT)
    else:
        await story.world.start_agents(host)
    await story.until(f"{host.name} has a lease again", lambda: story.holds_lease(host), 15)
    await story.until(f"{host.name} is whole again", lambda: story.is_whole(host), 15)


def _moved(story: Story, doomed: Mapping[str, object]) -> set[str]:
    return {vm for vm, start in story.running().items() if vm in doomed and start.host != story.roles["isolated"].fqdn}


async def _death(descriptor: int) -> int:
    try:
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(descriptor)
        return now_ns()
    finally:
        os.close(descriptor)
