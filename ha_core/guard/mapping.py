"""The file of one run in the run directory: a page of 64-bit fields that guard, shim and init share by mmap.

On a tmpfs, so that no write waits for a device. Each field is written by one side only, whole: a store through
``memoryview.cast("q")`` is never torn (``struct.pack_into`` is). While its shim lives, it holds the file's flock: a file with
the lock free and no init recorded is a run that never began; with the lock held and no init, one that may yet begin.
"""

from __future__ import annotations

import enum
import fcntl
import mmap
import os
from dataclasses import dataclass

SUFFIX = ".run"
_PAGE = 4096
_NAME_AT = 512
_MAGIC = 0x4841_5255_4E31


class Field(enum.IntEnum):
    MAGIC = 0
    BOOT = 1
    """Of the kernel's boot id: a file of an earlier boot names pids that mean nothing now."""
    # written by the guard
    TOKEN = 2
    LEASE_TOKEN = 3
    DEADLINE = 4
    SHUTDOWN = 5
    """Included in the deadline: so long before it, the VM is asked to end."""
    STOP_BY = 6
    """Not 0: the VM is to be asked to end, and killed then."""
    POLL = 7
    BURIED = 8
    """1: this token was never started and never will be."""
    NAME_BYTES = 9
    # written by shim and init
    STATE = 16
    SHIM_PID = 17
    SHIM_START = 18
    INIT_PID = 19
    INIT_START = 20
    EXIT_CODE = 21
    ARMED = 22
    """The deadline that the shim has armed last."""
    CONTAINMENT = 23
    ASKED = 24
    """1: the VM was sent SIGTERM."""


class RunPhase(enum.IntEnum):
    NEW = 0
    INIT_READY = 1
    RUNNING = 2
    """The command was executed."""
    EXITED = 3
    """The command ended by itself, or after SIGTERM; EXIT_CODE is set."""
    EXEC_FAILED = 4
    """EXIT_CODE is the errno."""
    SETUP_FAILED = 5
    DAEMONISED = 6
    """Without a PID namespace, and the command left its tree: it was killed."""


class Containment(enum.IntEnum):
    UNKNOWN = 0
    PID_NAMESPACE = 1
    SUBREAPER = 2


@dataclass(slots=True)
class RunMapping:
    """One mapped file; ``values[Field.X]`` reads and writes."""

    path: str
    vm: str
    values: memoryview[int]

    def get(self, field: Field) -> int:
        return self.values[field]

    def set(self, field: Field, value: int) -> None:
        self.values[field] = value

    def close(self) -> None:
        self.values.release()


def file_name(vm: str, token: int) -> str:
    return f"{vm.encode().hex()}-{token}{SUFFIX}"


def boot_number(boot: bytes) -> int:
    return int.from_bytes(boot[:7], "big")


def create_run(
    run_dir: str, vm: str, boot: int, *, token: int, lease_token: int, deadline_ns: int, shutdown_ns: int, poll_ns: int,
    buried: bool = False,
) -> tuple[RunMapping, int]:  # fmt: skip
    """Make the file under its final name, complete and with its flock held by the returned descriptor.

    Raises:
        FileExistsError: this token was here already.
        OSError: the directory cannot be written.
    """
    path = os.path.join(run_dir, file_name(vm, token))
    if os.path.exists(path):
        raise FileExistsError(17, "this fencing token has a file already", path)
    fresh = os.path.join(run_dir, ".new")
    fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mapping = _map(fd, path, vm)
        name = vm.encode()
        os.pwrite(fd, name, _NAME_AT)
        for field, value in (
            (Field.BOOT, boot), (Field.TOKEN, token), (Field.LEASE_TOKEN, lease_token), (Field.DEADLINE, deadline_ns),
            (Field.SHUTDOWN, shutdown_ns), (Field.POLL, poll_ns), (Field.BURIED, int(buried)), (Field.NAME_BYTES, len(name)),
            (Field.MAGIC, _MAGIC),
        ):  # fmt: skip
            mapping.set(field, value)
        os.rename(fresh, path)
    except BaseException:
        os.close(fd)
        raise
    return mapping, fd


def open_run(path: str) -> RunMapping | None:
    """None if the file is no run's."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_size != _PAGE:
            return None
        mapping = _map(fd, path, "")
        if mapping.get(Field.MAGIC) != _MAGIC:
            return None
        mapping.vm = os.pread(fd, mapping.get(Field.NAME_BYTES), _NAME_AT).decode()
        return mapping
    except ValueError:
        return None
    finally:
        os.close(fd)


def lock_free(path: str) -> bool:
    """Whether no shim holds the file: tried by taking the lock for an instant."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def _map(fd: int, path: str, vm: str) -> RunMapping:
    os.ftruncate(fd, _PAGE)
    return RunMapping(path, vm, memoryview(mmap.mmap(fd, _PAGE)).cast("q"))
