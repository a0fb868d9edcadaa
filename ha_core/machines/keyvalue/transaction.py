"""A transaction in the making: reads see its own writes, and nothing is kept unless it ends well."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ha_core.errors import HAError
from ha_core.ids import LogIndex
from ha_core.machines.keyvalue.model import Plain, Record
from ha_core.machines.keyvalue.versions import VersionedMap


class ProcedureError(HAError):
    """A procedure refuses: nothing of it is kept, and its caller gets the text."""


class KvTransaction:
    """What a procedure may do. Everything that it does must follow from the log alone: no time, no chance, no set order."""

    __slots__ = ("_map", "writes")

    def __init__(self, state: VersionedMap) -> None:
        self._map = state
        self.writes: dict[bytes, tuple[bytes, int] | None] = {}

    def get(self, key: bytes) -> bytes | None:
        if key in self.writes:
            write = self.writes[key]
            return None if write is None else write[0]
        record = self._map.get(key)
        return None if record is None else record.value

    def range(self, prefix: bytes) -> list[tuple[bytes, bytes]]:
        """Keys under ``prefix`` with their values, in key order."""
        found: dict[bytes, bytes] = {}
        for key in self._map.keys(prefix):
            record = self._map.get(key)
            if record is not None:
                found[key] = record.value
        for key, write in self.writes.items():
            if key.startswith(prefix):
                if write is None:
                    found.pop(key, None)
                else:
                    found[key] = write[0]
        return sorted(found.items())

    def put(self, key: bytes, value: bytes, lease: int = 0) -> None:
        if type(key) is not bytes or not key or type(value) is not bytes:
            raise ProcedureError(f"a key and its value are bytes, not {key!r} and {type(value).__name__}")
        self.writes[key] = (value, lease)

    def delete(self, key: bytes) -> None:
        self.writes[key] = None

    # -- for the steps of a Change --

    def record(self, key: bytes) -> Record | None:
        """The key as this transaction sees it; what it wrote itself shows the revision that it is going to have."""
        old = self._map.get(key)
        if key not in self.writes:
            return old
        write = self.writes[key]
        if write is None:
            return None
        revision = self._map.revision + 1
        if old is None:
            return Record(key, write[0], revision, revision, 1, write[1])
        return Record(key, write[0], old.create_revision, revision, old.version + 1, write[1])

    def delete_prefix(self, prefix: bytes) -> int:
        keys = [key for key, _ in self.range(prefix)]
        for key in keys:
            self.writes[key] = None
        return len(keys)


Procedure = Callable[[KvTransaction, LogIndex, Sequence[Plain]], Plain]
"""A deterministic function that the log command Call(name, args) runs at its log index, for keys under ``RESERVED`` too."""
