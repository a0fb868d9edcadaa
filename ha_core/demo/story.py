"""The demo's story: found a cluster, load it, break it step by step, mend it, and measure every step."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import attrs
import trio

from ha_core.demo import witness
from ha_core.demo.fleet import Fleet
from ha_core.demo.judge import Start, judge_messages, longest_stall_ms, read_starts
from ha_core.demo.report import Report
from ha_core.demo.world import DemoHost, World
from ha_core.errors import HAError, NodeFailedError
from ha_core.runtime.clock import now_ns
from ha_core.runtime.rpc import RpcClient, dial_rpc
from ha_core.security.key import load_key

AGENTS = ("guard", "aam", "vpxa")
Tell = Callable[[str], None]


@attrs.frozen
class DemoVm:
    """``role``: which host it begins on: the leader's, the one to be isolated, the third."""

    name: str
    priority: str
    role: str
    after: tuple[str, ...] = ()
    is_center: bool = False


VMS = (
    DemoVm("directory", "high", "leader"),
    DemoVm("center", "medium", "leader", is_center=True),
    DemoVm("database", "medium", "leader", after=("directory",)),
    DemoVm("web", "low", "isolated"),
    DemoVm("mail", "low", "third"),
    DemoVm("batch", "low", "isolated"),
)
PRIORITIES = ("high", "medium", "low")


