"""What the shim needs of the kernel and the standard library does not have: a timer that kills, prctl, unshare.

``timer_create`` on CLOCK_BOOTTIME with SIGKILL as its signal: the kernel kills the process at the deadline even if it is
stopped. exec deletes the timer, and fork does not inherit it: arm it in the shim and never exec there. The kernel drops such
a SIGKILL to the init of a PID namespace, which is why the shim stands outside.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time

CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
_BOOTTIME, _ABSOLUTE, _SIGEV_SIGNAL = 7, 1, 0
_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 15, 36

_libc = ctypes.CDLL(None, use_errno=True)


class _SigEvent(ctypes.Structure):
    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("padding", ctypes.c_byte * 48),
    )


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _TimerSpec(ctypes.Structure):
    _fields_ = (("interval", _TimeSpec), ("value", _TimeSpec))


_libc.timer_create.argtypes = [ctypes.c_int, ctypes.POINTER(_SigEvent), ctypes.POINTER(ctypes.c_void_p)]
_libc.timer_settime.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_TimerSpec), ctypes.c_void_p]
_libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
_libc.unshare.argtypes = [ctypes.c_int]


def _checked(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def now_ns() -> int:
    """CLOCK_BOOTTIME, the clock of every deadline."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class KillTimer:
    """SIGKILL to this process at an absolute instant of CLOCK_BOOTTIME."""

    def __init__(self) -> None:
        event = _SigEvent(None, signal.SIGKILL, _SIGEV_SIGNAL)
        self._timer = ctypes.c_void_p()
        _checked(_libc.timer_create(_BOOTTIME, ctypes.byref(event), ctypes.byref(self._timer)))

    def arm(self, deadline_ns: int | None) -> None:
        """None disarms. An instant in the past kills at once."""
        seconds, nanoseconds = (0, 0) if deadline_ns is None else divmod(max(1, deadline_ns), 1_000_000_000)
        spec = _TimerSpec(_TimeSpec(0, 0), _TimeSpec(seconds, nanoseconds))
        _checked(_libc.timer_settime(self._timer, _ABSOLUTE, ctypes.byref(spec), None))


def set_parent_death_signal(signo: int) -> None:
    """The kernel sends ``signo`` to this process when the *thread* that forked it dies."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, signo, 0, 0, 0))


def set_child_subreaper() -> None:
    """Orphaned descendants become children of this process."""
    _checked(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))


def set_name(name: str) -> None:
    """The name in /proc/PID/comm, at most 15 bytes."""
    text = ctypes.create_string_buffer(name.encode()[:15])
    _libc.prctl(_PR_SET_NAME, ctypes.addressof(text), 0, 0, 0)


def unshare(flags: int) -> None:
    """Raises OSError. CLONE_NEWUSER needs a process with one thread."""
    _checked(_libc.unshare(flags))


def enter_pid_namespace() -> bool:
    """Make the next child of this process the init of a new PID namespace; False where that is not allowed.

    Raises:
        OSError: the user namespace was made but could not be set up.
    """
    try:
        unshare(CLONE_NEWPID)
        return True
    except OSError:
        pass
    uid, gid = os.getuid(), os.getgid()
    try:
        unshare(CLONE_NEWUSER | CLONE_NEWPID)
    except OSError:
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def probe_pid_namespace() -> bool:
    """Whether ``enter_pid_namespace`` works here, tried in a child."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if enter_pid_namespace() else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
