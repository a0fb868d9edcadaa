"""Appends, commits and flow control: dissertation sections 3.5, 3.6, 10.2.1; pitfalls R1, R4, R6, R8, R26 to R29, R32."""

from __future__ import annotations

import pytest

from ha_core.errors import InvariantError
from ha_core.machines.contract import Persist
from ha_core.machines.raft.messages import Append, AppendAnswer, Heartbeat, decode_run, encode_run
from ha_core.machines.raft.records import recover
from ha_core.machines.raft.types import (
    Appended,
    Dropped,
    Entry,
    EntryKind,
    Lane,
    Limits,
    PeerReady,
    PeerReset,
    Propose,
    Reason,
    Role,
)
from tests.machines.raft.group import MS, Group, node_id


def run_of(*entries: tuple[int, int, bytes]) -> bytes:
    return encode_run([Entry(index, term, EntryKind.COMMAND, data) for index, term, data in entries])


def answers(group: Group, sender: str) -> list[AppendAnswer]:
    return [answer for answer in group.messages(AppendAnswer, sender) if isinstance(answer, AppendAnswer)]


def appends(group: Group, to: str) -> list[Append]:
    return [message for message in group.messages(Append, to=to) if isinstance(message, Append)]


def test_a_proposal_is_applied_everywhere_in_order() -> None:
    group = Group(3)
    group.elect()

    group.propose("n1", b"a", b"b")
    group.propose("n1", b"c")
    group.run(20)

    assert [node.data() for node in group.nodes.values()] == [[b"a", b"b", b"c"]] * 3
    assert [(one.request, one.index) for one in group["n1"].of(Appended) if isinstance(one, Appended)] == [
        (1, 3),
        (2, 4),
        (1, 5),
    ]


def test_a_follower_learns_of_a_commit_without_waiting_for_the_heartbeat() -> None:
    group = Group(3)
    group.elect()
    began_ns = group.now_ns

    group.propose("n1", b"a")
    group.run_until(lambda: group["n2"].data() == [b"a"])

    assert group.now_ns - began_ns < 8 * MS


def test_a_batch_is_one_append_and_one_record() -> None:
    group = Group(3)
    group.elect()
    before = len(group["n1"].disk.records)
    group.sent.clear()

    group.propose("n1", *[b"x"] * 64)
    group.run(1)

    assert len(group["n1"].disk.records) == before + 1
    assert len(appends(group, "n2")) == 1


def test_proposals_during_a_flush_share_the_next_one() -> None:
    group = Group(3)
    group.elect()
    before = len(group["n1"].disk.records)

    for number in range(10):
        group.propose("n1", b"%d" % number)
        group.run(0.1)
    group.run(10)

    assert len(group["n1"].disk.records) == before + 2
    assert len(group["n3"].data()) == 10


def test_followers_and_records_carry_the_leaders_bytes() -> None:
    group = Group(3)
    group.elect()

    group.propose("n1", b"a", b"b")
    group.run(20)

    run = appends(group, "n2")[-1].runs[0]
    assert all(node.disk.records[-1].endswith(run) or run in node.disk.records[-1] for node in group.nodes.values())


def test_appends_leave_while_the_leader_flushes() -> None:
    group = Group(3)
    group.elect()
    group.freeze_disk("n1")

    group.propose("n1", b"a")
    group.run(10)

    assert group["n2"].data() == group["n3"].data() == [b"a"]  # a quorum without the leader
    assert group["n1"].machine.core.log.durable == 2


def test_an_answer_to_an_append_waits_for_its_flush_R1() -> None:
    group = Group(3)
    group.elect()
    group.freeze_disk("n2")
    group.freeze_disk("n3")
    group.sent.clear()

    group.propose("n1", b"a")
    group.run(10)

    assert answers(group, "n2") == answers(group, "n3") == []
    assert group["n1"].data() == []
    group.thaw_disk("n3")
    group.run(10)
    assert group["n1"].data() == [b"a"]


def test_a_repeated_append_is_answered_only_once_its_entries_are_flushed_R1() -> None:
    group = Group(3)
    group.elect()
    group.freeze_disk("n2")
    group.drop = lambda sent: True
    group.sent.clear()
    append = Append(2, 2, 2, 2, (run_of((3, 2, b"a")),))

    group.inject("n2", "n1", append)
    group.inject("n2", "n1", append)
    group.run(10)

    assert answers(group, "n2") == []
    group.thaw_disk("n2")
    group.run(10)
    assert [answer.index for answer in answers(group, "n2")] == [3, 3]


def test_a_failed_write_ends_the_leadership_and_everything_else_R4() -> None:
    group = Group(3)
    group.elect()
    group["n1"].disk.error = "input/output error"

    group.propose("n1", b"a")
    group.propose("n1", b"b")
    group.run(10)

    assert group["n1"].role is Role.FOLLOWER
    assert [one.reason for one in group["n1"].of(Dropped) if isinstance(one, Dropped)] == [Reason.STORAGE_FAILED]
    group.propose("n1", b"c")
    assert group["n1"].of(Dropped)[-1] == Dropped(1, Reason.STORAGE_FAILED)
    group.sent.clear()
    group.run(3000)
    assert [sent for sent in group.sent if sent.sender == "n1"] == []
    assert group.leader.name != "n1"


