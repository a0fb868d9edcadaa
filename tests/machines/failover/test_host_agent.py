from __future__ import annotations

from collections.abc import Sequence

import pytest

from ha_core.ids import FencingToken, HostName, VmName
from ha_core.machines.contract import Effect, Event
from ha_core.machines.failover import commands as c
from ha_core.machines.failover.host_agent import (
    REPEAT_NS,
    RETRY_NS,
    GuardLost,
    GuardReport,
    GuardReports,
    HostAgent,
    ProposalDone,
    Propose,
    RecordsSeen,
    StartRefused,
    StartVm,
    StopVm,
)
from ha_core.machines.failover.records import RunState, Wanted
from tests.machines.failover.support import SECOND, Log


class Host:
    """The agent of h1, fed with the whole log after each change."""

    def __init__(self) -> None:
        self.log = Log(hosts=2)
        self.agent = HostAgent(HostName("h1"))
        self.now_ns = 0

    def tell(self, *events: Event) -> Sequence[Effect]:
        self.agent.receive(events, self.now_ns)
        return self.agent.take_effects()

    def see(self) -> Sequence[Effect]:
        return self.tell(RecordsSeen(self.log.index, list(self.log.keys.items()), restored=True))

    def guard(self, *reports: GuardReport, complete: bool = True) -> Sequence[Effect]:
        return self.tell(GuardReports(reports, complete))

    def wait(self, delay_ns: int) -> Sequence[Effect]:
        self.now_ns += delay_ns
        self.agent.handle_timer(self.now_ns)
        return self.agent.take_effects()

    def report(self, state: str, event: int = 1, token: int = 0, text: str = "") -> GuardReport:
        known = FencingToken(token) if token else self.log.runs("vm").token
        return GuardReport(VmName("vm"), known, state, event, b"i" * 16, None, text)


def commands(effects: Sequence[Effect]) -> list[object]:
    return [effect.command for effect in effects if isinstance(effect, Propose)]


def test_a_committed_assignment_is_started_once_the_guards_list_is_known() -> None:
    host = Host()
    host.log.add_vm("vm", shutdown_ns=5)
    token = host.log.assign("vm", "h1")

    assert host.see() == []
    (start,) = host.guard()
    assert isinstance(start, StartVm)
    assert (start.token, start.lease, start.shutdown_ns) == (token, host.log.token("h1"), 5)
    assert host.see() == []


def test_an_assignment_to_another_host_is_nobodys_business_here() -> None:
    host = Host()
    host.log.add_vm("vm")
    host.log.assign("vm", "h2")

    assert host.see() == []
    assert host.guard() == []


def test_an_assignment_under_another_lease_than_the_hosts_is_not_started() -> None:
    """H24: the view says itself that the lease is gone."""
    host = Host()
    host.log.add_vm("vm")
    host.log.assign("vm", "h1")
    host.log.revoke("h1")
    host.log.grant("h1")

    assert host.see() == []
    assert host.guard() == []


def test_starting_is_reported_once_the_vm_executes_and_running_after_its_start_time() -> None:
    host = Host()
    host.log.add_vm("vm", start_ns=SECOND)
    host.log.assign("vm", "h1")
    host.see()
    host.guard()

    assert commands(host.guard(host.report("starting", 6), complete=False)) == []
    (first,) = commands(host.guard(host.report("running", 7), complete=False))
    assert isinstance(first, c.ReportVm)
    assert (first.state, first.event) == (RunState.STARTING, 7)
    host.log.done(first)
    host.tell(ProposalDone(1, True))
    assert commands(host.see()) == []
    assert commands(host.wait(SECOND - 1)) == []
    (second,) = commands(host.wait(1))
    assert isinstance(second, c.ReportVm)
    assert second.state is RunState.RUNNING
    host.log.done(second)


@pytest.mark.parametrize("state", ["stopped", "failed"])
def test_only_the_guards_word_releases(state: str) -> None:
    host = Host()
    host.log.add_vm("vm")
    host.log.assign("vm", "h1")
    host.see()

    (released,) = commands(host.guard(host.report(state, 9, text="exit 3")))

    assert isinstance(released, c.Released)
    assert (released.failed, released.event, released.text) == (state == "failed", 9, "exit 3")


def test_a_recalled_run_is_stopped_within_its_time() -> None:
    host = Host()
    host.log.start("vm", "h1", shutdown_ns=7)
    host.log.done(c.WantVm(VmName("vm"), Wanted.STOPPED))
    host.see()

    (stop,) = host.guard(host.report("running", 3))

    assert isinstance(stop, StopVm)
    assert stop.grace_ns == 7
    assert [type(effect) for effect in host.guard(host.report("stopping", 4), complete=False)] == [Propose]


