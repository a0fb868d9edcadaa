from __future__ import annotations

import attrs
import pytest

from ha_core.errors import StorageError
from ha_core.ids import FencingToken, HostName, LeaseToken, VmName
from ha_core.machines.failover import commands as c
from ha_core.machines.failover.records import (
    HISTORY,
    TABLES,
    AdmissionPolicy,
    Decision,
    Host,
    HostState,
    Lease,
    Mode,
    Name,
    Rule,
    RuleKind,
    Run,
    RunState,
    Safety,
    Settings,
    Vm,
    Wanted,
)
from tests.machines.failover.support import Log


def test_every_record_survives_its_encoding() -> None:
    samples = [
        Host(HostName("h1.example"), (("a", "1.1.1.1:7400"),), 8000, 16384, HostState.MAINTENANCE, boot=b"\1" * 16),
        Lease(HostName("h1"), LeaseToken(7), b"b" * 16, b"i" * 16, 5, 2, 1, 2),
        Vm(VmName("db"), options=(("argv", ("sleep", "60")),), after=("dns",), safety=Safety.FENCE),
        Run(VmName("db"), FencingToken(9), HostName("h1"), LeaseToken(7), RunState.LOST, avoid=("h2",), exit_code=1),
        Rule("pair", RuleKind.PREFER, ("a", "b"), (("h1", 2),)),
        Settings(admission=AdmissionPolicy.PERCENTAGE),
        Name("center.example", ("1.1.1.9",), ("center",)),
    ]
    for sample in samples:
        assert type(sample).decode(sample.encode()) == sample


def test_a_record_with_more_or_fewer_fields_is_read() -> None:
    import msgpack

    newer = msgpack.packb([*msgpack.unpackb(Rule("r", RuleKind.APART, ("a",)).encode()), "a field of the future"])

    assert Rule.decode(newer) == Rule("r", RuleKind.APART, ("a",))
    assert Rule.decode(msgpack.packb(["r", "apart"])) == Rule("r", RuleKind.APART)


@pytest.mark.parametrize("table", TABLES)
def test_bytes_that_are_no_record_are_refused_with_its_name(table: type) -> None:
    with pytest.raises(StorageError, match=table.__name__):
        table.decode(b"\xc1\xff")  # type: ignore[attr-defined]


def test_arguments_of_another_shape_are_refused() -> None:
    with pytest.raises(StorageError, match="ha.grant"):
        c.Grant.decode(("h1",))


# -- leases --


def test_the_first_grant_is_the_log_index_and_asking_again_changes_nothing() -> None:
    log = Log()
    log.add_host("h1", lease=False)

    token = log.grant("h1", created_ns=5)

    assert token == log.index
    assert log.grant("h1", created_ns=9) == token


def test_a_host_that_registers_anew_keeps_what_was_decided_and_what_it_does_not_say() -> None:
    known = Host(HostName("h1"), state=HostState.MAINTENANCE, containment="subreaper", cpu_mhz=1000)

    assert Host(HostName("h1"), cpu_mhz=2000).taking_over(known) == attrs.evolve(known, cpu_mhz=2000)
    assert Host(HostName("h1"), containment="pid-namespace").taking_over(known).containment == "pid-namespace"


def test_a_host_that_nobody_registered_gets_no_lease() -> None:
    outcome = Log().run(c.Grant(HostName("h9"), b"b" * 16, b"i" * 16, 1))

    assert not outcome.done
    assert outcome.reason == "unknown host"


def test_another_guard_of_the_same_boot_continues_the_lease_and_its_runs_in_one_entry() -> None:
    log = Log(hosts=1)
    first = log.token("h1")
    log.start("vm", "h1")

    second = log.grant("h1", instance=2)
    third = log.grant("h1", instance=3)

    assert first < second < third == log.token("h1")
    assert log.lease("h1").continued == first
    assert log.runs("vm").lease == third
    assert log.runs("vm").state is RunState.RUNNING


def test_an_older_ask_of_a_dead_guard_of_this_boot_is_refused() -> None:
    log = Log(hosts=1)
    log.grant("h1", instance=2, created_ns=100)

    late = log.run(c.Grant(HostName("h1"), b"\1" * 16, b"\1" * 16, 99))

    assert not late.done
    assert log.lease("h1").instance == b"\2" * 16


