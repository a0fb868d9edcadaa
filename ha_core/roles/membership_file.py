"""What a host remembers of its cluster on its own disk: ``cluster.json`` in the data directory.

It is written by ``cluster create`` (the first host: itself as the only voter) or by joining (no voters: it learns), and its
list of primaries is kept current by the aam, so that a host finds its peers when DNS, the center and its old peers are gone.
vpxa removes it when the host leaves. Two processes change it, so each change holds a lock, and the aam's never makes it anew.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import attrs

from ha_core.errors import ConfigError, StorageError
from ha_core.ids import LinkName, NodeId
from ha_core.storage.files import flush_folder, replace_file

FILE_NAME = "cluster.json"
LOCK_NAME = "cluster.lock"
Addresses = Mapping[NodeId, Mapping[LinkName, str]]


@attrs.frozen
class MembershipFile:
    """``voters``: read only while the store is empty (R25). ``primaries``: whom to talk to. ``joining``: drawn anew each time
    that the host joins, so that who left and came back is not taken for who stayed."""

    cluster: str
    voters: Addresses
    primaries: Addresses
    joining: str = ""

    @classmethod
    def load(cls, data_dir: Path) -> MembershipFile | None:
        """None if the host has joined no cluster yet.

        Raises:
            ConfigError: the file is there but damaged.
        """
        path = data_dir / FILE_NAME
        try:
            data = json.loads(path.read_text())
            return cls(
                data["cluster"], _addresses(data["voters"]), _addresses(data["primaries"]), str(data.get("joining", ""))
            )  # fmt: skip
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as exc:
            raise ConfigError(f"{path}: damaged ({exc!r}); restore it, or remove it and join anew", field="cluster") from exc

    def save(self, data_dir: Path) -> None:
        """Replace the file atomically and durably.

        Raises:
            StorageError: it cannot be written.
        """
        with _locked(data_dir):
            self._write(data_dir)

    def update(self, data_dir: Path) -> bool:
        """``save``, unless the host has left this membership meanwhile: then nothing is written, and the answer is False."""
        with _locked(data_dir):
            known = self.load(data_dir)
            if known is None or known.joining != self.joining:
                return False
            self._write(data_dir)
            return True

    @staticmethod
    def remove(data_dir: Path) -> None:
        """The host has left; durable when this returns."""
        with _locked(data_dir):
            (data_dir / FILE_NAME).unlink(missing_ok=True)
            flush_folder(data_dir)

    def _write(self, data_dir: Path) -> None:
        replace_file(data_dir / FILE_NAME, json.dumps(attrs.asdict(self)).encode())


def is_member(data_dir: Path, since: MembershipFile) -> bool:
    """False once the host has left, even if it has joined anew meanwhile."""
    known = MembershipFile.load(data_dir)
    return known is not None and known.joining == since.joining


@contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    try:
        with (data_dir / LOCK_NAME).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as exc:
        raise StorageError(f"{data_dir / FILE_NAME}: cannot write: {exc.strerror}") from exc


def _addresses(data: Mapping[str, Mapping[str, str]]) -> Addresses:
    return {NodeId(node): {LinkName(link): str(address) for link, address in links.items()} for node, links in data.items()}
