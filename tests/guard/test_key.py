"""The guard follows the cluster key's file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ha_core.guard.key import KeyFile
from ha_core.guard.renewal import Renewal, RenewalCodec, RenewalError
from ha_core.guard.settings import SettingsError

FIRST, SECOND = bytes(32), bytes(range(32))
RENEWAL = Renewal("h1", bytes(16), bytes(16), 0, 1, 1)


def key_file(path: Path, key: bytes = FIRST) -> KeyFile:
    path.write_bytes(key)
    file = KeyFile(str(path), "c")
    assert file.reload()
    return file


def replace(path: Path, key: bytes) -> None:
    """With a time of its own: two files of one clock tick may look the same."""
    path.unlink()
    path.write_bytes(key)
    os.utime(path, (1, 1))


def test_a_key_that_comes_later_is_found(tmp_path: Path) -> None:
    path = tmp_path / "key"
    file = KeyFile(str(path), "c")
    assert not file.reload()
    assert file.codec is None

    path.write_bytes(FIRST)

    assert file.reload()
    assert not file.reload()


def test_another_key_seals_what_is_sent_from_then_on(tmp_path: Path) -> None:
    file = key_file(tmp_path / "key")
    replace(tmp_path / "key", SECOND)

    assert file.reload()

    assert file.codec is not None
    packet = file.codec.encode_renewal(RENEWAL)
    assert RenewalCodec("c", SECOND).decode_renewal(packet) == RENEWAL
    with pytest.raises(RenewalError):
        RenewalCodec("c", FIRST).decode_renewal(packet)


def test_a_file_that_vanishes_and_comes_back_with_the_same_key_is_no_other_cluster(tmp_path: Path) -> None:
    file = key_file(tmp_path / "key")
    known = file.codec

    (tmp_path / "key").unlink()
    assert not file.reload()
    (tmp_path / "key").write_bytes(FIRST)

    assert not file.reload()
    assert file.codec is known


def test_a_file_that_is_no_key_is_named_and_the_known_one_stays(tmp_path: Path) -> None:
    file = key_file(tmp_path / "key")
    known = file.codec
    replace(tmp_path / "key", b"short")

    with pytest.raises(SettingsError, match="expected a cluster key of 32 bytes"):
        file.reload()

    assert file.codec is known
