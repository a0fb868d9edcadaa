"""Where the tables and keys of a TOML text stand: the parser of the standard library does not say."""

from __future__ import annotations

import re


class Lines:
    """Where each table and key of a TOML text stands."""

    _TABLE = re.compile(r"\s*(\[\[?)\s*([\w.\"-]+)\s*\]\]?\s*(#.*)?$")
    _KEY = re.compile(r"\s*([\w\"-]+)\s*=")

    def __init__(self, text: str) -> None:
        self._lines: dict[tuple[str, int, str], int] = {}
        counts: dict[str, int] = {}
        table, number = "", 0
        for line, content in enumerate(text.splitlines(), 1):
            if found := self._TABLE.match(content):
                table = found.group(2)
                number = counts.get(table, 0)
                counts[table] = number + 1
                self._lines[table, number, ""] = line
            elif found := self._KEY.match(content):
                self._lines.setdefault((table, number, found.group(1).strip('"')), line)

    def of(self, table: str, number: int = 0, key: str = "") -> int:
        """The line of a key; that of its table if the key is not there; 1 if neither is."""
        inline = self._lines.get(("", 0, table), 1)
        return self._lines.get((table, number, key)) or self._lines.get((table, number, "")) or inline
