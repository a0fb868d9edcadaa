"""``ha-core host``: hosts come, are drained and go."""

from __future__ import annotations

from pathlib import Path

import click
import trio

from ha_core.cli.asking import Rows, ask_center, asks_center, say, show
from ha_core.config import Config
from ha_core.roles.rundir import VPXA_SOCKET, run_dir_of
from ha_core.runtime.rpc import dial_rpc

MANAGEMENT_PORT = 7500
HOST_COLUMNS = ("name", "state", "role", "lease", "sees itself", "containment", "links")


def show_hosts(rows: Rows, as_json: bool = False) -> None:
    """For people: the lease with its state, and why a host is not connected."""
    cells = [
        {
            **row,
            "lease": f"{row['lease_state']} {row['lease']}" if row["lease"] else "none",
            "sees itself": ": ".join(str(one) for one in (row["verdict"], row["verdict_reason"]) if one),
        }
        for row in rows
    ]
    show(rows if as_json else cells, HOST_COLUMNS, as_json)


@click.group(short_help="Add, list, drain and remove hosts.")
def host() -> None:
    """Add, list, drain and remove hosts."""


@host.command("add")
@click.argument("name")
@click.option("--address", help=f"Its management address, host:port; default: NAME:{MANAGEMENT_PORT}.")
@click.option("--token", required=True, envvar="HA_CORE_TOKEN", show_envvar=True, help="The join token that its agent shows.")
@asks_center
def add_host(center: str, key: Path, as_json: bool, name: str, address: str | None, token: str) -> None:
    """Register host NAME (its FQDN) and let it join."""
    answer = ask_center(center, key, "host.add", name=name, address=address or f"{name}:{MANAGEMENT_PORT}", token=token)
    if answer["was_member"]:
        say(answer, f"{name} holds this cluster's key already: it is registered as it says of itself now", as_json)
        return
    say(answer, f"{name} is registered and joins now: ha-core host list shows it", as_json)
    if not as_json:
        for note in answer["notes"]:
            click.echo(f"note: {note}")


@host.command("list", short_help="Show hosts, their roles and leases, and how each sees itself.")
@asks_center
def list_hosts(center: str, key: Path, as_json: bool) -> None:
    """Hosts, their roles and leases, and what each says of itself: connected, partitioned, isolated or failed."""
    show_hosts(ask_center(center, key, "host.list"), as_json)


@host.command("paths")
@asks_center
def list_paths(center: str, key: Path, as_json: bool) -> None:
    """Every path between hosts: its state and round trip."""
    rows = ask_center(center, key, "host.paths")
    if not as_json:
        rows = [row if row["state"] == "up" else {**row, "rtt_ms": ""} for row in rows]
    show(rows, ("host", "peer", "link", "state", "rtt_ms"), as_json)


@host.command("remove", short_help="Take an empty host out of the cluster.")
@click.argument("name")
@asks_center
def remove_host(center: str, key: Path, as_json: bool, name: str) -> None:
    """Take an empty host out of the cluster: it votes no more, forgets the cluster and its key, and waits to be added anew."""
    answer = ask_center(center, key, "host.remove", name=name)
    say(answer, answer["text"], as_json)


@host.command("leave", short_help="Forget the cluster, on this host.")
@click.option("--config", type=click.Path(path_type=Path), required=True, help="This host's configuration.")
@click.option("--force", is_flag=True, help="It was removed, although it has not heard of that.")
def leave_host(config: Path, force: bool) -> None:
    """Forget the cluster, on this host: for one that was removed while it could not be reached."""
    loaded = Config.load(config)

    async def ask() -> None:
        async with dial_rpc(run_dir_of(loaded) / VPXA_SOCKET) as client:
            await client.call("host.leave", removed=force)

    trio.run(ask)
    click.echo(f"{loaded.node} has left cluster {loaded.cluster}")


@host.command()
@click.argument("name")
@click.argument("switch", type=click.Choice(["on", "off"]))
@asks_center
def maintenance(center: str, key: Path, as_json: bool, name: str, switch: str) -> None:
    """Evacuate a host and keep it empty, or end that."""
    answer = ask_center(center, key, "host.maintenance", name=name, on=switch == "on")
    text = "is being emptied and stays empty: ha-core vm list shows how far it is" if switch == "on" else "takes VMs again"
    say(answer, f"{name} {text}", as_json)


@host.command(short_help="Say that a host is off, so that its VMs may start elsewhere.")
@click.argument("name")
@click.option("--yes", is_flag=True, help="It is off, and stays off until its agents start anew.")
@asks_center
def fenced(center: str, key: Path, as_json: bool, name: str, yes: bool) -> None:
    """Say that a host is off, and that nothing runs there: VMs that wait because nobody can tell start elsewhere. If that is wrong
    they run twice, and their data are lost."""
    if not yes:
        raise click.UsageError(f"make sure that {name} is off (power, not network), and add --yes")
    answer = ask_center(center, key, "host.fenced", name=name)
    say(answer, f"{name} counts as off: its VMs start elsewhere", as_json)
