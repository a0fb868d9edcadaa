"""Planted bugs of shells and stores (H5, H20, H27, M6, S*), caught by named tests."""

from __future__ import annotations

from tests.mutants.harness import Mutant

GUARD = "ha_core/guard/"
GUARD_TEST = "tests/integration/test_guard.py::"

MUTANTS: list[Mutant] = [
    Mutant(
        name="H5 no timer kills the VM of a host whose agents are dead",
        file=GUARD + "shim.py",
        old="self._timer.arm(None if until_ns == _NEVER else until_ns)\n            self._armed",
        new="pass\n            self._armed",
        invariant="I43",
        test=GUARD_TEST + "test_with_every_agent_killed_vms_end_at_their_deadline_and_not_before",
    ),
    Mutant(
        name="H19 a watcher that stood still takes the others for hung",
        file=GUARD + "watch.py",
        old="if lag_ns > self.tick_ns:",
        new="if lag_ns < 0:",
        invariant="I45",
        test="tests/guard/test_watch.py::test_time_in_which_the_watcher_itself_stood_still_does_not_count",
    ),
    Mutant(
        name="H20 two processes restart the guard",
        file="ha_core/runtime/watchdog.py",
        old="if not take_lock(lock):",
        new="if take_lock(lock) is None:",
        invariant="I45",
        test=GUARD_TEST + "test_while_another_process_restarts_the_guard_nobody_else_does",
    ),
    Mutant(
        name="H27 a VM without a namespace of its own",
        file=GUARD + "shim.py",
        old="contained = self._namespaces and enter_pid_namespace()",
        new="contained = self._namespaces",
        invariant="I43",
        test=GUARD_TEST + "test_a_double_forked_child_in_its_own_session_dies_with_its_vm_at_the_deadline",
    ),
    Mutant(
        name="H27 without a namespace, init is killed before it has ended the tree below it",
        file=GUARD + "runs.py",
        old="        if self._is_contained(entry):\n            init.send",
        new="        if init is not None:\n            init.send",
        invariant="I43",
        test=GUARD_TEST + "test_without_namespaces_a_vms_children_end_with_it_while_the_guard_lives",
    ),
    Mutant(
        name="H29 a new guard extends runs of a lease that its Grant does not continue",
        file=GUARD + "rules.py",
        old="if oldest <= run.lease_token <= token and not run.lost:",
        new="if run.lease_token <= token and not run.lost:",
        invariant="I43",
        test=GUARD_TEST + "test_a_new_guard_does_not_extend_runs_that_its_grant_does_not_continue",
    ),
    Mutant(
        name="H30 a new run is started before the one before it is reaped",
        file=GUARD + "rules.py",
        old='if known is not None and not known.state.reaped:\n            return Reply(0, "not-reaped", f"{order.vm}: the run',
        new='if known is None:\n            return Reply(0, "not-reaped", f"{order.vm}: the run',
        invariant="I42",
        test=GUARD_TEST + "test_a_restart_on_the_same_host_never_overlaps_the_run_before",
    ),
    Mutant(
        name="M6 a commit is not flushed",
        file="storage/sqlite_file.py",
        old='execute("PRAGMA synchronous=FULL")',
        new='execute("PRAGMA synchronous=NORMAL")',
        invariant="I52",
        test="tests/storage/test_sqlite_records.py::test_what_is_committed_is_flushed_before_the_commit_returns",
    ),
    Mutant(
        name="M3 a number is not given back by the function that was rolled back",
        file="storage/sqlite_transaction.py",
        old="                self._outbox.truncate(record, count)\n",
        new="                pass\n",
        invariant="I4",
        test="tests/storage/test_transactions.py::test_numbers_follow_each_other_and_a_rollback_gives_its_own_back",
    ),
]
