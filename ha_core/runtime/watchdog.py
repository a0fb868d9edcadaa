"""The agents' half of the mutual watchdogs: aam and vpxa beat for the guard and for each other, and replace a guard that is
gone.

* A dead guard is seen through its pidfd, at once; a stopped one (state T) at the next tick; a hung one by its missing beats.
* One restarter at a time: whoever holds ``guard-restart.lock``. Under the lock it looks again, ends what is left of the old
  guard, waits for its pidfd, and starts the new one, which takes ``guard.lock``, adopts the shims and asks for its Grant.
* A restarter that is itself stopped or stuck while it holds the lock is killed; a missing agent is then the new guard's affair.
* The guard replaces a hung agent. Should it fail to (three limits are over), the other agent kills the hung one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import trio

import ha_core.guard
from ha_core.config import Profile, ns
from ha_core.errors import ConfigError
from ha_core.guard.agents import BeatSocket, tick_ns_of
from ha_core.guard.control import PROCESSES
from ha_core.guard.loop import RESTART_FILE
from ha_core.guard.processes import (
    Process,
    find_process,
    lock_holder,
    open_lock,
    sample,
    take_lock,
)
from ha_core.guard.watch import Restarts, Sample, Verdict, Watch
from ha_core.runtime.clock import now_ns

logger = logging.getLogger(__name__)

_RESTART_LOCK = "guard-restart"
_GUARD_START_NS = 2_000_000_000
_STUCK_AGENT_LIMITS = 3
_SHORT_S = 0.01


class Watchdog:
    """Run it as a task of the agent's main nursery: a hung event loop then stops the beats, as it should."""

    def __init__(self, name: str, run_dir: Path | str, profile: Profile) -> None:
        """``name``: aam or vpxa."""
        if name not in ("aam", "vpxa"):
            raise ConfigError(f"watchdog: expected aam or vpxa, found {name!r}", field="name", value=name)
        self._name = name
        self._run_dir = str(run_dir)
        self._others = [other for other in PROCESSES if other != name]
        self._tick_ns = tick_ns_of(profile.guard_hang_s, profile.agent_hang_s)
        self._limits_ns = {
            other: ns(profile.guard_hang_s) if other == "guard" else _STUCK_AGENT_LIMITS * ns(profile.agent_hang_s)
            for other in self._others
        }
        self._stuck_ns = ns(profile.agent_hang_s)
        self._watch = Watch(self._tick_ns, _GUARD_START_NS)
        self._found: dict[str, Process] = {}
        self._children: list[subprocess.Popen[bytes]] = []
        self._restarts = Restarts()
        self._launch_at_ns = 0
        self._waiting_since_ns = 0
        self.guard_restarts = 0
        """How often this process has started a new guard."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Beat and watch until cancelled; the guard that starts the agents is expected to live when this begins."""
        beats = BeatSocket(self._run_dir, self._name)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._beat, beats)
                nursery.start_soon(self._keep_guard)
                task_status.started()
        finally:
            beats.close()
            for process in self._found.values():
                process.close()
            for child in self._children:
                # The guard outlives us on purpose: it is not ours to wait for.
                child.returncode = child.poll() or 0

    async def _beat(self, beats: BeatSocket) -> None:
        while True:
            self._look()
            self._tick(beats, now_ns())
            await trio.sleep(self._tick_ns / 1e9)

    async def _keep_guard(self) -> None:
        while True:
            guard = self._found.get("guard")
            if guard is None:
                await self._restart_guard()
                await trio.sleep(_SHORT_S)
            else:
                with contextlib.suppress(trio.ClosedResourceError):
                    await trio.lowlevel.wait_readable(guard.pidfd)
            self._look()

    def _look(self) -> None:
        """Forget the dead, find those that are new."""
        self._children = [child for child in self._children if child.poll() is None]
        for name in self._others:
            known = self._found.get(name)
            if known is not None and known.dead():
                self._forget(name)
                known = None
            if known is None:
                found = find_process(self._run_dir, name)
                if found is not None:
                    self._found[name] = found
                    self._watch.add(name, self._limits_ns[name], now_ns(), started=False)

    def _forget(self, name: str) -> None:
        process = self._found.pop(name)
        trio.lowlevel.notify_closing(process.pidfd)
        process.close()
        self._watch.remove(name)
        if name == "guard":
            logger.warning("the guard (pid %d) is dead", process.pid)
            self._launch_at_ns = self._restarts.died(now_ns())
            self._waiting_since_ns = 0

    def _tick(self, beats: BeatSocket, now: int) -> None:
        beats.send(self._others)
        for beat in beats.receive():
            process = self._found.get(beat.name)
            if process is not None and (process.pid, process.start_time) == (beat.pid, beat.start_time):
                self._watch.beat(beat.name, now)
        for name, verdict in self._watch.tick(self._samples(), now):
            # Agents are the guard's affair: a stopped one is judged there, here only one that it leaves hanging.
            if name == "guard" or verdict is Verdict.HUNG:
                process = self._found[name]
                logger.warning(
                    "%s (pid %d) is %s, silent for %.0f ms: killed",
                    name, process.pid, verdict.value, self._watch.silence_ns(name, now) / 1e6,
                )  # fmt: skip
                process.send(signal.SIGKILL)
                self._watch.remove(name)

    def _samples(self) -> Mapping[str, Sample]:
        samples = {name: sample(process.pid) for name, process in self._found.items()}
        return {name: found for name, found in samples.items() if found is not None}

    async def _restart_guard(self) -> None:
        """The guard is dead: start a new one, unless somebody else is at it."""
        if now_ns() < self._launch_at_ns:
            return
        lock = open_lock(self._run_dir, _RESTART_LOCK)
        try:
            if not take_lock(lock):
                self._judge_restarter()
                return
            self._waiting_since_ns = 0
            if lock_holder(self._run_dir, "guard"):
                return
            self._restarts.launched(now_ns())
            try:
                child = self._spawn()
            except (OSError, ValueError, KeyError) as exc:
                self._launch_at_ns = self._restarts.died(now_ns())
                logger.error("cannot start a new guard: %r", exc)
                return
            self._children.append(child)
            self.guard_restarts += 1
            if await self._guard_came(child):
                logger.warning("guard restarted (pid %d)", child.pid)
            else:
                self._launch_at_ns = self._restarts.died(now_ns())
                logger.error("the new guard ended with status %s", child.returncode)
        finally:
            os.close(lock)

    async def _guard_came(self, child: subprocess.Popen[bytes]) -> bool:
        """Whether a guard has the lock; False once the child is dead or takes too long."""
        for _ in range(_GUARD_START_NS // round(_SHORT_S * 1e9)):
            if lock_holder(self._run_dir, "guard"):
                return True
            if child.poll() is not None:
                return False
            await trio.sleep(_SHORT_S)
        return False

    def _judge_restarter(self) -> None:
        now = now_ns()
        self._waiting_since_ns = self._waiting_since_ns or now
        holder = find_process(self._run_dir, _RESTART_LOCK)
        if holder is None:
            return
        found = sample(holder.pid)
        if (found is not None and found.state == "T") or now - self._waiting_since_ns > self._stuck_ns + _GUARD_START_NS:
            logger.warning("the restarter of the guard (pid %d) is stuck: killed", holder.pid)
            holder.send(signal.SIGKILL)
            self._waiting_since_ns = 0
        holder.close()

    def _spawn(self) -> subprocess.Popen[bytes]:
        settings = Path(self._run_dir) / RESTART_FILE
        (folder,) = ha_core.guard.__path__
        log_path = Path(json.loads(settings.read_text())["log_dir"]) / "guard.log"
        with log_path.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", folder, "--config", str(settings)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
