"""The cluster key reaches the host that made the token, and nobody else."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from ha_core.errors import ConfigError, RemoteProtocolError
from ha_core.security.join import make_token, read_token, seal, unseal

TOKEN, KEY = bytes(range(32)), bytes(range(100, 132))


def test_the_key_comes_out_under_the_same_token_only() -> None:
    sealed = seal(TOKEN, KEY)

    assert unseal(TOKEN, sealed) == KEY
    assert KEY not in sealed
    with pytest.raises(RemoteProtocolError, match="another join token"):
        unseal(bytes(32), sealed)


@pytest.mark.parametrize("position", [0, 20, 50, 63])
def test_a_changed_byte_is_noticed(position: int) -> None:
    sealed = bytearray(seal(TOKEN, KEY))
    sealed[position] ^= 1

    with pytest.raises(RemoteProtocolError):
        unseal(TOKEN, bytes(sealed))


def test_a_token_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "join.token"

    token = make_token(path)

    assert make_token(path) == token == read_token(path.read_text())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("text", ["", "xyz", "00" * 31])
def test_a_text_that_is_no_token_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        read_token(text)
