"""``python -m ha_core.roles aam|vpxa CONFIG``: how the guard starts the other agents."""

from __future__ import annotations

import logging
import sys

import trio

from ha_core import registry
from ha_core.config import Config
from ha_core.errors import HAError, leaves


def main() -> None:
    name, path = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {name} %(name)s: %(message)s")
    run = registry.find("roles", name)
    assert callable(run)
    try:
        trio.run(run, Config.load(path))
    except* HAError as group:
        for error in leaves(group):
            print(f"ha-core {name}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
