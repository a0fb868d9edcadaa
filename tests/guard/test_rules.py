from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import pytest

from ha_core.guard.control import Reply, StartRequest, StopRequest
from ha_core.guard.events import (
    NEVER,
    Answered,
    Asked,
    Effect,
    EndAsked,
    Ended,
    Event,
    ForgetRun,
    KeepTombstone,
    KillRun,
    Noted,
    Rejoined,
    Replied,
    Reported,
    RunFound,
    RunGone,
    RunState,
    RunUp,
    SendRenewal,
    StartRun,
    StopRun,
    WriteRun,
)
from ha_core.guard.renewal import Renewal, RenewalAnswer, Status
from ha_core.guard.rules import GuardRules

T = TypeVar("T")
MS = 1_000_000
S = 1_000 * MS
INSTANCE = b"i" * 16
L, M = 2 * S, 300 * MS


class Host:
    """The rules with a clock of their own, and short words for what a story needs."""

    def __init__(self, *, fresh: bool = False, start_ns: int = 100 * S) -> None:
        self.now = start_ns
        self.rules = GuardRules(
            host="h1", boot_id=b"b" * 16, instance=INSTANCE, renewal_ns=150 * MS, now_ns=start_ns, fresh=fresh
        )
        self.number = 0

    def tell(self, *events: Event) -> Sequence[Effect]:
        self.rules.receive(events, self.now)
        self.rules.check()
        return self.rules.take_effects()

    def wait(self, ns: int) -> Sequence[Effect]:
        """Let time pass, firing each timer at its instant."""
        effects: list[Effect] = []
        until = self.now + ns
        while (timer := self.rules.next_timer()) is not None and timer <= until:
            self.now = max(self.now, timer)
            self.rules.handle_timer(self.now)
            self.rules.check()
            effects += self.rules.take_effects()
        self.now = until
        return effects

    def renewal(self) -> Renewal:
        """The next renewal, at its time."""
        timer = self.rules.next_timer()
        assert timer is not None
        for effect in self.wait(max(0, timer - self.now)):
            if isinstance(effect, SendRenewal):
                return effect.renewal
        return self.renewal()

    def answer(
        self, renewal: Renewal, token: int, *, continued: int = 0, status: Status = Status.CONFIRMED, armed: bool = True,
        lease_ns: int = L, margin_ns: int = M, instance: bytes = INSTANCE,
    ) -> Sequence[Effect]:  # fmt: skip
        answer = RenewalAnswer(instance, renewal.number, status, token, lease_ns, margin_ns, continued or token, armed)
        return self.tell(Answered(answer))

    def granted(self, token: int = 7, *, continued: int = 0) -> Host:
        self.answer(self.renewal(), token, continued=continued)
        assert self.rules.lease_token == token
        return self

    def start(self, vm: str, token: int, *, lease: int | None = None, shutdown_s: float = 0.0) -> Reply:
        held = self.rules.lease_token if lease is None else lease
        self.effects = self.tell(Asked(1, StartRequest(vm, held, token, ("true",), shutdown_s=shutdown_s)))
        return only(self.effects, Replied).reply

    def stop(self, vm: str, token: int, shutdown_s: float = 0.0) -> Reply:
        self.effects = self.tell(Asked(2, StopRequest(vm, token, shutdown_s)))
        return only(self.effects, Replied).reply

    def running(self, vm: str, token: int, *, shutdown_s: float = 0.0) -> Host:
        assert not self.start(vm, token, shutdown_s=shutdown_s).error
        self.tell(RunUp(vm, token))
        return self

    def found(self, vm: str, token: int, lease: int, deadline_ns: int, state: RunState = RunState.RUNNING) -> Host:
        self.tell(RunFound(vm, token, lease, deadline_ns, 0, 0, state))
        return self


def of(effects: Sequence[Effect], kind: type[T]) -> list[T]:
    return [effect for effect in effects if isinstance(effect, kind)]


