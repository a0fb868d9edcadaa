"""What the next release tells its users can be built, and is written for them."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_fragment_is_of_a_known_kind_and_one_paragraph() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["towncrier"]
    kinds = {kind["directory"] for kind in settings["type"]}
    bad = []
    for path in sorted((ROOT / settings["directory"]).glob("*.*")):
        text = path.read_text()
        if path.suffixes[-2:] not in [[f".{kind}", ".md"] for kind in kinds]:
            bad.append(f"{path.name}: expected NAME.KIND.md with a kind of {sorted(kinds)}")
        if text != f"{text.strip()}\n" or "\n" in text.strip() or not text.strip().endswith("."):
            bad.append(f"{path.name}: expected one line that ends with a full stop")

    assert bad == []


def test_the_change_log_has_the_place_where_releases_go() -> None:
    assert "<!-- towncrier release notes start -->" in (ROOT / "CHANGES.md").read_text()