def test_another_kernel_boot_ends_the_old_lease_only_once_it_has_proved_that_it_lives() -> None:
    log = Log(hosts=1)
    old = log.token("h1")
    log.start("vm", "h1")

    candidate = LeaseToken(log.grant("h1", boot=2))

    assert log.token("h1") == old
    assert log.runs("vm").held
    log.done(c.Confirm(HostName("h1"), candidate))
    assert log.token("h1") == candidate
    assert log.lease("h1").continued == 0
    assert log.runs("vm").state is RunState.LOST


def test_an_ask_of_an_earlier_boot_that_comes_late_disturbs_nobody() -> None:
    log = Log(hosts=1)
    log.done(c.Confirm(HostName("h1"), LeaseToken(log.grant("h1", boot=2))))
    log.start("vm", "h1")
    token = log.token("h1")

    log.grant("h1", boot=1)

    assert log.token("h1") == token
    assert log.runs("vm").held
    assert not log.run(c.Confirm(HostName("h1"), token)).done


def test_a_revoked_lease_ends_its_runs_and_the_next_grant_begins_anew() -> None:
    log = Log(hosts=1)
    log.start("vm", "h1")
    log.start("kept", "h1", safety=Safety.FENCE)
    old = log.token("h1")

    assert log.revoke("h1").done
    assert log.revoke("h1").done
    assert log.runs("vm").state is RunState.LOST
    assert log.runs("kept").state is RunState.UNFENCED
    token = log.grant("h1")

    assert token > old
    assert log.lease("h1").continued == 0
    assert log.runs("vm").state is RunState.LOST
    assert log.runs("kept").state is RunState.RUNNING
    assert log.runs("kept").lease == token


def test_a_revoke_of_another_leader_or_another_token_is_refused() -> None:
    log = Log(hosts=1)
    log.done(c.Lead(5, "aam@h1"))
    log.done(c.Lead(6, "aam@h2"))

    assert not log.run(c.Lead(5, "aam@h1")).done
    assert not log.run(c.Revoke(HostName("h1"), log.token("h1"), 5)).done
    assert not log.run(c.Revoke(HostName("h1"), LeaseToken(1), 6)).done
    assert log.run(c.Revoke(HostName("h1"), log.token("h1"), 6)).done


def test_confirmed_fencing_ends_what_outlives_its_lease() -> None:
    log = Log(hosts=2)
    log.start("vm", "h1", safety=Safety.FENCE)
    log.revoke("h1")
    previous = log.runs("vm").token
    elsewhere = c.Assign(VmName("vm"), HostName("h2"), log.token("h2"), previous)

    assert not log.run(elsewhere).done
    log.done(c.Fenced(HostName("h1"), log.token("h1"), "power off confirmed"))
    assert log.run(elsewhere).done


def test_a_shorter_lease_is_counted_by_the_longest_that_a_deadline_may_rest_on() -> None:
    log = Log(hosts=1)
    log.done(c.SetSettings.of(Settings(lease_ns=700, margin_ns=100)))

    token = log.grant("h1")

    assert token == log.token("h1")
    assert log.lease("h1").lease_ns == 700
    assert log.lease("h1").hold_ns == 2_000_000_000


# -- runs --


def test_a_vm_is_not_assigned_while_its_last_run_is_held() -> None:
    log = Log(hosts=2)
    log.start("vm", "h1")
    again = c.Assign(VmName("vm"), HostName("h2"), log.token("h2"), log.runs("vm").token)

    assert log.run(again).reason == "the last run is neither released nor under a revoked lease"
    log.revoke("h1")
    assert log.run(again).done


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"previous": FencingToken(3)}, "another run came between"),
        ({"lease": LeaseToken(3)}, "the host does not hold that lease"),
        ({"vm": VmName("nobody")}, "the VM is not to run"),
    ],
)
def test_an_assign_on_wrong_premises_is_refused(change: dict[str, object], reason: str) -> None:
    log = Log(hosts=1)
    log.add_vm("vm")
    good = c.Assign(VmName("vm"), HostName("h1"), log.token("h1"), FencingToken(0))

    assert log.run(attrs.evolve(good, **change)).reason == reason  # type: ignore[arg-type]
    assert log.run(good).done


