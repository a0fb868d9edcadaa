"""Disarming and arming as a guard lives through them: the real rules of the guard against the real lease server."""

from __future__ import annotations

from ha_core.guard import events as guard_events
from ha_core.guard import rules
from ha_core.guard.control import StartRequest
from ha_core.guard.renewal import RenewalAnswer, Status
from ha_core.machines.failover import commands as c
from ha_core.machines.failover.records import Mode, Settings
from tests.machines.failover.support import SECOND
from tests.machines.failover.test_leases import LEASE_NS, RENEWAL_NS, Office


class Pair:
    """An office and the guard of h1, on one clock; a VM runs on h1."""

    def __init__(self) -> None:
        self.office = Office()
        self.guard = rules.GuardRules(
            host="h1", boot_id=bytes([1]) * 16, instance=bytes([1]) * 16, renewal_ns=RENEWAL_NS, now_ns=self.now_ns
        )
        self.performed: list[guard_events.Effect] = []
        self.turn()
        self.office.log.start("vm", "h1")
        token = self.office.log.runs("vm").token
        self._receive(guard_events.Asked(1, StartRequest("vm", self.guard.lease_token, token, ("true",))))
        self._receive(guard_events.RunUp("vm", token))

    @property
    def now_ns(self) -> int:
        return self.office.now_ns

    @property
    def run(self) -> guard_events.Run:
        return self.guard.runs["vm"]

    @property
    def killed(self) -> bool:
        return any(isinstance(effect, guard_events.KillRun) for effect in self.performed)

    def _receive(self, event: guard_events.Event) -> list[guard_events.Effect]:
        self.guard.receive([event], self.now_ns)
        return self._take()

    def _take(self) -> list[guard_events.Effect]:
        effects = self.guard.take_effects()
        self.performed += effects
        self.guard.check()
        return effects

    def ask(self) -> list[RenewalAnswer]:
        """The guard's next renewal reaches the office, whose answers are still on their way."""
        self.guard.handle_timer(self.now_ns)
        answers: list[RenewalAnswer] = []
        for effect in self._take():
            if isinstance(effect, guard_events.SendRenewal):
                self.office.server.receive(effect.renewal, ("h1", "a"), self.now_ns)
                answers += self.office.prove(self.office.run())
        return answers

    def turn(self, count: int = 1) -> None:
        """Renewals with their answers, ``count`` intervals of them."""
        for _ in range(count):
            self.office.wait(RENEWAL_NS / SECOND)
            for answer in self.ask():
                self._receive(guard_events.Answered(answer))

    def order(self, mode: Mode) -> None:
        self.office.log.done(c.SetSettings.of(Settings(mode=mode)))
        self.office.server.applied(self.now_ns)


def test_a_cluster_that_is_disarmed_keeps_its_vms() -> None:
    pair = Pair()

    pair.order(Mode.DISARMED)
    pair.turn(40)

    assert not pair.guard.armed
    assert (pair.run.state, pair.run.lost) == (guard_events.RunState.RUNNING, False)
    assert pair.run.deadline_ns == guard_events.NEVER


def test_a_lease_that_was_disarmed_gets_its_deadline_back_under_a_new_token_only() -> None:
    pair = Pair()
    pair.order(Mode.DISARMED)
    pair.turn(2)

    pair.office.wait(RENEWAL_NS / SECOND)
    pair.ask()
    guard = pair.guard
    pair._receive(
        guard_events.Answered(
            RenewalAnswer(guard.instance, guard.sent, Status.CONFIRMED, guard.lease_token, LEASE_NS, guard.margin_ns)
        )
    )
    assert not guard.armed
    assert pair.run.deadline_ns == guard_events.NEVER

    before = pair.guard.lease_token
    pair.order(Mode.ARMED)
    pair.turn(3)
    assert pair.guard.armed
    assert pair.guard.lease_token > before
    assert pair.run.deadline_ns <= pair.now_ns + LEASE_NS


def test_disarming_again_before_the_guard_has_agreed_to_be_armed_disturbs_no_vm() -> None:
    pair = Pair()
    pair.order(Mode.DISARMED)
    pair.turn(2)
    pair.order(Mode.ARMED)
    pair.turn(2)
    assert pair.guard.armed
    assert pair.office.log.lease("h1").candidate

    pair.order(Mode.DISARMED)
    pair.turn(40)

    assert not pair.killed
    assert (pair.run.state, pair.run.lost) == (guard_events.RunState.RUNNING, False)
    assert not pair.guard.armed


def test_a_host_whose_lease_ran_out_just_before_it_was_disarmed_gets_it_again() -> None:
    pair = Pair()
    pair.office.expire()
    pair.office.server.take_demands()  # the Revoke is lost
    pair.order(Mode.DISARMED)

    pair.turn(10)

    assert pair.guard.holds_lease(pair.now_ns)
