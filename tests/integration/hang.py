"""Makes real processes hang, from outside and without their help: their main thread stands still under ptrace.

Unlike a stopped process, a hung one is in no state that gives it away (``t``, not ``T``), SIGCONT does not wake it, its other
threads run on and the kernel still accepts connections and data for it. It can be killed as any other.

Run as ``python -I -S hang.py SOCKET COMMAND...`` it is the ancestor of everything that it shall hang: Yama's usual setting lets a
process trace its descendants only, and orphans come back to it because it is a subreaper. It ends when none is left. Its end
lets go of everything that it holds: the kernel sees to that.
"""

from __future__ import annotations

import ctypes
import functools
import os
import select
import signal
import socket
import sys

WALL = 0x40000000
DETACH, SEIZE, INTERRUPT = 17, 0x4206, 0x4207
PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, pid: int, data: int = 0) -> None:
    if _libc.ptrace(request, pid, None, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace of {pid}: {os.strerror(number)}")


def hang(pid: int) -> int:
    """Stop the main thread of ``pid``; the signal that was on its way to it, 0 for none. Raises OSError."""
    _ptrace(SEIZE, pid)
    _ptrace(INTERRUPT, pid)
    _, status = os.waitpid(pid, WALL)
    if not os.WIFSTOPPED(status):
        raise ProcessLookupError(f"{pid} ended")
    return 0 if status >> 16 else os.WSTOPSIG(status)


def release(pid: int, signo: int) -> None:
    try:
        _ptrace(DETACH, pid, signo)
    except ProcessLookupError:
        pass  # killed meanwhile


@functools.cache
def reason_not_to_hang() -> str:
    """Why descendants cannot be traced here; empty if they can."""
    pid = os.fork()
    if pid == 0:
        signal.pause()
    try:
        release(pid, hang(pid))
    except OSError as exc:
        return str(exc)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return ""


def skip_unless_possible() -> None:
    """For tests; with ``ptrace`` in HA_CORE_REQUIRE they fail instead."""
    from tests.conftest import skip_without

    if reason := reason_not_to_hang():
        skip_without("ptrace", f"processes cannot be hung by ptrace here: {reason}")


def ask(path: str, request: str) -> None:
    """``hang PID`` or ``release``, of the process that listens at ``path``. Raises OSError with what it answered."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(path)
        client.sendall(request.encode())
        client.shutdown(socket.SHUT_WR)
        answer = client.recv(1000).decode()
    if answer != "done":
        raise OSError(answer or "it hung up")


def launcher(path: str) -> list[str]:
    """What to put before a command, so that what it starts can be hung through ``path``."""
    return [sys.executable, "-I", "-S", __file__, path]


def _carry_out(request: list[str], held: dict[int, int]) -> str:
    try:
        match request:
            case ["hang", pid]:
                held[int(pid)] = hang(int(pid))
            case ["release"]:
                while held:
                    release(*held.popitem())
            case _:
                return f"unknown request {request}"
    except OSError as exc:
        return str(exc)
    return "done"


def _reap(held: dict[int, int]) -> bool:
    """False once there is nobody left."""
    try:
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG | WALL)
            if pid == 0:
                return True
            if not os.WIFSTOPPED(status):
                held.pop(pid, None)
    except ChildProcessError:
        return False


def main(path: str, command: list[str]) -> None:
    """Serve until everything that was started has ended."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    pid = os.fork()
    if pid == 0:
        os.execvp(command[0], command)
    held: dict[int, int] = {}
    while _reap(held):
        if wake_read in select.select([server.fileno(), wake_read], [], [])[0]:
            os.read(wake_read, 100)
            continue
        with server.accept()[0] as client:
            request = client.recv(1000).decode().split()
            client.sendall(_carry_out(request, held).encode())
    os.unlink(path)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
