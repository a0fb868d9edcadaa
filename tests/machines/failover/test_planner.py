from __future__ import annotations

from collections.abc import Callable

import attrs
import pytest

from ha_core.ids import HostName, LeaseToken, VmName
from ha_core.machines.failover import commands as c
from ha_core.machines.failover.planner import Plan, plan
from ha_core.machines.failover.records import (
    AdmissionPolicy,
    HostState,
    Mode,
    Priority,
    Rule,
    RuleKind,
    RunState,
    Safety,
    Settings,
    Wanted,
)
from tests.machines.failover.support import SECOND, Log

TIER_NS = 300_000_000


def planned(log: Log, fresh: str = "") -> Plan:
    hosts = fresh.split() if fresh else sorted(log.inventory.hosts)
    return plan(log.inventory, [HostName(host) for host in hosts], TIER_NS, log.now_ns)


def assigned(log: Log, fresh: str = "") -> list[tuple[str, str]]:
    return [(one.vm, one.host) for one in planned(log, fresh).commands if isinstance(one, c.Assign)]


def recalled(log: Log, fresh: str = "") -> list[tuple[str, str]]:
    return [(one.vm, one.target) for one in planned(log, fresh).commands if isinstance(one, c.Recall)]


def waits(log: Log, fresh: str = "") -> dict[str, str]:
    return {one.vm: one.reason for one in planned(log, fresh).waiting}


def carry_out(log: Log, fresh: str = "", rounds: int = 10) -> list[str]:
    """Do what is planned, and what hosts would do, until nothing is planned; the VMs in the order of their starts."""
    started: list[str] = []
    for _ in range(rounds):
        commands = planned(log, fresh).commands
        for command in commands:
            log.done(command)
            if isinstance(command, c.Assign):
                started.append(command.vm)
        for vm, run in sorted(log.inventory.runs.items()):
            if run.held and run.recalled:
                log.release(vm)
            elif run.state is RunState.ASSIGNED:
                log.report(vm)
        if not commands:
            break
        log.now_ns += TIER_NS
    return started


def test_the_dead_hosts_vms_start_where_there_is_most_room() -> None:
    log = Log(hosts=3)
    log.start("a", "h1", memory_mib=4096)
    log.start("b", "h2", memory_mib=8192)
    log.revoke("h1")

    assert assigned(log, "h2 h3") == [("a", "h3")]


def test_equal_hosts_are_told_apart_by_name_and_the_plan_is_the_same_again() -> None:
    log = Log(hosts=3)
    log.add_vm("a")

    assert assigned(log) == assigned(log) == [("a", "h1")]


def test_higher_priorities_are_issued_first_and_the_next_once_they_are_seen_starting() -> None:
    log = Log(hosts=2)
    for name, priority in (("a", Priority.LOW), ("b", Priority.HIGH), ("c", Priority.HIGH)):
        log.add_vm(name, priority=priority)

    assert [vm for vm, _ in assigned(log)] == ["b", "c"]
    log.assign("b", "h1")
    log.assign("c", "h1")
    assert assigned(log) == []
    assert planned(log).wake_ns == TIER_NS
    log.report("b", RunState.STARTING)
    log.report("c", RunState.STARTING)
    assert [vm for vm, _ in assigned(log)] == ["a"]


def test_a_host_that_never_answers_holds_lower_priorities_up_for_a_moment_only() -> None:
    log = Log(hosts=2)
    log.add_vm("high", priority=Priority.HIGH)
    log.add_vm("low", priority=Priority.LOW)
    log.assign("high", "h1")

    log.now_ns += TIER_NS

    assert [vm for vm, _ in assigned(log)] == ["low"]


def test_a_vm_waits_until_what_it_depends_on_is_up() -> None:
    """H11: issued is not enough."""
    log = Log(hosts=2)
    log.add_vm("db", priority=Priority.LOW)
    log.add_vm("web", priority=Priority.HIGH, after=("db",))

    assert [vm for vm, _ in assigned(log)] == ["db"]
    log.assign("db", "h1")
    log.report("db", RunState.STARTING)
    assert waits(log)["web"] == "until db is up"
    log.report("db")
    assert [vm for vm, _ in assigned(log)] == ["web"]


