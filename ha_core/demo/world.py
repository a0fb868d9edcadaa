"""Three pretended hosts on loopback addresses: their cables, their configuration, their processes.

A relay stands in for every cable, so that cutting one is a silent loss. Three networks: ``a`` and ``b`` carry the agents and
the applications, ``m`` the center's requests to vpxa.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import trio

from ha_core.demo.processes import MARK, Marked, kill_all, marked, send_signal
from ha_core.errors import HAError, NodeFailedError, TransportError
from ha_core.runtime.clock import now_ns
from ha_core.runtime.rpc import dial_rpc
from ha_core.testing.cable import lay_cables
from ha_core.testing.cable_process import SwitchboardProcess, open_switchboard_process

HOSTS = ("h1", "h2", "h3")
LINKS = ("a", "b")
HOSTS_FILE = "127.0.0.1 localhost\n# by hand\n10.9.9.9 h2.demo\n\n192.0.2.7 printer.example printer\n"
_CONFIG = """\
node = "aam@{name}.demo"
cluster = "demo"
data_dir = "{folder}"
run_dir = "{run_dir}"
management = "{management}"
profile = "{profile}"
store = "{store}"
hosts_file = "{folder}/hosts"
cpu_mhz = 8000
memory_mib = 16384
{isolation}
[links]
{links}
[bind]
{bind}
"""


@attrs.define(eq=False)
class DemoHost:
    """One pretended host; all of its processes carry ``mark`` in their environment."""

    name: str
    folder: Path
    run_dir: Path
    mark: str
    management: str
    app_links: Mapping[str, str]
    app_bind: Mapping[str, str]
    process: trio.Process | None = None

    @property
    def fqdn(self) -> str:
        return f"{self.name}.demo"

    def processes(self, text: str = "") -> list[Marked]:
        return [process for process in marked(self.mark) if process.runs(text)]

    async def ask(self, method: str, **params: object) -> object:
        """A request to its vpxa, over the Unix socket that only the host itself has."""
        async with dial_rpc(self.run_dir / "vpxa.sock") as client:
            return await client.call(method, **params)

    async def guard(self, op: str) -> dict[str, object]:
        """One request to its guard, as raw JSON."""
        async with await trio.open_unix_socket(str(self.run_dir / "guard.sock")) as stream:
            await stream.send_all(json.dumps({"id": 1, "op": op}).encode() + b"\n")
            data = bytearray()
            while b"\n" not in data:
                more = await stream.receive_some()
                if not more:
                    raise TransportError(f"{self.fqdn}: its guard hung up")
                data += more
        answer = json.loads(data)
        assert isinstance(answer, dict)
        return answer

    async def agent_pids(self) -> dict[str, int]:
        """The pids of guard, aam and vpxa, as the guard knows them; empty while it is away."""
        try:
            with trio.fail_after(0.5):
                status = (await self.guard("status"))["status"]
        except (OSError, KeyError, ValueError, TransportError, trio.TooSlowError, trio.BrokenResourceError):
            return {}
        assert isinstance(status, dict)
        return {"guard": status["pid"]} | {one["name"]: one["pid"] for one in status["agents"] if one["pid"]}


@attrs.define(eq=False)
class World:
    folder: Path
    hosts: Mapping[str, DemoHost]
    board: SwitchboardProcess
    center_address: str
    """Where the center listens, on whichever host it runs."""
    launcher: Callable[[DemoHost], Sequence[str]]
    """What to put before the command that starts a host's agents."""
    started: list[trio.Process] = attrs.field(factory=list)

    @property
    def shared(self) -> Path:
        """What all hosts see, like a shared disk: the witnesses' locks and rows."""
        return self.folder / "shared"

    async def power_on(self, host: DemoHost) -> None:
        """Mend its cables and start its agents, under a boot id of its own: several hosts share one kernel here."""
        host.run_dir.mkdir(mode=0o700)
        (host.run_dir / "boot_id").write_text(str(uuid.uuid4()))
        await self.board.mend_host(host.name)
        await self.board.mend_host(f"{host.name}-app")
        await self.start_agents(host)

    async def start_agents(self, host: DemoHost) -> None:
        argv = [*self.launcher(host), sys.executable, "-m", "ha_core", "agent", "--config", str(self.config(host))]
        host.process = await self.start(host, "agent", *argv, env={"HA_CORE_BOOT_ID_FILE": str(host.run_dir / "boot_id")})

    def config(self, host: DemoHost) -> Path:
        return self.folder / f"{host.name}.toml"

    async def power_cut(self, host: DemoHost) -> int:
        """The host is gone at once: first its cables, so that nothing says goodbye, then everything on it."""
        await self.board.cut_host(host.name)
        await self.board.cut_host(f"{host.name}-app")
        at_ns = now_ns()
        await trio.to_thread.run_sync(kill_all, host.mark)
        if host.process is not None:
            await host.process.wait()
        shutil.rmtree(host.run_dir)  # a tmpfs does not outlive the power
        return at_ns

    async def start(self, host: DemoHost, log: str, *argv: str, env: Mapping[str, str] | None = None) -> trio.Process:
        """Start a process on the host; it writes to a log file."""
        with (host.folder / f"{log}.log").open("ab") as output:
            process = await trio.lowlevel.open_process(
                list(argv), cwd=host.folder, start_new_session=True, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env={**os.environ, MARK: host.mark, "PYTHONWARNINGS": "ignore", **(env or {})},
            )  # fmt: skip
        self.started.append(process)
        return process

    async def wait_ready(self, host: DemoHost, limit_s: float = 15.0) -> None:
        """Until its vpxa answers.

        Raises:
            NodeFailedError: with the end of its log.
        """
        with trio.move_on_after(limit_s):
            while True:
                try:
                    await host.ask("host.info")
                    return
                except HAError:
                    await trio.sleep(0.02)
        log = (host.folder / "agent.log").read_text(errors="replace")[-2000:]
        raise NodeFailedError(f"{host.fqdn}: its vpxa did not come up in {limit_s:g} s; its log ends:\n{log}")

    async def signal_agents(self, host: DemoHost, number: signal.Signals, names: Sequence[str]) -> dict[str, int]:
        """Send a signal to some of a host's agents; the pids that were hit."""
        pids = {name: pid for name, pid in (await host.agent_pids()).items() if name in names}
        for pid in pids.values():
            send_signal(pid, number)
        return pids


