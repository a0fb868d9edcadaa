from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ha_core.errors import StorageError
from ha_core.machines.names import Entry, Place
from ha_core.runtime import hosts_file
from ha_core.runtime.hosts_file import correct_hosts_file, write_ft_hosts

TABLE = (Entry("h1.example", (Place("10.0.0.1", "a", 7400),)),)
OLD = b"127.0.0.1 localhost\n10.0.0.7 h1.example h1\n"
NEW = b"127.0.0.1 localhost\n10.0.0.1 h1.example h1\n"


def test_ft_hosts_is_written_once(tmp_path: Path) -> None:
    path = tmp_path / "FT_HOSTS"

    assert write_ft_hosts(path, TABLE)
    assert not write_ft_hosts(path, TABLE)
    assert "10.0.0.1  h1.example h1" in path.read_text()


def test_a_correction_keeps_mode_and_a_backup(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(OLD)
    path.chmod(0o664)

    correction = correct_hosts_file(path, TABLE)

    assert len(correction.changes) == 1
    assert path.read_bytes() == NEW
    assert path.stat().st_mode & 0o777 == 0o664
    assert (tmp_path / "hosts.ha-core-backup").read_bytes() == OLD
    assert not correct_hosts_file(path, TABLE).changes


def test_a_link_to_the_hosts_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(OLD)
    (tmp_path / "hosts").symlink_to(tmp_path / "real")

    correct_hosts_file(tmp_path / "hosts", TABLE)

    assert (tmp_path / "hosts").is_symlink()
    assert (tmp_path / "real").read_bytes() == NEW


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="hosts"):
        correct_hosts_file(tmp_path / "hosts", TABLE)


@pytest.mark.parametrize("cut", range(0, max(len(OLD), len(NEW)) + 1, 5))
def test_overwriting_in_place_is_finished_after_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(OLD)
    real = os.replace

    def busy(source: Path, target: Path) -> None:
        if Path(target) == path:
            raise OSError(errno.EBUSY, "busy")
        real(source, target)

    def crash(target: Path, new: bytes) -> None:
        target.write_bytes(new[:cut] + OLD[cut:])
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", busy)
    with monkeypatch.context() as patch:
        patch.setattr(hosts_file, "_overwrite", crash)
        with pytest.raises(KeyboardInterrupt):
            correct_hosts_file(path, TABLE)

    correct_hosts_file(path, TABLE)

    assert path.read_bytes() == NEW
    assert not (tmp_path / "hosts.ha-core-new").exists()


def test_what_somebody_else_wrote_after_a_crash_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    theirs = b"10.0.0.1 h1.example h1\n1.1.1.1 new.example\n"
    path.write_bytes(theirs)
    (tmp_path / "hosts.ha-core-new").write_bytes(NEW)
    (tmp_path / "hosts.ha-core-backup").write_bytes(OLD)

    correct_hosts_file(path, TABLE)

    assert path.read_bytes() == theirs


def test_a_backup_that_somebody_removed_stops_no_correction(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(OLD)
    (tmp_path / "hosts.ha-core-new").write_bytes(NEW)

    correct_hosts_file(path, TABLE)

    assert path.read_bytes() == NEW
    assert not (tmp_path / "hosts.ha-core-new").exists()
