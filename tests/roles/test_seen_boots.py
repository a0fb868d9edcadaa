"""An aam remembers whom it saw."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from ha_core.errors import StorageError
from ha_core.ids import Boot, NodeId, SessionId, StoreId
from ha_core.machines.handshake import SeenBoot
from ha_core.machines.messages import SessionUp
from ha_core.roles.seen_boots import FILE_NAME, SeenBoots

PEER, STORE = NodeId("aam@h2.example"), StoreId(bytes(range(16)))


def session(counter: int) -> SessionUp:
    return SessionUp(PEER, SessionId(b"s"), STORE, Boot(counter, (1 << 64) - 1), b"digest")


async def test_the_newest_boot_of_a_peer_is_there_after_a_restart(tmp_path: Path) -> None:
    seen = SeenBoots(tmp_path)
    assert seen.known == []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(seen.run)
        for counter in (1, 2):
            seen.note(session(counter))
        with trio.fail_after(2):
            while not (tmp_path / FILE_NAME).exists():
                await trio.sleep(0.001)
        nursery.cancel_scope.cancel()

    assert SeenBoots(tmp_path).known == [SeenBoot(PEER, STORE, Boot(2, (1 << 64) - 1), b"digest")]


def test_a_damaged_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("[[1, 2]]")

    with pytest.raises(StorageError, match=r"seen\.json: damaged"):
        SeenBoots(tmp_path)
