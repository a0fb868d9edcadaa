"""Writes FT_HOSTS and corrects the hosts file: atomically, under a lock, with a backup of what was there before.

Where the file cannot be replaced (EBUSY or EXDEV: a container mounts it by itself) it is overwritten in place. The whole new
text then lies durably beside it first, so that a crash in the middle is repaired by the next call.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ha_core.errors import StorageError
from ha_core.machines.names import Correction, Entry, correct_hosts, format_ft_hosts
from ha_core.storage.files import flush_folder, replace_file, write_file

_CANNOT_REPLACE = (errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EACCES)


def write_ft_hosts(path: Path, entries: Sequence[Entry]) -> bool:
    """Bring the file up to date; True if it had to be written.

    Raises:
        StorageError: it cannot be written.
    """
    new = format_ft_hosts(entries).encode()
    try:
        if path.exists() and path.read_bytes() == new:
            return False
        replace_file(path, new)
    except OSError as exc:
        raise StorageError(f"{path}: cannot be written: {exc.strerror}") from exc
    return True


def correct_hosts_file(path: Path, entries: Sequence[Entry]) -> Correction:
    """Put managed names right in the hosts file at ``path``; ``changes`` says what was done. A backup stays beside it.

    Raises:
        StorageError: it cannot be read or written; it is as it was.
    """
    path = Path(os.path.realpath(path))
    try:
        with _locked(path):
            _finish_interrupted(path)
            correction = correct_hosts(path.read_bytes(), entries)
            if correction.changes:
                _replace(path, correction.text)
            return correction
    except OSError as exc:
        raise StorageError(f"{path}: the hosts file cannot be corrected: {exc.strerror}") from exc


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.name}.ha-core-{what}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(_beside(path, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, new: bytes) -> None:
    write_file(_beside(path, "backup"), path.read_bytes(), like=path)
    temporary = _beside(path, "tmp")
    write_file(temporary, new, like=path)
    try:
        os.replace(temporary, path)
    except OSError as exc:
        if exc.errno not in _CANNOT_REPLACE:
            raise
        os.replace(temporary, _beside(path, "new"))
        flush_folder(path.parent)
        _overwrite(path, new)
        _beside(path, "new").unlink()
    flush_folder(path.parent)


def _overwrite(path: Path, new: bytes) -> None:
    with path.open("r+b") as file:
        file.write(new)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def _finish_interrupted(path: Path) -> None:
    """Overwriting in place stopped half-way: the file begins like the new text and goes on like the old one."""
    intended, backup = _beside(path, "new"), _beside(path, "backup")
    if not intended.exists():
        return
    new, now = intended.read_bytes(), path.read_bytes()
    old = backup.read_bytes() if backup.exists() else b""
    common = len(os.path.commonprefix([new, now]))
    if now not in (new, old) and now[common:] in (old[common:], b""):
        _overwrite(path, new)
    intended.unlink()
