"""Which process of each other aam was seen last, kept on disk: an aam that restarts refuses who went back meanwhile (R12)."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import trio

from ha_core.errors import StorageError
from ha_core.ids import Boot, NodeId, StoreId
from ha_core.machines.handshake import SeenBoot
from ha_core.machines.messages import SessionUp
from ha_core.storage.files import replace_file

logger = logging.getLogger(__name__)

FILE_NAME = "seen.json"
MAX_SEEN = 1024


class SeenBoots:
    """``known`` is what the endpoint begins with; ``note`` every session; ``run`` writes what is new."""

    def __init__(self, data_dir: Path) -> None:
        """
        Raises:
            StorageError: the file is damaged.
        """
        self._path = data_dir / FILE_NAME
        self._known = _load(self._path)
        self._wake = trio.Event()

    @property
    def known(self) -> list[SeenBoot]:
        return list(self._known.values())

    def note(self, effect: SessionUp) -> None:
        seen = effect.seen
        if self._known.get(effect.store) != seen:
            self._known.pop(effect.store, None)
            if len(self._known) >= MAX_SEEN:
                del self._known[next(iter(self._known))]
            self._known[effect.store] = seen
            self._wake.set()

    async def run(self) -> None:
        """Serve until cancelled; what could not be written is written with the next change."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            rows = [
                [seen.store.hex(), seen.peer, seen.boot.counter, seen.boot.nonce, seen.boots_digest.hex()]
                for seen in self._known.values()
            ]
            try:
                await trio.to_thread.run_sync(replace_file, self._path, json.dumps(rows).encode())
            except OSError as exc:
                logger.warning("%s: cannot write: %s: peers that went back may not be recognised", self._path, exc.strerror)


def _load(path: Path) -> dict[StoreId, SeenBoot]:
    try:
        rows = json.loads(path.read_text())
        found = [
            SeenBoot(NodeId(peer), StoreId(bytes.fromhex(store)), Boot(counter, nonce), bytes.fromhex(digest))
            for store, peer, counter, nonce, digest in rows
        ]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as exc:
        raise StorageError(f"{path}: damaged ({exc!r}): remove it") from exc
    return {seen.store: seen for seen in found}
