"""ReadIndex: dissertation section 6.4; pitfalls R8, R33, R34, R35."""

from __future__ import annotations

from ha_core.machines.raft.messages import (
    Append,
    AppendAnswer,
    Heartbeat,
    HeartbeatAnswer,
    ReadAnswer,
    ReadRequest,
)
from ha_core.machines.raft.types import ReadFailed, ReadReady, Reason, Role, TransferLeadership
from tests.machines.raft.group import Group, Node, node_id


def ready(node: Node) -> list[tuple[int, int]]:
    return [(one.request, one.index) for one in node.of(ReadReady) if isinstance(one, ReadReady)]


def failed(node: Node) -> list[tuple[int, Reason]]:
    return [(one.request, one.reason) for one in node.of(ReadFailed) if isinstance(one, ReadFailed)]


def test_a_leader_reads_after_one_round() -> None:
    group = Group(3)
    group.elect()
    began_ns = group.now_ns

    group.read("n1")
    group.run_until(lambda: bool(ready(group["n1"])))

    assert ready(group["n1"]) == [(1, 2)]
    assert group.now_ns - began_ns == 2_000_000


def test_a_single_voter_reads_at_once() -> None:
    group = Group(1)
    group.elect()

    group.read("n1")

    assert ready(group["n1"]) == [(1, 2)]


def test_reads_that_come_together_share_a_round() -> None:
    group = Group(3)
    group.elect()
    group.sent.clear()

    for request in range(10):
        group.read("n1", request)
    group.run(5)

    assert len(ready(group["n1"])) == 10
    assert len(group.messages(Heartbeat, to="n2")) == 2  # the first read's, and one for all that came during it


def test_a_fresh_leader_answers_only_after_its_noop_R33() -> None:
    """n1 acknowledged an entry of which n2, its successor, has not heard the commit."""
    group = Group(3)
    group.elect()
    group.drop = lambda sent: isinstance(sent.message, Heartbeat)
    group.propose("n1", b"a")
    group.run_until(lambda: group["n1"].data() == [b"a"])
    group.crash("n1")
    group.drop = lambda sent: isinstance(sent.message, AppendAnswer)
    group.run_until(lambda: group["n2"].role is Role.LEADER)
    assert group["n2"].commit == 2

    group.read("n2")
    group.run(300)
    assert ready(group["n2"]) == []

    group.drop = lambda sent: False
    group.run(1000)
    assert [index for _, index in ready(group["n2"])] == [group["n2"].machine.status().commit]


def test_a_deposed_leader_that_does_not_know_it_serves_no_read() -> None:
    group = Group(3)
    group.elect()
    group.partition(["n1"])

    group.read("n1")
    group.run(1500)

    assert ready(group["n1"]) == []
    assert failed(group["n1"]) == [(1, Reason.NOT_LEADER)]


def test_answers_to_earlier_rounds_confirm_nothing_R34() -> None:
    group = Group(3)
    group.elect()
    group.partition(["n1"])
    leadership = group["n1"].machine.leadership
    assert leadership is not None
    earlier = leadership.round

    group.read("n1")
    group.inject("n1", "n2", HeartbeatAnswer(2, earlier))
    group.inject("n1", "n3", HeartbeatAnswer(2, earlier))
    assert ready(group["n1"]) == []

    group.inject("n1", "n3", HeartbeatAnswer(2, earlier + 1))
    assert ready(group["n1"]) == [(1, 2)]


def test_a_read_that_waits_is_served_by_the_next_round_if_its_own_is_lost() -> None:
    group = Group(3)
    group.elect()
    group.drop = lambda sent: isinstance(sent.message, Heartbeat)
    group.read("n1")
    group.run(10)

    group.drop = lambda sent: False
    group.run(200)

    assert ready(group["n1"]) == [(1, 2)]


def test_a_follower_reads_what_the_leader_confirms() -> None:
    group = Group(3)
    group.elect()
    group.propose("n1", b"a")
    group.run_until(lambda: group["n1"].data() == [b"a"])
    assert group["n3"].data() == []

    group.read("n3")
    group.run_until(lambda: bool(ready(group["n3"])))

    assert ready(group["n3"]) == [(1, 3)]
    assert group["n3"].data() == [b"a"]


def test_a_follower_waits_until_the_index_is_applied_here() -> None:
    group = Group(3)
    group.elect()
    group.drop = lambda sent: sent.to == "n3" and isinstance(sent.message, Append | Heartbeat)
    group.propose("n1", b"a")
    group.run(20)

    group.read("n3")
    group.run(50)
    assert ready(group["n3"]) == []

    group.drop = lambda sent: False
    group.run(1000)
    assert ready(group["n3"]) == [(1, 3)]


def test_each_attempt_of_a_followers_read_has_a_nonce_of_its_own_R34() -> None:
    group = Group(3)
    group.elect()
    group.drop = lambda sent: isinstance(sent.message, ReadAnswer)
    group.read("n3")
    group.run(400)

    nonces = [message.nonce for message in group.messages(ReadRequest, "n3") if isinstance(message, ReadRequest)]
    assert len(nonces) >= 3
    assert len(set(nonces)) == len(nonces)
    group.inject("n3", "n1", ReadAnswer(2, nonces[0], True, 2))
    assert ready(group["n3"]) == []
    group.inject("n3", "n1", ReadAnswer(2, nonces[-1], True, 2))
    assert ready(group["n3"]) == [(1, 2)]


def test_a_followers_read_fails_in_time_instead_of_answering_old_data_R35() -> None:
    group = Group(3)
    group.elect()
    group.drop = lambda sent: isinstance(sent.message, ReadAnswer)

    group.read("n3")
    group.run(2000)

    assert ready(group["n3"]) == []
    assert failed(group["n3"]) == [(1, Reason.NO_QUORUM)]


def test_without_a_leader_a_read_fails_at_once() -> None:
    group = Group(3)
    group.run(10)

    group.read("n2")

    assert failed(group["n2"]) == [(1, Reason.NO_LEADER)]


def test_reads_move_along_when_their_follower_becomes_leader() -> None:
    group = Group(3)
    group.elect()
    group.drop = lambda sent: isinstance(sent.message, ReadAnswer)
    group.read("n2")

    group["n1"].step(TransferLeadership(node_id("n2")))
    group.run(100)

    assert group["n2"].role is Role.LEADER
    assert ready(group["n2"]) == [(1, 3)]


def test_a_restart_reads_nothing_older_than_what_was_acknowledged_R8() -> None:
    group = Group(3)
    group.elect()
    group.propose("n1", b"a")
    group.run(20)
    for name in group.nodes:
        group.crash(name)
    for name in group.nodes:
        group.restart(name)

    group.elect()
    group.read(group.leader.name)
    group.run(10)

    assert ready(group.leader)[-1][1] >= 3
