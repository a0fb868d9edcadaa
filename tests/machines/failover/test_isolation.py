from __future__ import annotations

from ha_core.ids import HostName, NodeId, VmName
from ha_core.machines.explain import explain_host, explain_vm
from ha_core.machines.failover.isolation import Isolation, Verdict
from ha_core.machines.failover.planner import Waiting
from tests.machines.failover.support import Log

PATIENCE_NS, ANSWER_NS = 600, 300
PEER = NodeId("aam@h2")


def lonely(*addresses: str) -> Isolation:
    """A host that lost its leader at 0 and waited for its patience."""
    isolation = Isolation(addresses, PATIENCE_NS, ANSWER_NS)
    isolation.leader(False, 0)
    isolation.handle_timer(PATIENCE_NS)
    return isolation


def test_a_host_that_sees_a_leader_is_never_isolated() -> None:
    """H9."""
    isolation = Isolation(["gateway"], PATIENCE_NS, ANSWER_NS)
    isolation.leader(True, 0)

    isolation.handle_timer(10_000)

    assert isolation.verdict is Verdict.CONNECTED
    assert isolation.next_timer() is None
    assert isolation.take_pings() == []


def test_a_blink_is_no_verdict() -> None:
    """H10."""
    isolation = Isolation(["gateway"], PATIENCE_NS, ANSWER_NS)
    isolation.leader(False, 0)
    isolation.peer(PEER, True, 10)
    isolation.peer(PEER, False, 20)
    assert isolation.verdict is Verdict.CONNECTED
    isolation.leader(True, PATIENCE_NS - 1)
    isolation.handle_timer(PATIENCE_NS)

    assert isolation.verdict is Verdict.CONNECTED


def test_who_hears_nobody_asks_and_then_says_isolated() -> None:
    isolation = lonely("gateway", "switch")

    assert isolation.verdict is Verdict.PINGING
    assert isolation.take_pings() == ["gateway", "switch"]
    isolation.handle_timer(PATIENCE_NS + ANSWER_NS)
    assert isolation.verdict is Verdict.ISOLATED
    assert "gateway" in isolation.reason


def test_an_address_that_answers_or_a_peer_means_partitioned() -> None:
    isolation = lonely("gateway")
    isolation.answered("gateway", PATIENCE_NS + 10)
    assert isolation.verdict is Verdict.PARTITIONED

    isolation = lonely("gateway")
    isolation.peer(PEER, True, PATIENCE_NS + 10)
    assert isolation.verdict is Verdict.PARTITIONED
    isolation.peer(PEER, False, PATIENCE_NS + 20)
    isolation.handle_timer(PATIENCE_NS + ANSWER_NS)
    assert isolation.verdict is Verdict.ISOLATED
    isolation.leader(True, PATIENCE_NS + ANSWER_NS + 1)
    assert isolation.verdict is Verdict.CONNECTED


def test_an_answer_from_somebody_else_does_not_count() -> None:
    isolation = lonely("gateway")
    isolation.answered("somebody", PATIENCE_NS + 10)
    isolation.handle_timer(PATIENCE_NS + ANSWER_NS)

    assert isolation.verdict is Verdict.ISOLATED


def test_a_failed_store_is_said_whatever_the_network_does() -> None:
    isolation = lonely()
    isolation.store_failed("disk on fire", 5)

    assert isolation.verdict is Verdict.FAILED
    assert "disk on fire" in isolation.reason


def test_a_vms_story_tells_why_it_moved() -> None:
    log = Log(hosts=2)
    log.start("vm", "h1")
    log.start("other", "h2")
    log.revoke("h1")
    log.assign("vm", "h2")

    lines = explain_vm(log.inventory, VmName("vm"), [Waiting(VmName("vm"), "something")])

    assert [line.split("] ")[-1].split(":")[0] for line in lines[:3]] == [
        f"vm was assigned to h1 (token {log.inventory.decisions[log_number(log, 'assigned', 1)].token})",
        f"h1 lost lease {log.token('h1')}",
        f"vm was assigned to h2 (token {log.runs('vm').token})",
    ]
    assert lines[-2:] == [
        f"now: wanted started, assigned on h2 (token {log.runs('vm').token})", "waits: something",
    ]  # fmt: skip


def log_number(log: Log, kind: str, nth: int) -> int:
    found = sorted(number for number, one in log.inventory.decisions.items() if one.kind == kind and one.vm == "vm")
    return found[nth - 1]


def test_a_hosts_story_ends_with_how_it_stands() -> None:
    log = Log(hosts=1)
    log.revoke("h1")

    lines = explain_host(log.inventory, HostName("h1"))

    assert "was registered" in lines[0]
    assert lines[-1] == f"now: online, lease {log.token('h1')} is revoked"
    assert explain_host(log.inventory, HostName("h9")) == ["h9: there is no such host"]