def only(effects: Sequence[Effect], kind: type[T]) -> T:
    (effect,) = of(effects, kind)
    return effect


# -- the lease --


def test_a_guard_without_a_lease_asks_for_a_grant_at_once_and_each_interval() -> None:
    host = Host()

    sent = of(host.wait(450 * MS), SendRenewal)

    assert [item.renewal.lease_token for item in sent] == [0, 0, 0, 0]
    assert [item.renewal.number for item in sent] == [1, 2, 3, 4]


def test_deadline_counts_from_the_renewals_creation_not_from_the_answer() -> None:
    """L4, R38."""
    host = Host()
    renewal = host.renewal()
    host.now += 140 * MS

    host.answer(renewal, 7)

    assert host.rules.deadline_ns == renewal.created_ns + L - M


def test_each_confirmation_moves_the_deadline_of_every_run_of_the_lease() -> None:
    host = Host().granted().running("a", 11).running("b", 12, shutdown_s=2.0)
    renewal = host.renewal()

    written = of(host.answer(renewal, 7), WriteRun)

    end = renewal.created_ns + L - M
    assert {(item.vm, item.deadline_ns) for item in written} == {("a", end), ("b", end + 2 * S)}


def test_answers_that_come_out_of_order_never_move_a_deadline_back() -> None:
    host = Host().granted()
    first, second = host.renewal(), host.renewal()
    host.answer(second, 7)

    assert not of(host.answer(first, 7), WriteRun)
    assert host.rules.deadline_ns == second.created_ns + L - M


def test_an_answer_counts_once_although_it_comes_on_every_path() -> None:
    host = Host().granted().running("a", 11)
    renewal = host.renewal()

    assert of(host.answer(renewal, 7), WriteRun)
    assert not host.answer(renewal, 7)


def test_an_answer_to_a_number_that_was_never_sent_is_ignored() -> None:
    host = Host()
    renewal = host.renewal()

    host.answer(Renewal(renewal.host, renewal.boot_id, INSTANCE, 0, 99, renewal.created_ns), 7)

    assert host.rules.lease_token == 0


def test_an_answer_to_an_earlier_guard_is_ignored() -> None:
    host = Host()

    host.answer(host.renewal(), 7, instance=b"o" * 16)

    assert host.rules.lease_token == 0


def test_an_answer_that_comes_after_its_own_deadline_is_ignored() -> None:
    host = Host()
    renewal = host.renewal()
    host.now += L - M

    host.answer(renewal, 7)

    assert host.rules.lease_token == 0


def test_an_expired_lease_is_not_renewed_but_asked_for_anew() -> None:
    """L5."""
    host = Host().granted()

    sent = of(host.wait(L), SendRenewal)

    expired = [item.renewal.lease_token for item in sent].index(0)
    assert all(item.renewal.lease_token == 7 for item in sent[:expired])
    assert all(item.renewal.lease_token == 0 for item in sent[expired:])
    assert host.rules.lease_token == 0


def test_an_answer_to_a_renewal_from_before_the_expiry_does_not_revive_the_lease() -> None:
    host = Host().granted()
    late = host.renewal()
    host.wait(L - M)

    host.answer(late, 7)

    assert host.rules.lease_token == 0


def test_the_host_asks_at_the_very_instant_of_expiry() -> None:
    host = Host().granted()
    deadline = host.rules.deadline_ns

    sent = of(host.wait(deadline - host.now), SendRenewal)

    assert sent[-1].renewal.created_ns == deadline
    assert sent[-1].renewal.lease_token == 0


def test_another_cluster_is_asked_for_a_grant_at_once_whatever_its_tokens() -> None:
    host = Host().granted(70)

    host.tell(Rejoined())

    assert host.rules.next_timer() == host.now
    assert host.renewal().lease_token == 0
    assert host.granted(3).rules.holds_lease(host.now)


