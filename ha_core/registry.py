"""Finds implementations by name: the built-in ones here, others through entry points, which may not replace a built-in.

The groups are ``ha_core.transports``, ``ha_core.stores``, ``ha_core.hypervisors``, ``ha_core.fencing`` and ``ha_core.roles``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points

from ha_core.errors import ConfigError

_BUILT_IN: Mapping[str, Mapping[str, str]] = {
    "transports": {
        "tcp": "ha_core.transports.tcp:TcpTransport",
        "udp": "ha_core.transports.udp:UdpTransport",
        "memory": "ha_core.transports.memory:MemoryTransport",
    },
    "stores": {
        "sqlite": "ha_core.storage.sqlite:SqliteEngine",
        "flash": "ha_core.storage.flash:FlashEngine",
        "memory": "ha_core.storage.memory:MemoryEngine",
    },
    "hypervisors": {"process": "ha_core.hypervisors.process:ProcessHypervisor"},
    "fencing": {},
    "roles": {
        "aam": "ha_core.roles.aam:run_aam",
        "vpxa": "ha_core.roles.vpxa:run_vpxa",
        "vmap": "ha_core.roles.vmap:open_vmap",
    },
}


def names(group: str) -> list[str]:
    """What ``find`` knows in a group, sorted."""
    return sorted({*_BUILT_IN[group], *(point.name for point in entry_points(group=f"ha_core.{group}"))})


def find(group: str, name: str) -> object:
    """The implementation called ``name``.

    Raises:
        ConfigError: there is none; the text lists those that there are.
    """
    target = _BUILT_IN[group].get(name)
    if target is not None:
        module, _, attribute = target.partition(":")
        return getattr(importlib.import_module(module), attribute)
    for point in entry_points(group=f"ha_core.{group}", name=name):
        return point.load()
    raise ConfigError(
        f"{group}: there is no {name!r}, only {', '.join(names(group)) or 'none at all'}", field=group, value=name
    )
