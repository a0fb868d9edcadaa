"""The shim of one VM: armed before anything else, it dies at the deadline, and with it everything that the VM ever forked.

guard -- fork --> shim (kernel timer, reads the deadline) -- fork --> init (PID 1 of a new namespace, dies with the shim) --> VM

The shim never execs (that would delete its timer), holds no descriptor but its run file's flock, and ignores every signal that
it can. Where PID namespaces are not allowed, init is an ordinary subreaper: it kills the tree it sees, and a command that
leaves that tree (daemonises) is refused; the containment reached is in the mapping.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from ha_core.guard.kernel_timer import (
    KillTimer,
    enter_pid_namespace,
    now_ns,
    set_child_subreaper,
    set_name,
    set_parent_death_signal,
)
from ha_core.guard.mapping import Containment, Field, RunMapping, RunPhase
from ha_core.guard.processes import prepare_child, redirect, start_time

_NEVER = (1 << 63) - 1
_WAKE = signal.SIGUSR1
_PARENT_DIED = signal.SIGUSR2
_LAST_RESORT_NS = 50_000_000
_TREE_ENDS_NS = 1_000_000_000
_SHORTEST_POLL_NS = 5_000_000


@dataclass(frozen=True, slots=True)
class Command:
    argv: Sequence[str]
    environment: Mapping[str, str]
    workdir: str
    log_path: str


def fork_shim(mapping: RunMapping, lock: int, command: Command, *, namespaces: bool) -> int:
    """Fork the shim; its pid. ``lock`` is the run file's locked descriptor; the caller closes its own copy afterwards."""
    # Blocked over the fork: a signal meant for nobody must not run the guard's handlers in the child.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid
    code = 70
    try:
        _Shim(mapping, command, namespaces).run(lock)
    except BaseException as exc:  # noqa: ASYNC103 - a forked child: nobody is above to tell
        mapping.set(Field.STATE, max(mapping.get(Field.STATE), RunPhase.SETUP_FAILED))
        sys.stderr.write(f"{mapping.vm}: the shim failed: {exc!r}\n")
        sys.stderr.flush()
    finally:
        os._exit(code)


class _Shim:
    def __init__(self, mapping: RunMapping, command: Command, namespaces: bool) -> None:
        self._mapping = mapping
        self._command = command
        self._namespaces = namespaces
        self._armed: int | None = None
        self._init = 0

    def run(self, lock: int) -> NoReturn:
        self._timer = KillTimer()
        self._arm()
        signal.set_wakeup_fd(-1)
        for signo in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGQUIT, signal.SIGTSTP):
            signal.signal(signo, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, (signal.SIGCHLD, _WAKE))
        os.setsid()
        redirect(self._command.log_path)
        os.dup2(lock, 3)
        os.closerange(4, 1 << 20)
        set_name("ha-shim")
        mapping = self._mapping
        mapping.set(Field.SHIM_START, start_time(os.getpid()))
        mapping.set(Field.SHIM_PID, os.getpid())
        contained = self._namespaces and enter_pid_namespace()
        mapping.set(Field.CONTAINMENT, Containment.PID_NAMESPACE if contained else Containment.SUBREAPER)
        if not self._fork_init(contained):
            os._exit(0)
        while True:
            self._wait()

    def _fork_init(self, contained: bool) -> bool:
        go_read, go_write = os.pipe()
        ready_read, ready_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                for fd in (3, go_write, ready_read):
                    os.close(fd)
                _Init(self._mapping, self._command, contained).run(go_read, ready_write)
            finally:
                os._exit(code)
        os.close(go_read)
        os.close(ready_write)
        os.read(ready_read, 1)
        mapping = self._mapping
        mapping.set(Field.INIT_START, start_time(pid))
        mapping.set(Field.INIT_PID, pid)
        mapping.set(Field.STATE, max(mapping.get(Field.STATE), RunPhase.INIT_READY))
        self._init = pid
        # Recorded first, then looked for an order to stop: the guard writes its order first and then looks for a record.
        if mapping.get(Field.STOP_BY) or now_ns() >= mapping.get(Field.DEADLINE):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return False
        os.write(go_write, b"g")
        os.close(go_write)
        os.close(ready_read)
        return True

    def _wait(self) -> None:
        self._arm()
        mapping = self._mapping
        now = now_ns()
        ask_at = mapping.get(Field.DEADLINE) - mapping.get(Field.SHUTDOWN) if mapping.get(Field.SHUTDOWN) else _NEVER
        if mapping.get(Field.STOP_BY) or now >= ask_at:
            if not mapping.get(Field.ASKED):
                mapping.set(Field.ASKED, 1)
                os.kill(self._init, signal.SIGTERM)
            ask_at = _NEVER
        wait_ns = min(max(mapping.get(Field.POLL), _SHORTEST_POLL_NS), ask_at - now)
        signal.sigtimedwait((signal.SIGCHLD, _WAKE), max(0, wait_ns) / 1e9)
        if os.waitpid(self._init, os.WNOHANG)[0]:
            os._exit(0)

    def _arm(self) -> None:
        deadline_ns = self._mapping.get(Field.DEADLINE)
        stop_by_ns = self._mapping.get(Field.STOP_BY)
        until_ns = min(deadline_ns, stop_by_ns) if stop_by_ns else deadline_ns
        if until_ns != self._armed:
            self._timer.arm(None if until_ns == _NEVER else until_ns)
            self._armed = until_ns
        self._mapping.set(Field.ARMED, until_ns)


