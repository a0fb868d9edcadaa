"""What all commands share that ask the center: how they find it and prove that they may, and how its answers are shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import trio

from ha_core.errors import TransportError
from ha_core.runtime.rpc import dial_rpc
from ha_core.security.key import load_key

ANSWER_S = 90.0
"""Longer than the center asks all hosts of a cluster that has no quorum."""

F = TypeVar("F", bound=Callable[..., Any])
Rows = Sequence[Mapping[str, object]]


key_option = click.option(
    "--key",
    type=click.Path(path_type=Path),
    envvar="HA_CORE_KEY",
    show_envvar=True,
    required=True,
    help="The cluster key file.",
)


def asks_center(function: F) -> F:
    """The options of every command that speaks to the center."""
    for option in (
        click.option(
            "--center",
            default="127.0.0.1:7600",
            envvar="HA_CORE_CENTER",
            show_default=True,
            show_envvar=True,
            help="Where the center listens.",
        ),
        key_option,
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    ):
        function = option(function)
    return function


def ask_center(center: str, key: Path, method: str, **params: object) -> Any:
    async def ask() -> object:
        with trio.move_on_after(ANSWER_S):
            async with dial_rpc(center, key=load_key(key)) as client:
                return await client.call(method, **params)
        raise TransportError(f"{center}: the center did not answer in {ANSWER_S:g} s; it may still carry the request out")

    return trio.run(ask)


def show(rows: Rows, columns: Sequence[str], as_json: bool) -> None:
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
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def say(answer: object, text: str, as_json: bool) -> None:
    """What an order came to, for programs or for people."""
    click.echo(json.dumps(answer, default=str) if as_json else text)
