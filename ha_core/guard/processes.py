"""Processes by identity: a pid alone may have been reused, so a pidfd is opened first and the start time compared then.

Who is the guard, the aam or the vpxa of a run directory is told by record locks (``lockf``) on ``guard.lock``, ``aam.lock``,
``vpxa.lock``: such a lock belongs to one process, survives its exec, is not inherited by its children (so a half-forked shim
can never keep a dead guard's lock), is gone the moment it dies, and the kernel names its holder to anybody who asks. The one
rule: the holder must never open and close its own lock file again.
"""

from __future__ import annotations

import fcntl
import os
import resource
import select
import signal
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ha_core.guard.watch import Sample

_FLOCK = struct.Struct("@hhqqi4x")
LOST_RACE = 75


@dataclass(frozen=True, slots=True)
class Process:
    """A living process, by pidfd; ``close`` it. The pidfd becomes readable when it is dead."""

    pid: int
    start_time: int
    pidfd: int

    def fileno(self) -> int:
        return self.pidfd

    def dead(self) -> bool:
        return self.wait(0)

    def wait(self, timeout_s: float) -> bool:
        """True once it is dead."""
        # poll, not select: an agent may have more than 1,024 descriptors open.
        waiter = select.poll()
        waiter.register(self.pidfd, select.POLLIN)
        return bool(waiter.poll(timeout_s * 1e3))

    def send(self, signo: int) -> None:
        try:
            signal.pidfd_send_signal(self.pidfd, signo)
        except ProcessLookupError:
            pass

    def close(self) -> None:
        os.close(self.pidfd)


def _stat(pid: int) -> list[str] | None:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def start_time(pid: int) -> int:
    """Clock ticks from boot to the start of ``pid``; 0 if there is no such process."""
    fields = _stat(pid)
    return int(fields[19]) if fields else 0


def sample(pid: int) -> Sample | None:
    """State letter and run delay of ``pid``; None if there is no such process."""
    fields = _stat(pid)
    if fields is None:
        return None
    try:
        with open(f"/proc/{pid}/schedstat") as file:
            delay_ns = int(file.read().split()[1])
    except (OSError, IndexError, ValueError):
        delay_ns = 0
    return Sample(fields[0], delay_ns)


def open_process(pid: int, expected_start: int | None = None) -> Process | None:
    """The process with this pid, if it lives and, when ``expected_start`` is given, is the one that started then.

    Raises:
        OSError: it cannot be told (no descriptor is left, for example), which must never pass for dead.
    """
    if pid <= 0:
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    started = start_time(pid)
    if started == 0 or (expected_start is not None and started != expected_start):
        os.close(pidfd)
        return None
    found = Process(pid, started, pidfd)
    if found.dead():
        os.close(pidfd)
        return None
    return found


def boot_id(path: str = "/proc/sys/kernel/random/boot_id") -> bytes:
    """The kernel's boot id, 16 bytes."""
    with open(path) as file:
        return bytes.fromhex(file.read().strip().replace("-", ""))


def lock_path(run_dir: str, process: str) -> str:
    return os.path.join(run_dir, f"{process}.lock")


def open_lock(run_dir: str, process: str) -> int:
    return os.open(lock_path(run_dir, process), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def take_lock(fd: int) -> bool:
    """Take the lock for this process; False if another one has it."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def lock_holder(run_dir: str, process: str) -> int:
    """The pid that holds the lock of ``process``, 0 if nobody does. Never ask for one's own lock."""
    try:
        fd = os.open(lock_path(run_dir, process), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    finally:
        os.close(fd)
    return 0 if kind == fcntl.F_UNLCK else pid


def find_process(run_dir: str, process: str) -> Process | None:
    """The living holder of that lock."""
    pid = lock_holder(run_dir, process)
    found = open_process(pid)
    if found is not None and lock_holder(run_dir, process) != pid:
        found.close()
        return None
    return found


@dataclass(frozen=True, slots=True)
class _Before:
    """What this process had before it was protected, for its children."""

    descriptors: tuple[int, int]
    nice: int
    oom_score: str


_before: _Before | None = None


def protect_process(nice: int, nice_before: int) -> None:
    """Take all the descriptors that are allowed, and where that is allowed a high priority and a low rank for the OOM killer:
    a lease must not expire because a VM is busy or greedy. Children that exec get back what was before."""
    global _before
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    _before = _Before((soft, hard), nice_before, _swap_oom_score("-900"))
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    _set_nice(nice)


def prepare_child() -> None:
    """In a new child that will exec: limits and priority from before, default signal actions, nothing blocked."""
    if _before is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, _before.descriptors)
        _set_nice(_before.nice)
        _swap_oom_score(_before.oom_score)
    for signo in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        try:
            signal.signal(signo, signal.SIG_DFL)
        except (OSError, ValueError):
            pass
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _set_nice(nice: int) -> None:
    try:
        os.setpriority(os.PRIO_PROCESS, 0, nice)
    except OSError:
        pass


def _swap_oom_score(score: str) -> str:
    """Set /proc/self/oom_score_adj, if that is allowed; what it was."""
    try:
        with open("/proc/self/oom_score_adj", "r+") as file:
            before = file.read().strip()
            file.seek(0)
            file.write(score)
        return before
    except OSError:
        return "0"


def redirect(log_path: str) -> None:
    """stdin from nowhere, stdout and stderr to the end of a log file (to nowhere, if that cannot be opened)."""
    null = os.open(os.devnull, os.O_RDWR)
    try:
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640) if log_path else null
    except OSError:
        log = null
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)


def spawn_locked(run_dir: str, process: str, argv: Sequence[str], environment: Mapping[str, str], log_path: str) -> int:
    """Fork and exec an agent that holds its lock from before its exec; the pid. Exit status 75: another one had the lock."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid
    code = 126
    try:
        signal.set_wakeup_fd(-1)
        os.setsid()
        prepare_child()
        redirect(log_path)
        lock = open_lock(run_dir, process)
        if not take_lock(lock):
            os._exit(LOST_RACE)
        # Not closing lock's own description: moving it by dup2 and closing the copies would release the record lock.
        os.closerange(3, lock)
        os.closerange(lock + 1, 1 << 20)
        os.set_inheritable(lock, True)
        os.execvpe(argv[0], list(argv), dict(environment))
    except OSError as exc:
        os.write(2, f"{process}: cannot run {argv[0]!r}: {exc.strerror}\n".encode())
        code = 127
    finally:
        os._exit(code)
