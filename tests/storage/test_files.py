"""Small files are there whole or not at all."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ha_core.storage.files import create_file, replace_file

BOTH = pytest.mark.parametrize("write", [replace_file, create_file])


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may grow beyond ten bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@BOTH
def test_a_file_that_was_written_has_its_mode_and_nothing_stays_beside_it(tmp_path: Path, write: Callable[..., None]) -> None:
    write(tmp_path / "file", b"new", mode=0o600)

    assert (tmp_path / "file").read_bytes() == b"new"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["file"]


def test_a_replaced_file_is_another_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")
    with path.open("rb") as reader:
        replace_file(path, b"new")

        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"


def test_a_file_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    create_file(tmp_path / "file", b"old")

    with pytest.raises(FileExistsError):
        create_file(tmp_path / "file", b"new")

    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    replace_file(tmp_path / "file", b"old")

    with full_disk(), pytest.raises(OSError, match="too large"):
        replace_file(tmp_path / "file", bytes(20))

    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_leaves_no_half_of_a_new_file(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(OSError, match="too large"):
        create_file(tmp_path / "file", bytes(20))

    assert os.listdir(tmp_path) == []


@BOTH
def test_what_a_crash_left_beside_it_gives_neither_text_nor_mode(tmp_path: Path, write: Callable[..., None]) -> None:
    left = tmp_path / f"file.{os.getpid()}.new"
    left.write_bytes(bytes(100))
    left.chmod(0o666)

    write(tmp_path / "file", b"new", mode=0o600)

    assert (tmp_path / "file").read_bytes() == b"new"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