def test_an_assign_under_a_revoked_lease_is_refused() -> None:
    log = Log(hosts=1)
    log.add_vm("vm")
    log.revoke("h1")

    assert not log.run(c.Assign(VmName("vm"), HostName("h1"), log.token("h1"), FencingToken(0))).done


def test_fencing_tokens_only_grow() -> None:
    log = Log(hosts=2)
    log.start("vm", "h1")
    tokens = [log.runs("vm").token]
    for _ in range(3):
        log.done(c.Recall(VmName("vm"), log.runs("vm").token, "move"))
        log.release("vm")
        log.assign("vm", "h2")
        tokens.append(log.runs("vm").token)

    assert tokens == sorted(set(tokens))


def test_a_report_that_is_older_or_of_an_earlier_run_is_dropped() -> None:
    """H21: a VM that was started is not reported powered off by a late, older report."""
    log = Log(hosts=2)
    log.start("vm", "h1")
    log.revoke("h1")
    earlier = log.runs("vm").token
    log.assign("vm", "h2")
    token = log.runs("vm").token
    log.done(c.ReportVm(VmName("vm"), token, b"\2" * 16, 50, RunState.RUNNING))

    assert not log.run(c.Released(VmName("vm"), earlier, b"\1" * 16, 99)).done
    assert not log.run(c.Released(VmName("vm"), token, b"\2" * 16, 49)).done
    assert not log.run(c.ReportVm(VmName("vm"), token, b"\2" * 16, 49, RunState.STOPPING)).done
    assert not log.run(c.ReportVm(VmName("vm"), token, b"\2" * 16, 50, RunState.STARTING)).done
    assert log.runs("vm").state is RunState.RUNNING


def test_failed_tries_are_counted_in_the_database_until_the_last() -> None:
    """H7: whoever coordinates, the count goes on."""
    log = Log(hosts=3)
    log.add_vm("vm", max_restart=1, max_relocate=1)
    for attempts, failed in ((1, False), (2, False), (3, True)):
        log.assign("vm", f"h{attempts}")
        log.release("vm", failed=True, text="no disk")
        assert (log.runs("vm").attempts, log.runs("vm").failed) == (attempts, failed)
    log.done(c.WantVm(VmName("vm"), Wanted.STARTED))

    assert (log.runs("vm").attempts, log.runs("vm").failed, log.runs("vm").avoid) == (0, False, ())


def test_a_vm_that_was_up_and_ends_restarts_at_once_the_first_time_only() -> None:
    log = Log(hosts=1)
    log.start("vm", "h1")

    log.release("vm")
    assert (log.runs("vm").crashed, log.runs("vm").attempts) == (True, 0)
    log.assign("vm", "h1")
    log.report("vm")
    log.release("vm")
    assert log.runs("vm").attempts == 1
    log.assign("vm", "h1")
    log.report("vm")
    log.done(c.Settle(VmName("vm"), log.runs("vm").token))
    assert (log.runs("vm").crashed, log.runs("vm").attempts) == (False, 0)


def test_a_run_that_was_seen_stopping_before_it_ended_is_no_failed_start() -> None:
    """Its guard ended it at the lease's deadline: the first time it restarts at once, also on the same host."""
    log = Log(hosts=1)
    log.start("vm", "h1")
    log.report("vm", RunState.STOPPING)

    log.release("vm")

    assert (log.runs("vm").attempts, log.runs("vm").avoid) == (0, ())


def test_a_recalled_run_that_ends_counts_as_no_failure() -> None:
    log = Log(hosts=1)
    log.start("vm", "h1")
    log.done(c.WantVm(VmName("vm"), Wanted.STOPPED))

    log.release("vm")

    assert (log.runs("vm").state, log.runs("vm").attempts) == (RunState.RELEASED, 0)


def test_a_removed_vm_keeps_its_run_until_it_is_released() -> None:
    """H22: added again under its name, it cannot be started a second time."""
    log = Log(hosts=2)
    log.start("vm", "h1")
    log.done(c.RemoveVm(VmName("vm")))
    log.add_vm("vm")

    assert not log.run(c.Assign(VmName("vm"), HostName("h2"), log.token("h2"), FencingToken(0))).done
    log.done(c.RemoveVm(VmName("vm")))
    log.release("vm")
    assert Run.get(log, "vm") is None


