"""The cluster key: 32 random bytes in a file that only its owner may read."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from ha_core.errors import ConfigError
from ha_core.storage.files import create_file

KEY_BYTES = 32


def create_key(path: Path) -> bytes:
    """Make the key of a new cluster in ``path`` (mode 0600); it is on disk when this returns.

    Raises:
        ConfigError: there is a file already (a key is never overwritten), or it cannot be written.
    """
    key = secrets.token_bytes(KEY_BYTES)
    write_key(path, key)
    return key


def write_key(path: Path, key: bytes) -> None:
    """Keep a key that came from elsewhere: all of it or nothing, so that a crash leaves no half of a key in the way.

    Raises:
        ConfigError: as ``create_key``.
    """
    try:
        create_file(path, key, mode=0o600)
    except FileExistsError as exc:
        raise ConfigError(f"{path}: there is a cluster key already, it is not overwritten", field="key_file") from exc
    except OSError as exc:
        raise ConfigError(f"{path}: cannot write the cluster key: {exc.strerror}", field="key_file") from exc


def load_key(path: Path) -> bytes:
    """The key in ``path``.

    Raises:
        ConfigError: the file is missing, of another size, or others may read it.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            key = file.read(KEY_BYTES + 1)
    except FileNotFoundError as exc:
        raise ConfigError(
            f"{path}: there is no cluster key: make one with 'ha-core cluster create' or copy it from a member",
            field="key_file",
        ) from exc
    except OSError as exc:
        raise ConfigError(f"{path}: cannot read the cluster key: {exc.strerror}", field="key_file") from exc
    if mode & 0o077:
        raise ConfigError(f"{path}: mode is {mode:04o}, expected 0600: others could read the cluster key", field="key_file")
    if len(key) != KEY_BYTES:
        found = f"{len(key)}" if len(key) <= KEY_BYTES else f"more than {KEY_BYTES}"
        raise ConfigError(f"{path}: expected {KEY_BYTES} bytes, found {found}: this is no cluster key", field="key_file")
    return key
