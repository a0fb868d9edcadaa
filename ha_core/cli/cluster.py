"""``ha-core cluster | host | vm | explain``: what administrators ask of the center."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import click
import trio

from ha_core.config import Config
from ha_core.errors import TransportError
from ha_core.roles.founding import create_cluster
from ha_core.roles.rundir import VPXA_SOCKET, run_dir_of
from ha_core.runtime.rpc import dial_rpc
from ha_core.security.key import load_key

ANSWER_S = 90.0
"""Longer than the center asks all hosts of a cluster that has no quorum."""

F = TypeVar("F", bound=Callable[..., Any])
Rows = Sequence[Mapping[str, object]]


def _asks_center(function: F) -> F:
    """The options of every command that speaks to the center."""
    for option in (
        click.option("--center", default="127.0.0.1:7600", envvar="HA_CORE_CENTER", show_default=True, help="The center."),
        click.option(
            "--key", type=click.Path(path_type=Path), envvar="HA_CORE_KEY", required=True, help="The cluster key file."
        ),
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    ):
        function = option(function)
    return function


def _ask(center: str, key: Path, method: str, **params: object) -> object:
    async def ask() -> object:
        with trio.move_on_after(ANSWER_S):
            async with dial_rpc(center, key=load_key(key)) as client:
                return await client.call(method, **params)
        raise TransportError(f"{center}: the center did not answer in {ANSWER_S:g} s; it may still carry the request out")

    return trio.run(ask)


def _show(rows: Rows, columns: Sequence[str], as_json: bool) -> None:
    """Rows as an aligned table, or as JSON."""
    if as_json:
        click.echo(json.dumps(list(rows), default=str))
        return
    table = [list(columns), *[[_cell(row.get(column, "")) for column in columns] for row in rows]]
    widths = [max(len(line[number]) for line in table) for number in range(len(columns))]
    for line in table:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: object) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value)


# -- cluster --


@click.group()
def cluster() -> None:
    """Create a cluster; show its state; arm and disarm it."""


@cluster.command()
@click.option("--config", type=click.Path(path_type=Path), required=True, help="The first host's configuration.")
def create(config: Path) -> None:
    """Make the cluster key and this host its only primary; start its agents afterwards."""
    loaded = Config.load(config)
    path = create_cluster(loaded)
    click.echo(f"cluster {loaded.cluster} created; its key is {path}: keep it secret, the hosts that join get it by themselves")


@cluster.command()
@_asks_center
def status(center: str, key: Path, as_json: bool) -> None:
    """Leader, hosts and VMs."""
    answer = cast(dict[str, object], _ask(center, key, "cluster.status"))
    if as_json:
        click.echo(json.dumps(answer, default=str))
        return
    click.echo(f"cluster {answer['cluster']}, active primary {answer['leader'] or 'none'}, term {answer['term']}\n")
    _show(cast(Rows, answer["hosts"]), HOST_COLUMNS, False)
    click.echo()
    _show(cast(Rows, answer["vms"]), VM_COLUMNS, False)


@cluster.command()
@_asks_center
def disarm(center: str, key: Path, as_json: bool) -> None:
    """High availability off: VMs stay as they are, nothing is fenced or restarted."""
    _ask(center, key, "cluster.mode", mode="disarmed")


@cluster.command()
@_asks_center
def arm(center: str, key: Path, as_json: bool) -> None:
    """High availability on again."""
    _ask(center, key, "cluster.mode", mode="armed")


# -- hosts --

HOST_COLUMNS = ("name", "state", "role", "lease_state", "lease", "links", "containment")


@click.group()
def host() -> None:
    """Add, list and drain hosts."""


@host.command("add")
@click.argument("name")
@click.option("--address", required=True, help="Its management address, host:port.")
@click.option("--token", required=True, envvar="HA_CORE_TOKEN", help="The join token that its agent shows.")
@_asks_center
def add_host(center: str, key: Path, as_json: bool, **params: str) -> None:
    """Register host NAME (its FQDN) and let it join."""
    _ask(center, key, "host.add", **params)
    click.echo(f"{params['name']} is registered and joins now: ha-core host list shows it")


@host.command("list")
@_asks_center
def list_hosts(center: str, key: Path, as_json: bool) -> None:
    """Hosts, their roles, paths and leases."""
    _show(cast(Rows, _ask(center, key, "host.list")), HOST_COLUMNS, as_json)


@host.command("paths")
@_asks_center
def list_paths(center: str, key: Path, as_json: bool) -> None:
    """Every path between hosts: its state and round trip."""
    _show(cast(Rows, _ask(center, key, "host.paths")), ("host", "peer", "link", "state", "rtt_ms"), as_json)


@host.command("remove")
@click.argument("name")
@_asks_center
def remove_host(center: str, key: Path, as_json: bool, name: str) -> None:
    """Take an empty host out of the cluster: it votes no more, forgets the cluster and its key, and waits to be added anew."""
    answer = cast(dict[str, object], _ask(center, key, "host.remove", name=name))
    click.echo(json.dumps(answer) if as_json else answer["text"])


@host.command("leave")
@click.option("--config", type=click.Path(path_type=Path), required=True, help="This host's configuration.")
def leave_host(config: Path) -> None:
    """Forget the cluster, on this host: for one that was removed while it could not be reached."""
    loaded = Config.load(config)

    async def ask() -> None:
        async with dial_rpc(run_dir_of(loaded) / VPXA_SOCKET) as client:
            await client.call("host.leave")

    trio.run(ask)
    click.echo(f"{loaded.node} has left cluster {loaded.cluster}")


@host.command()
@click.argument("name")
@click.argument("switch", type=click.Choice(["on", "off"]))
@_asks_center
def maintenance(center: str, key: Path, as_json: bool, name: str, switch: str) -> None:
    """Evacuate a host and keep it empty, or end that."""
    _ask(center, key, "host.maintenance", name=name, on=switch == "on")


# -- virtual machines --

VM_COLUMNS = ("name", "wanted", "state", "host", "priority", "after", "token", "why", "text")


@click.group()
def vm() -> None:
    """Add, start, stop, move and list VMs."""


@vm.command("add", context_settings={"ignore_unknown_options": False})
@click.argument("name")
@click.argument("argv", nargs=-1, required=True)
@click.option("--priority", default="medium", type=click.Choice(["highest", "high", "medium", "low", "lowest", "disabled"]))
@click.option("--after", multiple=True, help="A VM that must be up first.")
@click.option("--host", default="", help="Preferred for the first start.")
@click.option("--cpu-mhz", default=500)
@click.option("--memory-mib", default=512)
@click.option("--shutdown-s", default=0.0, help="For its orderly shutdown at its host's deadline; a failover waits as long.")
@click.option("--stop-s", type=float, help="For its orderly shutdown when it is stopped or moved; default: --shutdown-s.")
@_asks_center
def add_vm(center: str, key: Path, as_json: bool, argv: tuple[str, ...], after: tuple[str, ...], **params: object) -> None:
    """Protect the command ARGV (after --) as VM NAME."""
    given = {name: value for name, value in params.items() if value is not None}
    _ask(center, key, "vm.add", options={"argv": list(argv)}, after=list(after), **given)


def _wants(wanted: str, text: str) -> None:
    @vm.command({"started": "start", "stopped": "stop", "ignored": "ignore"}[wanted], help=text)
    @click.argument("name")
    @_asks_center
    def order(center: str, key: Path, as_json: bool, name: str) -> None:
        _ask(center, key, "vm.want", name=name, wanted=wanted)


_wants("started", "Start a VM, and keep it running.")
_wants("stopped", "Stop a VM in an orderly way.")
_wants("ignored", "Neither restart nor move a VM.")


@vm.command("move")
@click.argument("name")
@click.argument("host")
@_asks_center
def move_vm(center: str, key: Path, as_json: bool, name: str, host: str) -> None:
    """Stop a VM where it is and start it on HOST."""
    _ask(center, key, "vm.move", name=name, host=host)


@vm.command("remove")
@click.argument("name")
@_asks_center
def remove_vm(center: str, key: Path, as_json: bool, name: str) -> None:
    """Forget a VM; a run that is there goes on, unmanaged."""
    _ask(center, key, "vm.remove", name=name)


@vm.command("list")
@_asks_center
def list_vms(center: str, key: Path, as_json: bool) -> None:
    """VMs, where they run and why."""
    _show(cast(Rows, _ask(center, key, "vm.list")), VM_COLUMNS, as_json)


@click.command()
@click.option("--vm", default="", help="Decisions about this VM.")
@click.option("--host", default="", help="Decisions about this host.")
@_asks_center
def explain(center: str, key: Path, as_json: bool, vm: str, host: str) -> None:
    """Why was this VM started there, why was this host fenced: the decisions that were committed, oldest first."""
    rows = cast(Rows, _ask(center, key, "explain", vm=vm, host=host))
    _show(rows, ("number", "kind", "host", "vm", "token", "why"), as_json)
