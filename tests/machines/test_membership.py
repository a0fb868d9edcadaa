"""Who shall vote: every single step is safe, and repeated steps reach the wanted set."""

from __future__ import annotations

from collections.abc import Collection

import attrs

from ha_core.ids import LinkName, NodeId
from ha_core.machines.membership import REPLACE_AFTER_NS, Contact, next_change, next_leader
from ha_core.machines.raft.configuration import Configuration, Member, change_configuration
from ha_core.machines.raft.types import AddLearner, Promote, Remove

N = [NodeId(f"aam@h{number}.example") for number in range(8)]

ADDRESS = {LinkName("a"): "127.0.0.9:1"}


def configuration(voters: Collection[int], learners: Collection[int] = ()) -> Configuration:
    return Configuration(
        incoming=tuple(N[i] for i in voters),
        learners=tuple(N[i] for i in learners),
        members={N[i]: Member(b"r%d" % i) for i in (*voters, *learners)},
    )


def alive(*numbers: int) -> dict[NodeId, Contact]:
    return {N[i]: Contact(b"r%d" % i, {}) for i in numbers}


def settle(config: Configuration, contacts: dict[NodeId, Contact], registered: Collection[NodeId]) -> list[object]:
    """Carry out changes until none is left, each of them checked."""
    done: list[object] = []
    while (change := next_change(config, leader=N[1], registered=registered, contacts=contacts)) is not None:
        config = change_configuration(config, change)
        config.check()
        live = [node for node in config.voters if node in contacts and contacts[node].alive]
        assert config.has_quorum(live), change
        done.append(change)
        assert len(done) < 30
    done.append(config)
    return done


def test_hosts_join_as_learners_and_five_become_primaries() -> None:
    *_, config = settle(configuration([1]), alive(1, 2, 3, 4, 5, 6, 7), N[1:8])

    assert isinstance(config, Configuration)
    assert len(config.voters) == 5
    assert len(config.learners) == 2


def test_an_even_number_of_hosts_leaves_one_secondary() -> None:
    *_, config = settle(configuration([1]), alive(1, 2, 3, 4), N[1:5])

    assert isinstance(config, Configuration)
    assert len(config.voters) == 3


def test_nothing_changes_in_a_healthy_cluster() -> None:
    assert next_change(configuration([1, 2, 3]), leader=N[1], registered=N[1:4], contacts=alive(1, 2, 3)) is None


def test_a_dead_primary_is_replaced_by_a_secondary_that_votes_before_it_goes() -> None:
    contacts = alive(1, 2, 4) | {N[3]: Contact(b"r3", {}, REPLACE_AFTER_NS)}

    steps = settle(configuration([1, 2, 3], [4]), contacts, N[1:5])

    assert steps[:2] == [Promote(N[4]), Remove(N[3])]


def test_two_dead_primaries_of_five_are_replaced_one_after_the_other() -> None:
    contacts = alive(1, 2, 3, 6, 7) | {N[i]: Contact(b"r%d" % i, {}, REPLACE_AFTER_NS) for i in (4, 5)}
    many = [NodeId(f"aam@s{number}.example") for number in range(6)]
    config = configuration([1, 2, 3, 4, 5], [6, 7])
    config = attrs.evolve(
        config,
        learners=tuple(sorted((*config.learners, *many))),
        members={**config.members, **{node: Member(b"s") for node in many}},
    )
    contacts |= {node: Contact(b"s", {}) for node in many}

    *changes, after = settle(config, contacts, [*N[1:8], *many])

    assert isinstance(after, Configuration)
    assert len(after.voters) == 5
    assert not {N[4], N[5]} & set(after.voters)
    assert [type(change) for change in changes[:4]] == [Promote, Remove, Promote, Remove]


def test_a_primary_that_is_silent_for_a_moment_is_kept() -> None:
    contacts = alive(1, 2, 4) | {N[3]: Contact(b"r3", {}, REPLACE_AFTER_NS // 2)}

    assert next_change(configuration([1, 2, 3], [4]), leader=N[1], registered=N[1:5], contacts=contacts) is None


def test_a_wiped_voter_is_removed_and_joins_anew() -> None:
    contacts = alive(1, 2) | {N[3]: Contact(b"new", {})}

    steps = settle(configuration([1, 2, 3]), contacts, N[1:4])

    assert steps[:3] == [Remove(N[3]), AddLearner(N[3], b"new", {}), Promote(N[3])]


def test_an_unregistered_host_is_removed() -> None:
    assert next_change(configuration([1, 2, 3]), leader=N[1], registered=N[1:3], contacts=alive(1, 2, 3)) == Remove(N[3])


def test_a_leader_whose_host_is_not_registered_hands_over_before_it_is_removed() -> None:
    config, contacts = configuration([1, 2, 3]), alive(2, 3)

    assert next_change(config, leader=N[1], registered=N[2:4], contacts=contacts) is None
    assert next_leader(config, leader=N[1], registered=N[2:4], contacts=contacts) == N[2]


def test_nothing_is_done_that_would_leave_the_living_without_a_quorum() -> None:
    """Two of three are dead: adding a third voter needs a quorum of four, which there is not."""
    contacts = alive(1, 4) | {N[i]: Contact(b"r%d" % i, {}, 10 * REPLACE_AFTER_NS) for i in (2, 3)}

    assert next_change(configuration([1, 2, 3], [4]), leader=N[1], registered=N[1:5], contacts=contacts) is None


def test_a_new_address_of_a_voter_is_written_down_without_a_change_of_role() -> None:
    contacts = alive(1, 2, 3) | {N[2]: attrs.evolve(alive(2)[N[2]], addresses=ADDRESS)}

    steps = settle(configuration([1, 2, 3]), contacts, N[1:4])

    assert steps[0] == AddLearner(N[2], b"r2", ADDRESS)
    assert len(steps) == 2
