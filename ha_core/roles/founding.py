"""Founding a cluster: the key, and the first host as its only voter."""

from __future__ import annotations

from pathlib import Path

from ha_core.config import Config
from ha_core.errors import ConfigError
from ha_core.roles.membership_file import MembershipFile
from ha_core.runtime.entropy import fresh_id
from ha_core.security.key import create_key


def create_cluster(config: Config) -> Path:
    """Make the cluster key and ``cluster.json`` of the first host; the key's path.

    Raises:
        ConfigError: this host belongs to a cluster already, or its data directory cannot be written.
    """
    try:
        config.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as exc:
        raise ConfigError(f"data_dir: cannot make {config.data_dir}: {exc.strerror}", field="data_dir") from exc
    known = MembershipFile.load(config.data_dir)
    if known is not None:
        raise ConfigError(f"{config.data_dir}: this host belongs to cluster {known.cluster!r} already", field="data_dir")
    create_key(config.key_path)
    voters = {config.node: dict(config.links)}
    MembershipFile(config.cluster, voters, voters, fresh_id().hex()).save(config.data_dir)
    return config.key_path
