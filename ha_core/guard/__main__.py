"""``python -I -S .../ha_core/guard --config FILE`` (or ``--config-json TEXT``); exit status 2: wrong settings, 75: another
guard runs."""

import os
import sys
import types

if __name__ == "__main__":
    # Before the imports: on a busy machine they take longest when they matter most. The settings may ask for another priority.
    nice_before = os.getpriority(os.PRIO_PROCESS, 0)
    try:
        os.setpriority(os.PRIO_PROCESS, 0, min(nice_before, -10))
    except OSError:
        pass

if "ha_core" not in sys.modules:
    # Run as a folder: the package docstring says why.
    _package = types.ModuleType("ha_core")
    _package.__path__ = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    sys.modules["ha_core"] = _package
    sys.path.pop(0)

from ha_core.guard.loop import AnotherGuardError, Guard
from ha_core.guard.processes import LOST_RACE
from ha_core.guard.settings import SettingsError, load_settings, parse_settings


def main(arguments: list[str], nice: int) -> int:
    """Run a guard; the exit status. ``nice``: the priority that agents and VMs get."""
    try:
        match arguments:
            case ["--config", path]:
                settings = load_settings(path)
            case ["--config-json", text]:
                settings = parse_settings(text, "--config-json")
            case _:
                raise SettingsError("usage: guard --config FILE | --config-json TEXT")
        guard = Guard(settings, nice)
    except AnotherGuardError as exc:
        print(exc, file=sys.stderr)
        return LOST_RACE
    except SettingsError as exc:
        print(exc, file=sys.stderr)
        return 2
    except OSError as exc:
        print(f"guard: cannot start: {exc}", file=sys.stderr)
        return 1
    guard.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], nice_before))
