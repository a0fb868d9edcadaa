"""The boots of an aam: a counter and a random number, durable before the node speaks, and the digest of all boots before.

Kept beside the record store and tied to its incarnation: a new store begins a new history.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import attrs

from ha_core.errors import StorageError
from ha_core.ids import Boot
from ha_core.machines.handshake import extend_boots_digest
from ha_core.storage.files import replace_file

FILE_NAME = "boots.json"


@attrs.frozen
class BootLine:
    """This boot, and what earlier ones come to (peers compare it: a clone that rested is seen)."""

    boot: Boot
    digest: bytes


def next_boot(data_dir: Path, incarnation: bytes) -> BootLine:
    """Count this boot; it is on disk when this returns.

    Raises:
        StorageError: the file is damaged or cannot be written.
    """
    path = data_dir / FILE_NAME
    try:
        known = json.loads(path.read_text())
        if known["incarnation"] != incarnation.hex():
            known = None
    except FileNotFoundError:
        known = None
    except (OSError, ValueError, TypeError, KeyError) as exc:
        raise StorageError(f"{path}: damaged ({exc!r}): remove it together with the store, and join anew") from exc
    before, digest = None, b""
    if known is not None:
        before = Boot(known["counter"], known["nonce"])
        digest = extend_boots_digest(bytes.fromhex(known["digest"]), before)
    boot = Boot(before.counter + 1 if before else 1, secrets.randbits(63))
    line = {"incarnation": incarnation.hex(), "counter": boot.counter, "nonce": boot.nonce, "digest": digest.hex()}
    try:
        replace_file(path, json.dumps(line).encode())
    except OSError as exc:
        raise StorageError(f"{path}: cannot write: {exc.strerror}") from exc
    return BootLine(boot, digest)
