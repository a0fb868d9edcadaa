"""``ha-core demo``: the main job."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import attrs
import click
import trio

from ha_core.demo.report import Report
from ha_core.demo.story import Story, Tell
from ha_core.demo.world import open_world
from ha_core.errors import HAError, leaves


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; the story goes to stderr.")
@click.option("--keep", type=click.Path(path_type=Path), help="Keep logs and stores in this directory.")
@click.option("--store", type=click.Choice(["sqlite", "flash"]), default="sqlite", show_default=True, help="The hosts' store.")
@click.option("--profile", type=click.Choice(["lan", "fast"]), default="lan", show_default=True, help="The cluster's timings.")
def demo(as_json: bool, keep: Path | None, store: str, profile: str) -> None:
    """Start three hosts, six VMs and 1,000 messages on this machine; cut, kill and isolate; show that it held."""
    began = time.monotonic()

    def tell(text: str) -> None:
        click.echo(f"[{time.monotonic() - began:5.1f} s] {text}", err=as_json)

    report = Report()
    status = 1
    try:
        trio.run(_play, keep, store, profile, report, tell)
        status = 0 if report.ok else 1
    except* KeyboardInterrupt:
        click.echo("interrupted; every process that the demo started was ended", err=True)
        status = 130
    except* HAError as group:
        for error in leaves(group):
            click.echo(f"ha-core demo: {error}", err=True)
    if status != 130:
        click.echo(json.dumps(attrs.asdict(report)) if as_json else f"\n{report.table()}")
    sys.exit(status)


async def _play(keep: Path | None, store: str, profile: str, report: Report, tell: Tell) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_end_on_sigterm)
        async with open_world(keep=keep and keep.resolve(), profile=profile, store=store) as world:
            await Story(world, report, tell, world.center_address).play()
        nursery.cancel_scope.cancel()


async def _end_on_sigterm() -> None:
    """SIGTERM ends the demo as Ctrl-C does: with nothing left behind."""
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            raise KeyboardInterrupt
