"""A host for guard tests: real guard processes, a leader that answers renewals from a thread, and VMs that are their own
witness.

The witness knows nothing of our code: each VM takes a non-blocking flock on its own shared file for life (finding it held is an
overlap) and appends host, token and start to its journal.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import ha_core.guard
from ha_core.guard.control import (
    MAX_REPLY_BYTES,
    EndRequest,
    GuardStatus,
    LineDecoder,
    ListRequest,
    Reply,
    Request,
    RunReport,
    StartRequest,
    StatusRequest,
    decode_answer,
    encode_request,
)
from ha_core.guard.mapping import Field, RunMapping, open_run
from ha_core.guard.primaries import write_primaries
from ha_core.guard.processes import Process, find_process, lock_holder, open_process
from ha_core.guard.renewal import RenewalAnswer, RenewalCodec, RenewalError, Status
from ha_core.guard.runs import living_processes

T = TypeVar("T")
GUARD = str(Path(ha_core.guard.__file__).parent)
KEY = bytes(range(32))
LEASE_S, MARGIN_S = 0.7, 0.1

WITNESS = """
import fcntl, os, sys, time, signal
path = sys.argv[1]
lock = os.open(path + ".lock", os.O_RDWR | os.O_CREAT, 0o666)
journal = os.open(path + ".journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
me = f"{os.environ['HA_CORE_HOST']} {os.environ['HA_CORE_FENCING_TOKEN']} {time.clock_gettime_ns(time.CLOCK_BOOTTIME)}"
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    os.write(journal, f"overlap {me}\\n".encode())
    sys.exit(99)
os.write(journal, f"start {me}\\n".encode())
what = sys.argv[2:]
if "ignore-term" in what:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "child" in what and os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "daemon" in what:
    os.set_inheritable(lock, True)
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.write(journal, f"daemon {me}\\n".encode())
        while True:
            time.sleep(60)
while os.path.exists(path + ".journal"):  # what escapes a broken guard ends with its world
    time.sleep(1)
"""

AGENT = """
import os, sys, time
sys.path.insert(0, sys.argv[2])
import types
package = types.ModuleType("ha_core"); package.__path__ = [sys.argv[2]]; sys.modules["ha_core"] = package
from ha_core.guard.agents import BeatSocket
run_dir, name = os.environ["RUN_DIR"], sys.argv[1]
beats = BeatSocket(run_dir, name)
with open(f"{run_dir}/{name}.lives", "a") as file:
    file.write(f"{os.getpid()}\\n")
while True:
    beats.send(["guard"])
    if os.path.exists(f"{run_dir}/{name}.hang"):
        os.unlink(f"{run_dir}/{name}.hang")
        while True:
            time.sleep(60)
    if os.path.exists(f"{run_dir}/{name}.slow"):
        os.unlink(f"{run_dir}/{name}.slow")
        time.sleep(0.6)
    time.sleep(0.03)
"""


WATCHDOG_AGENT = """
import logging, os, sys, trio
from ha_core.config import FAST
from ha_core.runtime.watchdog import Watchdog
logging.basicConfig(format="%(asctime)s %(name)s %(message)s")
run_dir, name = os.environ["RUN_DIR"], sys.argv[1]
with open(f"{run_dir}/{name}.lives", "a") as file:
    file.write(f"{os.getpid()}\\n")
trio.run(Watchdog(name, run_dir, FAST).run)
"""


def usable_python(prefix: tuple[str, ...]) -> str | None:
    """An interpreter that can be executed, and can read the guard, under ``prefix``."""
    check = f'test -r "{GUARD}/__main__.py" && exec "$0" -I -S -c "import sys; assert sys.version_info >= (3, 11)"'
    for python in (sys.executable, "/usr/bin/python3"):
        if subprocess.run([*prefix, "sh", "-c", check, python], check=False, capture_output=True).returncode == 0:
            return python
    return None


def now_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Leader:
    """Answers renewals as an active primary would; grants a continuing token to each new guard instance."""

    def __init__(self, links: int = 1) -> None:
        self.codec = RenewalCodec("test", KEY)
        self.sockets = []
        for link in range(links):
            opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            opened.bind((f"127.0.0.{link + 1}", 0))
            opened.setblocking(False)
            self.sockets.append(opened)
        self.addresses = {
            f"l{n}": f"{opened.getsockname()[0]}:{opened.getsockname()[1]}" for n, opened in enumerate(self.sockets)
        }
        self.silent = False
        self.silent_links: set[int] = set()
        self.armed = True
        self.revoked = False
        self.continues = True
        self.token = 0
        self.oldest = 0
        self.instance = b""
        self.next_token = 100
        self.last_created_ns = 0
        self._ending = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def join(self, key: bytes) -> None:
        """From now on the leader of another cluster, which counts its tokens anew."""
        self.token, self.oldest, self.next_token = 0, 0, 10
        self.codec = RenewalCodec("test", key)

    def close(self) -> None:
        self._ending = True
        self._thread.join()
        for opened in self.sockets:
            opened.close()

    def _serve(self) -> None:
        while not self._ending:
            for opened in select.select(self.sockets, [], [], 0.02)[0]:
                packet, source = opened.recvfrom(2000)
                if self.silent or self.sockets.index(opened) in self.silent_links:
                    continue
                answer = self._answer(packet)
                if answer is not None:
                    opened.sendto(self.codec.encode_answer(answer), source)

    def _answer(self, packet: bytes) -> RenewalAnswer | None:
        try:
            renewal = self.codec.decode_renewal(packet)
        except RenewalError:
            return None
        if self.revoked and renewal.lease_token:
            return RenewalAnswer(renewal.instance, renewal.number, Status.REVOKED, renewal.lease_token)
        if renewal.instance != self.instance or renewal.lease_token not in (0, self.token) or not self.token:
            self.instance, self.token = renewal.instance, self.next_token
            self.oldest = self.oldest if self.continues and self.oldest else self.token
            self.next_token += 10
        self.last_created_ns = renewal.created_ns
        return RenewalAnswer(
            renewal.instance, renewal.number, Status.CONFIRMED, self.token, round(LEASE_S * 1e9), round(MARGIN_S * 1e9),
            self.oldest, self.armed,
        )  # fmt: skip


class World:
    """One host; use as a context manager: on leaving, everything that it started is gone."""

    def __init__(
        self, *, links: int = 1, agents: tuple[str, ...] = (), watchdogs: bool = False, prefix: tuple[str, ...] = (),
        python: str = sys.executable,
        **settings: object,
    ) -> None:  # fmt: skip
        """``agents``: stand-ins that beat, or with ``watchdogs`` the real watchdog under trio. ``prefix`` runs the guard, with
        an interpreter that may be another one."""
        base = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self.dir = tempfile.mkdtemp(prefix="guard-", dir=base)
        os.chmod(self.dir, 0o755)
        self.run_dir = f"{self.dir}/run"
        os.mkdir(self.run_dir, 0o700)
        self.leader = Leader(links)
        write_primaries(self.run_dir, {"aam@leader": self.leader.addresses})
        Path(f"{self.dir}/key").write_bytes(KEY)
        root = str(Path(GUARD).parent)
        flags, script = (["-P"], WATCHDOG_AGENT) if watchdogs else (["-I", "-S"], AGENT)
        self.settings: dict[str, object] = {
            "host": "h1", "cluster": "test", "run_dir": self.run_dir, "log_dir": f"{self.dir}/log",
            "key_file": f"{self.dir}/key", "links": {f"l{n}": f"127.0.0.{n + 1}:0" for n in range(links)},
            "renewal_s": 0.05, "guard_hang_s": 0.15, "agent_hang_s": 1.0,
            "agents": {
                name: [python, *flags, "-c", script, name, root]
                for name in agents
            },
            "environment": {"RUN_DIR": self.run_dir},
        } | settings  # fmt: skip
        self.prefix = prefix
        self.python = python
        self.guards: list[subprocess.Popen[bytes]] = []
        self._next_id = 0

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        # Without its settings nobody can start another guard; then the guard goes first, since it would replace the agents.
        Path(f"{self.run_dir}/guard.json").unlink(missing_ok=True)
        for _ in range(3):
            for name in ("guard", "aam", "vpxa"):
                found = find_process(self.run_dir, name)
                if found is not None:
                    found.send(signal.SIGKILL)
                    found.wait(2)
                    found.close()
            time.sleep(0.02)
        for guard in self.guards:
            guard.kill()
            guard.wait()
        for process in living_processes(self.run_dir):
            process.send(signal.SIGKILL)
            process.close()
        self.leader.close()
        if kind is not None:
            sys.stderr.write(self.log())
        shutil.rmtree(self.dir, ignore_errors=True)

    def log(self) -> str:
        parts = [f"--- {path.name}\n{path.read_text()}" for path in sorted(Path(self.dir).glob("**/*.log"))]
        return "\n".join(parts)

    def start_guard(self, **environment: str) -> subprocess.Popen[bytes]:
        path = Path(f"{self.dir}/guard-settings.json")
        path.write_text(json.dumps(self.settings))
        with open(f"{self.dir}/guard.log", "ab") as log:
            guard = subprocess.Popen(
                [*self.prefix, self.python, "-I", "-S", GUARD, "--config", str(path)],
                stderr=log,
                start_new_session=True,
                env=os.environ | environment,
            )
        self.guards.append(guard)
        return guard

    def wait_for_lease(self) -> GuardStatus:
        return self.wait_until(lambda: status if (status := self.status()) and status.lease_token else None)

    def wait_until(
        self, check: Callable[[], T | None], timeout_s: float = 5.0, *, otherwise: str = "it did not happen in time"
    ) -> T:
        until = time.monotonic() + timeout_s
        while True:
            found = check()
            if found:
                return found
            if time.monotonic() > until:
                raise AssertionError(otherwise)
            time.sleep(0.002)

    def ask(self, request: Request) -> Reply:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(2)
            client.connect(f"{self.run_dir}/guard.sock")
            self._next_id += 1
            client.sendall(encode_request(self._next_id, request))
            decoder = LineDecoder(MAX_REPLY_BYTES)
            while True:
                data = client.recv(65_536)
                if not data:
                    raise ConnectionResetError
                for line in decoder.receive(data):
                    answer = decode_answer(line)
                    assert isinstance(answer, Reply)
                    return answer

    def status(self) -> GuardStatus | None:
        try:
            return self.ask(StatusRequest()).status
        except OSError:
            return None

    def run(self, vm: str) -> RunReport | None:
        try:
            runs = self.ask(ListRequest()).runs or ()
        except OSError:
            return None
        return next((run for run in runs if run.vm == vm), None)

    def start_vm(self, vm: str, token: int, *what: str, shutdown_s: float = 0.0, wait: bool = True) -> RunReport:
        lease = self.wait_for_lease().lease_token
        argv = (self.python, "-I", "-S", "-c", WITNESS, f"{self.dir}/{vm}", *what)
        reply = self.ask(StartRequest(vm, lease, token, argv, {}, "/", shutdown_s))
        assert not reply.error, reply
        assert reply.run is not None
        if wait:
            self.wait_until(lambda: self.starts(vm) and self.run(vm))
        return reply.run

    def lives(self, agent: str) -> list[int]:
        """The pids under which an agent has lived."""
        path = Path(f"{self.run_dir}/{agent}.lives")
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def guard_pid(self) -> int:
        return lock_holder(self.run_dir, "guard")

    def init(self, vm: str) -> Process:
        """The VM's init, by pidfd."""
        mapping = self.mapping(vm)
        found = open_process(mapping.get(Field.INIT_PID), mapping.get(Field.INIT_START))
        assert found is not None
        return found

    def end(self, *, stop_vms: bool) -> None:
        self.ask(EndRequest(stop_vms))

    def journal(self, vm: str) -> list[str]:
        path = Path(f"{self.dir}/{vm}.journal")
        return path.read_text().splitlines() if path.exists() else []

    def starts(self, vm: str) -> list[str]:
        return [line for line in self.journal(vm) if line.startswith("start ")]

    def lock_held(self, vm: str) -> bool:
        """Asked of the kernel from outside: whether anything of the VM is still alive."""
        return subprocess.run(["flock", "-n", f"{self.dir}/{vm}.lock", "true"], check=False).returncode != 0

    def mapping(self, vm: str) -> RunMapping:
        for path in sorted(Path(self.run_dir).glob(f"{vm.encode().hex()}-*.run"), reverse=True):
            mapping = open_run(str(path))
            if mapping is not None:
                return mapping
        raise AssertionError(f"no run file of {vm}")