def test_what_a_left_cluster_ran_dies_at_its_deadline_and_is_never_extended() -> None:
    host = Host().granted(70).running("web", 900)
    deadline_ns = host.rules.runs["web"].deadline_ns

    effects = host.tell(Rejoined())
    host.granted(80)

    assert not of(effects, KillRun)
    assert host.rules.runs["web"].deadline_ns == deadline_ns
    assert host.start("web", 901).error == "not-reaped"


def test_what_was_reaped_in_a_left_cluster_stands_in_nobodys_way() -> None:
    host = Host().granted(70).running("web", 900)
    host.tell(RunGone("web", 900, 0, "ended"))
    assert host.start("web", 20).error == "stale-token"

    effects = host.tell(Rejoined())

    assert of(effects, ForgetRun) == [ForgetRun("web")]
    assert not host.granted(3).start("web", 20).error


def test_an_answer_of_the_left_cluster_gives_no_lease_in_the_new_one() -> None:
    host = Host()
    asked = host.renewal()
    host.tell(Rejoined())

    host.answer(asked, 70)

    assert host.rules.lease_token == 0


def test_changed_terms_under_one_token_are_ignored() -> None:
    """H31."""
    host = Host().granted()
    deadline = host.rules.deadline_ns

    effects = host.answer(host.renewal(), 7, lease_ns=10 * S)

    assert host.rules.deadline_ns == deadline
    assert of(effects, Noted)


def test_a_newer_grant_that_continues_the_lease_takes_its_runs_over() -> None:
    host = Host().granted().running("a", 11)
    renewal = host.renewal()

    written = only(host.answer(renewal, 20, continued=7, lease_ns=4 * S), WriteRun)

    assert (written.lease_token, written.deadline_ns) == (20, renewal.created_ns + 4 * S - M)
    assert written.poll_ns == (4 * S - M) // 6


def test_an_older_token_never_replaces_a_newer_one() -> None:
    host = Host().granted(20)

    host.answer(host.renewal(), 7)

    assert host.rules.lease_token == 20


def test_a_revoked_lease_kills_its_runs_and_asks_for_a_new_one_at_once() -> None:
    host = Host().granted().running("a", 11)

    effects = host.answer(host.renewal(), 7, status=Status.REVOKED)

    assert only(effects, KillRun).vm == "a"
    assert host.renewal().lease_token == 0


def test_a_revocation_of_another_token_changes_nothing() -> None:
    host = Host().granted(20).running("a", 21)

    assert not of(host.answer(host.renewal(), 7, status=Status.REVOKED), KillRun)
    assert host.rules.lease_token == 20


def test_a_late_revocation_of_the_token_before_does_not_hit_the_new_one() -> None:
    host = Host().granted(7).running("a", 11)
    old = host.renewal()
    host.answer(host.renewal(), 20, continued=7)

    assert not of(host.answer(old, 7, status=Status.REVOKED), KillRun)
    assert host.rules.lease_token == 20


def test_a_refused_host_keeps_what_it_has_until_the_deadline() -> None:
    host = Host().granted().running("a", 11)
    deadline = host.rules.deadline_ns

    effects = host.answer(host.renewal(), 7, status=Status.REFUSED)

    assert not of(effects, KillRun)
    assert host.rules.deadline_ns == deadline


def test_a_disarmed_lease_writes_no_deadline_and_an_armed_one_gives_it_back() -> None:
    host = Host().granted().running("a", 11)

    disarmed = only(host.answer(host.renewal(), 20, continued=7, armed=False), WriteRun)
    assert disarmed.deadline_ns == NEVER
    host.wait(100 * S)
    assert host.rules.lease_token == 20

    renewal = host.renewal()
    armed = only(host.answer(renewal, 30, continued=7), WriteRun)
    assert armed.deadline_ns == renewal.created_ns + L - M


