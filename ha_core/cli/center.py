"""``ha-core center``: the management server."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import click
import trio

from ha_core.center.server import Center
from ha_core.cli.asking import key_option
from ha_core.config import split_address
from ha_core.errors import ConfigError
from ha_core.runtime.rpc import serve_tcp
from ha_core.security.key import load_key


@click.command()
@click.option(
    "--listen",
    default="127.0.0.1:7600",
    show_default=True,
    metavar="HOST:PORT",
    help="Where the command line reaches the center.",
)
@key_option
@click.option(
    "--vpxa",
    "vpxas",
    multiple=True,
    metavar="HOST:PORT",
    help="A host's management address; may be given again. The others are learnt from the cluster.",
)
def center(listen: str, key: Path, vpxas: tuple[str, ...]) -> None:
    """Run the management server; it keeps nothing and may stop, be lost, or run as a protected VM of its own cluster."""
    for address in vpxas:
        split_address(address, "--vpxa")
    known: list[str | Path] = list(vpxas)
    local = os.environ.get("HA_CORE_RUN_DIR")
    if local:  # we are a VM of the cluster: the host's own vpxa is the nearest
        known.insert(0, Path(local) / "vpxa.sock")
    if not known:
        raise ConfigError("center: expected the management address of at least one host: --vpxa HOST:PORT", field="--vpxa")
    cluster_key = load_key(key)
    trio.run(_serve, listen, Center(key=cluster_key, vpxas=known), cluster_key)


async def _serve(listen: str, server: Center, key: bytes) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            address = await nursery.start(
                lambda task_status: serve_tcp(listen, server.handle, key=key, task_status=task_status)
            )
            click.echo(f"center listens on {address}")
            async for _ in signals:
                nursery.cancel_scope.cancel()
                break
