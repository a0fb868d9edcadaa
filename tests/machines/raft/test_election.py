"""Elections: dissertation sections 3.4, 4.2.3, 6.2, 9.6; pitfalls R1, R2, R7, R14 to R18, R20; rule L6 of leases."""

from __future__ import annotations

from ha_core.machines.raft.messages import (
    Append,
    AppendAnswer,
    Heartbeat,
    HeartbeatAnswer,
    VoteAnswer,
    VoteRequest,
)
from ha_core.machines.raft.records import recover
from ha_core.machines.raft.types import Lane, Role, RoleChanged, TransferLeadership
from tests.machines.raft.group import MS, Group, node_id


def vote_request(term: int, *, pre: bool = False, last: tuple[int, int] = (9, 9), transfer: bool = False) -> VoteRequest:
    return VoteRequest(term, pre, 7, last[0], last[1], transfer)


def granted(group: Group, sender: str) -> list[bool]:
    return [answer.granted for answer in group.messages(VoteAnswer, sender) if isinstance(answer, VoteAnswer)]


def test_a_leader_is_elected_and_commits_its_noop_section_3_4() -> None:
    group = Group(3)

    group.elect()

    assert group.leader.name == "n1"
    assert [node.commit for node in group.nodes.values()] == [2, 2, 2]
    assert [node.term for node in group.nodes.values()] == [2, 2, 2]


def test_a_vote_waits_for_its_flush_R1() -> None:
    group = Group(3)
    group.run(10)
    group.freeze_disk("n2")

    group.inject("n2", "n1", vote_request(5))
    group.run(10)

    assert granted(group, "n2") == []
    group.thaw_disk("n2")
    group.run(10)
    assert granted(group, "n2") == [True]
    assert recover(group["n2"].disk).vote == node_id("n1")


def test_a_vote_survives_a_restart_R2_I37() -> None:
    group = Group(3)
    group.run(10)
    group.inject("n2", "n1", vote_request(5))
    group.run(10)

    group.restart("n2")
    group.run(10)
    group.inject("n2", "n3", vote_request(5))
    group.run(10)

    assert granted(group, "n2") == [True, False]


def test_a_vote_that_was_lost_in_a_crash_was_never_sent_R2() -> None:
    group = Group(3)
    group.run(10)
    group.freeze_disk("n2")
    group.inject("n2", "n1", vote_request(5))

    group.crash("n2")
    group.thaw_disk("n2")
    group.restart("n2")
    group.run(10)
    group.inject("n2", "n3", vote_request(5))
    group.run(10)

    assert granted(group, "n2") == [True]


def test_a_single_voter_leads_only_once_its_vote_is_flushed_R7() -> None:
    group = Group(1)
    group.run(10)
    group.freeze_disk("n1")

    group.run(400)

    assert group["n1"].role is Role.CANDIDATE
    group.thaw_disk("n1")
    group.run(3)
    assert group["n1"].role is Role.LEADER


def test_a_single_voter_commits_only_what_is_flushed_R7() -> None:
    group = Group(1)
    group.elect()
    group.freeze_disk("n1")

    group.propose("n1", b"a")
    group.run(10)

    assert group["n1"].data() == []
    group.thaw_disk("n1")
    group.run(3)
    assert group["n1"].data() == [b"a"]


def test_a_refused_prevote_carries_the_higher_term_R14() -> None:
    group = Group(3)
    group.run(10)
    group.inject("n2", "n3", vote_request(8, last=(0, 0)))  # refused, but its term counts
    group.run(5)

    group.inject("n2", "n1", vote_request(3, pre=True))
    group.run(5)

    answers = [answer for answer in group.messages(VoteAnswer, "n2", "n1") if isinstance(answer, VoteAnswer)]
    assert [(answer.term, answer.granted) for answer in answers] == [(8, False)]
    assert group["n1"].term == 8


def test_a_prevote_changes_nothing_at_the_voter() -> None:
    group = Group(3)
    group.run(10)

    group.inject("n2", "n1", vote_request(3, pre=True))
    group.run(5)

    assert granted(group, "n2") == [True]
    assert (group["n2"].term, group["n2"].machine.core.vote) == (1, None)


