"""The database campaign: plays both kinds of worlds, is reproducible, and its checkers see what they should."""

from __future__ import annotations

import pytest

from ha_core.machines.raft.configuration import Configuration, Member
from ha_core.machines.raft.messages import VoteAnswer, encode
from ha_core.machines.raft.records import encode_record
from ha_core.testing.campaigns import load_campaign, play_seed
from ha_core.testing.campaigns.consensus import ConsensusChecker, DiskReader
from ha_core.testing.simulator import MILLISECOND, SimDisk, Simulation
from tests.machines.raft.group import node_id


@pytest.mark.parametrize("seed", [1, 3])
def test_a_seed_plays_without_a_violation_and_twice_the_same(seed: int) -> None:
    one, other = (play_seed(load_campaign("database"), seed) for _ in range(2))

    assert one.violations == ()
    assert one.trace_hash == other.trace_hash
    assert one.checks["I35"] > 100


def test_both_kinds_of_worlds_are_played() -> None:
    kinds = {Simulation(seed).stream("kind").random() < 0.34 for seed in range(1, 20)}

    assert kinds == {True, False}


def vote(term: int, granted: bool = True) -> bytes:
    return encode(b"c" * 8, b"s" * 16, b"r" * 16, VoteAnswer(term, False, 1, granted, 0))


def write(sim: Simulation, disk: SimDisk, record: bytes) -> None:
    disk.append(record, lambda error: None)
    sim.run_for(100 * MILLISECOND)


def test_a_second_vote_in_a_term_is_seen_I37() -> None:
    sim = Simulation(1)
    disk = SimDisk(sim, "n1")
    checker = ConsensusChecker(sim, {"n1": disk}, lambda name: None)
    write(sim, disk, encode_record(5, node_id("n2"), 0, 0, []))

    checker.sent_datagram("n1", node_id("n2"), vote(5))
    assert sim.violations == []
    checker.sent_datagram("n1", node_id("n3"), vote(5, granted=False))
    assert sim.violations == []
    checker.sent_datagram("n1", node_id("n3"), vote(5))

    assert [violation.invariant for violation in sim.violations] == ["I37"]


def test_a_vote_that_is_not_on_the_disk_is_seen_I37() -> None:
    sim = Simulation(1)
    checker = ConsensusChecker(sim, {"n1": SimDisk(sim, "n1")}, lambda name: None)

    checker.sent_datagram("n1", node_id("n2"), vote(5))

    assert [violation.invariant for violation in sim.violations] == ["I37"]


def test_old_reads_and_parted_states_are_seen_I40_I41() -> None:
    sim = Simulation(1)
    checker = ConsensusChecker(sim, {}, lambda name: None)

    checker.read_ready("n1", 5, 5)
    checker.read_ready("n1", 5, 4)
    checker.state("n1", 7, 1)
    checker.state("n2", 7, 2)

    assert [violation.invariant for violation in sim.violations] == ["I40", "I41"]


def test_a_disk_is_read_as_a_restart_would() -> None:
    from ha_core.machines.raft.messages import encode_run
    from ha_core.machines.raft.records import encode_checkpoint
    from ha_core.machines.raft.types import Entry, EntryKind

    sim = Simulation(1)
    disk = SimDisk(sim, "n1")
    reader = DiskReader(disk)
    entries = [Entry(index, 1, EntryKind.COMMAND, b"x") for index in (1, 2)]
    write(sim, disk, encode_record(1, None, 0, 0, [encode_run(entries)]))
    assert reader.holds(2, 1)
    assert not reader.holds(2, 2)
    assert not reader.holds(3, 1)

    configuration = Configuration(incoming=(node_id("n1"),), members={node_id("n1"): Member(b"")})
    disk.checkpoint(encode_checkpoint(2, 1, configuration, b"s").payload, [], lambda error: None)
    sim.run_for(100 * MILLISECOND)
    assert reader.holds(1, 1)
    assert not reader.holds(3, 1)
    disk.lose()
    assert not reader.holds(1, 1)