@pytest.mark.parametrize(("stop_ns", "grace_ns"), [(-1, 7), (0, 0), (90, 90)])
def test_an_ordered_stop_may_take_another_time_than_the_one_at_the_deadline(stop_ns: int, grace_ns: int) -> None:
    """Found by a scenario: what a move may take for an orderly shutdown made every failover wait as long."""
    host = Host()
    host.log.add_vm("vm", shutdown_ns=7, stop_ns=stop_ns)
    token = host.log.assign("vm", "h1")
    host.see()
    host.guard(host.report("running"))
    host.log.done(c.Recall(VmName("vm"), FencingToken(token), "a move", "h2"))

    stop = next(effect for effect in host.see() if isinstance(effect, StopVm))

    assert stop.grace_ns == grace_ns


def test_a_recalled_run_that_never_began_is_declined() -> None:
    host = Host()
    host.log.add_vm("vm", shutdown_ns=7)
    token = host.log.assign("vm", "h1")
    host.log.done(c.WantVm(VmName("vm"), Wanted.STOPPED))
    host.see()

    (decline,) = host.guard()

    assert isinstance(decline, StopVm)
    assert (decline.token, decline.grace_ns) == (token, 7)


def test_a_refused_start_is_tried_again_soon_or_given_up_with_its_reason() -> None:
    host = Host()
    host.log.add_vm("vm")
    token = FencingToken(host.log.assign("vm", "h1"))
    host.see()
    host.guard()

    assert host.tell(StartRefused(VmName("vm"), token, "other-lease", "not yet")) == []
    (again,) = host.wait(RETRY_NS)
    assert isinstance(again, StartVm)
    (stop,) = host.tell(StartRefused(VmName("vm"), token, "driver", "no such image"))
    assert isinstance(stop, StopVm)
    (released,) = commands(host.guard(host.report("stopped", 4), complete=False))
    assert isinstance(released, c.Released)
    assert (released.failed, released.text) == (True, "no such image")


def test_after_a_restart_everything_is_seen_anew_and_nothing_is_disturbed() -> None:
    """H3, H25."""
    host = Host()
    host.log.start("vm", "h1")
    host.agent = HostAgent(HostName("h1"))

    assert host.see() == []
    assert host.guard(host.report("running", 5)) == []


def test_a_run_that_the_records_left_behind_is_ended() -> None:
    host = Host()
    host.log.start("vm", "h1")
    old = host.log.runs("vm").token
    host.log.revoke("h1")
    host.log.assign("vm", "h2")
    host.see()

    (stop,) = host.guard(host.report("running", 5, token=old))

    assert isinstance(stop, StopVm)
    assert stop.token == old


def test_a_view_that_lags_behind_the_guard_does_nothing() -> None:
    host = Host()
    host.log.start("vm", "h1")
    host.see()

    assert host.guard(host.report("running", 5, token=host.log.index + 50)) == []


def test_a_run_that_a_new_guard_holds_again_is_reported_running() -> None:
    host = Host()
    host.log.start("vm", "h1")
    host.log.report("vm", RunState.STOPPING)
    host.see()
    event = host.log.runs("vm").event + 1

    assert commands(host.guard(host.report("running", event - 1))) == []
    host.guard(host.report("running", event), complete=False)
    (resumed,) = commands(host.wait(SECOND))
    assert isinstance(resumed, c.ReportVm)
    assert resumed.state is RunState.RUNNING


def test_a_lost_guard_is_asked_nothing_until_its_list_comes() -> None:
    host = Host()
    host.log.add_vm("vm")
    host.see()
    host.guard()
    host.tell(GuardLost())
    host.log.assign("vm", "h1")

    assert host.see() == []
    assert [type(effect) for effect in host.guard()] == [StartVm]


def test_a_proposal_whose_fate_is_open_is_made_again() -> None:
    host = Host()
    host.log.add_vm("vm")
    host.log.assign("vm", "h1")
    host.see()
    (effect,) = host.guard(host.report("failed", 4))
    assert isinstance(effect, Propose)

    assert host.tell(ProposalDone(effect.number, False)) == []
    assert commands(host.wait(RETRY_NS)) == [effect.command]


def test_a_silent_guard_is_asked_again() -> None:
    host = Host()
    host.log.add_vm("vm")
    host.log.assign("vm", "h1")
    host.see()
    host.guard()

    assert [type(effect) for effect in host.wait(REPEAT_NS)] == [StartVm]