def test_what_ran_on_a_host_that_nobody_has_heard_of_is_not_taken_for_up() -> None:
    """H11, found by a scenario: after a power cut of all hosts a VM started before the one that it depends on, whose host was still
    off: the record of its run was as it had been before."""
    log = Log(hosts=3)
    log.add_vm("db")
    log.add_vm("app", after=("db",))
    log.start("db", "h1")

    assert assigned(log, fresh="h2 h3") == []
    assert waits(log, fresh="h2 h3") == {"app": "until db is up"}
    assert assigned(log, fresh="h1 h2 h3") == [("app", "h2")]


def test_what_others_depend_on_has_their_priority() -> None:
    log = Log(hosts=2)
    log.add_vm("middle", priority=Priority.MEDIUM)
    log.add_vm("base", priority=Priority.LOWEST)
    log.add_vm("top", priority=Priority.HIGHEST, after=("base",))

    assert carry_out(log) == ["base", "top", "middle"]


def test_high_priority_keeps_its_room_while_its_dependency_comes_up() -> None:
    log = Log(hosts=1)
    log.add_vm("dns", priority=Priority.HIGH, memory_mib=100)
    log.add_vm("big", priority=Priority.HIGH, memory_mib=16_000, after=("dns",))
    log.add_vm("low", priority=Priority.LOW, memory_mib=1_000)

    assert carry_out(log) == ["dns", "big"]
    assert waits(log) == {"low": "no host has room and is allowed"}


def test_no_room_is_kept_for_a_vm_whose_dependency_will_not_come_up() -> None:
    log = Log(hosts=1)
    log.add_vm("db", memory_mib=1024, max_restart=0, max_relocate=0)
    log.assign("db", "h1")
    log.release("db", failed=True)
    assert log.runs("db").failed
    log.add_vm("web", after=("db",), priority=Priority.HIGH, memory_mib=16384)
    log.add_vm("shop", after=("web",), priority=Priority.HIGH, memory_mib=16384)
    log.add_vm("mail", priority=Priority.LOW, memory_mib=2048)

    assert assigned(log) == [("mail", "h1")]
    assert waits(log)["web"] == "until db is up"


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda log: log.done(c.SetHostState(HostName("h2"), HostState.MAINTENANCE)), "H14"),
        (lambda log: log.revoke("h2"), "no lease"),
        (lambda log: log.done(c.RemoveHost(HostName("h2"))), "removed"),
    ],
)
def test_no_host_is_chosen_that_may_not_run_it(spoil: Callable[[Log], object], why: str) -> None:
    log = Log(hosts=2)
    log.add_vm("a", memory_mib=16_000)
    log.add_vm("b", memory_mib=16_000)
    spoil(log)

    assert assigned(log) == [("a", "h1")], why


def test_without_a_candidate_a_vm_waits_and_starts_when_one_appears() -> None:
    """H13."""
    log = Log(hosts=2)
    log.start("a", "h1")
    log.revoke("h1")

    assert assigned(log, "h1") == []
    assert waits(log, "h1") == {"a": "no host has room and is allowed"}
    assert assigned(log, "h2") == [("a", "h2")]


def test_what_may_outlive_its_lease_waits_for_somebody_who_knows() -> None:
    log = Log(hosts=2)
    log.start("a", "h1", safety=Safety.FENCE)
    log.revoke("h1")

    assert assigned(log, "h2") == []
    assert "may still run" in waits(log, "h2")["a"]
    log.done(c.Fenced(HostName("h1"), log.token("h1")))
    assert assigned(log, "h2") == [("a", "h2")]


