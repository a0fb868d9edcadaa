"""Checkpoints, compaction and snapshots in chunks: dissertation chapter 5; pitfalls R5, R10, R30, R31."""

from __future__ import annotations

from hashlib import blake2b

import attrs

from ha_core.machines.contract import WriteCheckpoint
from ha_core.machines.raft.messages import Heartbeat, SnapshotAnswer, SnapshotChunk
from ha_core.machines.raft.types import Apply, Checkpointed, Limits, MessageRefused, Reason, Restore
from tests.machines.raft.group import Group, Node, node_id

SMALL = Limits(snapshot_chunk_bytes=50, snapshot_window_chunks=2, tail_entries=0)
STATE = b"s" * 1000


def restores(node: Node) -> list[tuple[int, bytes]]:
    return [(one.index, one.state) for one in node.of(Restore) if isinstance(one, Restore)]


def compacted(limits: Limits = SMALL) -> Group:
    """n3 was away while the others went on and compacted."""
    group = Group(3, limits=limits)
    group.elect()
    group.partition(["n3"])
    group.propose("n1", *[b"x"] * 10)
    group.run(20)
    group.checkpoint("n1", STATE)
    group.run(5)
    return group


def test_a_checkpoint_compacts_the_log_and_restores_after_a_restart() -> None:
    group = Group(3)
    group.elect()
    group.propose("n1", b"a", b"b")
    group.run(20)
    group.checkpoint("n1", b"ab")
    group.propose("n1", b"c")
    group.run(20)

    group.crash("n1")
    group.start("n1")
    assert restores(group["n1"]) == [(4, b"ab")]
    group.run(1000)

    assert group["n1"].data() == [b"c"]


def test_a_checkpoint_and_its_configuration_are_one_write_R5() -> None:
    group = Group(3)
    group.elect()
    group.freeze_disk("n1")

    group.checkpoint("n1", b"s")

    assert isinstance(group["n1"].disk.waiting[-1], WriteCheckpoint)
    group.crash("n1")
    group.thaw_disk("n1")
    group.start("n1")
    assert restores(group["n1"]) == []
    assert group["n1"].machine.core.log.last_index == 2


def test_a_slow_follower_is_served_from_the_tail_R31() -> None:
    group = compacted(Limits(tail_entries=100))

    group.heal()
    group.run(100)

    assert restores(group["n3"]) == []
    assert len(group["n3"].data()) == 10


def test_the_tail_is_bounded_R31() -> None:
    group = Group(3, limits=Limits(tail_entries=5))
    group.elect()
    for _ in range(5):
        group.propose("n1", *[b"x"] * 10)
        group.run(20)
        group.checkpoint("n1")
        group.run(5)

    log = group["n1"].machine.core.log
    assert log.last_index - log.base_index == 5


def test_a_follower_too_far_behind_gets_a_snapshot_in_chunks() -> None:
    group = compacted()
    group.sent.clear()

    group.heal()
    group.propose("n1", b"after")
    group.run(500)

    assert restores(group["n3"]) == [(12, STATE)]
    assert group["n3"].data() == [b"after"]
    assert len(group.messages(SnapshotChunk, to="n3")) >= 20


def test_chunks_in_flight_are_bounded() -> None:
    group = compacted()
    group.drop = lambda sent: isinstance(sent.message, SnapshotAnswer)
    group.sent.clear()

    group.heal()
    group.run(20)

    assert len(group.messages(SnapshotChunk, to="n3")) == 2


def test_a_transfer_goes_on_after_silence() -> None:
    group = compacted()
    group.drop = lambda sent: isinstance(sent.message, SnapshotChunk) and sent.message.offset == 100
    group.heal()
    group.run(100)
    assert restores(group["n3"]) == []

    group.drop = lambda sent: False
    group.run(2000)

    assert restores(group["n3"]) == [(12, STATE)]


def test_a_restored_follower_survives_a_restart() -> None:
    group = compacted()
    group.heal()
    group.run(500)

    group.crash("n3")
    group["n3"].effects.clear()
    group.start("n3")

    assert restores(group["n3"]) == [(12, STATE)]
    assert group["n3"].machine.core.log.configuration == group["n1"].machine.core.log.configuration


def test_a_snapshot_is_confirmed_only_once_it_is_flushed_R1() -> None:
    group = compacted()
    group.freeze_disk("n3")
    group.heal()
    group.run(500)

    leadership = group["n1"].machine.leadership
    assert leadership is not None
    assert leadership.peers[node_id("n3")].match < 12
    group.thaw_disk("n3")
    group.run(500)
    assert leadership.peers[node_id("n3")].match >= 12


