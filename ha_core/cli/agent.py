"""``ha-core agent``: this host's agents."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from ha_core.config import Config
from ha_core.roles.membership_file import MembershipFile
from ha_core.roles.rundir import JOIN_TOKEN, guard_command, make_directories
from ha_core.security.join import make_token


@click.command()
@click.option("--config", "path", type=click.Path(path_type=Path), required=True, help="This host's configuration.")
def agent(path: Path) -> None:
    """Become the guard, which starts and watches the others; until the host has joined a cluster it waits to be added."""
    config = Config.load(path)
    run_dir = make_directories(config)
    if MembershipFile.load(config.data_dir) is None:
        token = make_token(config.data_dir / JOIN_TOKEN)
        click.echo(f"not in a cluster yet: ha-core host add NAME --address {config.management} --token {token.hex()}")
    sys.stdout.flush()
    command = guard_command(config, path.resolve(), run_dir)
    os.execv(command[0], command)
