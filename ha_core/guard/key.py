"""The cluster key as its file has it: there is none before the host joins, and another one once it has joined elsewhere."""

from __future__ import annotations

import os

from ha_core.guard.renewal import KEY_BYTES, RenewalCodec
from ha_core.guard.settings import SettingsError


class WatchedFile:
    """A small file that others replace as a whole."""

    def __init__(self, path: str, max_bytes: int) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._signature: tuple[int, int, int] | None = None

    def read_changed(self) -> bytes | None:
        """Its first bytes if it is another file than at the last call; None if it is the same.

        Raises:
            FileNotFoundError: it is not there; coming back, it counts as another one.
            OSError: it cannot be read.
        """
        try:
            stat = os.stat(self.path)
            signature = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            if signature == self._signature:
                return None
            self._signature = None
            with open(self.path, "rb") as file:
                data = file.read(self._max_bytes)
        except FileNotFoundError:
            self._signature = None
            raise
        self._signature = signature
        return data


class KeyFile:
    """``codec`` is None until there is a key; a file that vanishes takes nothing away."""

    def __init__(self, path: str, cluster: str) -> None:
        self.codec: RenewalCodec | None = None
        self._file = WatchedFile(path, KEY_BYTES + 1)
        self._cluster = cluster
        self._key = b""

    def reload(self) -> bool:
        """True if there is another key than before.

        Raises:
            SettingsError: the file cannot be read, or is no key; what was known stays.
        """
        path = self._file.path
        try:
            key = self._file.read_changed()
        except FileNotFoundError:
            return False
        except OSError as exc:
            raise SettingsError(f"{path}: cannot read the cluster key: {exc.strerror}") from None
        if key is None or key == self._key:
            return False
        if len(key) != KEY_BYTES:
            raise SettingsError(f"{path}: expected a cluster key of {KEY_BYTES} bytes")
        self._key, self.codec = key, RenewalCodec(self._cluster, key)
        return True
