"""Members come and go: dissertation chapter 4; pitfalls R11, R13, R19, R21 to R25; I38."""

from __future__ import annotations

import pytest

from ha_core.errors import LocalProtocolError
from ha_core.machines.raft.configuration import (
    Configuration,
    Member,
    change_configuration,
    decode_configuration,
    encode_configuration,
)
from ha_core.machines.raft.messages import Append, AppendAnswer, Heartbeat, HeartbeatAnswer, Removed, VoteAnswer, VoteRequest
from ha_core.machines.raft.types import (
    AddLearner,
    ConfigurationRefused,
    Dropped,
    Limits,
    MessageRefused,
    Promote,
    Reason,
    Remove,
    Role,
)
from tests.machines.raft.group import Group, Node, node_id


def voters(node: Node) -> list[str]:
    configuration = node.machine.core.log.configuration
    assert configuration is not None
    return [name.partition("@")[0] for name in configuration.voters]


def dropped(node: Node) -> list[Reason]:
    return [one.reason for one in node.of(Dropped) if isinstance(one, Dropped)]


def refusals(node: Node) -> list[Reason]:
    return [one.reason for one in node.of(MessageRefused) if isinstance(one, MessageRefused)]


def grow(group: Group, name: str) -> None:
    """Add a spare as a learner and promote it."""
    group.add_learner("n1", name)
    group.run(20)
    group.change("n1", Promote(node_id(name)))
    group.run(20)


def test_a_learner_gets_the_log_and_does_not_vote() -> None:
    group = Group(3, 1)
    group.elect()
    group.propose("n1", b"a")

    group.add_learner("n1", "n4")
    group.run(20)

    assert group["n4"].data() == [b"a"]
    assert voters(group["n4"]) == ["n1", "n2", "n3"]
    group.crash("n1")
    group.crash("n2")
    group.run(3000)
    assert group["n3"].role is Role.PRECANDIDATE


def test_a_learner_that_has_caught_up_is_promoted_and_counts() -> None:
    group = Group(3, 1)
    group.elect()

    grow(group, "n4")
    group.crash("n2")
    group.propose("n1", b"a")
    group.run(20)

    assert voters(group["n4"]) == ["n1", "n2", "n3", "n4"]
    assert group["n4"].data() == [b"a"]


def test_a_learner_that_lags_is_not_promoted_R23() -> None:
    group = Group(3, 1, limits=Limits(promote_lag_entries=5))
    group.elect()
    group.add_learner("n1", "n4")
    group.run(20)
    group.partition(["n4"])
    group.propose("n1", *[b"x"] * 10)
    group.run(20)

    group.change("n1", Promote(node_id("n4")))

    assert dropped(group["n1"]) == [Reason.NOT_CAUGHT_UP]


def test_a_learner_that_was_never_heard_is_not_promoted_R23() -> None:
    group = Group(3, 1)
    group.elect()
    group.crash("n4")
    group.add_learner("n1", "n4")

    group.change("n1", Promote(node_id("n4")))
    group.run(20)
    group.change("n1", Promote(node_id("n4")))

    assert dropped(group["n1"]) == [Reason.CHANGE_PENDING, Reason.NOT_CAUGHT_UP]


def test_no_change_before_the_new_leaders_noop_R21() -> None:
    group = Group(3, 1)
    group.drop = lambda sent: isinstance(sent.message, AppendAnswer)
    group.run_until(lambda: group["n1"].role is Role.LEADER)

    group.add_learner("n1", "n4")

    assert dropped(group["n1"]) == [Reason.NOT_READY]


def test_never_two_changes_pending_R22() -> None:
    group = Group(3, 1)
    group.elect()

    group.add_learner("n1", "n4")
    group.change("n1", Remove(node_id("n3")))

    assert dropped(group["n1"]) == [Reason.CHANGE_PENDING]


def test_a_new_leader_ends_the_change_of_the_old_one_before_its_own_R22() -> None:
    group = Group(3, 1)
    group.elect()
    group.partition(["n1"])
    group.add_learner("n1", "n4")
    group.run(2000)

    group.heal()
    group.run(1000)

    assert group["n1"].machine.core.log.configuration == group["n2"].machine.core.log.configuration
    assert voters(group["n1"]) == ["n1", "n2", "n3"]
    assert group["n1"].machine.core.log.configuration_index == 1  # its own change was truncated