def test_a_candidate_without_answers_goes_back_to_prevote_and_keeps_its_term_R15() -> None:
    group = Group(3)
    group.drop = lambda sent: isinstance(sent.message, VoteAnswer) and not sent.message.pre
    group.run_until(lambda: group["n1"].role is Role.CANDIDATE)
    term = group["n1"].term
    group.partition(["n1"])

    group.run(5000)

    assert group["n1"].role is Role.PRECANDIDATE
    assert group["n1"].term == term


def test_a_partitioned_replica_returns_without_an_election() -> None:
    group = Group(3)
    leader = group.elect()
    group.partition(["n3"])
    group.run(3000)

    group.heal()
    group.run(2000)

    assert group.leader is leader
    assert {node.term for node in group.nodes.values()} == {2}


def test_a_lost_prevote_is_tried_again_after_a_short_delay() -> None:
    group = Group(3)
    group.drop = lambda sent: isinstance(sent.message, VoteAnswer)

    group.run(700)

    asked_ms = sorted(attempt for attempt in _attempts(group, "n1"))
    assert len(asked_ms) > 4  # 50 ms apart, far less than an election timeout


def _attempts(group: Group, name: str) -> set[int]:
    return {message.attempt for message in group.messages(VoteRequest, name) if isinstance(message, VoteRequest)}


def test_a_leader_without_a_quorum_steps_down_R16() -> None:
    """Check-quorum, section 6.2: here it can send, but not receive."""
    group = Group(3)
    group.elect()
    group.drop = lambda sent: sent.to == "n1"

    group.run(1000)

    assert group["n1"].role is not Role.LEADER
    assert group["n1"].machine.core.leader is None or group["n1"].machine.core.leader != node_id("n1")


def test_a_voter_that_hears_its_leader_refuses_others_R17() -> None:
    """Stickiness, section 4.2.3."""
    group = Group(3)
    group.elect()

    group.inject("n2", "n3", vote_request(9))
    group.inject("n2", "n3", vote_request(9, pre=True))
    group.run(5)

    assert granted(group, "n2")[-2:] == [False, False]
    assert {node.term for node in group.nodes.values()} == {2}


def test_a_transfer_overrides_stickiness() -> None:
    group = Group(3)
    group.elect()

    group.inject("n2", "n3", vote_request(9, transfer=True))
    group.run(5)

    assert granted(group, "n2")[-1] is True


def test_a_refused_vote_leaves_the_election_timer_alone_R18() -> None:
    group = Group(3)
    group.run(10)
    deadline_ns = group["n2"].machine.election.deadline_ns

    group.inject("n2", "n3", vote_request(4, last=(0, 0)))

    assert group["n2"].machine.election.deadline_ns == deadline_ns
    group.inject("n2", "n3", vote_request(5))
    assert group["n2"].machine.election.deadline_ns != deadline_ns


def test_a_log_that_lacks_entries_gets_no_vote_section_3_6_1() -> None:
    group = Group(3)
    group.elect()
    group.partition(["n1"], ["n2"], ["n3"])
    group.run(2000)
    group["n2"].machine.core.leader = None

    group.inject("n2", "n3", vote_request(9, last=(1, 1)))
    group.inject("n2", "n3", vote_request(10, last=(5, 1)))
    group.inject("n2", "n3", vote_request(11, last=(2, 2)))
    group.run(5)

    assert granted(group, "n2")[-3:] == [False, False, True]


def test_a_leader_with_a_frozen_disk_makes_room_R20() -> None:
    group = Group(3)
    group.elect()
    group.freeze_disk("n1")
    group.propose("n1", b"a")

    group.run(2500)

    assert group["n1"].role is not Role.LEADER
    assert group.leader.name in ("n2", "n3")
    assert group.leader.data() == [b"a"]


def test_a_leader_whose_streams_stand_still_steps_down_and_abstains() -> None:
    """Datagrams may pass where TCP does not (design 5)."""
    group = Group(3)
    group.elect()
    group.drop = lambda sent: sent.sender == "n1" and sent.lane is not Lane.DATAGRAM

    group.propose("n1", b"a")
    group.run(1190)
    assert group["n1"].role is Role.LEADER
    group.run(3000)

    assert group.leader.name != "n1"
    assert group.leader.commit >= 3


