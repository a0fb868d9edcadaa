"""``ha-core cluster | explain``: the cluster as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ha_core.cli.asking import ask_center, asks_center, say
from ha_core.cli.hosts import show_hosts
from ha_core.cli.vms import show_vms
from ha_core.config import Config
from ha_core.roles.founding import create_cluster


@click.group()
def cluster() -> None:
    """Create a cluster; show its state; arm and disarm it."""


@cluster.command(short_help="Make the cluster key, and this host its only primary.")
@click.option("--config", type=click.Path(path_type=Path), required=True, help="The first host's configuration.")
def create(config: Path) -> None:
    """Make the cluster key and this host its only primary; start its agents afterwards."""
    loaded = Config.load(config)
    path = create_cluster(loaded)
    click.echo(f"cluster {loaded.cluster} created; its key is {path}: keep it secret, the hosts that join get it by themselves")
    click.echo(f"next: ha-core agent --config {config}")


@cluster.command(short_help="Show the active primary, the hosts and the VMs.")
@asks_center
def status(center: str, key: Path, as_json: bool) -> None:
    """Leader, hosts and VMs: what each host says of itself, what each VM waits for, and what should be mended."""
    answer = ask_center(center, key, "cluster.status")
    if as_json:
        click.echo(json.dumps(answer, default=str))
        return
    leader = answer["leader"] or "none"
    click.echo(f"cluster {answer['cluster']}, {answer['mode']}, active primary {leader}, term {answer['term']}\n")
    show_hosts(answer["hosts"])
    click.echo()
    show_vms(answer["vms"])
    for note in answer["notes"]:
        click.echo(f"\nnote: {note}")


@cluster.command(short_help="High availability off: nothing is fenced or restarted.")
@asks_center
def disarm(center: str, key: Path, as_json: bool) -> None:
    """High availability off: VMs stay as they are, nothing is fenced or restarted."""
    answer = ask_center(center, key, "cluster.mode", mode="disarmed")
    say(answer, "the cluster is disarmed: nothing is fenced or restarted until 'ha-core cluster arm'", as_json)


@cluster.command()
@asks_center
def arm(center: str, key: Path, as_json: bool) -> None:
    """High availability on again."""
    say(ask_center(center, key, "cluster.mode", mode="armed"), "the cluster is armed", as_json)


@click.command()
@click.option("--vm", default="", help="The story of this VM.")
@click.option("--host", default="", help="The story of this host.")
@asks_center
def explain(center: str, key: Path, as_json: bool, vm: str, host: str) -> None:
    """Why was this VM started there, why was this host fenced: the decisions that were committed, each with its place in the
    log, oldest first, and how it stands now."""
    answer = ask_center(center, key, "explain", vm=vm, host=host)
    say(answer["decisions"], "\n".join(answer["lines"]), as_json)
