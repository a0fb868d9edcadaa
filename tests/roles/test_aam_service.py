"""What the aam answers fits frames, however many records there are."""

from __future__ import annotations

from typing import cast

import msgpack
import pytest

from ha_core.errors import CompactedError, RemoteProtocolError
from ha_core.ids import VmName
from ha_core.machines.aam import RecordsChanged
from ha_core.machines.database_events import DatabaseOutcome, Range
from ha_core.machines.failover.records import PREFIX, Vm
from ha_core.machines.keyvalue.model import Refusal, Refused
from ha_core.machines.keyvalue.versions import VersionedMap
from ha_core.roles.aam_service import pieces, read_page
from ha_core.runtime.rpc import MAX_FRAME_BYTES, Call

VMS = [Vm(VmName(f"vm{number:04}"), options=(("argv", ("x" * 2000,)),)) for number in range(1000)]
RECORDS = [(Vm.key_of(vm.name), vm.encode()) for vm in VMS]


async def nothing(value: object) -> None:
    pass


class Database:
    def __init__(self) -> None:
        self.map = VersionedMap()
        self.map.commit({key: (value, 0) for key, value in RECORDS})

    async def ask(self, request: Range) -> DatabaseOutcome:
        if request.at and request.at < self.map.compacted:
            return Refused(Refusal.COMPACTED, "it is compacted", self.map.compacted)
        return self.map.range(request.prefix, limit=request.limit, after=request.after, at=request.at)

    async def page(self, **params: object) -> dict[str, object]:
        answer = await read_page(self.ask, Call("records.read", params, nothing))
        assert len(msgpack.packb(answer)) < MAX_FRAME_BYTES
        return answer


async def test_a_thousand_vms_come_in_pages_of_one_revision() -> None:
    database = Database()
    page = await database.page(prefix=Vm.prefix())
    found = cast(list[tuple[bytes, bytes]], page["records"])
    database.map.commit({RECORDS[-1][0]: None})
    pages = 1

    while page["more"]:
        page = await database.page(prefix=Vm.prefix(), after=found[-1][0], at=page["revision"])
        found += cast(list[tuple[bytes, bytes]], page["records"])
        pages += 1

    assert found == RECORDS
    assert pages > 1


async def test_a_revision_that_is_gone_is_said() -> None:
    database = Database()
    database.map.commit({RECORDS[0][0]: None})
    database.map.commit({RECORDS[1][0]: None})
    database.map.compact(2)

    with pytest.raises(CompactedError):
        await database.page(prefix=Vm.prefix(), after=RECORDS[0][0], at=1)


@pytest.mark.parametrize("params", [{}, {"prefix": b"mine/"}, {"prefix": PREFIX, "after": 1}, {"prefix": PREFIX, "at": -1}])
async def test_a_wrong_request_is_refused(params: dict[str, object]) -> None:
    with pytest.raises(RemoteProtocolError, match="expected"):
        await Database().page(**params)


def test_a_whole_state_is_streamed_in_pieces_of_which_the_last_says_so() -> None:
    streamed = list(pieces(RecordsChanged(9, RECORDS, restored=True)))

    assert [more for *_, more in streamed] == [*[True] * (len(streamed) - 1), False]
    assert [pair for _, _, piece, _ in streamed for pair in piece] == RECORDS
    assert len(streamed) > 1
    assert all(len(msgpack.packb(piece)) < MAX_FRAME_BYTES for piece in streamed)


def test_an_empty_state_is_a_piece() -> None:
    assert list(pieces(RecordsChanged(9, [], restored=True))) == [(9, True, [], False)]