def test_an_orderly_shutdown_at_the_deadline_adds_to_the_expiry() -> None:
    """L4, by the slowest clock."""
    log = Log(hosts=2)
    log.start("a", "h1", shutdown_ns=10 * SECOND)
    log.now_ns = 100 * SECOND
    log.revoke("h1")

    assert planned(log, "h2").wake_ns == log.now_ns + 10 * SECOND * 102 // 100
    log.now_ns += 10 * SECOND * 102 // 100
    assert assigned(log, "h2") == [("a", "h2")]


def test_a_vm_that_is_removed_and_added_again_waits_for_the_shutdown_of_its_last_run_all_the_same() -> None:
    """I42: its copy on the lost host may still be shutting down."""
    log = Log(hosts=2)
    log.start("a", "h1", shutdown_ns=10 * SECOND)
    log.revoke("h1")

    log.done(c.RemoveVm(VmName("a")))
    log.add_vm("a")

    assert assigned(log, "h2") == []
    log.now_ns += 10_200_000_000
    assert assigned(log, "h2") == [("a", "h2")]


def test_nothing_is_planned_while_disarmed_and_stopped_or_ignored_vms_stay() -> None:
    log = Log(hosts=2)
    for name, wanted in (("stopped", Wanted.STOPPED), ("ignored", Wanted.IGNORED)):
        log.start(name, "h1")
        log.done(c.WantVm(VmName(name), wanted))
    log.add_vm("off", priority=Priority.DISABLED)
    log.assign("off", "h1")
    log.revoke("h1")

    assert assigned(log, "h2") == []
    log.done(c.WantVm(VmName("off"), Wanted.STARTED))
    assert assigned(log, "h2") == [("off", "h2")]
    log.assign("off", "h2")
    log.done(c.SetSettings.of(Settings(mode=Mode.DISARMED)))
    log.release("off")
    assert planned(log, "h2").commands == ()