def test_the_next_timer_is_the_deadline_if_that_comes_first() -> None:
    host = Host().granted()
    host.wait(L - M - 10 * MS - (host.now - (host.rules.deadline_ns - (L - M))))

    assert host.rules.next_timer() == host.rules.deadline_ns


# -- adoption --


def test_a_new_guard_extends_nothing_before_its_first_answer() -> None:
    """H29."""
    host = Host().found("a", 11, 7, 101 * S)

    assert not of(host.wait(500 * MS), WriteRun)


def test_a_new_guard_extends_what_its_grant_continues() -> None:
    host = Host().found("a", 11, 7, 101 * S)
    renewal = host.renewal()

    written = only(host.answer(renewal, 20, continued=7), WriteRun)

    assert (written.vm, written.lease_token, written.deadline_ns) == ("a", 20, renewal.created_ns + L - M)


def test_a_chain_of_guards_none_of_which_got_an_answer_is_continued_by_the_last() -> None:
    host = Host().found("a", 11, 7, 101 * S).found("b", 12, 20, 101 * S)

    written = of(host.answer(host.renewal(), 30, continued=7), WriteRun)

    assert {item.vm for item in written} == {"a", "b"}


def test_a_grant_that_continues_nothing_ends_the_runs_of_the_lease_before() -> None:
    """H23, H24: a revoked lease's runs may be on their way elsewhere."""
    host = Host().found("a", 11, 7, NEVER)

    effects = host.answer(host.renewal(), 20)

    assert only(effects, KillRun).vm == "a"
    assert not of(effects, WriteRun)


def test_a_run_lost_with_its_lease_is_never_extended_again() -> None:
    host = Host().granted().running("a", 11, shutdown_s=5.0)
    host.wait(L)

    effects = host.answer(host.renewal(), 7)

    assert host.rules.lease_token == 7
    assert not of(effects, WriteRun)


def test_only_the_run_with_the_highest_token_is_kept() -> None:
    host = Host().found("a", 12, 7, 101 * S).found("a", 11, 7, 101 * S, RunState.STOPPED)

    assert [(run.vm, run.token) for run in host.rules.reports()] == [("a", 12)]


def test_a_run_found_on_its_way_down_stays_on_it() -> None:
    host = Host()
    host.tell(RunFound("a", 11, 7, 101 * S, 0, 100 * S + 500 * MS, RunState.RUNNING))

    assert host.rules.reports()[0].state == "stopping"


def test_on_a_fresh_run_directory_a_continued_lease_means_runs_that_nobody_sees() -> None:
    host = Host(fresh=True)
    assert host.stop("a", 11).error == "not-reaped"
    host.granted(20, continued=7)

    assert host.start("a", 21).error == "not-reaped"
    assert host.stop("b", 22).error == "not-reaped"

    host.answer(host.renewal(), 20, continued=7)
    host.wait(L - 200 * MS)
    host.granted(20, continued=7)
    host.wait(200 * MS)
    assert not host.start("a", 21).error


def test_runs_that_nobody_sees_are_given_their_shutdown_time_too() -> None:
    """I42: their deadline is that much later, and so is the end of the promise that they are gone."""
    host = Host(fresh=True).granted(20, continued=7)
    for _ in range(20):
        host.answer(host.renewal(), 20, continued=7)

    assert host.stop("a", 11, shutdown_s=5.0).error == "not-reaped"
    assert host.start("b", 22, shutdown_s=5.0).error == "not-reaped"
    assert not host.stop("c", 12).error
    for _ in range(40):
        host.answer(host.renewal(), 20, continued=7)
    assert not host.stop("a", 11, shutdown_s=5.0).error


def test_on_a_fresh_run_directory_a_first_lease_is_used_at_once() -> None:
    assert not Host(fresh=True).granted(7).start("a", 11).error


# -- start --