def test_an_unmanaged_host_cannot_be_removed_while_vms_run_there() -> None:
    log = Log(hosts=1)
    log.start("vm", "h1")

    assert not log.run(c.RemoveHost(HostName("h1"))).done
    log.revoke("h1")
    assert log.run(c.RemoveHost(HostName("h1"))).done
    assert log.run(c.Grant(HostName("h1"), b"b" * 16, b"i" * 16, 9)).reason == "unknown host"


# -- orders --


def test_dependencies_in_a_circle_are_refused() -> None:
    log = Log()
    log.add_vm("a", after=("b",))
    log.add_vm("b", after=("c",))

    assert not log.run(c.DefineVm.of(Vm(VmName("c"), after=("a",)))).done
    assert log.run(c.DefineVm.of(Vm(VmName("c"), after=("d",)))).done


def test_a_start_that_takes_what_a_failover_needs_is_refused_and_says_why() -> None:
    log = Log(hosts=2, settings=Settings(admission=AdmissionPolicy.HOST_FAILURES))
    log.add_vm("a", memory_mib=10_000)

    outcome = log.run(c.DefineVm.of(Vm(VmName("b"), memory_mib=10_000)))

    assert outcome.reason == "admission (host-failures): 20000 MiB would be needed, 16384 may be used"


def test_admission_counts_no_host_in_maintenance() -> None:
    """H12."""
    log = Log(hosts=3, settings=Settings(admission=AdmissionPolicy.HOST_FAILURES))
    big = c.DefineVm.of(Vm(VmName("big"), memory_mib=20_000))
    log.done(c.SetHostState(HostName("h3"), HostState.MAINTENANCE))

    assert not log.run(big).done
    log.done(c.SetHostState(HostName("h3"), HostState.ONLINE))
    assert log.run(big).done


def test_maintenance_of_an_absent_host_is_refused() -> None:
    log = Log(hosts=1)
    log.revoke("h1")

    assert log.run(c.SetHostState(HostName("h1"), HostState.MAINTENANCE)).reason == "the host is absent"


def test_maintenance_survives_a_registration_and_a_reboot_and_a_shutdown_does_not() -> None:
    for state, after in ((HostState.MAINTENANCE, HostState.MAINTENANCE), (HostState.FREEZE, HostState.ONLINE)):
        log = Log(hosts=1)
        log.done(c.SetHostState(HostName("h1"), state))
        log.done(c.RegisterHost.of(Host(HostName("h1"), boot=b"new")))
        assert log.inventory.hosts[HostName("h1")].state is state
        log.done(c.Confirm(HostName("h1"), LeaseToken(log.grant("h1", boot=2))))
        assert log.inventory.hosts[HostName("h1")].state is after


def test_an_order_against_a_rule_is_refused() -> None:
    log = Log(hosts=3)
    log.start("a", "h1")
    log.start("b", "h2")
    log.done(c.SetRule.of(Rule("apart", RuleKind.APART, ("a", "b"))))
    log.done(c.SetRule.of(Rule("near", RuleKind.REQUIRE, ("a",), (("h1", 1), ("h2", 1)))))

    assert "apart" in log.run(c.MoveVm(VmName("a"), HostName("h2"))).reason
    assert "require" in log.run(c.MoveVm(VmName("a"), HostName("h3"))).reason


def test_an_order_for_one_of_a_together_group_moves_all() -> None:
    log = Log(hosts=2)
    log.start("a", "h1")
    log.start("b", "h1")
    log.done(c.SetRule.of(Rule("pair", RuleKind.TOGETHER, ("a", "b"))))

    log.done(c.MoveVm(VmName("a"), HostName("h2")))

    assert [log.runs(vm).target for vm in ("a", "b")] == ["h2", "h2"]