def test_a_removed_leader_steps_down_once_that_is_committed_R19() -> None:
    group = Group(3)
    group.elect()

    group.change("n1", Remove(node_id("n1")))
    assert group["n1"].role is Role.LEADER
    group.run(30)

    assert group["n1"].role is Role.FOLLOWER
    assert group.leader.name in ("n2", "n3")  # at once: the heir was told to campaign
    assert voters(group.leader) == ["n2", "n3"]


def test_a_removed_leader_does_not_count_itself_R19() -> None:
    group = Group(3)
    group.elect()
    group.partition(["n1", "n2"])

    group.change("n1", Remove(node_id("n1")))
    group.run(50)

    assert group["n1"].commit == 2


def test_a_removed_member_disturbs_nobody_R19_I38() -> None:
    group = Group(4)
    group.elect()
    group.partition(["n4"])
    group.change("n1", Remove(node_id("n4")))
    group.run(1000)

    group.heal()
    group.run(5000)

    assert group.leader.name == "n1"
    assert {group[name].term for name in ("n1", "n2", "n3")} == {2}
    assert Reason.RETIRED in refusals(group["n2"])


def test_a_removed_member_is_told_and_campaigns_no_more_I38() -> None:
    group = Group(4)
    group.elect()
    group.partition(["n4"])
    group.change("n1", Remove(node_id("n4")))
    group.run(1000)
    group.heal()
    group.run(1000)

    assert refusals(group["n4"]) == [Reason.REMOVED]
    asked = len(refusals(group["n1"]))
    group.run(5000)
    assert len(refusals(group["n1"])) == asked
    assert group["n4"].role is Role.FOLLOWER

    group.crash("n4")
    group.restart("n4")
    group.run(1000)
    assert group["n4"].machine.core.is_removed, "after a restart it is told again"


def test_a_removal_that_is_not_committed_is_told_to_nobody_I38() -> None:
    group = Group(5)
    group.elect()
    group.partition(["n1", "n2"], ["n3", "n4"])
    group.change("n1", Remove(node_id("n5")))
    group.run(50)
    group.heal()
    group.partition(["n1", "n5"])
    group.run(2000)

    assert Reason.REMOVED not in refusals(group["n5"])
    assert not group["n5"].machine.core.is_removed


def test_only_what_is_meant_for_this_incarnation_removes_it() -> None:
    group = Group(3)
    group.elect()

    group.inject("n2", "n1", Removed(2), receiver=b"")
    group.inject("n2", "n1", Removed(2), receiver=b"o" * 16)
    assert not group["n2"].machine.core.is_removed

    group.inject("n2", "n1", Removed(2), receiver=group["n2"].machine.core.replica)
    assert group["n2"].machine.core.is_removed
    assert not group["n2"].machine.core.is_voter


def test_answers_of_nonmembers_count_for_nothing_R13() -> None:
    group = Group(3, 1)
    group.run_until(lambda: group["n1"].role is Role.CANDIDATE)
    group.partition(["n1"])
    attempt = group["n1"].machine.election.attempt
    group.run(5)

    group.inject("n1", "n4", VoteAnswer(2, False, attempt, True, 0))
    group.inject("n1", "n4", HeartbeatAnswer(99, 1))

    assert group["n1"].role is Role.CANDIDATE
    assert group["n1"].term == 2
    assert refusals(group["n1"]) == [Reason.NO_MEMBER] * 2


def test_messages_of_another_cluster_are_refused_R13() -> None:
    group = Group(3)
    group.elect()

    group.inject("n2", "n3", VoteRequest(50, False, 1, 99, 99, True), cluster="other")

    assert group["n2"].term == 2
    assert refusals(group["n2"]) == [Reason.OTHER_CLUSTER]