def test_an_index_is_not_reused_in_the_term_after_its_write_failed_R4() -> None:
    group = Group(3)
    group.elect()
    group["n1"].disk.error = "input/output error"
    group.drop = lambda sent: sent.to == "n3"
    group.propose("n1", b"lost here, kept at n2")
    group.run(10)

    group["n1"].disk.error = ""
    group.drop = lambda sent: False
    group.restart("n1")
    group.run(3000)
    group.propose(group.leader.name, b"next")
    group.run(50)

    assert group.leader.term > 2
    assert len({tuple(node.data()) for node in group.nodes.values()}) == 1


def test_earlier_terms_commit_only_with_an_entry_of_the_own_R26() -> None:
    """Figure 8 of the paper: counting replicas of an old entry proves nothing."""
    group = Group(3)
    group.elect()
    group.partition(["n1"])
    group.propose("n1", b"old")
    group.run(20)
    group.partition(["n1", "n2"])
    group.drop = lambda sent: sent.sender == "n1" and isinstance(sent.message, Append) and _term(sent.message) > 2
    core = group["n1"].machine.core
    core.set_term(5, node_id("n1"))  # as if it had been deposed and elected again
    core.finish()
    group.run(2)

    leadership = group["n1"].machine.leadership
    assert leadership is not None
    leadership.peers[node_id("n2")].match = 3
    leadership.advance_commit()

    assert core.log.last_term == 2
    assert core.commit == 2


def _term(append: Append) -> int:
    return max(entry.term for run in append.runs for entry in decode_run(run)) if append.runs else 0


def test_a_follower_commits_no_further_than_what_an_append_verified_R27() -> None:
    group = Group(3)
    group.elect()
    group.partition(["n2"])
    group.inject("n2", "n1", Append(2, 2, 2, 2, (run_of((3, 2, b"a"), (4, 2, b"b")),)))

    group.inject("n2", "n3", Append(3, 2, 2, 4, (run_of((3, 3, b"x")),)))

    assert group["n2"].commit == 3
    assert group["n2"].data() == [b"x"]


def test_a_stale_tail_is_not_committed_by_a_new_leaders_heartbeat_R27() -> None:
    group = Group(3)
    group.elect()
    group.partition(["n2"])
    group.inject("n2", "n1", Append(2, 2, 2, 2, (run_of((3, 2, b"old")),)))

    group.inject("n2", "n3", Heartbeat(3, 1, 3))

    assert group["n2"].commit == 2


def test_a_stale_append_truncates_nothing_that_matches_R28() -> None:
    group = Group(3)
    group.elect()
    first = Append(2, 2, 2, 2, (run_of((3, 2, b"a")),))
    group.inject("n2", "n1", first)
    group.inject("n2", "n1", Append(2, 3, 2, 2, (run_of((4, 2, b"b")),)))

    group.inject("n2", "n1", first)

    assert group["n2"].log()[-2:] == [(3, 2), (4, 2)]


def test_a_conflict_replaces_the_rest_in_one_record_R6() -> None:
    group = Group(3)
    group.elect()
    group.partition(["n2"])
    group.inject("n2", "n1", Append(2, 2, 2, 2, (run_of((3, 2, b"a"), (4, 2, b"b")),)))
    group.run(5)
    before = len(group["n2"].disk.records)

    group.inject("n2", "n3", Append(3, 2, 2, 2, (run_of((3, 3, b"x")),)))
    group.run(5)

    assert len(group["n2"].disk.records) == before + 1
    assert [(entry.index, entry.term) for entry in recover(group["n2"].disk).entries] == group["n2"].log()
    group.restart("n2")
    assert group["n2"].log()[-1] == (3, 3)


def test_a_committed_entry_is_never_truncated() -> None:
    group = Group(3)
    group.elect()

    with pytest.raises(InvariantError):
        group.inject("n2", "n3", Append(3, 1, 1, 1, (run_of((2, 3, b"x")),)))


def test_a_write_that_ends_late_vouches_for_no_other_entry_R29() -> None:
    """An entry is overwritten while its first write is on its way; that write's end says nothing of the second (I36)."""
    group = Group(3)
    group.elect()
    log = group["n2"].machine.core.log
    group.freeze_disk("n2")
    group.inject("n2", "n1", Append(2, 2, 2, 2, (run_of((3, 2, b"a")),)))
    group.inject("n2", "n3", Append(3, 2, 2, 2, (run_of((3, 3, b"b")),)))
    writes = [write.number for write in group["n2"].disk.waiting if isinstance(write, Persist)]

    group["n2"].machine.persisted(writes[0], group.now_ns)

    assert log.durable == 2
    group["n2"].machine.persisted(writes[1], group.now_ns)
    assert log.durable == 3


