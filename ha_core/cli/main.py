"""The command line: a group whose commands are imported only when they are called, so that ``ha-core --help`` is quick."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping

import click

from ha_core._version import __version__
from ha_core.errors import HAError, leaves

# name -> (module:command, one line of help)
_COMMANDS: Mapping[str, tuple[str, str]] = {
    "agent": ("ha_core.cli.agent:agent", "Run this host's agents: guard, aam and vpxa."),
    "center": ("ha_core.cli.center:center", "Run the management server."),
    "cluster": ("ha_core.cli.cluster:cluster", "Create a cluster; show its state; arm and disarm it."),
    "demo": ("ha_core.cli.demo:demo", "Start a real cluster on this machine, break it, and show that it held."),
    "explain": ("ha_core.cli.cluster:explain", "Say why a VM was started where it is, or why a host was fenced."),
    "host": ("ha_core.cli.hosts:host", "Add, list, drain and remove hosts."),
    "simulate": ("ha_core.cli.simulate:simulate", "Play scenarios or campaigns of the whole cluster in virtual time."),
    "vm": ("ha_core.cli.vms:vm", "Add, start, stop, move and list VMs."),
}


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name][1]) for name in sorted(_COMMANDS)])


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ha-core")
def cli() -> None:
    """High availability for Python: messages exactly once, a replicated database, VMs that survive their hosts."""


def main() -> None:
    """Entry point: errors of ours are one line on stderr and exit status 2, a traceback is always a bug."""
    try:
        cli()
    except* HAError as group:
        for error in leaves(group):
            print(f"ha-core: {error}", file=sys.stderr)
        sys.exit(2)
