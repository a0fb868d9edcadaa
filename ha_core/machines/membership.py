"""Who shall vote: the next single change towards the wanted set of primaries, decided by the leader.

Rules, in the order in which they are tried:

1. A member whose host is no longer registered is removed.
2. A member that comes back under another incarnation (wiped disk) has lost its promises: it is removed, and joins anew (R11).
3. A live host that is no member becomes a learner.
4. A voter that has been silent for ``replace_after_ns`` is replaced: first a live learner is promoted, then the dead one goes.
5. While there are fewer voters than wanted, a live learner is promoted.

Never is a change proposed after which the live voters would be no quorum, and never the leader itself removed: one whose own
host is no longer registered hands over first (``next_leader``). Wanted are five, or the largest odd number that the live
members allow: an even number adds a voter without tolerating one more failure.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import attrs

from ha_core.ids import LinkName, NodeId
from ha_core.machines.raft.configuration import Configuration, change_configuration
from ha_core.machines.raft.types import AddLearner, Change, ConfigurationRefused, Promote, Remove

MAX_PRIMARIES = 5
REPLACE_AFTER_NS = 20_000_000_000
"""Longer than a reboot of the agents, shorter than an administrator's patience: a change of voters is never urgent."""


@attrs.frozen
class Contact:
    """What the leader knows of a node: what it said of itself when its session came up, and how long it has been silent."""

    replica: bytes
    addresses: Mapping[LinkName, str]
    silent_ns: int = 0
    """0 while its session stands and a path to it is up."""

    @property
    def alive(self) -> bool:
        return self.silent_ns == 0


def next_change(
    configuration: Configuration,
    *,
    leader: NodeId,
    registered: Collection[NodeId],
    contacts: Mapping[NodeId, Contact],
    replace_after_ns: int = REPLACE_AFTER_NS,
    max_voters: int = MAX_PRIMARIES,
) -> Change | None:
    """The change to propose now; None if the configuration is as it should be, or nothing may be done safely."""
    if configuration.outgoing:
        return None
    proposals = [
        *_removals(configuration, registered, contacts),
        *_joins(configuration, registered, contacts),
        *_replacements(configuration, contacts, replace_after_ns),
        *_promotions(configuration, contacts, max_voters),
    ]
    for change in proposals:
        if _is_safe(configuration, change, leader, contacts):
            return change
    return None


def next_leader(
    configuration: Configuration,
    *,
    leader: NodeId,
    registered: Collection[NodeId],
    contacts: Mapping[NodeId, Contact],
) -> NodeId | None:
    """To whom a leader whose own host is no longer registered hands over; None if it may stay, or nobody can take it."""
    if leader in registered or configuration.outgoing:
        return None
    voters = [node for node in configuration.voters if node != leader and node in registered and _is_alive(node, contacts)]
    return next((node for node in voters if not _is_other(configuration, node, contacts)), None)


def _removals(configuration: Configuration, registered: Collection[NodeId], contacts: Mapping[NodeId, Contact]) -> list[Change]:
    gone = [node for node in configuration.nodes if node not in registered]
    wiped = [node for node in configuration.voters if _is_other(configuration, node, contacts)]
    return [Remove(node) for node in (*gone, *wiped)]


def _is_other(configuration: Configuration, node: NodeId, contacts: Mapping[NodeId, Contact]) -> bool:
    """True if the node speaks under another incarnation than the one that is a member."""
    known = configuration.members[node].replica
    contact = contacts.get(node)
    return bool(known) and contact is not None and contact.alive and contact.replica not in (b"", known)


def _joins(configuration: Configuration, registered: Collection[NodeId], contacts: Mapping[NodeId, Contact]) -> list[Change]:
    changes: list[Change] = []
    for node in sorted(registered):
        contact = contacts.get(node)
        if contact is None or not contact.alive or not contact.replica:
            continue
        member = configuration.members.get(node)
        if member is None or dict(member.addresses) != dict(contact.addresses) or _is_other(configuration, node, contacts):
            changes.append(AddLearner(node, contact.replica, dict(contact.addresses)))
    return changes


def _replacements(configuration: Configuration, contacts: Mapping[NodeId, Contact], replace_after_ns: int) -> list[Change]:
    dead = [node for node in configuration.voters if (contact := contacts.get(node)) and contact.silent_ns >= replace_after_ns]
    if not dead:
        return []
    if len(configuration.voters) % 2 == 0:  # a stand-in votes already
        return [Remove(node) for node in dead]
    return [Promote(node) for node in configuration.learners if _is_alive(node, contacts)]


def _promotions(configuration: Configuration, contacts: Mapping[NodeId, Contact], max_voters: int) -> list[Change]:
    voters = len(configuration.voters)
    learners = [node for node in configuration.learners if _is_alive(node, contacts)]
    possible = voters + len(learners)
    wanted = possible if possible <= 2 else min(max_voters, possible - (possible % 2 == 0))
    return [Promote(node) for node in learners] if voters < wanted else []


def _is_alive(node: NodeId, contacts: Mapping[NodeId, Contact]) -> bool:
    contact = contacts.get(node)
    return contact is not None and contact.alive


def _is_safe(configuration: Configuration, change: Change, leader: NodeId, contacts: Mapping[NodeId, Contact]) -> bool:
    if isinstance(change, Remove) and change.node == leader:
        return False
    try:
        after = change_configuration(configuration, change)
    except ConfigurationRefused:
        return False
    alive = [
        node
        for node in after.voters
        if node == leader or (_is_alive(node, contacts) and not _is_other(configuration, node, contacts))
    ]
    return after.voters == configuration.voters or after.has_quorum(alive)
