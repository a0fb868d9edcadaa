"""What a person meets on the command line: one clear line where something is wrong, aligned tables where it is not."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ha_core.cli.asking import show
from ha_core.cli.hosts import show_hosts
from ha_core.cli.main import cli, main
from ha_core.cli.vms import show_vms


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

    assert line == "ha-core: 127.0.0.1:1: nobody answers (Connection refused); is the process running?"


@pytest.mark.parametrize(
    "words", [("host", "list", "--center"), ("center", "--vpxa", "127.0.0.1:1", "--listen"), ("center", "--vpxa")]
)
def test_an_address_that_is_none_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str, words: tuple[str, ...]
) -> None:
    assert "is no address, expected 'host:port'" in fails(monkeypatch, capsys, *words, "nonsense", "--key", key)


def test_a_port_in_use_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"

        assert f"{address}: cannot listen" in fails(
            monkeypatch, capsys, "center", "--listen", address, "--key", key, "--vpxa", "127.0.0.1:1"
        )  # fmt: skip


def test_a_center_that_knows_no_host_says_what_it_expects(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    monkeypatch.delenv("HA_CORE_RUN_DIR", raising=False)

    assert "at least one host: --vpxa HOST:PORT" in fails(monkeypatch, capsys, "center", "--key", key)


def test_a_vm_that_does_not_run_says_what_became_of_it_and_what_it_waits_for(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"name": "web", "wanted": "started", "host": "", "priority": "high", "after": [], "token": 7, "why": "first start"}
    show_vms([{**row, "state": "waiting", "text": "ended with status 3", "waits": "no host has room"}])
    show_vms([{**row, "state": "running", "text": "", "waits": ""}])

    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("7      ended with status 3; waits: no host has room")
    assert lines[3].endswith("7      first start")


def test_a_host_shows_its_lease_and_how_it_sees_itself(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"name": "h1", "state": "online", "role": "primary", "containment": "subreaper", "links": {"a": "127.0.0.1:1"}}
    lost = {"lease": 5, "lease_state": "revoked", "verdict": "isolated", "verdict_reason": "nobody answers"}
    show_hosts([{**row, **lost}, {**row, "lease": 0, "lease_state": "none", "verdict": "connected", "verdict_reason": ""}])

    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "h1    online  primary  revoked 5  isolated: nobody answers  subreaper    a=127.0.0.1:1"
    assert lines[2].split() == ["h1", "online", "primary", "none", "connected", "subreaper", "a=127.0.0.1:1"]


def test_a_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    show([{"name": "h1", "links": {"a": "x"}}, {"name": "h22", "links": {}}], ["name", "links"], as_json=False)

    assert capsys.readouterr().out == "name  links\nh1    a=x\nh22\n"
