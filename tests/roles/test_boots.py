"""Boots count up, and their digest tells a history from its copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from ha_core.errors import StorageError
from ha_core.roles.boots import FILE_NAME, next_boot, vouch

STORE, OTHER = bytes(16), bytes(range(16))


def test_each_boot_counts_up_and_changes_the_digest(tmp_path: Path) -> None:
    lines = [next_boot(tmp_path, STORE) for _ in range(3)]

    assert [line.boot.counter for line in lines] == [1, 2, 3]
    assert len({line.digest for line in lines}) == 3
    assert lines[0].digest == b""


def test_a_copy_that_booted_once_more_has_another_history(tmp_path: Path) -> None:
    next_boot(tmp_path, STORE)
    image = (tmp_path / FILE_NAME).read_text()
    ours = [next_boot(tmp_path, STORE) for _ in range(2)][-1]
    (tmp_path / FILE_NAME).write_text(image)
    theirs = [next_boot(tmp_path, STORE) for _ in range(2)][-1]

    assert ours.boot.counter == theirs.boot.counter
    assert ours.digest != theirs.digest


def test_a_new_store_begins_a_new_history(tmp_path: Path) -> None:
    next_boot(tmp_path, STORE)

    assert next_boot(tmp_path, OTHER).boot.counter == 1


def test_a_damaged_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("{")

    with pytest.raises(StorageError, match=r"boots\.json: damaged"):
        next_boot(tmp_path, STORE)


def test_the_record_store_may_have_the_mark_of_the_last_boot_or_of_the_one_vouched_for(tmp_path: Path) -> None:
    one = next_boot(tmp_path, STORE)
    assert one.marks == ()
    two = next_boot(tmp_path, STORE)
    assert two.marks == (b"", one.boot.mark)

    vouch(tmp_path, STORE, two)
    three = next_boot(tmp_path, STORE)
    assert three.marks == (two.boot.mark, two.boot.mark)
    assert next_boot(tmp_path, STORE).marks == (two.boot.mark, three.boot.mark)