@attrs.define(eq=False)
class Story:
    world: World
    report: Report
    tell: Tell
    center_address: str
    roles: dict[str, DemoHost] = attrs.field(factory=dict)
    fleet: Fleet = attrs.field(init=False)
    outside: trio.Process = attrs.field(init=False)
    """The center that founds the cluster, before it is a VM of it."""
    stall_span: tuple[int, int] = (0, 0)

    @property
    def key_path(self) -> Path:
        return self.world.hosts["h1"].folder / "cluster.key"

    async def play(self) -> None:
        """Everything, in order; what was measured is in the report."""
        await self.found()
        await self.load()
        self.fleet = Fleet(self.world, self.key_path)
        await self.fleet.start()
        await trio.sleep(1.0)
        await self.cut_a_network()
        await self.hurt_agents()
        await self.isolate_a_host()
        await self.kill_the_leaders_host()
        await self.bring_back()
        await self.judge()
        self.report.finish()

    # -- asking --

    @asynccontextmanager
    async def center(self) -> AsyncIterator[RpcClient]:
        async with dial_rpc(self.center_address, key=load_key(self.key_path)) as client:
            yield client

    async def status(self, *, without: Sequence[DemoHost] = ()) -> dict[str, object]:
        """The cluster as some living host sees it."""
        for host in self.world.hosts.values():
            if host in without:
                continue
            try:
                with trio.fail_after(1.0):
                    return cast(dict[str, object], await host.ask("cluster.status"))
            except (HAError, trio.TooSlowError):
                continue
        return {}

    async def until(self, what: str, condition: Callable[[], object], limit_s: float) -> None:
        """Poll until ``condition()`` (awaited if it is a coroutine) is true.

        Raises:
            NodeFailedError: it is not within ``limit_s``.
        """
        end = trio.current_time() + limit_s
        while True:
            value = condition()
            if hasattr(value, "__await__"):
                value = await value
            if value:
                return
            if trio.current_time() > end:
                raise NodeFailedError(f"{what}: not within {limit_s:g} s")
            await trio.sleep(0.02)

    def starts(self, *, since_ns: int = 0) -> list[Start]:
        return [start for start in read_starts(self.world.shared) if start.at_ns >= since_ns and not start.overlap]

    def _started_since(self, since_ns: int) -> set[str]:
        return {start.vm for start in self.starts(since_ns=since_ns)}

    # -- the steps --

    async def found(self) -> None:
        self.tell("three hosts, two networks each: h1 founds the cluster, the center lets h2 and h3 join by their names")
        hosts = list(self.world.hosts.values())
        founder = hosts[0]
        argv = [sys.executable, "-m", "ha_core", "cluster", "create", "--config", str(self.world.config(founder))]
        await (await self.world.start(founder, "create", *argv)).wait()
        for host in hosts:
            await self.world.power_on(host)
        for host in hosts:
            await self.world.wait_ready(host)
        await self.until("h1 leads its cluster", lambda: self._leader_is_known(), 10)
        self.outside = await self._start_outside_center(founder)
        for host in hosts[1:]:
            token = (host.folder / "join.token").read_text().strip()
            async with self.center() as center:
                await center.call("host.add", name=host.fqdn, address=host.management, token=token)
        await self.until("three primaries", lambda: self._voters_are(3), 20)
        status = await self.status()
        leader = next(host for host in hosts if status["leader"] == f"aam@{host.fqdn}")
        others = [host for host in hosts if host is not leader]
        self.roles = {"leader": leader, "isolated": others[0], "third": others[1]}
        self.report.hosts, self.report.paths_per_host = len(hosts), 2

    async def _leader_is_known(self) -> bool:
        return bool((await self.status()).get("leader"))

    async def _voters_are(self, count: int) -> bool:
        return len(cast(list[str], (await self.status()).get("voters", []))) == count

    async def _start_outside_center(self, founder: DemoHost) -> trio.Process:
        argv = [sys.executable, "-m", "ha_core", "center", "--listen", self.center_address, "--key", str(self.key_path)]
        process = await self.world.start(founder, "center", *argv, "--vpxa", founder.management)
        await self.until("the center answers", self._center_answers, 10)
        return process

    async def _center_answers(self) -> bool:
        try:
            async with self.center() as client:
                await client.call("cluster.status")
        except HAError:
            return False
        return True

    def _command(self, vm: DemoVm, key: Path) -> list[str]:
        argv = [sys.executable, "-I", "-S", witness.__file__, str(self.world.shared), vm.name]
        if not vm.is_center:
            return argv
        inner = [sys.executable, "-m", "ha_core", "center", "--listen", self.center_address, "--key", str(key)]
        for host in self.world.hosts.values():
            inner += ["--vpxa", host.management]
        return [*argv, "--", *inner]

    async def load(self) -> None:
        self.tell(f"six VMs in three priorities; the center becomes one of them, on {self.roles['leader'].name}")
        async with self.center() as center:
            for vm in VMS:
                if not vm.is_center:
                    await self._add(center, vm)
            await self._add(center, next(vm for vm in VMS if vm.is_center), wanted="stopped")
            await self.until("five VMs run", lambda: len(self.running()) == len(VMS) - 1, 15)
            await center.call("vm.want", name="center", wanted="started")
        self.outside.terminate()
        await self.outside.wait()
        await self.until("the center runs as a VM", lambda: "center" in self.running(), 10)
        await self.until("the center answers as a VM", self._center_answers, 10)
        self.report.vms = len(VMS)
        status = cast(Mapping[str, object], (await self.roles["leader"].guard("status"))["status"])
        self.report.containment = str(status["containment"])

    async def _add(self, center: RpcClient, vm: DemoVm, wanted: str = "started") -> None:
        await center.call(
            "vm.add", name=vm.name, priority=vm.priority, after=list(vm.after), host=self.roles[vm.role].fqdn,
            options={"argv": self._command(vm, self.key_path), "env": {"PYTHONWARNINGS": "ignore"}}, start_s=0.2, wanted=wanted,
        )  # fmt: skip

    def running(self) -> dict[str, Start]:
        """The last start of each VM whose process lives."""
        last = {start.vm: start for start in self.starts()}
        return {vm: start for vm, start in last.items() if Path(f"/proc/{start.pid}").exists()}

    async def cut_a_network(self) -> None:
        host = self.roles["isolated"]
        self.tell(f"network a of {host.name} is cut, silently, under running messages")
        from_ns = now_ns()
        await self.world.board.cut(host.name, "a")
        await self.world.board.cut(f"{host.name}-app", "a")
        await trio.sleep(2.0)
        self.stall_span = (from_ns - 500_000_000, now_ns())
        await self.world.board.mend(host.name, "a")
        await self.world.board.mend(f"{host.name}-app", "a")
        await trio.sleep(0.5)

    async def hurt_agents(self) -> None:
        host = self.roles["third"]
        self.tell(f"on {host.name}: guard, aam and vpxa are killed, then stopped, one after the other")
        before = {vm: start.pid for vm, start in self.running().items()}
        since_ns = now_ns()
        for number, measured in (
            (signal.SIGKILL, self.report.agent_killed_restarted_ms),
            (signal.SIGSTOP, self.report.agent_hung_restarted_ms),
        ):
            for name in AGENTS:
                measured[name] = await self._hurt(host, name, number)
                self.tell(
                    f"    {name} {'killed' if number is signal.SIGKILL else 'stopped'}: back after {measured[name]:.0f} ms"
                )
                await self.until(f"{host.name}: all agents run", lambda: self.is_whole(host), 10)
                await trio.sleep(0.3)
        after = {vm: start.pid for vm, start in self.running().items()}
        self.report.vms_disturbed_by_agent_faults = len(self.starts(since_ns=since_ns)) + sum(
            after.get(vm) != pid for vm, pid in before.items()
        )

    async def is_whole(self, host: DemoHost) -> bool:
        if len(await host.agent_pids()) < len(AGENTS):
            return False
        try:
            with trio.fail_after(1.0):
                await host.ask("cluster.status")
        except (HAError, trio.TooSlowError):
            return False
        return True

    async def _hurt(self, host: DemoHost, name: str, number: signal.Signals) -> float:
        """Milliseconds until another process plays the part."""
        hurt = (await self.world.signal_agents(host, number, [name])).get(name, 0)
        began_ns = now_ns()

        async def is_back() -> bool:
            return (await host.agent_pids()).get(name, hurt) != hurt

        await self.until(f"{host.name}: {name} is back", is_back, 10)
        return (now_ns() - began_ns) / 1e6

    async def isolate_a_host(self) -> None:
        host = self.roles["isolated"]
        doomed = {vm: start for vm, start in self.running().items() if start.host == host.fqdn}
        self.tell(
            f"{host.name} is cut off from all networks and its agents are stopped; {', '.join(doomed)} must die by deadline"
        )
        descriptors = {vm: os.pidfd_open(start.pid) for vm, start in doomed.items()}
        await self.world.board.cut_host(host.name)
        await self.world.board.cut_host(f"{host.name}-app")
        stopped = await self.world.signal_agents(host, signal.SIGSTOP, AGENTS)
        since_ns = now_ns()
        died_ns: dict[str, int] = {}
        async with trio.open_nursery() as nursery:
            for vm, descriptor in descriptors.items():
                nursery.start_soon(_note_death, vm, descriptor, died_ns)
            await self.until(
                "they run elsewhere", lambda: set(doomed) <= {one.vm for one in self.starts(since_ns=since_ns)}, 15
            )
            nursery.cancel_scope.deadline = trio.current_time() + 5
        again = {start.vm: start for start in reversed(self.starts(since_ns=since_ns)) if start.vm in doomed}
        margins = {vm: (again[vm].at_ns - died_ns.get(vm, now_ns())) / 1e6 for vm in doomed}
        self.report.isolation_margin_ms = min(margins.values(), default=0.0)
        self.tell(
            f"    dead {self.report.isolation_margin_ms:.0f} ms before they started elsewhere; {host.name} gets its cables back"
        )
        for pid in stopped.values():
            _resume(pid)
        await self.world.board.mend_host(host.name)
        await self.world.board.mend_host(f"{host.name}-app")
        await self.until(f"{host.name} has a lease again", lambda: self.holds_lease(host), 15)
        # Its aam was replaced: until it is back, losing another host would be losing the quorum.
        await self.until(f"{host.name}: all agents run", lambda: self.is_whole(host), 15)
        await self.until("all databases are equal", self._databases_are_equal, 15)

    async def holds_lease(self, host: DemoHost) -> bool:
        try:
            with trio.fail_after(1.0):
                status = cast(Mapping[str, int], (await host.guard("status"))["status"])
        except (OSError, HAError, KeyError, ValueError, trio.TooSlowError, trio.BrokenResourceError):
            return False
        return status["lease_token"] > 0 and status["deadline_ns"] > now_ns()

    async def kill_the_leaders_host(self) -> None:
        status = await self.status()
        host = next(one for one in self.world.hosts.values() if status.get("leader") == f"aam@{one.fqdn}")
        self.roles["killed"] = host
        doomed = [vm for vm, start in self.running().items() if start.host == host.fqdn]
        self.tell(f"the power of {host.name}, host of the active primary, is cut; on it: {', '.join(doomed)}")
        at_ns = await self.world.power_cut(host)
        survivor = next(one for one in self.world.hosts.values() if one is not host)

        async def is_declared() -> bool:
            try:
                with trio.fail_after(0.5):
                    leases = cast(Mapping[str, str], (await survivor.ask("cluster.status"))["leases"])  # type: ignore[index]
            except (HAError, trio.TooSlowError):
                return False
            return leases.get(host.fqdn) == "revoked"

        await self.until(f"{host.name} is declared failed", is_declared, 20)
        self.report.host_killed_declared_ms = (now_ns() - at_ns) / 1e6
        await self.until("its VMs run elsewhere", lambda: set(doomed) <= self._started_since(at_ns), 20)
        again = sorted((one for one in self.starts(since_ns=at_ns) if one.vm in doomed), key=lambda one: one.at_ns)
        self.report.host_killed_vms_restarted_ms = {one.vm: round((one.at_ns - at_ns) / 1e6, 1) for one in again}
        self.report.priority_order_kept = _in_order(again)
        self.report.center_restarted = "center" in self.report.host_killed_vms_restarted_ms
        for name, value in self.report.host_killed_vms_restarted_ms.items():
            self.tell(f"    {name} runs again after {value:.0f} ms")
        await self.until("the center answers again", self._center_answers, 15)

    async def bring_back(self) -> None:
        host = self.roles["killed"]
        self.tell(f"{host.name} comes back")
        await self.world.power_on(host)
        await self.fleet.start_on(host)
        await self.world.wait_ready(host)
        await self.until(f"{host.name} has a lease again", lambda: self.holds_lease(host), 20)
        await self.until("all databases are equal", self._databases_are_equal, 20)
        self.report.database_equal = True
        await self.until("every VM runs", lambda: len(self.running()) == len(VMS), 15)
        self.report.every_vm_back = True

    async def _databases_are_equal(self) -> bool:
        seen = []
        for host in self.world.hosts.values():
            try:
                with trio.fail_after(1.0):
                    status = cast(Mapping[str, object], await host.ask("cluster.status"))
            except (HAError, trio.TooSlowError):
                return False
            seen.append((status["applied"], status["hash"]))
        return len(set(seen)) == 1

    async def judge(self) -> None:
        self.tell("the applications stop sending; every message must have had its effect once")
        await self.fleet.finish()
        found = judge_messages(self.fleet.databases())
        self.report.messages = attrs.asdict(found)
        self.report.path_cut_stall_ms = longest_stall_ms(self.fleet.databases(), *self.stall_span)
        self.report.double_activations = sum(start.overlap for start in read_starts(self.world.shared))
        hosts_file = (self.world.hosts["h1"].folder / "hosts").read_text()
        self.report.hosts_file_corrected = "10.9.9.9" not in hosts_file and "192.0.2.7 printer.example printer" in hosts_file


def _in_order(starts: Sequence[Start]) -> bool:
    """Higher priorities first, and nothing before what it depends on; by the kernel's time of each process."""
    known = {vm.name: vm for vm in VMS}
    ranks = {start.vm: PRIORITIES.index(known[start.vm].priority) for start in starts}
    return all(
        one.made_ticks <= other.made_ticks
        for one in starts
        for other in starts
        if ranks[one.vm] < ranks[other.vm] or one.vm in known[other.vm].after
    )


def _resume(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        pass  # its successor has replaced it already


async def _note_death(vm: str, descriptor: int, died_ns: dict[str, int]) -> None:
    try:
        await trio.lowlevel.wait_readable(descriptor)
        died_ns[vm] = now_ns()
    finally:
        os.close(descriptor)
