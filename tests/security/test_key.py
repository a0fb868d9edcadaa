"""The cluster key's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from ha_core.errors import ConfigError
from ha_core.security.key import create_key, load_key
from tests.storage.test_files import full_disk


def test_a_key_is_32_bytes_that_only_the_owner_may_read(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"

    key = create_key(path)

    assert len(key) == 32
    assert load_key(path) == key
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    key = create_key(path)

    with pytest.raises(ConfigError, match="not overwritten"):
        create_key(path)

    assert load_key(path) == key


def test_a_key_that_could_not_be_written_is_not_in_the_way(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"

    with full_disk(), pytest.raises(ConfigError, match="cannot write the cluster key: File too large"):
        create_key(path)

    assert create_key(path) == load_key(path)


@pytest.mark.parametrize(
    ("size", "mode", "text"),
    [(31, 0o600, "expected 32 bytes, found 31"), (33, 0o600, "found more than 32"), (32, 0o640, "mode is 0640, expected 0600")],
)
def test_what_is_wrong_with_a_key_file_is_said(tmp_path: Path, size: int, mode: int, text: str) -> None:
    path = tmp_path / "cluster.key"
    path.write_bytes(bytes(size))
    path.chmod(mode)

    with pytest.raises(ConfigError, match=text) as caught:
        load_key(path)

    assert str(path) in str(caught.value)
    assert caught.value.field == "key_file"


def test_a_missing_key_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ha-core cluster create"):
        load_key(tmp_path / "none")
