"""The demo's applications, one on each host: started, restarted after a power cut, and brought to rest."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import attrs
import trio

from ha_core.demo.world import DemoHost, World
from ha_core.errors import NodeFailedError

INTERVAL_S = 0.02


@attrs.define(eq=False)
class Fleet:
    world: World
    key_path: Path
    processes: dict[str, trio.Process] = attrs.field(factory=dict)

    @staticmethod
    def node(host: DemoHost) -> str:
        return f"orders@{host.fqdn}"

    @property
    def _stop_file(self) -> Path:
        return self.world.folder / "stop-sending"

    def databases(self) -> Mapping[str, Path]:
        return {self.node(host): host.folder / "orders" / "app.db" for host in self.world.hosts.values()}

    async def start(self) -> None:
        for host in self.world.hosts.values():
            await self.start_on(host)

    async def start_on(self, host: DemoHost) -> None:
        settings = {
            "node": self.node(host), "links": dict(host.app_links), "bind": dict(host.app_bind),
            "peers": {self.node(one): dict(one.app_links) for one in self.world.hosts.values() if one is not host},
            "data_dir": str(host.folder / "orders"), "key_file": str(self.key_path), "interval_s": INTERVAL_S,
            "stop_file": str(self._stop_file), "progress_file": str(self._progress_file(host)),
        }  # fmt: skip
        path = host.folder / "orders.json"
        path.write_text(json.dumps(settings))
        argv = [sys.executable, "-m", "ha_core.demo.application", str(path)]
        self.processes[host.name] = await self.world.start(host, "orders", *argv)

    def _progress_file(self, host: DemoHost) -> Path:
        return host.folder / "orders.progress"

    def _progress(self, host: DemoHost) -> dict[str, dict[str, int]]:
        try:
            return cast(dict[str, dict[str, int]], json.loads(self._progress_file(host).read_text()))
        except (OSError, ValueError):
            return {"sent": {}, "received": {}}

    def _is_at_rest(self) -> bool:
        """Everything that was sent has had its effect, as far as the applications say; the judge decides."""
        progress = {self.node(host): self._progress(host) for host in self.world.hosts.values()}
        return all(
            progress[receiver]["received"].get(sender, 0) >= count
            for sender, found in progress.items()
            for receiver, count in found["sent"].items()
        )

    async def finish(self, limit_s: float = 20.0) -> None:
        """Stop sending, wait until all has arrived or time is up, and end the applications; the judge finds what is missing."""
        self._stop_file.touch()
        await trio.sleep(0.6)
        with trio.move_on_after(limit_s):
            while not self._is_at_rest():
                await trio.sleep(0.1)
        for name, process in self.processes.items():
            if process.poll() is not None:
                log = (self.world.hosts[name].folder / "orders.log").read_text(errors="replace")[-1500:]
                raise NodeFailedError(f"the application on {name} ended by itself; its log ends:\n{log}")
            process.kill()
            await process.wait()
