"""What a host remembers of its cluster on its own disk: ``cluster.json`` in the data directory.

It is written by ``cluster create`` (the first host: itself as the only voter) or by joining (no voters: it learns), and its
list of primaries is kept current by the aam, so that a host finds its peers when DNS, the center and its old peers are gone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import attrs

from ha_core.errors import ConfigError
from ha_core.ids import LinkName, NodeId

FILE_NAME = "cluster.json"
Addresses = Mapping[NodeId, Mapping[LinkName, str]]


@attrs.frozen
class MembershipFile:
    """``voters``: read only while the store is empty (R25). ``primaries``: whom to talk to."""

    cluster: str
    voters: Addresses
    primaries: Addresses

    @classmethod
    def load(cls, data_dir: Path) -> MembershipFile | None:
        """None if the host has joined no cluster yet.

        Raises:
            ConfigError: the file is there but damaged.
        """
        path = data_dir / FILE_NAME
        try:
            data = json.loads(path.read_text())
            return cls(data["cluster"], _addresses(data["voters"]), _addresses(data["primaries"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as exc:
            raise ConfigError(f"{path}: damaged ({exc!r}); restore it, or remove it and join anew", field="cluster") from exc

    def save(self, data_dir: Path) -> None:
        """Replace the file atomically and durably."""
        path = data_dir / FILE_NAME
        new = path.with_suffix(".new")
        with new.open("w") as file:
            json.dump(attrs.asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        folder = os.open(data_dir, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _addresses(data: Mapping[str, Mapping[str, str]]) -> Addresses:
    return {NodeId(node): {LinkName(link): str(address) for link, address in links.items()} for node, links in data.items()}
