"""What is built is what is in the tree: every package is listed, and the wheel holds every module and nothing else."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def listed() -> set[str]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return set(config["options"]["packages"].split())


def present() -> set[str]:
    folders = {"ha_core": ROOT / "ha_core", "ha_core.transports": ROOT / "transports", "ha_core.storage": ROOT / "storage"}
    found = set()
    for name, folder in folders.items():
        for init in folder.rglob("__init__.py"):
            below = init.parent.relative_to(folder).parts
            if below[:1] not in (("transports",), ("storage",)):
                found.add(".".join((name, *below)))
    return found


def test_every_package_is_listed() -> None:
    assert present() == listed()


@pytest.mark.skipif("TOX_ENV_DIR" not in os.environ, reason="only tox installs the wheel")
def test_the_installed_package_is_what_is_tested() -> None:
    import ha_core

    assert Path(ha_core.__file__).is_relative_to(sys.prefix)


@pytest.mark.integration
def test_wheel_holds_every_module_and_nothing_else(tmp_path: Path) -> None:
    """Built from ``git archive``: a checkout's build/ and egg-info revive modules that are gone."""
    archive = tmp_path / "tree.tar"
    subprocess.run(["git", "archive", "-o", str(archive), "HEAD"], cwd=ROOT, check=True)
    tree = tmp_path / "tree"
    tree.mkdir()
    subprocess.run(["tar", "xf", str(archive), "-C", str(tree)], check=True)

    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(tree)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    expected = {"ha_core/py.typed"}
    for name in tracked:
        if name.endswith(".py") and name.startswith(("ha_core/", "transports/", "storage/")):
            expected.add(name if name.startswith("ha_core/") else f"ha_core/{name}")
    assert names == expected