def test_an_idle_leader_whose_streams_stand_still_stays() -> None:
    group = Group(3)
    group.elect()
    group.drop = lambda sent: sent.sender == "n1" and sent.lane is not Lane.DATAGRAM

    group.run(5000)

    assert group.leader.name == "n1"


def test_a_process_that_stood_still_asks_once_more_before_it_campaigns() -> None:
    group = Group(3)
    group.elect()
    group["n3"].frozen = True
    group.run(2000)

    group["n3"].frozen = False
    group["n3"].step()

    assert group["n3"].role is Role.FOLLOWER
    group.run(500)
    assert group["n3"].machine.core.leader == node_id("n1")
    assert group["n3"].of(RoleChanged)[-1].role is Role.FOLLOWER  # type: ignore[attr-defined]


def test_a_vote_answer_carries_the_voters_leader_age_L6() -> None:
    group = Group(3)
    group.elect()
    group.partition(["n1"], ["n2"], ["n3"])
    group.run(100)
    contact_ns = group["n2"].machine.core.leader_contact_ns
    assert contact_ns is not None
    group.run(400)

    group.inject("n2", "n3", vote_request(9))
    group.run(5)

    answer = group.messages(VoteAnswer, "n2")[-1]
    assert isinstance(answer, VoteAnswer)
    assert answer.granted
    assert answer.age_ns == group.now_ns - 5 * MS - contact_ns


def test_a_voter_that_has_met_no_leader_knows_no_age_L6() -> None:
    group = Group(3)
    group.run(10)

    group.inject("n2", "n1", vote_request(9))
    group.run(5)

    answer = group.messages(VoteAnswer, "n2")[-1]
    assert isinstance(answer, VoteAnswer)
    assert (answer.granted, answer.age_ns) == (True, 0)


def test_a_voter_that_computed_its_age_acknowledges_no_lower_term_L6() -> None:
    group = Group(3)
    group.elect()
    group.freeze_disk("n2")
    group.inject("n2", "n3", vote_request(9, transfer=True))
    group.sent.clear()

    group.inject("n2", "n1", Heartbeat(2, 50, 2))
    group.inject("n2", "n1", Append(2, 2, 2, 2, ()))
    group.thaw_disk("n2")
    group.run(5)

    beats = [answer for answer in group.messages(HeartbeatAnswer, "n2") if isinstance(answer, HeartbeatAnswer)]
    answers = [answer for answer in group.messages(AppendAnswer, "n2") if isinstance(answer, AppendAnswer)]
    assert [(answer.term, answer.round) for answer in beats] == [(9, 0)]
    assert [(answer.term, answer.matched) for answer in answers] == [(9, False)]


def test_a_new_leader_knows_the_smallest_age_of_its_quorum_L6() -> None:
    group = Group(3)
    group.elect()
    group.run(130)
    group.crash("n1")
    crashed_ns = group.now_ns

    group.run_until(lambda: group["n2"].role is Role.LEADER)

    role = group["n2"].of(RoleChanged)[-1]
    assert isinstance(role, RoleChanged)
    contacts = [group[name].machine.core.leader_contact_ns or 0 for name in ("n2", "n3")]
    assert 0 < role.lease_age_ns <= group.now_ns - min(contacts)
    assert role.lease_age_ns >= group.now_ns - crashed_ns - 150 * MS


def test_a_deposed_leader_was_one_until_now_L6() -> None:
    """Its successor would count leases from too early a moment and start VMs that still run (I42)."""
    group = Group(3)
    group.elect()
    for one, other in (("n1", "n2"), ("n2", "n1")):
        group[one].step(TransferLeadership(node_id(other)))
        group.run(300)
    assert group.leader.name == "n1"

    group.inject("n1", "n3", vote_request(9, transfer=True))
    group.run(5)

    answer = group.messages(VoteAnswer, "n1", "n3")[-1]
    assert isinstance(answer, VoteAnswer)
    assert (answer.granted, answer.age_ns) == (True, 0)