def test_start_gives_the_run_the_deadline_of_the_lease_and_its_shutdown_time() -> None:
    host = Host().granted()

    host.start("a", 11, shutdown_s=3.0)

    started = only(host.effects, StartRun)
    assert (started.deadline_ns, started.shutdown_ns) == (host.rules.deadline_ns + 3 * S, 3 * S)
    assert started.poll_ns == (L - M) // 6


def test_start_is_idempotent_whatever_became_of_the_run() -> None:
    host = Host().granted()
    host.start("a", 11)
    for event, state in (
        (RunUp("a", 11), "running"),
        (RunGone("a", 11, 0, "ended with status 0"), "stopped"),
    ):
        host.tell(event)
        reply = host.start("a", 11)
        assert reply.run is not None
        assert reply.run.state == state
        assert not of(host.effects, StartRun)


def test_start_below_a_known_token_is_refused_with_the_token_known() -> None:
    """I44, L7."""
    host = Host().granted().running("a", 12)

    reply = host.start("a", 11)

    assert (reply.error, reply.current) == ("stale-token", 12)
    assert not of(host.effects, StartRun)


def test_start_below_the_token_of_a_reaped_run_is_refused() -> None:
    host = Host().granted().running("a", 12)
    host.tell(RunGone("a", 12, 0, ""))

    assert host.start("a", 11).error == "stale-token"


def test_start_while_the_older_run_is_not_reaped_is_refused() -> None:
    """H30, L7."""
    host = Host().granted().running("a", 11)
    host.stop("a", 11, 5.0)

    assert host.start("a", 12).error == "not-reaped"

    host.tell(RunGone("a", 11, -15, ""))
    assert not host.start("a", 12).error


@pytest.mark.parametrize("lease", [6, 8])
def test_start_under_another_lease_token_is_refused(lease: int) -> None:
    """H24: an assignment that has since moved names a lease that this host no longer holds."""
    host = Host().granted(7)

    reply = host.start("a", 11, lease=lease)

    assert (reply.error, reply.current) == ("other-lease", 7)


def test_start_without_a_lease_or_at_its_deadline_is_refused() -> None:
    host = Host()
    assert host.start("a", 11, lease=7).error == "no-lease"

    host.granted(7)
    host.now = host.rules.deadline_ns
    assert host.start("a", 11, lease=7).error == "no-lease"


def test_start_under_the_old_token_after_a_continuing_grant_is_refused_until_asked_anew() -> None:
    host = Host().granted(7)
    host.answer(host.renewal(), 20, continued=7)

    assert host.start("a", 11, lease=7).error == "other-lease"
    assert not host.start("a", 11, lease=20).error


def test_a_run_that_could_not_be_started_is_failed_and_its_token_used_up() -> None:
    host = Host().granted()
    host.start("a", 11)

    effects = host.tell(RunGone("a", 11, 127, "cannot be run: No such file", started=False))

    assert only(effects, Reported).report.state == "failed"
    host.start("a", 11)
    assert not of(host.effects, StartRun)
    assert not host.start("a", 12).error


# -- stop and evidence --


def test_stop_asks_the_shim_to_end_the_run_within_its_time() -> None:
    host = Host().granted().running("a", 11)

    reply = host.stop("a", 11, 2.0)

    assert only(host.effects, StopRun).stop_by_ns == host.now + 2 * S
    assert reply.run is not None
    assert reply.run.state == "stopping"


def test_a_second_stop_may_shorten_the_time_but_never_lengthen_it() -> None:
    host = Host().granted().running("a", 11)
    host.stop("a", 11, 2.0)

    host.stop("a", 11, 5.0)
    assert not of(host.effects, StopRun)
    host.stop("a", 11, 0.0)
    assert only(host.effects, StopRun).stop_by_ns == host.now


def test_a_stopping_run_still_gets_its_lease_renewed() -> None:
    host = Host().granted().running("a", 11)
    host.stop("a", 11, 60.0)

    assert only(host.answer(host.renewal(), 7), WriteRun).vm == "a"


