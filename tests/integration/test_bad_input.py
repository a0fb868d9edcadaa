"""What is wrong with a host is one clear line that says what, where and what to do; nothing is lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ha_core.cli.main import cli  # noqa: F401 - the console script's module imports
from ha_core.config import Config
from ha_core.roles.founding import create_cluster
from ha_core.storage.sqlite import SqliteEngine

pytestmark = pytest.mark.integration


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """The configuration of a host that has founded its cluster, on ports that are free."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = one.getsockname()[1], two.getsockname()[1]
    path = tmp_path / "h1.toml"
    path.write_text(
        f'node = "aam@h1.example"\ncluster = "c"\ndata_dir = "data"\nrun_dir = "{tmp_path}/run"\n'
        f'[links]\na = "127.0.0.1:{ports[0]}"\nb = "127.0.0.1:{ports[1]}"\n'
    )
    create_cluster(Config.load(path))
    return path


def aam(config: Path, limit_s: float = 15.0) -> tuple[int, str]:
    """Run the aam alone; its exit status and what it said. One that goes on is ended, with status 0."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ha_core.roles", "aam", str(config)], cwd=config.parent, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        _, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
        return 0, errors
    return process.returncode, errors


def the_line(errors: str) -> str:
    lines = [line for line in errors.splitlines() if line.startswith("ha-core ")]
    assert len(lines) == 1, errors
    assert "Traceback" not in errors
    return lines[0]


def command(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ha_core", *words], cwd=cwd, capture_output=True, text=True, timeout=30)


def test_a_wrong_configuration_names_file_key_and_what_is_expected(host: Path) -> None:
    host.write_text(host.read_text().replace('cluster = "c"', "cluster = 7"))

    result = command("agent", "--config", str(host), cwd=host.parent)

    assert result.returncode == 2
    assert result.stderr.strip() == f"ha-core: {host}: cluster: expected a string, found 7"


def test_a_missing_configuration_is_one_line(tmp_path: Path) -> None:
    result = command("agent", "--config", "nowhere.toml", cwd=tmp_path)

    assert result.returncode == 2
    assert result.stderr.strip() == "ha-core: nowhere.toml: cannot read the configuration: No such file or directory"


def test_a_second_cluster_is_not_created_over_the_first(host: Path) -> None:
    result = command("cluster", "create", "--config", str(host), cwd=host.parent)

    assert result.returncode == 2
    assert "belongs to cluster 'c' already" in result.stderr


def test_a_port_in_use_is_named(host: Path) -> None:
    address = Config.load(host).links["a"]  # type: ignore[index]
    name, _, port = address.rpartition(":")
    with socket.create_server((name, int(port))):
        status, errors = aam(host)

    assert status == 2
    assert address in the_line(errors)


async def test_a_store_that_another_process_owns_is_named(host: Path) -> None:
    async with SqliteEngine().open(str(host.parent / "data" / "node.db"), {}) as store:
        await store.recover()
        status, errors = aam(host)

    assert status == 2
    assert "node.db" in the_line(errors)


def test_a_store_that_is_no_store_is_named_and_left_alone(host: Path) -> None:
    store = host.parent / "data" / "node.db"
    store.write_bytes(b"this is no database " * 500)
    before = store.read_bytes()

    status, errors = aam(host)

    assert status == 2
    assert "node.db" in the_line(errors)
    assert store.read_bytes() == before


def test_a_key_that_others_may_read_is_refused(host: Path) -> None:
    (host.parent / "data" / "cluster.key").chmod(0o644)

    status, errors = aam(host)

    assert status == 2
    assert "cluster.key" in the_line(errors)
