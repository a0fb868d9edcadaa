"""A VM of the demo, and a witness that knows nothing of ha-core.

Run as ``python -I -S witness.py FOLDER NAME [-- COMMAND ...]``.

For life it holds a non-blocking lock on a file that all copies of the VM share: finding it held *is* an overlap. It appends
what it sees to FOLDER/NAME.runs, one JSON line each: ``start`` with host, token and boot-clock time, or ``overlap``; and when
the kernel made the process, in its clock ticks: two interpreters that begin in turn need not get here in turn. With a command
it becomes that command, the lock in its hand.
"""

import fcntl
import json
import os
import signal
import sys
import time


def main() -> None:
    folder, name, command = sys.argv[1], sys.argv[2], sys.argv[4:]
    lock = os.open(os.path.join(folder, name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    os.set_inheritable(lock, True)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        what = "start"
    except OSError:
        what = "overlap"
    row = {
        "what": what, "host": os.environ.get("HA_CORE_HOST", ""), "token": int(os.environ.get("HA_CORE_FENCING_TOKEN", "0")),
        "at_ns": time.clock_gettime_ns(time.CLOCK_BOOTTIME), "made_ticks": _made_ticks(), "pid": _outer_pid(),
    }  # fmt: skip
    runs = os.open(os.path.join(folder, name + ".runs"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(runs, json.dumps(row).encode() + b"\n")
    os.close(runs)
    if what == "overlap":
        sys.exit(3)
    if command:
        os.execvp(command[0], command)
    signal.pause()


def _outer_pid() -> int:
    """Our pid as seen from outside of our PID namespace: /proc is the outer one."""
    return int(os.readlink("/proc/self"))


def _made_ticks() -> int:
    """proc_pid_stat(5): starttime, field 22; the second, the name, is in parentheses and may hold anything."""
    with open("/proc/self/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])


if __name__ == "__main__":
    main()
