"""Launches aam and vpxa, beats for them, listens to their beats, and replaces the one that is dead or hangs."""

from __future__ import annotations

import os
import selectors
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

from ha_core.guard.control import AgentStatus, Beat, beat_path, decode_beat, encode_beat
from ha_core.guard.kernel_timer import now_ns
from ha_core.guard.processes import Process, find_process, open_process, sample, spawn_locked, start_time
from ha_core.guard.settings import Settings
from ha_core.guard.watch import Restarts, Watch

_END_NS = 3_000_000_000
_BEATS_A_TURN = 100


def tick_ns_of(guard_hang_s: float, agent_hang_s: float) -> int:
    """Between beats, and between looks at the others: a tenth of the shortest limit, at least 20 ms."""
    return max(20_000_000, round(min(guard_hang_s, agent_hang_s) * 1e9 / 10))


class BeatSocket:
    """A process's beats: sent to the others' sockets, received on its own. Never waits, never fails: a lost beat is no harm."""

    def __init__(self, run_dir: str, name: str) -> None:
        self._run_dir = run_dir
        self._name = name
        self._number = 0
        self._start_time = start_time(os.getpid())
        path = beat_path(run_dir, name)
        fresh = path + ".new"
        if os.path.exists(fresh):
            os.unlink(fresh)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(fresh)
        os.chmod(fresh, 0o600)
        os.rename(fresh, path)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, others: list[str]) -> None:
        self._number += 1
        data = encode_beat(Beat(self._name, os.getpid(), self._start_time, self._number))
        for name in others:
            try:
                self._socket.sendto(data, beat_path(self._run_dir, name))
            except OSError:
                pass

    def receive(self) -> list[Beat]:
        beats: list[Beat] = []
        for _ in range(_BEATS_A_TURN):
            try:
                beat = decode_beat(self._socket.recv(256))
            except OSError:
                break
            if beat is not None:
                beats.append(beat)
        return beats

    def close(self) -> None:
        self._socket.close()


@dataclass(slots=True)
class _Agent:
    name: str
    argv: list[str]
    process: Process | None = None
    child: bool = False
    launch_at_ns: int = 0
    state: str = "down"
    restarts: Restarts = field(default_factory=Restarts)


class AgentKeeper:
    def __init__(self, settings: Settings, selector: selectors.BaseSelector, log: Callable[[str], None]) -> None:
        self._settings = settings
        self._selector = selector
        self._log = log
        self._agents = {name: _Agent(name, argv) for name, argv in settings.agents.items()}
        self.tick_ns = tick_ns_of(settings.guard_hang_s, settings.agent_hang_s)
        self._watch = Watch(self.tick_ns, round(settings.agent_start_s * 1e9))
        self._beats = BeatSocket(settings.run_dir, "guard")
        selector.register(self._beats, selectors.EVENT_READ, self._read)
        self._kill_at_ns = 0
        self._names = sorted(self._agents)
        self._unreaped: list[int] = []

    def status(self) -> tuple[AgentStatus, ...]:
        return tuple(
            AgentStatus(agent.name, agent.process.pid if agent.process else 0, agent.state, agent.restarts.count)
            for agent in self._agents.values()
        )

    def next_ns(self) -> int | None:
        """When a dead agent may be launched again."""
        times = [agent.launch_at_ns for agent in self._agents.values() if agent.process is None]
        return min(times) if times and not self._kill_at_ns else None

    def run_due(self, now: int) -> None:
        """Adopt or launch what is missing."""
        if self._kill_at_ns:
            return
        for agent in self._agents.values():
            if agent.process is None and now >= agent.launch_at_ns:
                self._begin(agent)

    def tick(self, now: int) -> None:
        self._beats.send(self._names)
        self._read()
        self._unreaped = [pid for pid in self._unreaped if not os.waitpid(pid, os.WNOHANG)[0]]
        samples = {}
        for name, agent in self._agents.items():
            found = sample(agent.process.pid) if agent.process is not None else None
            if found is not None:
                samples[name] = found
        for name, verdict in self._watch.tick(samples, now):
            process = self._agents[name].process
            if process is not None:
                silence_ms = self._watch.silence_ns(name, now) // 1_000_000
                self._log(f"{name} (pid {process.pid}) is {verdict.value}, silent for {silence_ms} ms: killed")
                self._agents[name].state = verdict.value
                process.send(signal.SIGKILL)
                self._watch.remove(name)
        if self._kill_at_ns and now >= self._kill_at_ns:
            for agent in self._agents.values():
                if agent.process is not None:
                    agent.process.send(signal.SIGKILL)

    def end(self, now: int) -> None:
        """SIGTERM to all; SIGKILL to those that are there 3 s later. ``ended`` tells when none is left."""
        if self._kill_at_ns:
            return
        self._kill_at_ns = now + _END_NS
        for agent in self._agents.values():
            self._watch.remove(agent.name)
            if agent.process is not None:
                agent.process.send(signal.SIGTERM)
                agent.process.send(signal.SIGCONT)

    def ended(self) -> bool:
        return bool(self._kill_at_ns) and all(agent.process is None for agent in self._agents.values())

    def _begin(self, agent: _Agent) -> None:
        settings, now = self._settings, now_ns()
        found, agent.child = find_process(settings.run_dir, agent.name), False
        adopted = found is not None
        if found is None:
            environment = {key: value for key, value in os.environ.items() if key != "WATCHDOG_PID"} | settings.environment
            log_path = os.path.join(settings.log_dir, f"{agent.name}.log")
            try:
                pid = spawn_locked(settings.run_dir, agent.name, agent.argv, environment, log_path)
            except OSError as exc:
                agent.launch_at_ns = agent.restarts.died(now)
                self._log(f"cannot fork {agent.name}: {exc.strerror}")
                return
            found, agent.child = open_process(pid), True
            agent.restarts.launched(now)
            if found is None:
                self._reap(pid)
                agent.launch_at_ns = agent.restarts.died(now)
                return
        agent.process, agent.state = found, "up"
        self._log(f"{agent.name} {'adopted' if adopted else 'launched'} (pid {found.pid})")
        self._selector.register(found, selectors.EVENT_READ, lambda: self._died(agent))
        self._watch.add(agent.name, round(settings.agent_hang_s * 1e9), now, started=adopted)

    def _died(self, agent: _Agent) -> None:
        process = agent.process
        if process is None or not process.dead():
            return
        how = self._reap(process.pid) if agent.child else ""
        self._log(f"{agent.name} (pid {process.pid}) ended{how}")
        self._selector.unregister(process)
        process.close()
        self._watch.remove(agent.name)
        agent.process, agent.state = None, "down"
        if not self._kill_at_ns:
            agent.launch_at_ns = agent.restarts.died(now_ns())
            self.run_due(now_ns())

    def _reap(self, pid: int) -> str:
        """How a dead child ended. Whoever traces it hears of its end first, and may keep it for ever: the guard does not wait."""
        reaped, status = os.waitpid(pid, os.WNOHANG)
        if not reaped:
            self._unreaped.append(pid)
            return ", held by a debugger"
        code = os.waitstatus_to_exitcode(status)
        return f" by signal {-code}" if code < 0 else f" with status {code}"

    def _read(self) -> None:
        now = now_ns()
        for beat in self._beats.receive():
            agent = self._agents.get(beat.name)
            process = agent.process if agent is not None else None
            if process is not None and (process.pid, process.start_time) == (beat.pid, beat.start_time):
                self._watch.beat(beat.name, now)