def test_tries_follow_the_schedule_whoever_coordinates() -> None:
    """H7, I49: 1 + max_restart here, then one on each other host."""
    log = Log(hosts=3, settings=Settings(retries_ns=(0, 2 * SECOND, 6 * SECOND, 14 * SECOND)))
    log.add_vm("a", max_restart=1, max_relocate=2, host="h2")
    instants: list[int] = []
    where: list[str] = []
    told: list[str] = []
    for _ in range(4):
        while not (found := assigned(log)):
            told.append(waits(log)["a"])
            wake_ns = planned(log).wake_ns
            assert wake_ns is not None
            log.now_ns = wake_ns
        instants.append(log.now_ns // SECOND)
        where.append(found[0][1])
        log.assign("a", found[0][1])
        log.release("a", failed=True)

    assert instants == [0, 2, 6, 14]
    assert told == [f"until its next try, {apart} s after the last" for apart in (2, 4, 8)]
    assert where[:2] == ["h2", "h2"]
    assert sorted(where[2:]) == ["h1", "h3"]
    assert waits(log) == {"a": "every try failed: needs an administrator"}


def test_a_failing_start_goes_elsewhere_if_its_host_has_no_room_left() -> None:
    log = Log(hosts=2)
    log.add_vm("a", memory_mib=16384, max_restart=2)
    log.assign("a", "h1")
    log.release("a", failed=True)
    log.add_vm("b", memory_mib=1024)
    log.assign("b", "h1")
    log.report("b")
    log.now_ns += 10_000 * SECOND

    assert assigned(log) == [("a", "h2")]


def test_a_crashed_vm_restarts_on_its_host() -> None:
    log = Log(hosts=3)
    log.start("a", "h2")
    log.release("a")

    assert assigned(log) == [("a", "h2")]


def test_a_run_that_lasted_is_settled() -> None:
    log = Log(hosts=1)
    log.start("a", "h1")
    log.release("a")
    log.assign("a", "h1")
    log.report("a")
    log.now_ns += 60 * SECOND

    assert planned(log).commands == (c.Settle(VmName("a"), log.runs("a").token),)


def test_a_vm_that_was_to_leave_a_host_goes_back_to_it_once_it_can() -> None:
    """Found by a scenario: all hosts were shut down, and the first VM had been promised to another before that went down, too."""
    log = Log(hosts=3)
    log.start("vm", "h1")
    log.done(c.Recall(VmName("vm"), log.runs("vm").token, "its host is in shutdown", "h3", home="h1"))
    log.release("vm")

    assert assigned(log, fresh="h2 h3") == [("vm", "h3")]
    assert assigned(log) == [("vm", "h1")]


def test_maintenance_moves_vms_away_and_they_come_home_when_it_ends() -> None:
    log = Log(hosts=2)
    log.start("a", "h1")
    log.done(c.SetHostState(HostName("h1"), HostState.MAINTENANCE))

    carry_out(log)
    assert log.runs("a").host == "h2"
    log.done(c.SetHostState(HostName("h1"), HostState.ONLINE))
    carry_out(log)
    assert log.runs("a").host == "h1"
    assert planned(log).commands == ()


def test_maintenance_stops_nothing_that_has_nowhere_to_go() -> None:
    log = Log(hosts=2)
    log.start("a", "h1", memory_mib=10_000)
    log.start("b", "h2", memory_mib=10_000)
    log.done(c.SetHostState(HostName("h1"), HostState.MAINTENANCE))

    assert recalled(log) == []
    assert waits(log) == {"a": "its host is in maintenance and no other has room"}


def test_a_frozen_hosts_vms_wait_for_it() -> None:
    log = Log(hosts=2)
    log.start("a", "h1")
    log.done(c.SetHostState(HostName("h1"), HostState.FREEZE))

    carry_out(log, rounds=2)
    assert waits(log) == {"a": "until h1 is back"}
    log.done(c.Confirm(HostName("h1"), LeaseToken(log.grant("h1", boot=2))))
    assert assigned(log) == [("a", "h1")]


def test_vms_apart_go_to_different_hosts_and_together_to_one() -> None:
    log = Log(hosts=3)
    for name in "abcd":
        log.add_vm(name)
    log.done(c.SetRule.of(Rule("apart", RuleKind.APART, ("a", "b"))))
    log.done(c.SetRule.of(Rule("pair", RuleKind.TOGETHER, ("c", "d"))))

    places = dict(assigned(log))

    assert places["a"] != places["b"]
    assert places["c"] == places["d"]


def test_a_require_rule_does_not_bend_and_a_prefer_rule_does() -> None:
    log = Log(hosts=3)
    log.add_vm("bound")
    log.add_vm("fond")
    log.done(c.SetRule.of(Rule("r", RuleKind.REQUIRE, ("bound",), (("h2", 1),))))
    log.done(c.SetRule.of(Rule("p", RuleKind.PREFER, ("fond",), (("h2", 1), ("h3", 2)))))

    assert dict(assigned(log)) == {"bound": "h2", "fond": "h3"}
    assert dict(assigned(log, "h1")) == {"fond": "h1"}


def test_a_together_group_follows_its_member_whose_starts_failed() -> None:
    log = Log(hosts=2)
    log.done(c.SetRule.of(Rule("pair", RuleKind.TOGETHER, ("a", "b"))))
    log.start("a", "h1", max_restart=0, max_relocate=1)
    log.start("b", "h1")
    log.release("a")
    log.assign("a", "h1")
    log.release("a", failed=True)
    log.now_ns += 120 * SECOND

    carry_out(log)

    assert {log.runs(vm).host for vm in "ab"} == {"h2"}


def test_broken_rules_are_mended_by_the_vm_that_came_last() -> None:
    log = Log(hosts=2)
    log.start("a", "h1")
    log.start("b", "h1")
    log.done(c.SetRule.of(Rule("apart", RuleKind.APART, ("a", "b"))))

    assert recalled(log) == [("b", "h2")]


def test_failback_never_goes_where_a_start_failed() -> None:
    """H15."""
    log = Log(hosts=2)
    log.done(c.SetRule.of(Rule("p", RuleKind.PREFER, ("a",), (("h1", 2), ("h2", 1)))))
    log.add_vm("a", max_restart=0)
    log.assign("a", "h1")
    log.release("a", failed=True)
    log.now_ns += 120 * SECOND

    assert carry_out(log) == ["a"]
    log.now_ns += 600 * SECOND
    assert carry_out(log) == []

    assert (log.runs("a").host, log.runs("a").state) == ("h2", RunState.RUNNING)
    assert planned(log).commands == ()


def test_a_vm_goes_back_to_the_host_that_a_rule_prefers() -> None:
    log = Log(hosts=2)
    log.done(c.SetRule.of(Rule("p", RuleKind.PREFER, ("a",), (("h1", 2),))))
    log.start("a", "h2")

    assert recalled(log) == [("a", "h1")]
    assert recalled(log, "h2") == []


def test_a_running_vm_never_moves_for_load_alone() -> None:
    log = Log(hosts=2)
    for name in "abc":
        log.start(name, "h1")

    assert planned(log).commands == ()


def test_what_ran_on_a_host_that_died_while_disarmed_says_what_it_waits_for() -> None:
    """Its lease has no deadline, so nobody can tell that it does not run there any more."""
    log = Log(hosts=2)
    log.start("a", "h1")
    log.start("b", "h2")
    log.done(c.SetSettings.of(Settings(mode=Mode.DISARMED)))
    log.done(c.SetSettings.of(Settings()))

    assert waits(log, "h2") == {"a": "it may still run on h1, whose lease has no deadline: needs the host, or fencing"}
    assert assigned(log, "h2") == []

    log.done(c.Confirm(HostName("h2"), LeaseToken(log.grant("h2"))))
    log.done(c.Fenced(HostName("h1"), log.token("h1"), "seen"))
    assert assigned(log, "h2") == [("a", "h2")]


def test_starts_and_moves_in_progress_are_limited() -> None:
    log = Log(hosts=2, settings=Settings(starts_per_host=1, moves=1))
    for name in "abc":
        log.add_vm(name)
    assert len(assigned(log)) == 2
    carry_out(log)
    log.done(c.SetHostState(HostName("h1"), HostState.MAINTENANCE))

    assert len(recalled(log)) == 1


def test_failover_hosts_stay_empty_until_a_failover_needs_them() -> None:
    log = Log(hosts=3, settings=Settings(admission=AdmissionPolicy.FAILOVER_HOSTS, failover_hosts=("h1",)))
    log.add_vm("a")
    assert assigned(log) == [("a", "h2")]
    log.assign("a", "h2")
    log.report("a")
    log.revoke("h2")

    assert assigned(log, "h1 h3") == [("a", "h1")]


def story(log: Log, seen: list[c.Command]) -> None:
    """A failover, a failing start, a maintenance and its end, as coordinator and hosts play it."""
    for _ in range(30):
        commands = planned(log, "h2 h3").commands
        for command in commands:
            seen.append(command)
            log.run(command)
        for vm, run in sorted(log.inventory.runs.items()):
            if run.held and run.recalled:
                log.release(vm)
            elif run.state is RunState.ASSIGNED:
                log.report(vm)
        log.now_ns += TIER_NS


def failover() -> Log:
    log = Log(hosts=3)
    log.start("db", "h1", priority=Priority.HIGH)
    log.start("web", "h1", after=("db",))
    log.start("x", "h2")
    log.done(c.SetHostState(HostName("h2"), HostState.MAINTENANCE))
    log.revoke("h1")
    return log


@pytest.mark.parametrize("died_after", range(8))
def test_a_new_coordinator_goes_on_wherever_the_old_one_died(died_after: int) -> None:
    """H8: of the first coordinator's commands only a prefix entered the log; a second one plans from the records alone."""
    whole: list[c.Command] = []
    story(failover(), whole)
    log = failover()
    for command in planned(log, "h2 h3").commands[:died_after]:
        log.run(command)

    story(log, [])

    assert {run.host for run in log.inventory.runs.values()} == {"h3"}
    assert all(run.up for run in log.inventory.runs.values())
    tokens = [attrs.astuple(command) for command in whole if isinstance(command, c.Assign)]
    assert len(tokens) == 3
