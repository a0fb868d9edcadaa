"""Where a host's agents meet: the sockets and small files of the run directory, and what the guard is told at its start."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import ha_core.guard
from ha_core.config import Config
from ha_core.errors import ConfigError
from ha_core.guard.processes import boot_id
from ha_core.guard.settings import KERNEL_BOOT_ID
from ha_core.ids import host_of

AAM_SOCKET = "aam.sock"
VPXA_SOCKET = "vpxa.sock"
JOIN_TOKEN = "join.token"
"""In the data directory: how the center proves to a host that has no cluster key yet that an administrator sent it."""


def run_dir_of(config: Config) -> Path:
    """The configured run directory, or one below /run (root) or XDG_RUNTIME_DIR.

    Raises:
        ConfigError: none is configured and there is no place for one.
    """
    if config.run_dir is not None:
        return config.run_dir
    host = host_of(config.node)
    if os.geteuid() == 0:
        return Path("/run/ha-core") / host
    base = os.environ.get("XDG_RUNTIME_DIR")
    if not base:
        raise ConfigError("run_dir: not root and no XDG_RUNTIME_DIR: name a directory on a tmpfs", field="run_dir")
    return Path(base) / "ha-core" / host


def make_directories(config: Config) -> Path:
    """Make the data and run directories; the latter's path.

    Raises:
        ConfigError: naming the directory and what is in the way.
    """
    run_dir = run_dir_of(config)
    for field, folder in (("data_dir", config.data_dir), ("run_dir", run_dir)):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as exc:
            raise ConfigError(f"{field}: cannot make {folder}: {exc.strerror}", field=field, value=str(folder)) from exc
    return run_dir


def guard_settings(config: Config, config_path: Path, run_dir: Path) -> Mapping[str, object]:
    """The guard's JSON object (guard/settings.py)."""
    argv = [sys.executable, "-m", "ha_core.roles"]
    settings: dict[str, object] = {
        "host": host_of(config.node), "cluster": config.cluster, "run_dir": str(run_dir), "log_dir": str(config.data_dir),
        "key_file": str(config.key_path), "links": {link: config.bind_address(link) for link in config.links},
        "renewal_s": config.profile.renewal_s, "guard_hang_s": config.profile.guard_hang_s,
        "agent_hang_s": config.profile.agent_hang_s,
        "agents": {name: [*argv, name, str(config_path)] for name in ("aam", "vpxa")},
    }  # fmt: skip
    boot_id_file = os.environ.get("HA_CORE_BOOT_ID_FILE")
    if boot_id_file:  # several hosts pretended on one kernel: each has its own boots
        settings["boot_id_file"] = boot_id_file
    return settings


def guard_command(config: Config, config_path: Path, run_dir: Path) -> list[str]:
    """Write the guard's settings into the run directory; the command that starts it."""
    path = run_dir / "guard.json"
    path.write_text(json.dumps(guard_settings(config, config_path, run_dir)))
    (folder,) = ha_core.guard.__path__
    return [sys.executable, "-I", "-S", folder, "--config", str(path)]


def own_boot_id() -> bytes:
    """The kernel's boot id; of a pretended host, that of its own file."""
    return boot_id(os.environ.get("HA_CORE_BOOT_ID_FILE") or KERNEL_BOOT_ID)
