"""What a record must look like to be kept. What every planner and every guard would stumble over is refused as it comes."""

from __future__ import annotations

import re
from typing import Final, cast

import attrs

from ha_core.guard.control import MAX_NAME_BYTES, MAX_SHUTDOWN_S
from ha_core.machines.failover.records import Host, Name, Record, Vm

_KINDS: Final[dict[str, type]] = {
    "int": int, "bool": bool, "str": str, "bytes": bytes, "VmName": str, "HostName": str,
}  # fmt: skip
"""By the annotation of the field; the others are made by their converters, which refuse by themselves."""
_WORDS: Final[dict[type, str]] = {int: "a whole number", bool: "true or false", str: "text", bytes: "bytes"}
_LARGEST: Final = 1 << 62
_HOST_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9])?")


def is_host_name(text: str) -> bool:
    """Whether it may stand in a hosts file: one word of letters, digits, dots, hyphens and underscores."""
    return _HOST_NAME.fullmatch(text) is not None


def shape_problem(record: Record) -> str:
    """``field: what is expected of it`` for the first field that is wrong; empty: none is."""
    for field in attrs.fields(cast(type[attrs.AttrsInstance], type(record))):
        problem = _field_problem(record, field)
        if problem:
            return f"{field.name}: {problem}, found {str(getattr(record, field.name))[:60]!r}"
    return ""


def _field_problem(record: Record, field: attrs.Attribute[object]) -> str:
    value = getattr(record, field.name)
    kind = _KINDS.get(str(field.type))
    if kind is not None and type(value) is not kind:
        return f"expected {_WORDS[kind]}"
    if isinstance(value, int) and kind is int:
        least = -1 if field.default == -1 else 0
        most = MAX_SHUTDOWN_S * 10**9 if field.name in ("shutdown_ns", "stop_ns") else _LARGEST
        if not least <= value <= most:
            return f"expected {least} to {most}"
    if isinstance(record, Vm) and field.name == "name" and not 0 < len(record.name.encode()) <= MAX_NAME_BYTES:
        return f"expected 1 to {MAX_NAME_BYTES} bytes"
    if isinstance(record, Host | Name) and field.name in ("name", "fqdn") and not is_host_name(str(value)):
        return "expected a host's name"
    return ""