def test_uncommitted_bytes_are_bounded_R32() -> None:
    group = Group(3, limits=Limits(max_uncommitted_bytes=10_000))
    group.elect()
    group.partition(["n1"])

    for _ in range(30):
        group.propose("n1", b"x" * 1000)
        group.run(2)

    assert len(group["n1"].log()) < 14
    assert group["n1"].of(Dropped)[-1] == Dropped(1, Reason.TOO_MANY_UNCOMMITTED)


def test_a_command_that_is_too_large_is_dropped() -> None:
    group = Group(1, limits=Limits(max_command_bytes=100))
    group.elect()

    group.propose("n1", b"x" * 100)

    assert group["n1"].of(Dropped) == [Dropped(1, Reason.TOO_LARGE)]


def test_a_follower_drops_proposals() -> None:
    group = Group(3)
    group.elect()

    group.propose("n2", b"a")

    assert group["n2"].of(Dropped) == [Dropped(1, Reason.NOT_LEADER)]


def test_appends_in_flight_are_bounded_by_messages() -> None:
    group = Group(3, limits=Limits(max_inflight_messages=3))
    group.elect()
    group.drop = lambda sent: sent.sender == "n2" and sent.lane is Lane.APPEND
    group.sent.clear()

    for _ in range(10):
        group.propose("n1", b"x")
        group.run(3)

    assert len(appends(group, "n2")) == 3
    group.run(3)
    assert len(group["n3"].data()) == 10


def test_appends_in_flight_are_bounded_by_bytes() -> None:
    group = Group(3, limits=Limits(max_inflight_bytes=2500, max_append_bytes=1000))
    group.elect()
    group.drop = lambda sent: sent.sender == "n2" and sent.lane is Lane.APPEND
    group.sent.clear()

    for _ in range(10):
        group.propose("n1", b"x" * 900)
        group.run(3)

    assert len(appends(group, "n2")) == 3


def test_large_batches_are_cut_into_appends() -> None:
    group = Group(3, limits=Limits(max_append_bytes=1000))
    group.elect()
    group.sent.clear()

    group.propose("n1", *[b"x" * 300] * 20)
    group.run(30)

    assert max(sum(map(len, append.runs)) for append in appends(group, "n2")) < 1100
    assert len(group["n2"].data()) == 20


def test_a_reset_session_is_probed_and_filled_again() -> None:
    group = Group(3)
    group.elect()
    group.drop = lambda sent: sent.to == "n2" and sent.lane is Lane.APPEND
    group.propose("n1", b"a", b"b")
    group.run(5)
    group.drop = lambda sent: False

    group["n1"].step(PeerReset(node_id("n2")))
    group.propose("n1", b"c")
    group.run(20)
    assert group["n2"].data() == []  # nothing goes out while the session is down
    group["n1"].step(PeerReady(node_id("n2")))
    group.run(10)

    assert group["n2"].data() == [b"a", b"b", b"c"]


def test_lost_appends_are_repeated_even_if_nobody_tells() -> None:
    group = Group(3)
    group.elect()
    group.drop = lambda sent: sent.to == "n2" and sent.lane is Lane.APPEND
    group.propose("n1", b"a")
    group.run(20)

    group.drop = lambda sent: False
    group.run(1000)

    assert group["n2"].data() == [b"a"]


def test_logs_that_parted_are_joined_in_few_steps() -> None:
    """Section 3.5: the refusal names where the logs may still agree, so a term is skipped in one step."""
    group = Group(3)
    group.elect()
    group.partition(["n1"])
    for number in range(40):
        group.propose("n1", b"lost %d" % number)
        group.run(3)
    group.run(2000)
    group.propose(group.leader.name, *[b"kept %d" % number for number in range(40)])
    group.run(20)
    group.sent.clear()

    group.heal()
    group.run(500)

    assert group["n1"].log() == group["n2"].log() == group["n3"].log()
    assert sum(not answer.matched for answer in answers(group, "n1")) <= 3


def test_a_restarted_group_keeps_what_it_acknowledged() -> None:
    group = Group(3)
    group.elect()
    group.propose("n1", b"a")
    group.run(20)

    for name in group.nodes:
        group.crash(name)
    for name in group.nodes:
        group.restart(name)
    group.elect()

    assert [node.data() for node in group.nodes.values()] == [[b"a"]] * 3


def test_a_leader_that_died_after_its_quorum_answered_loses_nothing() -> None:
    group = Group(3)
    group.elect()
    group.freeze_disk("n1")
    group.propose("n1", b"a")
    group.run_until(lambda: group["n1"].data() == [b"a"])

    group.crash("n1")
    group.run(2000)

    assert group.leader.data() == [b"a"]


def test_a_proposal_and_its_failure_name_the_request() -> None:
    group = Group(3)
    group.elect()
    group.freeze_disk("n1")
    group["n1"].step(Propose(41, b"a"))
    group["n1"].step(Propose(42, b"b"))

    group.inject("n1", "n2", Heartbeat(3, 1, 2))

    assert group["n1"].of(Appended)[-1] == Appended(41, 3, 2)
    assert group["n1"].of(Dropped) == [Dropped(42, Reason.NOT_LEADER)]