def test_disarming_takes_the_deadlines_and_waits_for_a_failover() -> None:
    log = Log(hosts=2)
    log.start("vm", "h1")
    disarm = c.SetSettings.of(Settings(mode=Mode.DISARMED))
    log.revoke("h1")

    assert not log.run(disarm).done
    log.assign("vm", "h2")
    assert log.run(disarm).done
    assert not log.lease("h2").armed
    assert log.revoke("h2").reason == "the cluster is disarmed: leases have no deadline"


def test_arming_gives_a_lease_its_deadline_only_once_the_guard_uses_it() -> None:
    log = Log(hosts=1)
    log.start("vm", "h1")
    first = log.token("h1")
    log.done(c.SetSettings.of(Settings(mode=Mode.DISARMED)))
    log.done(c.SetSettings.of(Settings(mode=Mode.ARMED)))

    candidate = LeaseToken(log.grant("h1"))

    assert not log.lease("h1").armed
    log.done(c.Confirm(HostName("h1"), candidate))
    assert (log.lease("h1").armed, log.lease("h1").continued) == (True, first)
    assert (log.runs("vm").lease, log.runs("vm").held) == (candidate, True)


def test_settings_that_cannot_be_kept_are_refused() -> None:
    log = Log()

    assert not log.run(c.SetSettings.of(Settings(lease_ns=1000, margin_ns=19))).done
    assert not log.run(c.SetSettings.of(Settings(retries_ns=(5, 1)))).done


@pytest.mark.parametrize(
    ("command", "field"),
    [
        (c.DefineVm.of(Vm(VmName("vm"), memory_mib="1g")), "memory_mib"),  # type: ignore[arg-type]
        (c.DefineVm.of(Vm(VmName("vm"), cpu_mhz=-1)), "cpu_mhz"),
        (c.DefineVm.of(Vm(VmName("vm"), shutdown_ns=True)), "shutdown_ns"),
        (c.DefineVm.of(Vm(VmName("vm"), shutdown_ns=86_401 * 10**9)), "shutdown_ns"),
        (c.DefineVm.of(Vm(VmName("vm"), stop_ns=-2)), "stop_ns"),
        (c.DefineVm.of(Vm(VmName(""))), "name"),
        (c.DefineVm.of(Vm(VmName("v" * 101))), "name"),
        (c.RegisterHost.of(Host(HostName("h1"), cpu_mhz=None)), "cpu_mhz"),  # type: ignore[arg-type]
        (c.RegisterHost.of(Host(HostName("h 1"))), "name"),
        (c.SetSettings.of(Settings(starts_per_host="1")), "starts_per_host"),  # type: ignore[arg-type]
        (c.SetRule.of(Rule(7, RuleKind.APART)), "name"),  # type: ignore[arg-type]
        (c.SetName.of(Name("two words", ("10.0.0.1",))), "fqdn"),
    ],
)
def test_a_record_that_no_replica_could_work_with_is_refused(command: c.Command, field: str) -> None:
    """The planner of every leader would stumble over it, for ever."""
    outcome = Log().run(command)

    assert not outcome.done
    assert outcome.reason.startswith(f"{field}: ")


def test_the_history_of_decisions_is_bounded() -> None:
    log = Log(hosts=1)
    for _ in range(HISTORY + 20):
        log.run(c.SetHostState(HostName("h1"), HostState.ONLINE))

    kept = [one.number for one in Decision.all(log)]
    assert len(kept) == HISTORY
    assert max(kept) - min(kept) == HISTORY - 1


@pytest.mark.parametrize("seed", range(3))
def test_replaying_any_prefix_again_gives_the_same_state_or_refusals(seed: int) -> None:
    """Every command may be proposed twice: what was applied once is refused or changes nothing that matters."""
    log = Log(hosts=2)
    log.start("vm", "h1")
    commands = [
        c.Recall(VmName("vm"), log.runs("vm").token, "move", "h2"),
        c.Released(VmName("vm"), log.runs("vm").token, b"\1" * 16, 100),
        c.Assign(VmName("vm"), HostName("h2"), log.token("h2"), log.runs("vm").token),
    ]
    for command in commands:
        log.run(command)
    after = {vm: attrs.asdict(run) for vm, run in log.inventory.runs.items()}

    for command in commands[seed:]:
        log.run(command)

    assert {vm: attrs.asdict(run) for vm, run in log.inventory.runs.items()} == after
