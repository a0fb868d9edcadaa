"""Small files that are there whole or not at all: what a host keeps beside its stores (keys, boots, membership, names).

The new text is flushed under a name of its own in the same folder before it takes the file's name, and then the folder is
flushed: after a crash at any moment there is the old file or the new one. Writers of one file keep each other out themselves.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def replace_file(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Put ``data`` in the place of ``path``, or make it; it is on disk when this returns.

    Raises:
        OSError: it cannot be written; ``path`` is as it was.
    """
    with _written_beside(path, data, mode) as new:
        new.replace(path)
        flush_folder(path.parent)


def create_file(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Like ``replace_file``, but never in the place of another file.

    Raises:
        FileExistsError: there is such a file, which stays as it is.
        OSError: it cannot be written; there is nothing.
    """
    with _written_beside(path, data, mode) as new:
        os.link(new, path)
        new.unlink()
        flush_folder(path.parent)


def write_file(path: Path, data: bytes, *, mode: int = 0o644, like: Path | None = None) -> None:
    """Write ``data`` over ``path`` and flush it, with mode and owner of ``like``: not atomic, and not its name's folder."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        if like is not None:
            status = like.stat()
            os.fchmod(descriptor, status.st_mode & 0o7777)
            with contextlib.suppress(PermissionError):
                os.fchown(descriptor, status.st_uid, status.st_gid)
        file.flush()
        os.fsync(descriptor)


def flush_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable: which files there are, not what is in them."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _written_beside(path: Path, data: bytes, mode: int) -> Iterator[Path]:
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.unlink(missing_ok=True)  # of a process with our number that crashed: its mode may be another
    try:
        write_file(new, data, mode=mode)
        yield new
    finally:
        new.unlink(missing_ok=True)
