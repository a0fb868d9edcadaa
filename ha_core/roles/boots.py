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
    marks: tuple[bytes, ...] = ()
    """What the record store may hold, if neither it nor the file is an older copy (R12); empty: the file is new."""


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
    before, digest, vouched = None, b"", ""
    marks: tuple[bytes, ...] = ()
    if known is not None:
        before = Boot(known["counter"], known["nonce"])
        digest = extend_boots_digest(bytes.fromhex(known["digest"]), before)
        vouched = known["vouched"]
        marks = (bytes.fromhex(vouched), before.mark)
    line = BootLine(Boot(before.counter + 1 if before else 1, secrets.randbits(63)), digest, marks)
    _write(path, incarnation, line, vouched)
    return line


def vouch(data_dir: Path, incarnation: bytes, line: BootLine) -> None:
    """The record store has the mark of this boot: one that has an older one is an older copy.

    Raises:
        StorageError: the file cannot be written.
    """
    _write(data_dir / FILE_NAME, incarnation, line, line.boot.mark.hex())


def _write(path: Path, incarnation: bytes, line: BootLine, vouched: str) -> None:
    fields = {
        "incarnation": incarnation.hex(),
        "counter": line.boot.counter,
        "nonce": line.boot.nonce,
        "digest": line.digest.hex(),
        "vouched": vouched,
    }
    try:
        replace_file(path, json.dumps(fields).encode())
    except OSError as exc:
        raise StorageError(f"{path}: cannot write: {exc.strerror}") from exc