@asynccontextmanager
async def open_world(
    *, keep: Path | None, profile: str, store: str, launcher: Callable[[DemoHost], Sequence[str]] = lambda _: ()
) -> AsyncIterator[World]:
    """Lay the cables and write the configurations; leaving kills every process that carries one of our marks."""
    cables = lay_cables([*HOSTS, *(f"{name}-app" for name in HOSTS), "center"], [*LINKS, "m"])
    relayed = {where: pair for where, pair in cables.items() if where[0] != "center"}
    run_root = Path(tempfile.mkdtemp(prefix="ha-core-demo-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    folder = keep or Path(tempfile.mkdtemp(prefix="ha-core-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "shared").mkdir(exist_ok=True)
    draw = secrets.token_hex(8)
    hosts: dict[str, DemoHost] = {}
    for name in HOSTS:
        host = DemoHost(
            name, folder / name, run_root / name, f"{draw}-{name}", cables[name, "m"][0],
            {link: cables[f"{name}-app", link][0] for link in LINKS}, {link: cables[f"{name}-app", link][1] for link in LINKS},
        )  # fmt: skip
        host.folder.mkdir(exist_ok=True)
        _write_config(folder, host, cables, profile, store)
        hosts[name] = host
    try:
        async with open_switchboard_process(relayed) as board:
            world = World(folder, hosts, board, cables["center", "m"][0], launcher)
            try:
                yield world
            finally:
                for host in hosts.values():
                    kill_all(host.mark)
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
                    for process in world.started:
                        await process.wait()
    finally:
        shutil.rmtree(run_root, ignore_errors=True)
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def _write_config(
    folder: Path, host: DemoHost, cables: Mapping[tuple[str, str], tuple[str, str]], profile: str, store: str
) -> None:
    public = {link: cables[host.name, link][0] for link in LINKS}
    real = {link: cables[host.name, link][1] for link in LINKS}
    text = _CONFIG.format(
        name=host.name, folder=host.folder, run_dir=host.run_dir, management=cables[host.name, "m"][1], profile=profile,
        store=store, isolation="", links="\n".join(f'{link} = "{address}"' for link, address in public.items()),
        bind="\n".join(f'{link} = "{address}"' for link, address in real.items()),
    )  # fmt: skip
    (folder / f"{host.name}.toml").write_text(text)
    # A hosts file with the mistakes that people make: HA shall mend exactly these and leave the rest alone.
    (host.folder / "hosts").write_text(HOSTS_FILE)
