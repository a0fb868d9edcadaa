"""A host remembers its cluster across a restart, and says so when it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from ha_core.errors import ConfigError
from ha_core.ids import LinkName, NodeId
from ha_core.roles.membership_file import FILE_NAME, MembershipFile, is_member

HOST = {NodeId("aam@h1.example"): {LinkName("a"): "127.1.0.1:7400"}}


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    file = MembershipFile("c", HOST, HOST)

    file.save(tmp_path)

    assert MembershipFile.load(tmp_path) == file


def test_a_host_that_never_joined_has_none(tmp_path: Path) -> None:
    assert MembershipFile.load(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", '{"cluster": "c"}', '{"cluster": "c", "voters": [], "primaries": {}}'])
def test_a_damaged_file_is_one_clear_line(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)

    with pytest.raises(ConfigError, match=r"cluster\.json: damaged"):
        MembershipFile.load(tmp_path)


def test_who_has_left_is_not_made_a_member_again_by_a_late_write(tmp_path: Path) -> None:
    file = MembershipFile("c", HOST, HOST, "first")
    file.save(tmp_path)
    assert file.update(tmp_path)

    MembershipFile.remove(tmp_path)

    assert not file.update(tmp_path)
    assert MembershipFile.load(tmp_path) is None


def test_who_left_and_joined_anew_is_not_who_stayed(tmp_path: Path) -> None:
    before, after = MembershipFile("c", HOST, HOST, "first"), MembershipFile("c", {}, HOST, "second")
    before.save(tmp_path)
    assert is_member(tmp_path, before)

    after.save(tmp_path)

    assert not is_member(tmp_path, before)
    assert not before.update(tmp_path)
    assert MembershipFile.load(tmp_path) == after
