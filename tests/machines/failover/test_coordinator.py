"""The coordinator by hand: when it plans, and what it then proposes."""

from __future__ import annotations

from ha_core.ids import HostName
from ha_core.machines.failover import commands as c
from ha_core.machines.failover.coordinator import GATHER_RENEWALS, Coordinator
from ha_core.machines.failover.records import HostState
from tests.machines.failover.support import Log

RENEWAL_NS = 150_000_000
H1, H2 = HostName("h1"), HostName("h2")


def led(log: Log) -> Coordinator:
    coordinator = Coordinator(log.inventory, RENEWAL_NS)
    coordinator.lead(0)
    return coordinator


def test_first_plan_waits_until_every_host_has_renewed() -> None:
    """Found by a scenario: after a cold start all VMs were placed on the host whose lease came first."""
    log = Log(hosts=2)
    log.add_vm("vm", host="h2")
    coordinator = led(log)

    assert coordinator.run([H1], 0)[1] == ()
    timer = coordinator.next_timer()
    assert timer is not None
    assert 0 < timer <= RENEWAL_NS
    (assign,) = coordinator.run([H1, H2], timer)[1]
    assert isinstance(assign, c.Assign)
    assert assign.host == H2


def test_first_plan_does_not_wait_long_for_a_host_that_is_silent() -> None:
    log = Log(hosts=2)
    log.add_vm("vm", host="h2")
    coordinator = led(log)
    now_ns = 0
    while not (commands := coordinator.run([H1], now_ns)[1]):
        timer = coordinator.next_timer()
        assert timer is not None
        assert timer > now_ns
        now_ns = timer

    assert now_ns == GATHER_RENEWALS * RENEWAL_NS
    assert [command.host for command in commands if isinstance(command, c.Assign)] == [H1]


def test_a_host_in_maintenance_is_not_waited_for() -> None:
    log = Log(hosts=2)
    log.add_vm("vm")
    log.done(c.SetHostState(H2, HostState.MAINTENANCE))

    assert len(led(log).run([H1], 0)[1]) == 1
