"""Planted bugs of high availability (H*)."""

from __future__ import annotations

from tests.mutants.harness import Mutant

LEASES = "machines/failover/leases.py"
PLANNER = "machines/failover/planner.py"
RUNS = "machines/failover/run_procedures.py"
LEASE_TEST = "tests/machines/failover/test_leases.py::"

MUTANTS: list[Mutant] = [
    Mutant(
        name="H1 a lease is revoked, and its VMs restarted, before it has expired",
        file=LEASES,
        old="if now_ns < count.expiry_ns or (",
        new="if now_ns < count.expiry_ns - 6 * self._renewal_ns or (",
        invariant="I43",
        campaign="cluster",
    ),
    Mutant(
        name="H6 an assignment is acted on before a quorum has it",
        file="machines/raft/configuration.py",
        old="[(len(voters) - 1) // 2]",
        new="[len(voters) - 1]",
        invariant="I47",
        campaign="cluster",
        seed=5,
    ),
    Mutant(
        name="H7 the count of failed tries is lost with the next assignment",
        file=RUNS,
        old="home=home, attempts=run.attempts,",
        new="home=home, attempts=0,",
        invariant="I49",
        campaign="cluster",
        seed=5,
    ),
    Mutant(
        name="H11 a VM is started before what it depends on is up",
        file=PLANNER,
        old="            if missing:\n",
        new="            if missing and not self.waiting:\n",
        invariant="I48",
        campaign="cluster",
        seed=2,
    ),
    Mutant(
        name="I48 a VM counts as starting while its shim is still being made, and lower priorities overtake it",
        file="machines/failover/host_agent.py",
        old="            return None  # its shim is being made",
        new="            return RunState.STARTING if run.state is RunState.ASSIGNED else None  # its shim is being made",
        invariant="I48",
        campaign="cluster",
    ),
    Mutant(
        name="H21 a late report of an earlier run counts for the present one",
        file=RUNS,
        old="return run if run is not None and run.token == token else None",
        new="return run",
        invariant="I42",
        campaign="cluster",
        seed=2,
    ),
    Mutant(
        name="H23 a leader that lost its quorum answers renewals without a round",
        file=LEASES,
        old="    proven: bool = False\n",
        new="    proven: bool = True\n",
        invariant="I43",
        campaign="cluster",
        seed=4,
    ),
    Mutant(
        name="H24 a healed host starts a VM from an assignment that has moved",
        file="guard/rules.py",
        old="if order.lease != self.lease_token:",
        new="if order.lease > self.lease_token:",
        invariant="I42",
        campaign="cluster",
        seed=80,
    ),
    Mutant(
        name="L3 a token is confirmed while its Revoke is on the way",
        file=LEASES,
        old="        if lease.token in self._revoking:  # L3\n            return False\n",
        new="",
        invariant="I43",
        test=LEASE_TEST + "test_a_renewal_whose_round_ends_after_the_revoke_was_proposed_is_not_confirmed",
    ),
    Mutant(
        name="L5 an expired token is renewed",
        file=LEASES,
        old="        if lease.armed and pending.arrived_ns >= count.expiry_ns:  # L5\n            return False\n",
        new="",
        invariant="I43",
        test=LEASE_TEST + "test_a_renewal_that_comes_after_the_expiry_is_not_confirmed_even_if_nobody_has_looked_yet",
    ),
    Mutant(
        name="I46 a host that hears nothing keeps its lease by asking, and its VMs are started nowhere",
        file=LEASES,
        old="return held and (count.proven or ",
        new="return held and not count.proven and (",
        invariant="I46",
        test=LEASE_TEST + "test_a_host_that_hears_none_of_our_answers_loses_the_lease_that_its_vms_run_under",
    ),
    Mutant(
        name="H11 a VM counts as up on a host that nobody has heard of",
        file=PLANNER,
        old=" and run.up and run.host in self.fresh)",
        new=" and run.up)",
        invariant="H11",
        test="tests/machines/failover/test_planner.py::test_what_ran_on_a_host_that_nobody_has_heard_of_is_not_taken_for_up",
    ),
]
