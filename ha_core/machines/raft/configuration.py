"""Who votes, who learns, under which incarnation and addresses; and how one configuration becomes the next.

A configuration has two voter sets so that joint consensus fits the record and entry formats; outside a joint change
``outgoing`` is empty. A decision needs a majority of each set that is not empty.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import attrs
import msgpack

from ha_core.errors import DecodeError, invariant
from ha_core.ids import LinkName, NodeId
from ha_core.machines.raft.types import AddLearner, Change, ConfigurationRefused, Promote, Reason, Remove

MAX_RETIRED = 256
"""How many replica ids of removed members are remembered, so that their messages are refused."""


@attrs.frozen
class Member:
    """``replica`` is the incarnation of the member's store; empty until the first leader has heard it (bootstrap)."""

    replica: bytes
    addresses: Mapping[LinkName, str] = attrs.field(factory=dict)


@attrs.frozen
class Configuration:
    """Sorted voter sets and learners; ``members`` has exactly their union. Nobody is voter and learner at once."""

    incoming: tuple[NodeId, ...]
    outgoing: tuple[NodeId, ...] = ()
    learners: tuple[NodeId, ...] = ()
    members: Mapping[NodeId, Member] = attrs.field(factory=dict)
    retired: tuple[bytes, ...] = ()

    @property
    def voters(self) -> tuple[NodeId, ...]:
        return tuple(sorted({*self.incoming, *self.outgoing})) if self.outgoing else self.incoming

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """Everybody, sorted."""
        return tuple(sorted(self.members))

    def is_voter(self, node: NodeId) -> bool:
        return node in self.incoming or node in self.outgoing

    def has_quorum(self, nodes: Collection[NodeId]) -> bool:
        """True if ``nodes`` holds a majority of each voter set."""
        return bool(self.incoming) and all(
            2 * sum(node in nodes for node in voters) > len(voters) for voters in (self.incoming, self.outgoing) if voters
        )

    def can_still_win(self, refused: Collection[NodeId]) -> bool:
        """False once the voters outside ``refused`` are no quorum."""
        return self.has_quorum([node for node in self.voters if node not in refused])

    def quorum_value(self, value_of: Callable[[NodeId], int]) -> int:
        """The largest value that a quorum has reached, each voter's own being ``value_of(voter)``."""
        reached = [sorted(map(value_of, voters))[(len(voters) - 1) // 2] for voters in (self.incoming, self.outgoing) if voters]
        return min(reached, default=0)

    def knows(self, node: NodeId, replica: bytes) -> bool:
        """True if ``node`` is a member under this incarnation, or under one not yet known."""
        member = self.members.get(node)
        return member is not None and member.replica in (b"", replica)

    def check(self) -> None:
        invariant(self.incoming, "a configuration without voters")
        for names in (self.incoming, self.outgoing, self.learners):
            invariant(names == tuple(sorted(set(names))), "names are sorted and unique", names=names)
        invariant({*self.voters, *self.learners} == set(self.members), "members are the voters and learners")
        invariant(not {*self.voters} & {*self.learners}, "nobody is voter and learner")


def change_configuration(old: Configuration, change: Change) -> Configuration:
    """The configuration after ``change``: at most one voter more or less, so that old and new quorums always meet.

    Raises:
        ConfigurationRefused: the change does not fit ``old``; nothing happened.

    Source: dissertation section 4.1.
    """
    match change:
        case AddLearner():
            return _add_learner(old, change)
        case Promote(node=node):
            if node not in old.learners:
                raise ConfigurationRefused(Reason.NO_LEARNER)
            return attrs.evolve(
                old,
                incoming=tuple(sorted((*old.incoming, node))),
                learners=tuple(name for name in old.learners if name != node),
            )
        case Remove(node=node):
            if node not in old.members:
                raise ConfigurationRefused(Reason.NO_MEMBER)
            if old.voters == (node,):
                raise ConfigurationRefused(Reason.LAST_VOTER)
            return attrs.evolve(
                old,
                incoming=tuple(name for name in old.incoming if name != node),
                learners=tuple(name for name in old.learners if name != node),
                members={name: member for name, member in old.members.items() if name != node},
                retired=_retire(old, old.members[node].replica),
            )


def _add_learner(old: Configuration, change: AddLearner) -> Configuration:
    member = Member(change.replica, dict(change.addresses))
    known = old.members.get(change.node)
    if change.replica in old.retired:
        raise ConfigurationRefused(Reason.RETIRED)
    if known is None:
        return attrs.evolve(
            old,
            learners=tuple(sorted((*old.learners, change.node))),
            members={**old.members, change.node: member},
        )
    if known.replica not in (b"", change.replica):
        # A wiped voter must be removed first: its old incarnation's promises cannot be carried over (R11).
        if old.is_voter(change.node):
            raise ConfigurationRefused(Reason.OTHER_INCARNATION)
        return attrs.evolve(old, members={**old.members, change.node: member}, retired=_retire(old, known.replica))
    # New addresses, same role (R24).
    return attrs.evolve(old, members={**old.members, change.node: member})


def _retire(old: Configuration, replica: bytes) -> tuple[bytes, ...]:
    return (*old.retired, replica)[-MAX_RETIRED:] if replica else old.retired


def encode_configuration(configuration: Configuration) -> bytes:
    members = [
        [node, member.replica, sorted(member.addresses.items())] for node, member in sorted(configuration.members.items())
    ]
    body = [configuration.incoming, configuration.outgoing, configuration.learners, members, configuration.retired]
    packed: bytes = msgpack.packb(body)
    return packed


def decode_configuration(data: bytes) -> Configuration:
    """Raises DecodeError."""
    try:
        incoming, outgoing, learners, members, retired = msgpack.unpackb(data, use_list=False)
        configuration = Configuration(
            incoming=tuple(map(_name, incoming)),
            outgoing=tuple(map(_name, outgoing)),
            learners=tuple(map(_name, learners)),
            members={
                _name(node): Member(_bytes(replica), {LinkName(_name(link)): _name(address) for link, address in addresses})
                for node, replica, addresses in members
            },
            retired=tuple(map(_bytes, retired)),
        )
    except (ValueError, TypeError) as exc:
        raise DecodeError(f"raft: no configuration: {exc}", code="raft") from exc
    if {*configuration.voters, *configuration.learners} != set(configuration.members) or not configuration.incoming:
        raise DecodeError("raft: a configuration whose members are not its voters and learners", code="raft")
    return configuration


def _name(value: object) -> NodeId:
    if type(value) is not str:
        raise TypeError(f"expected a name, found {type(value).__name__}")
    return NodeId(value)


def _bytes(value: object) -> bytes:
    if type(value) is not bytes:
        raise TypeError(f"expected bytes, found {type(value).__name__}")
    return value