def _chunks(group: Group) -> list[SnapshotChunk]:
    group.sent.clear()
    group.heal()
    group.run(500)
    return [chunk for chunk in group.messages(SnapshotChunk, to="n3") if isinstance(chunk, SnapshotChunk)]


def test_a_damaged_chunk_is_refused() -> None:
    chunks = _chunks(compacted())
    group = compacted()

    group.inject("n3", "n1", attrs.evolve(chunks[0], data=b"?" * 50))

    assert [one.reason for one in group["n3"].of(MessageRefused) if isinstance(one, MessageRefused)] == [Reason.MALFORMED]


def test_a_snapshot_whose_whole_does_not_match_is_refused() -> None:
    chunks = _chunks(compacted())
    group = compacted()
    data = b"?" * 50
    chunks[3] = attrs.evolve(chunks[3], data=data, chunk_digest=blake2b(data, digest_size=16).digest())

    for chunk in chunks:
        group.inject("n3", "n1", chunk)

    assert restores(group["n3"]) == []
    assert group["n3"].commit == 2
    assert [one.reason for one in group["n3"].of(MessageRefused) if isinstance(one, MessageRefused)] == [Reason.MALFORMED]


def test_chunks_of_two_snapshots_do_not_mix_R30() -> None:
    group = compacted()
    chunks = _chunks(compacted())
    group.inject("n3", "n1", chunks[0])
    group.inject("n3", "n1", attrs.evolve(chunks[1], digest=b"another"))

    group.inject("n3", "n1", chunks[1])

    assert restores(group["n3"]) == []
    staging = group["n3"].machine.following._staging
    assert staging is not None
    assert len(staging.data) == 0  # it begins again at its own offset 0


def test_an_old_snapshot_after_newer_log_changes_nothing_R30() -> None:
    """Else the state would go back (I35)."""
    chunks = _chunks(compacted())
    group = compacted()
    group.heal()
    group.propose("n1", b"after")
    group.run(500)
    before = group["n3"].log(), group["n3"].commit

    for chunk in chunks:
        group.inject("n3", "n1", chunk)
    group.run(10)

    assert (group["n3"].log(), group["n3"].commit) == before
    assert restores(group["n3"]) == [(12, STATE)]


def test_a_snapshot_that_the_log_reaches_beyond_keeps_the_rest_R30() -> None:
    """Entries behind it have been acknowledged: they may be committed already (I36)."""
    group = Group(3, limits=SMALL)
    group.elect()
    group.drop = lambda sent: sent.to == "n3" and isinstance(sent.message, Heartbeat)  # it hears of no commit
    group.propose("n1", *[b"x"] * 5)
    group.run(20)
    assert (group["n3"].commit, group["n3"].log()[-1]) == (2, (7, 2))
    donor = Group(3, limits=SMALL)
    donor.elect()
    donor.propose("n1", *[b"x"] * 5)
    donor.run(20)
    donor["n1"].step(Checkpointed(4, STATE))
    snapshot = donor["n1"].machine.core.log.snapshot

    payload = snapshot.payload
    digest = blake2b(payload, digest_size=32).digest()
    group.inject(
        "n3", "n1", SnapshotChunk(2, 4, 2, digest, len(payload), 0, blake2b(payload, digest_size=16).digest(), payload)
    )

    assert restores(group["n3"]) == []
    assert group["n3"].log()[-1] == (7, 2)
    assert group["n3"].commit == 4
    assert [entry.index for one in group["n3"].of(Apply)[-1:] if isinstance(one, Apply) for entry in one.entries] == [3, 4]


def test_an_older_checkpoint_changes_nothing() -> None:
    group = Group(1)
    group.elect()
    group.propose("n1", b"a", b"b")
    group.run(10)
    group["n1"].step(Checkpointed(4, b"new"))

    group["n1"].step(Checkpointed(3, b"old"))

    assert group["n1"].machine.core.log.snapshot.index == 4


def test_a_learner_beyond_the_log_begins_with_a_snapshot() -> None:
    group = Group(3, 1, limits=SMALL)
    group.elect()
    group.propose("n1", b"a")
    group.run(20)
    group.checkpoint("n1", STATE)
    group.run(5)

    group.add_learner("n1", "n4")
    group.run(500)

    assert restores(group["n4"]) == [(3, STATE)]
    assert group["n4"].commit == group["n1"].commit
