"""What every kind of node opens alike, by the names in its configuration: its record store and its networks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import cast

from ha_core import registry
from ha_core.config import Config
from ha_core.ids import LinkName
from ha_core.interfaces import DatagramTransport, RecordStore, RecordStoreEngine, StreamTransport
from ha_core.runtime.driver import Driver
from ha_core.runtime.endpoint import EndpointShell


def records_path(config: Config) -> Path:
    """Where a node keeps its replica of the database."""
    return config.data_dir / f"node.{'db' if config.store == 'sqlite' else config.store}"


def open_records(config: Config) -> AbstractAsyncContextManager[RecordStore]:
    """The store of ``records_path``, by the engine that the configuration names."""
    engine = cast(Callable[[], RecordStoreEngine], registry.find("stores", config.store))()
    return engine.open(str(records_path(config)), {})


def endpoint_shell(
    config: Config, driver: Driver, on_guard_datagram: Callable[[LinkName, str, bytes], None] | None = None
) -> EndpointShell:
    """The shell between ``driver`` and the configured links; it still has to be opened and run."""
    return EndpointShell(
        post=driver.post,
        step=driver.step,
        bind={link: config.bind_address(link) for link in config.links},
        stream=cast(Callable[[], StreamTransport], registry.find("transports", "tcp"))(),
        datagram=cast(Callable[[], DatagramTransport], registry.find("transports", "udp"))(),
        on_guard_datagram=on_guard_datagram,
    )