def test_stop_of_a_token_that_never_ran_promises_that_it_never_will() -> None:
    """The evidence for Released."""
    host = Host().granted()

    reply = host.stop("a", 11)

    assert only(host.effects, KeepTombstone).token == 11
    assert reply.run is not None
    assert reply.run.state == "stopped"
    host.start("a", 11)
    assert not of(host.effects, StartRun)


def test_stop_of_a_token_that_was_replaced_is_evidence_too() -> None:
    host = Host().granted().running("a", 11)
    host.tell(RunGone("a", 11, 0, ""))
    host.running("a", 12)

    reply = host.stop("a", 11)

    assert reply.run is not None
    assert (reply.run.token, reply.run.state) == (11, "stopped")
    assert not of(host.effects, StopRun)


def test_stop_of_a_newer_token_waits_for_the_older_run() -> None:
    host = Host().granted().running("a", 11)

    assert host.stop("a", 12).error == "not-reaped"


def test_stop_needs_no_lease() -> None:
    host = Host().found("a", 11, 7, 101 * S)

    assert not host.stop("a", 11, 1.0).error


def test_a_gone_run_is_reported_once() -> None:
    host = Host().granted().running("a", 11)

    assert len(of(host.tell(RunGone("a", 11, 3, "ended with status 3")), Reported)) == 1
    assert not host.tell(RunGone("a", 11, 3, "again"))
    assert host.rules.reports()[0].exit_code == 3


def test_events_of_a_run_that_was_replaced_are_dropped() -> None:
    host = Host().granted().running("a", 11)
    host.tell(RunGone("a", 11, 0, ""))
    host.start("a", 12)

    assert not host.tell(RunGone("a", 11, 1, "late"), RunUp("a", 11))
    assert host.rules.reports()[0].state == "starting"


def test_event_numbers_rise_also_across_guards_of_one_boot() -> None:
    host = Host().granted().running("a", 11)
    first = host.rules.reports()[0].event
    later = Host(start_ns=host.now + 20 * MS).found("a", 11, 7, 101 * S)

    assert later.rules.reports()[0].event > first
    later.stop("a", 11, 1.0)
    assert later.rules.reports()[0].event > first


def test_expiry_reports_the_runs_as_stopping_with_the_reason() -> None:
    host = Host().granted().running("a", 11)

    reports = of(host.wait(L), Reported)

    assert [(item.report.state, item.report.text) for item in reports] == [("stopping", "lease expired")]
    gone = only(host.tell(RunGone("a", 11, -9, "killed at its deadline")), Reported).report
    assert (gone.state, gone.text) == ("stopped", "lease expired; killed at its deadline")


# -- the end --


def test_the_orderly_end_stops_the_vms_and_waits_for_them() -> None:
    host = Host().granted().running("a", 11, shutdown_s=2.0)

    effects = host.tell(EndAsked(True))

    assert only(effects, StopRun).stop_by_ns == host.now + 2 * S
    assert not of(effects, Ended)
    assert host.start("b", 12).error == "ending"
    assert of(host.tell(RunGone("a", 11, -15, "")), Ended)


def test_the_end_without_stopping_leaves_the_vms_to_their_deadline() -> None:
    host = Host().granted().running("a", 11)

    effects = host.tell(EndAsked(False))

    assert of(effects, Ended)
    assert not of(effects, StopRun)


def test_a_second_end_does_not_wait_for_the_vms() -> None:
    host = Host().granted().running("a", 11, shutdown_s=60.0)
    host.tell(EndAsked(True))

    assert of(host.tell(EndAsked(False)), Ended)
    assert not of(host.tell(RunGone("a", 11, 0, "")), Ended)


def test_an_end_with_nothing_running_is_immediate() -> None:
    assert of(Host().tell(EndAsked(True)), Ended)