def test_a_wiped_voter_neither_votes_nor_acknowledges_under_its_old_name_R11_I38() -> None:
    group = Group(3)
    group.elect()
    group.propose("n1", b"a")
    group.run(20)
    group.wipe("n3")
    group.crash("n2")

    group.propose("n1", b"b")
    group.run(500)

    assert group["n1"].data() == [b"a"]
    assert group["n3"].machine.core.log.last_index == 0
    assert Reason.OTHER_REPLICA in refusals(group["n3"])
    group.run(2000)
    group.inject("n1", "n3", VoteAnswer(9, False, 1, True, 0))
    assert group["n1"].term == 2


def test_a_wiped_voter_comes_back_as_a_learner_R11() -> None:
    group = Group(3)
    group.elect()
    group.propose("n1", b"a")
    group.wipe("n3")

    group.add_learner("n1", "n3")
    assert dropped(group["n1"]) == [Reason.OTHER_INCARNATION]
    group.change("n1", Remove(node_id("n3")))
    group.run(20)
    grow(group, "n3")
    group.crash("n2")
    group.propose("n1", b"b")
    group.run(20)

    assert group["n3"].data() == [b"a", b"b"]


def test_a_wiped_learner_takes_its_place_again() -> None:
    group = Group(3, 1)
    group.elect()
    group.add_learner("n1", "n4")
    group.run(20)
    group.wipe("n4")
    group.propose("n1", b"a")

    group.add_learner("n1", "n4")
    group.run(500)

    assert group["n4"].data() == [b"a"]


def test_an_incarnation_that_was_removed_never_comes_back() -> None:
    group = Group(4)
    group.elect()
    group.change("n1", Remove(node_id("n4")))
    group.run(20)

    group.add_learner("n1", "n4")

    assert dropped(group["n1"]) == [Reason.RETIRED]


def test_a_disk_restored_from_an_older_copy_is_found_out_R12() -> None:
    group = Group(3)
    group.elect()
    image = list(group["n3"].disk.records)
    group.propose("n1", b"a")
    group.run(20)

    group.crash("n3")
    group["n3"].disk.records = image
    group.start("n3")
    group.run(1000)

    assert Reason.REGRESSED in refusals(group["n1"])
    assert group["n3"].data() == []


def test_the_replicated_members_override_the_bootstrap_R25() -> None:
    group = Group(3, 1)
    group.elect()
    grow(group, "n4")

    group.restart("n2")

    assert voters(group["n2"]) == ["n1", "n2", "n3", "n4"]


def test_bootstrap_incarnations_are_learned_and_then_held() -> None:
    group = Group(3, known=False)
    group.elect()

    group.run(1000)

    configuration = group["n2"].machine.core.log.configuration
    assert configuration is not None
    assert {member.replica for member in configuration.members.values()} == {
        node.disk.incarnation for node in group.nodes.values()
    }
    group.wipe("n3")
    group.run(500)
    assert group["n3"].machine.core.log.last_index == 0


def test_a_promoted_learner_that_does_not_know_it_votes() -> None:
    """etcd's campaign_learner_must_vote: else there may be no leader."""
    group = Group(2, 1)
    group.elect()
    group.add_learner("n1", "n3")
    group.run(20)
    group.drop = lambda sent: sent.to == "n3"
    group.change("n1", Promote(node_id("n3")))
    group.run(100)
    group.drop = lambda sent: False
    group.crash("n1")

    group.run(3000)

    assert group.leader.name == "n2"


def test_a_promoted_learner_that_does_not_know_it_votes_again_after_a_vote_was_lost() -> None:
    """It never campaigns, so only the candidate can bring it to a newer term."""
    group = Group(1, 1)
    group.elect()
    group.add_learner("n1", "n2")
    group.run(20)
    group.drop = lambda sent: isinstance(sent.message, Append)
    group.change("n1", Promote(node_id("n2")))
    group.run(20)
    assert voters(group["n2"]) == ["n1"]

    group.restart("n1")
    group.drop = lambda sent: isinstance(sent.message, VoteRequest) and not sent.message.pre
    group.run_until(lambda: group["n1"].role is Role.CANDIDATE)
    group.run(50)
    group.drop = lambda sent: False
    group.run(3000)

    assert group["n1"].role is Role.LEADER
    assert voters(group["n2"]) == ["n1", "n2"]


