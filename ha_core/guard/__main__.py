"""``python -I -S .../ha_core/guard --config FILE`` (or ``--config-json TEXT``); exit status 2: wrong settings, 75: another
guard runs."""

import os
import sys
import types

if "ha_core" not in sys.modules:
    # Run as a folder: the package docstring says why.
    _package = types.ModuleType("ha_core")
    _package.__path__ = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    sys.modules["ha_core"] = _package
    sys.path.pop(0)

from ha_core.guard.loop import AnotherGuardError, Guard
from ha_core.guard.processes import LOST_RACE
from ha_core.guard.settings import SettingsError, load_settings, parse_settings


def main(arguments: list[str]) -> int:
    """Run a guard; the exit status."""
    try:
        match arguments:
            case ["--config", path]:
                settings = load_settings(path)
            case ["--config-json", text]:
                settings = parse_settings(text, "--config-json")
            case _:
                raise SettingsError("usage: guard --config FILE | --config-json TEXT")
        guard = Guard(settings)
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
    sys.exit(main(sys.argv[1:]))