class _Init:
    """The parent of the VM's own process, in its namespace if there is one. Blocked signals reach even a PID 1."""

    def __init__(self, mapping: RunMapping, command: Command, contained: bool) -> None:
        self._mapping = mapping
        self._command = command
        self._contained = contained
        self._signals = (signal.SIGCHLD, signal.SIGTERM, _PARENT_DIED)

    def run(self, go: int, ready: int) -> NoReturn:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._signals)
        set_parent_death_signal(signal.SIGKILL if self._contained else _PARENT_DIED)
        set_name("ha-init")
        if not self._contained:
            set_child_subreaper()
            self._timer = KillTimer()
            self._arm()
        os.write(ready, b"r")
        os.close(ready)
        # The pipe, not getppid (0 in a namespace), closes the race with a shim that died before the death signal was set.
        if os.read(go, 1) != b"g":
            os._exit(111)
        os.close(go)
        status_read, status_write = os.pipe()
        vm = os.fork()
        if vm == 0:
            self._exec(status_write)
        os.close(status_write)
        error = os.read(status_read, 4)
        os.close(status_read)
        if error:
            self._mapping.set(Field.EXIT_CODE, int.from_bytes(error, "big"))
            self._mapping.set(Field.STATE, RunPhase.EXEC_FAILED)
            os.waitpid(vm, 0)
            os._exit(0)
        self._mapping.set(Field.STATE, RunPhase.RUNNING)
        while True:
            self._wait(vm)

    def _wait(self, vm: int) -> None:
        if self._contained:
            signo = signal.sigwaitinfo(self._signals).si_signo
        else:
            self._arm()
            timeout_s = min(0.1, max(self._mapping.get(Field.POLL), _SHORTEST_POLL_NS) / 1e9)
            info = signal.sigtimedwait(self._signals, timeout_s)
            signo = info.si_signo if info is not None else 0
        if signo == signal.SIGTERM:
            try:
                os.killpg(vm, signal.SIGTERM)
            except (ProcessLookupError, PermissionError):
                pass
        elif signo == _PARENT_DIED:
            self._end_tree()
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid == vm:
                self._mapping.set(Field.EXIT_CODE, os.waitstatus_to_exitcode(status))
                self._mapping.set(Field.STATE, RunPhase.EXITED)
                if not self._contained:
                    self._end_tree()
                os._exit(0)
        if not self._contained and set(_children(os.getpid())) - {vm}:
            self._mapping.set(Field.STATE, RunPhase.DAEMONISED)
            self._end_tree()

    def _exec(self, status: int) -> NoReturn:
        command = self._command
        try:
            os.setsid()
            prepare_child()
            if not self._contained:
                set_parent_death_signal(signal.SIGKILL)
            os.chdir(command.workdir)
            os.execvpe(command.argv[0], list(command.argv), dict(command.environment))
        except OSError as exc:
            os.write(2, f"cannot run {command.argv[0]!r} in {command.workdir!r}: {exc.strerror}\n".encode())
            os.write(status, (exc.errno or 1).to_bytes(4, "big"))
        finally:
            os._exit(127)

    def _arm(self) -> None:
        """Without a namespace, a stopped init must not outlive its shim: its own timer follows a little later."""
        until_ns = self._mapping.get(Field.ARMED)
        self._timer.arm(None if until_ns == _NEVER else until_ns + _LAST_RESORT_NS)

    def _end_tree(self) -> NoReturn:
        """Kill every descendant until none is left; orphans become our own children, so none escapes that stayed below us."""
        if not self._contained:
            self._timer.arm(now_ns() + _TREE_ENDS_NS)
        for _ in range(1000):
            for pid in descendants(os.getpid()):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                break
            time.sleep(0.001)
        os._exit(0)


def _children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(text) for text in file.read().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def descendants(pid: int) -> list[int]:
    """All that are below ``pid`` at this moment, the dead that nobody has reaped yet included."""
    found: list[int] = []
    waiting = _children(pid)
    while waiting:
        child = waiting.pop()
        found.append(child)
        waiting += _children(child)
    return found
