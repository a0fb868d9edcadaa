"""What a person meets on the command line: one clear line where something is wrong, aligned tables where it is not."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ha_core.cli.cluster import _show
from ha_core.cli.main import cli, main


@pytest.fixture
def key(tmp_path: Path) -> str:
    path = tmp_path / "cluster.key"
    path.write_bytes(bytes(32))
    path.chmod(0o600)
    return str(path)


def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["ha-core", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_every_command_says_what_it_does() -> None:
    for words in ([], ["agent"], ["center"], ["cluster"], ["demo"], ["explain"], ["host"], ["simulate"], ["vm"]):
        result = CliRunner().invoke(cli, [*words, "--help"])

        assert result.exit_code == 0, result.output
        assert "Usage:" in result.output


def test_a_center_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    line = fails(monkeypatch, capsys, "host", "list", "--key", key, "--center", "127.0.0.1:1")

    assert line.startswith("ha-core: 127.0.0.1:1: nobody answers")


@pytest.mark.parametrize("words", [("host", "list", "--center"), ("center", "--listen")])
def test_an_address_that_is_none_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str, words: tuple[str, ...]
) -> None:
    assert "is no address, expected 'host:port'" in fails(monkeypatch, capsys, *words, "nonsense", "--key", key)


def test_a_port_in_use_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"

        assert f"{address}: cannot listen" in fails(monkeypatch, capsys, "center", "--listen", address, "--key", key)


def test_a_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    _show([{"name": "h1", "links": {"a": "x"}}, {"name": "h22", "links": {}}], ["name", "links"], as_json=False)

    assert capsys.readouterr().out == "name  links\nh1    a=x\nh22\n"
