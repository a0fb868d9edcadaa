"""The guard's one thread: a selectors loop around the rules. It decides nothing; it reads, feeds, carries out and sleeps.

Order of a turn: sockets and pidfds first, then the timers that are due, so that beats and answers that wait are heard before
anybody is judged by their absence.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
import time
from collections import deque

from ha_core.guard.agents import AgentKeeper
from ha_core.guard.control import (
    EndRequest,
    GuardStatus,
    ListRequest,
    Reply,
    Request,
    StartRequest,
    StatusRequest,
    StopRequest,
    SubscribeRequest,
)
from ha_core.guard.events import (
    NEVER,
    Answered,
    Asked,
    Effect,
    EndAsked,
    Ended,
    Event,
    ForgetRun,
    KeepTombstone,
    KillRun,
    Noted,
    Rejoined,
    Replied,
    Reported,
    SendRenewal,
    StartRun,
    StopRun,
    WriteRun,
)
from ha_core.guard.kernel_timer import now_ns
from ha_core.guard.key import KeyFile
from ha_core.guard.links import Links
from ha_core.guard.processes import boot_id, lock_holder, open_lock, protect_process, take_lock
from ha_core.guard.rules import GuardRules
from ha_core.guard.runs import RunKeeper
from ha_core.guard.server import ControlServer
from ha_core.guard.settings import Settings

RESTART_FILE = "guard.json"
_LOCK_WAIT_S = 2.0
_REPEAT_NS = 60_000_000_000


class AnotherGuardError(Exception):
    """guard.lock is held by a living guard."""


class Guard:
    """One guard process, from taking its lock to its end."""

    def __init__(self, settings: Settings, nice_before: int) -> None:
        """Raises SettingsError, AnotherGuardError, OSError: one line each, nothing was started."""
        self._settings = settings
        key = KeyFile(settings.key_file, settings.cluster)
        key.reload()
        os.makedirs(settings.run_dir, mode=0o700, exist_ok=True)
        os.makedirs(settings.log_dir, exist_ok=True)
        protect_process(settings.nice, nice_before)
        self._lock = _wait_for_lock(settings.run_dir)
        self._noted: dict[str, int] = {}
        self._selector = selectors.DefaultSelector()
        self._queue: deque[Event] = deque()
        self._feeding = False
        self._replies: dict[int, Reply] = {}
        self._requests = 0
        self._ended = False
        self._runs = RunKeeper(
            settings.run_dir, settings.log_dir, settings.host, self._selector, self._tell, self._log,
            containment=settings.containment,
        )  # fmt: skip
        found, fresh = self._runs.adopt()
        self._boot = boot_id(settings.boot_id_file)
        self._rules = GuardRules(
            host=settings.host, boot_id=self._boot, instance=os.urandom(16), renewal_ns=round(settings.renewal_s * 1e9),
            now_ns=now_ns(), fresh=fresh,
        )  # fmt: skip
        self._links = Links(
            settings.run_dir, settings.links, key, self._selector, lambda answer: self._tell(Answered(answer)),
            lambda: self._tell(Rejoined()), self._log,
        )  # fmt: skip
        self._server = ControlServer(settings.run_dir, self._selector, self._request, self._rules.reports)
        self._agents = AgentKeeper(settings, self._selector, self._log)
        self._next_tick_ns = now_ns()
        self._signals = _catch_signals()
        self._selector.register(self._signals, selectors.EVENT_READ, self._on_signal)
        self._queue.extend(found)

    def run(self) -> None:
        """Serve until the orderly end."""
        _write_restart(self._settings)
        self._log(f"guard {os.getpid()} of {self._settings.host} up, containment {self._runs.containment}")
        self._feed()
        self._agents.run_due(now_ns())
        _notify(f"READY=1\nMAINPID={os.getpid()}")
        while not self._agents.ended():
            for key, _ in self._selector.select(self._wait_s()):
                # Handled earlier in this turn, the file may have been closed meanwhile, and its number reused.
                if self._selector.get_map().get(key.fd) is key:
                    key.data()
            self._timers()
        self._links.close()
        self._server.close()
        self._log(f"guard {os.getpid()} of {self._settings.host} ended")

    # -- the turn --

    def _wait_s(self) -> float:
        now = now_ns()
        times = [self._next_tick_ns, self._rules.next_timer(), self._runs.next_tick_ns(now), self._agents.next_ns()]
        return max(0, min(at for at in times if at is not None) - now) / 1e9

    def _timers(self) -> None:
        now = now_ns()
        timer = self._rules.next_timer()
        if timer is not None and timer <= now:
            self._rules.handle_timer(now)
            self._feed()
        if self._runs.next_tick_ns(now) is not None or now >= self._next_tick_ns:
            self._runs.tick()
        if now >= self._next_tick_ns:
            self._next_tick_ns = now + self._agents.tick_ns
            self._agents.tick(now)
            _notify("WATCHDOG=1")
        self._agents.run_due(now)

    def _tell(self, event: Event) -> None:
        self._queue.append(event)
        self._feed()

    def _feed(self) -> None:
        if self._feeding:
            return
        self._feeding = True
        try:
            while True:
                events = list(self._queue)
                self._queue.clear()
                if events:
                    self._rules.receive(events, now_ns())
                effects = self._rules.take_effects()
                for effect in effects:
                    self._perform(effect)
                if not effects and not self._queue:
                    return
        finally:
            self._feeding = False

    def _perform(self, effect: Effect) -> None:
        match effect:
            case SendRenewal(renewal):
                self._links.send(renewal, self._rules.hints)
            case WriteRun():
                self._runs.write(effect)
            case StartRun():
                self._runs.start(effect, _vm_environment())
            case StopRun():
                self._runs.stop(effect)
            case KillRun():
                self._runs.kill(effect)
            case KeepTombstone():
                self._runs.bury(effect)
            case ForgetRun(vm):
                self._runs.forget(vm)
            case Replied(request, reply):
                self._replies[request] = reply
            case Reported(report):
                self._log(f"{report.vm} (token {report.token}): {report.state}{': ' if report.text else ''}{report.text}")
                self._server.report(report)
            case Noted(text):
                self._note(text)
            case Ended():
                self._agents.end(now_ns())

    # -- requests and signals --

    def _request(self, request: Request) -> Reply:
        match request:
            case StartRequest() | StopRequest():
                self._requests += 1
                self._queue.append(Asked(self._requests, request))
                self._feed()
                return self._replies.pop(self._requests)
            case ListRequest():
                return Reply(0, runs=self._rules.reports())
            case StatusRequest():
                return Reply(0, status=self._status())
            case SubscribeRequest():
                return Reply(0)
            case EndRequest(stop_vms):
                self._end(self._settings.stop_vms if stop_vms is None else stop_vms)
                return Reply(0)

    def _end(self, stop_vms: bool) -> None:
        _notify("STOPPING=1")
        self._tell(EndAsked(stop_vms))

    def _on_signal(self) -> None:
        for signo in self._signals.recv(64):
            if signo in (signal.SIGTERM, signal.SIGINT):
                # A second one does not wait for the VMs any longer: they keep their stop time, and their shims see to it.
                self._end(self._settings.stop_vms and not self._rules.ending)

    def _status(self) -> GuardStatus:
        rules = self._rules
        return GuardStatus(
            host=rules.host,
            pid=os.getpid(),
            instance=rules.instance.hex(),
            boot_id=self._boot.hex(),
            lease_token=rules.lease_token,
            deadline_ns=-1 if rules.deadline_ns == NEVER else rules.deadline_ns,
            lease_ns=rules.lease_ns,
            margin_ns=rules.margin_ns,
            armed=rules.armed,
            renewals_sent=rules.sent,
            renewals_confirmed=rules.confirmed,
            last_confirmed_ns=rules.last_confirmed_ns,
            packets_refused=self._links.refused,
            containment=self._runs.containment,
            agents=self._agents.status(),
        )

    def _note(self, text: str) -> None:
        """The same line once a minute at most."""
        now = now_ns()
        if now - self._noted.get(text, -_REPEAT_NS) >= _REPEAT_NS:
            if len(self._noted) > 1000:
                self._noted.clear()
            self._noted[text] = now
            self._log(text)

    def _log(self, text: str) -> None:
        try:
            sys.stderr.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} guard: {text}\n")
            sys.stderr.flush()
        except OSError:
            pass


def _wait_for_lock(run_dir: str) -> int:
    lock = open_lock(run_dir, "guard")
    until = time.monotonic() + _LOCK_WAIT_S
    while not take_lock(lock):
        if time.monotonic() > until:
            os.close(lock)
            raise AnotherGuardError(f"{run_dir}: another guard (pid {lock_holder(run_dir, 'guard')}) is running here")
        time.sleep(0.005)
    return lock


def _write_restart(settings: Settings) -> None:
    """Keep the settings where the agents' watchdogs find them, for the next guard."""
    path = os.path.join(settings.run_dir, RESTART_FILE)
    data = {name: getattr(settings, name) for name in Settings.__slots__}
    with open(path + ".new", "w") as file:
        json.dump(data, file)
    os.replace(path + ".new", path)


def _catch_signals() -> socket.socket:
    """A socket that delivers the numbers of the signals caught."""
    ours, kernels = socket.socketpair()
    ours.setblocking(False)
    kernels.setblocking(False)
    global _wakeup
    _wakeup = kernels
    signal.set_wakeup_fd(kernels.fileno(), warn_on_full_buffer=False)
    for signo in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signo, lambda *_: None)
    for signo in (signal.SIGHUP, signal.SIGPIPE):
        signal.signal(signo, signal.SIG_IGN)
    return ours


_wakeup: socket.socket | None = None


def _vm_environment() -> dict[str, str]:
    hidden = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")
    return {key: value for key, value in os.environ.items() if key not in hidden}


def _notify(text: str) -> None:
    """sd_notify; nothing without NOTIFY_SOCKET."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
        try:
            sender.sendto(text.encode(), "\0" + path[1:] if path.startswith("@") else path)
        except OSError:
            pass
