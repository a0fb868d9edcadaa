"""What a flash store stands on: erase blocks that are programmed in whole units, front to back, once between two erases."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path
from typing import Protocol

import attrs

from ha_core.errors import ConfigError, StorageError, StoreLockedError
from ha_core.storage.files import flush_folder


@attrs.frozen
class Geometry:
    """``erase_bytes`` a block, ``program_bytes`` a unit; a block holds at least four units and a header."""

    erase_bytes: int
    program_bytes: int
    block_count: int

    def __attrs_post_init__(self) -> None:
        if self.program_bytes < 1 or self.erase_bytes % self.program_bytes or self.erase_bytes < 4 * self.program_bytes:
            raise ConfigError(
                f"flash: an erase block ({self.erase_bytes} bytes) must be at least four program units ({self.program_bytes})",
                field="erase_bytes",
                value=self.erase_bytes,
            )
        if self.erase_bytes < 256 or self.block_count < 8:
            raise ConfigError(
                f"flash: expected at least 8 erase blocks of 256 bytes or more, found {self.block_count} of {self.erase_bytes}",
                field="size_bytes",
            )


class BadBlockError(OSError):
    """This block can no longer be erased or programmed; the rest of the device works."""


class FlashDevice(Protocol):
    """All calls block. An OSError other than BadBlockError means that the device failed: nothing more is written to it."""

    geometry: Geometry
    blocks_thread: bool
    """True if calls may take long enough to need a worker thread."""

    def read(self, block: int, offset: int, size: int) -> bytes: ...

    def program(self, block: int, offset: int, data: bytes) -> None:
        """Program whole units that were not programmed since the block's last erase, in rising order."""

    def erase(self, block: int) -> None: ...

    def sync(self) -> None:
        """Everything programmed before is durable on return."""

    def close(self) -> None: ...


class FileDevice:
    """A preallocated file, or a partition, as flash.

    Its blocks are never really erased: the medium below (an SSD, a USB stick, an SD card) hides its flash and does that
    itself, and filling a block with ones first would only write everything twice. The store does not need it: what is left
    of a block's earlier life fails its CRC, which is seeded with the segment's number.
    """

    blocks_thread = True

    def __init__(self, path: str, geometry: Geometry) -> None:
        """Open or create and own the file.

        Raises:
            StoreLockedError: another process owns it.
            StorageError: it cannot be opened or is smaller than the geometry says.
        """
        self.geometry = geometry
        self._path = path
        size = geometry.erase_bytes * geometry.block_count
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise StorageError(f"flash store {path}: cannot open it: {exc.strerror}") from exc
        try:
            self._own()
            self._allocate(size)
        except BaseException:
            os.close(self._file)
            raise

    def _own(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise StoreLockedError(f"flash store {self._path}: another process owns it; stop that one first") from exc

    def _allocate(self, size: int) -> None:
        try:
            if stat.S_ISBLK(os.fstat(self._file).st_mode):
                found = os.lseek(self._file, 0, os.SEEK_END)
            else:
                found = os.fstat(self._file).st_size
                if found == 0:
                    os.posix_fallocate(self._file, 0, size)
                    os.fsync(self._file)
                    flush_folder(Path(self._path).absolute().parent)
                    found = size
        except OSError as exc:
            raise StorageError(f"flash store {self._path}: cannot allocate {size} bytes: {exc.strerror}") from exc
        if found < size:
            raise StorageError(
                f"flash store {self._path}: it has {found} bytes, but its geometry needs {size}; "
                "correct size_bytes, erase_bytes or the device"
            )

    def read(self, block: int, offset: int, size: int) -> bytes:
        data = os.pread(self._file, size, block * self.geometry.erase_bytes + offset)
        if len(data) != size:
            raise OSError(f"{self._path}: {len(data)} of {size} bytes read in block {block} at {offset}")
        return data

    def program(self, block: int, offset: int, data: bytes) -> None:
        at = block * self.geometry.erase_bytes + offset
        rest = memoryview(data)
        while rest:
            count = os.pwrite(self._file, rest, at)
            rest, at = rest[count:], at + count

    def erase(self, block: int) -> None:
        pass

    def sync(self) -> None:
        os.fdatasync(self._file)

    def close(self) -> None:
        os.close(self._file)