def test_leadership_is_transferred_without_a_gap_section_3_10() -> None:
    from ha_core.machines.raft.types import TransferLeadership

    group = Group(3)
    group.elect()
    group.propose("n1", b"a")
    began_ns = group.now_ns

    group["n1"].step(TransferLeadership(node_id("n3")))
    group.propose("n1", b"b")
    group.run_until(lambda: group["n3"].role is Role.LEADER)

    assert group.now_ns - began_ns < 20_000_000
    assert group["n3"].machine.core.log.last_index >= 3
    assert dropped(group["n1"]) == [Reason.TRANSFERRING]


def test_a_transfer_that_fails_ends_after_an_election_timeout() -> None:
    from ha_core.machines.raft.types import TransferLeadership

    group = Group(3)
    group.elect()
    group.crash("n3")
    group.propose("n1", b"a")

    group["n1"].step(TransferLeadership(node_id("n3")))
    group.run(800)
    group.propose("n1", b"b")
    group.run(20)

    assert group["n1"].data() == [b"a", b"b"]


def test_a_removed_transferee_is_forgotten() -> None:
    from ha_core.machines.raft.types import TransferLeadership

    group = Group(4)
    group.elect()
    group.crash("n4")
    group.propose("n1", b"a")
    group.run(20)
    group["n1"].step(TransferLeadership(node_id("n4")))

    group.change("n1", Remove(node_id("n4")))
    group.propose("n1", b"b")
    group.run(20)

    assert group["n1"].data() == [b"a", b"b"]


def test_an_uncommitted_removal_does_not_shut_its_member_out() -> None:
    """The member may rightly be elected by those who lack the removal; who has it must follow."""
    group = Group(3)
    group.elect()
    group.partition(["n1", "n2"])
    group.drop = lambda sent: isinstance(sent.message, AppendAnswer) and sent.to == "n1"
    group.change("n1", Remove(node_id("n3")))
    group.run(5)
    assert voters(group["n2"]) == ["n1", "n2"]

    group.inject("n2", "n3", Heartbeat(7, 1, 0))

    assert group["n2"].term == 7


def configuration_of(*names: str) -> Configuration:
    return Configuration(
        incoming=tuple(node_id(name) for name in names),
        members={node_id(name): Member(name.encode() * 8) for name in names},
    )


def test_new_addresses_change_no_role_R24() -> None:
    old = configuration_of("n1", "n2")
    link = {"a": "10.0.0.1:1"}

    new = change_configuration(old, AddLearner(node_id("n2"), b"n2" * 8, link))  # type: ignore[arg-type]

    assert (new.incoming, new.learners) == (old.incoming, ())
    assert new.members[node_id("n2")].addresses == link


def test_the_last_voter_stays() -> None:
    with pytest.raises(ConfigurationRefused) as caught:
        change_configuration(configuration_of("n1"), Remove(node_id("n1")))

    assert caught.value.reason is Reason.LAST_VOTER


def test_a_joint_configuration_needs_both_majorities() -> None:
    joint = Configuration(
        incoming=tuple(map(node_id, ("n1", "n2", "n3"))),
        outgoing=tuple(map(node_id, ("n3", "n4", "n5"))),
        members={node_id(f"n{number}"): Member(b"") for number in range(1, 6)},
    )
    joint.check()

    assert not joint.has_quorum([node_id("n1"), node_id("n2")])
    assert joint.has_quorum([node_id("n1"), node_id("n3"), node_id("n4")])
    values = {node_id("n1"): 9, node_id("n2"): 8, node_id("n3"): 7, node_id("n4"): 6, node_id("n5"): 5}
    assert joint.quorum_value(values.__getitem__) == 6
    assert decode_configuration(encode_configuration(joint)) == joint


def test_a_bootstrap_without_this_node_is_refused() -> None:
    group = Group(2)
    group._bootstrapped.add("n3")
    group.nodes["n3"] = Node(group, "n3", group["n1"].disk, group["n1"].rng)
    group["n3"].disk = type(group["n1"].disk)(b"n3")

    with pytest.raises(LocalProtocolError):
        group.start("n3")
