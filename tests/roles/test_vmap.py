"""What vpxa sees of the records is never half a state."""

from __future__ import annotations

from pathlib import Path

import trio
import trio.testing

from ha_core.ids import HostName, VmName
from ha_core.machines.aam import RecordsChanged
from ha_core.machines.failover.host_agent import GuardReports, HostAgent, RecordsSeen, StartVm, StopVm
from ha_core.machines.failover.records import PREFIX
from ha_core.roles.aam_service import PIECE_BYTES, pieces
from ha_core.roles.rundir import AAM_SOCKET
from ha_core.roles.vmap import Vmap
from ha_core.runtime.rpc import Call, serve_unix
from tests.machines.failover.support import Log


def assigned() -> Log:
    """A VM that is assigned to h1 and does not run yet, and enough others behind its run to fill several frames."""
    log = Log(hosts=1)
    log.add_vm("vm", options=(("argv", ("x" * PIECE_BYTES,)),))
    log.assign("vm", "h1")
    return log


async def seen_over_the_socket(run_dir: Path, change: RecordsChanged) -> list[RecordsSeen]:
    seen: list[RecordsSeen] = []
    everything = trio.Event()

    def see(one: RecordsSeen) -> None:
        seen.append(one)
        if sum(len(one.changes) for one in seen) == len(change.changes):
            everything.set()

    async def serve(call: Call) -> object:
        for item in pieces(change):
            await call.send(item)
            await trio.testing.wait_all_tasks_blocked()
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        await nursery.start(serve_unix, run_dir / AAM_SOCKET, serve)
        nursery.start_soon(Vmap(run_dir, see).run)
        with trio.fail_after(5):
            await everything.wait()
        nursery.cancel_scope.cancel()
    return seen


async def test_a_whole_state_that_comes_in_pieces_is_seen_at_once(tmp_path: Path) -> None:
    """Of a run whose VM has not come yet, the host agent would say that it cannot be started."""
    log = assigned()
    change = RecordsChanged(log.index, log.range(PREFIX), restored=True)
    assert len(list(pieces(change))) > 1

    seen = await seen_over_the_socket(tmp_path, change)

    agent = HostAgent(HostName("h1"))
    agent.receive([GuardReports([], complete=True)], 0)
    asked: list[object] = []
    for one in seen:
        agent.receive([one], 0)
        asked += [effect for effect in agent.take_effects() if isinstance(effect, StartVm | StopVm)]
    assert [type(effect) for effect in asked] == [StartVm]
    assert [(one.index, one.restored) for one in seen] == [(log.index, True)]
    assert VmName("vm") in agent.inventory.vms
