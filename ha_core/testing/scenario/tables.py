"""One TOML table being read: values are checked as they are taken, and each mistake is named with its line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import attrs

from ha_core.testing.scenario.lines import Lines
from ha_core.testing.scenario.model import ScenarioError

T = TypeVar("T")
_SHOWN = {str: "a string", bool: "true or false", int: "an integer", float: "a number", list: "a list", dict: "a table"}


class Source(Protocol):
    """The file that a table is from."""

    path: str
    lines: Lines


@attrs.define
class Table:
    """One table being read: each key is taken once, and what nobody takes is unknown."""

    source: Source
    name: str
    number: int
    values: dict[str, object]
    inside: str = ""
    """The key of the table ``name`` that holds this one in its line."""

    def fail(self, key: str, text: str) -> ScenarioError:
        line = self.source.lines.of(self.name, self.number, self.inside or key)
        return ScenarioError(
            f"{self.source.path}:{line}: {text}", field=f"{self.name}.{key}".strip("."), value=self.values.get(key)
        )

    @property
    def line(self) -> int:
        return self.source.lines.of(self.name, self.number)

    def take(self, key: str, kind: type[T], default: T | None = None) -> T:
        """Raises ScenarioError: missing without a default, or of another kind."""
        if key not in self.values:
            if default is None:
                raise self.fail(key, f"{self.title}: {key} is missing, expected {_SHOWN[kind]}")
            return default
        value = self.values.pop(key)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            self.values[key] = value
            raise self.fail(key, f"{self.title}: {key} = {value!r}, expected {_SHOWN[kind]}")
        return value

    def choice(self, key: str, allowed: Sequence[str], default: str | None = None) -> str:
        value = self.take(key, str, default)
        if value not in allowed:
            raise self.fail(key, f"{self.title}: {key} = {value!r}, expected one of {', '.join(allowed)}")
        return value

    def count(self, key: str, default: int, least: int = 0) -> int:
        value = self.take(key, int, default)
        if value < least:
            raise self.fail(key, f"{self.title}: {key} = {value}, expected at least {least}")
        return value

    def seconds(self, key: str, default: float | None = None) -> float:
        value = self.take(key, float, default)
        if not 0 <= value < 1e9:
            raise self.fail(key, f"{self.title}: {key} = {value}, expected seconds, at least 0")
        return value

    def names(self, key: str, known: Mapping[str, object], what: str) -> Sequence[str]:
        """A name or a list of names, each known."""
        value = self.values.pop(key, [])
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self.fail(key, f"{self.title}: {key} = {value!r}, expected a list of names")
        for name in names:
            self.known(key, name, known, what)
        return tuple(names)

    def known(self, key: str, name: str, known: Mapping[str, object], what: str) -> None:
        if name not in known:
            raise self.fail(key, f"{self.title}: there is no {what} {name!r}, expected one of {', '.join(known) or 'none'}")

    def end(self) -> None:
        for key in self.values:
            raise self.fail(key, f"{self.title}: unknown key {key!r}")

    @property
    def title(self) -> str:
        return f"[{self.name}]" if self.name else "the scenario"
