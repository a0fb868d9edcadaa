"""Keeps FT_HOSTS and the hosts file equal to the database's names, and finds peers in FT_HOSTS when there is nothing else."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import trio

from ha_core.config import Config
from ha_core.errors import ConfigError, StorageError
from ha_core.ids import LinkName, NodeId
from ha_core.machines.failover.inventory import Inventory
from ha_core.machines.names import Entry, entries_of, parse_ft_hosts
from ha_core.runtime.hosts_file import correct_hosts_file, write_ft_hosts

logger = logging.getLogger(__name__)

FILE_NAME = "FT_HOSTS"
LOOK_S = 2.0
"""How often the hosts file is looked at: a mistake made by hand is mended within this time."""


class NamesKeeper:
    def __init__(self, config: Config) -> None:
        self._ft_hosts = config.data_dir / FILE_NAME
        self._hosts_file = config.hosts_file
        self._entries: tuple[Entry, ...] = ()
        self._changed = trio.Event()

    def follow(self, inventory: Inventory) -> None:
        """The records changed."""
        entries = entries_of(inventory.hosts, inventory.names)
        if entries != self._entries:
            self._entries = entries
            self._changed.set()

    async def run(self) -> None:
        """Write until cancelled; a file that cannot be written is reported and tried again."""
        while True:
            with trio.move_on_after(LOOK_S):
                await self._changed.wait()
            self._changed = trio.Event()
            if self._entries:
                try:
                    await trio.to_thread.run_sync(self._write, self._entries)
                except StorageError as exc:
                    logger.warning("%s", exc)

    def _write(self, entries: tuple[Entry, ...]) -> None:
        write_ft_hosts(self._ft_hosts, entries)
        if self._hosts_file is not None:
            for change in correct_hosts_file(self._hosts_file, entries).changes:
                logger.warning("%s corrected: %s", self._hosts_file, change)


def known_peers(data_dir: Path) -> Mapping[NodeId, Mapping[LinkName, str]]:
    """The aams that FT_HOSTS names: whom to ask when the last-known primaries do not answer. Empty if it cannot be read."""
    try:
        entries = parse_ft_hosts((data_dir / FILE_NAME).read_text())
    except (OSError, ConfigError, UnicodeDecodeError) as exc:
        logger.info("no peers from FT_HOSTS: %s", exc)
        return {}
    return {
        NodeId(f"aam@{entry.fqdn}"): {
            LinkName(place.link): f"{place.address}:{place.port}" for place in entry.places if place.link
        }
        for entry in entries
    }
