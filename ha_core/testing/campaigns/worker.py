"""``python -m ha_core.testing.campaigns.worker NAME SEED...``: play seeds in this process, one JSON line a seed on stdout."""

from __future__ import annotations

import json
import sys

import attrs

from ha_core.testing.campaigns import load_campaign, play_seed


def main(arguments: list[str]) -> None:
    name, *seeds = arguments
    for seed in seeds:
        result = play_seed(load_campaign(name), int(seed))
        print(json.dumps(attrs.asdict(result)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
