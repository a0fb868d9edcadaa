"""``ha-core vm``: what shall run, and what does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from ha_core.cli.asking import Rows, ask_center, asks_center, say, show

VM_COLUMNS = ("name", "wanted", "state", "host", "priority", "after", "token", "why")


def show_vms(rows: Rows, as_json: bool = False) -> None:
    show(rows if as_json else [{**row, "why": _why(row)} for row in rows], VM_COLUMNS, as_json)


def _why(row: Mapping[str, object]) -> str:
    """Why it runs there; if it does not run, what became of its last run and what it waits for."""
    if row["state"] not in ("waiting", "failed", "stopped"):
        return str(row["why"])
    last = [str(row["text"])] if row["text"] else []
    waits = [f"waits: {row['waits']}"] if row["waits"] else []
    return "; ".join([*last, *waits])


@click.group()
def vm() -> None:
    """Add, start, stop, move and list VMs."""


@vm.command("add", context_settings={"ignore_unknown_options": False})
@click.argument("name")
@click.argument("argv", nargs=-1, required=True)
@click.option(
    "--priority",
    default="medium",
    type=click.Choice(["highest", "high", "medium", "low", "lowest", "disabled"]),
    show_default=True,
    help="Who starts first after a failure; disabled: never restarted.",
)
@click.option("--after", multiple=True, metavar="VM", help="A VM that must be up first; may be given again.")
@click.option("--host", default="", help="Preferred for the first start.")
@click.option("--cpu-mhz", default=500, type=click.IntRange(0), show_default=True, help="What it needs on its host.")
@click.option("--memory-mib", default=512, type=click.IntRange(0), show_default=True, help="What it needs on its host.")
@click.option(
    "--shutdown-s",
    default=0.0,
    type=click.FloatRange(0),
    help="For its orderly shutdown at its host's deadline; a failover waits as long.",
)
@click.option(
    "--stop-s", type=click.FloatRange(0), help="For its orderly shutdown when it is stopped or moved; default: --shutdown-s."
)
@asks_center
def add_vm(center: str, key: Path, as_json: bool, argv: tuple[str, ...], after: tuple[str, ...], **params: object) -> None:
    """Protect the command ARGV (after --) as VM NAME."""
    given = {name: value for name, value in params.items() if value is not None}
    answer = ask_center(center, key, "vm.add", options={"argv": list(argv)}, after=list(after), **given)
    what = "was there already: its new definition counts from its next start" if answer["was_known"] else "is added"
    say(answer, f"{answer['name']} {what}", as_json)


def _wants(command: str, wanted: str, text: str, done: str) -> None:
    @vm.command(command, help=text)
    @click.argument("name")
    @asks_center
    def order(center: str, key: Path, as_json: bool, name: str) -> None:
        say(ask_center(center, key, "vm.want", name=name, wanted=wanted), f"{name} {done}", as_json)


_wants("start", "started", "Start a VM, and keep it running.", "is to run: ha-core vm list shows where, or what it waits for")
_wants("stop", "stopped", "Stop a VM in an orderly way.", "is told to stop")
_wants("ignore", "ignored", "Neither restart nor move a VM.", "is neither restarted nor moved until 'ha-core vm start'")


@vm.command("move")
@click.argument("name")
@click.argument("host")
@asks_center
def move_vm(center: str, key: Path, as_json: bool, name: str, host: str) -> None:
    """Stop a VM where it is and start it on HOST."""
    say(ask_center(center, key, "vm.move", name=name, host=host), f"{name} moves to {host}", as_json)


@vm.command("remove")
@click.argument("name")
@asks_center
def remove_vm(center: str, key: Path, as_json: bool, name: str) -> None:
    """Forget a VM; a run that is there goes on, unmanaged."""
    answer = ask_center(center, key, "vm.remove", name=name)
    say(answer, f"{name} is forgotten; if it runs, it goes on, unmanaged", as_json)


@vm.command("list", short_help="Show VMs, where they run and why, or what they wait for.")
@asks_center
def list_vms(center: str, key: Path, as_json: bool) -> None:
    """VMs, where they run and why; those that do not, what they wait for."""
    show_vms(ask_center(center, key, "vm.list"), as_json)
