"""Looks over the shoulders of all replicas after every step: I32 to I38, reads (I40), equal states (I41), and rule L6.

What is checked comes from the replicas' memory, from their disks (read independently, as a restart would) and from what they
send. Nothing here is told what a replica intends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from zlib import crc32

import attrs

from ha_core.ids import NodeId
from ha_core.machines.raft.configuration import Configuration
from ha_core.machines.raft.messages import VoteAnswer, VoteRequest, decode
from ha_core.machines.raft.raft import Raft
from ha_core.machines.raft.records import Durable, decode_checkpoint, replay
from ha_core.machines.raft.types import Entry, Role
from ha_core.testing.simulator import SimDisk, Simulation

_VOTES = (1, 2)
"""The codes of VoteRequest and VoteAnswer ..."""
_REMOVED = 12
"""... and of Removed: nothing else is worth decoding here."""


class DiskReader:
    """What a disk holds durably, read record by record as they come."""

    def __init__(self, disk: SimDisk) -> None:
        self.disk = disk
        self._durable = Durable()
        self._checkpoint: bytes | None = None
        self._incarnation = disk.incarnation
        self._count = 0

    def read(self) -> Durable:
        recovered = self.disk.recover()
        is_other = recovered.checkpoint is not self._checkpoint or self.disk.incarnation != self._incarnation
        if is_other or len(recovered.records) < self._count:
            self._checkpoint, self._incarnation, self._count = recovered.checkpoint, self.disk.incarnation, 0
            self._durable = Durable()
            if recovered.checkpoint is not None:
                self._durable.snapshot = decode_checkpoint(recovered.checkpoint)
                self._durable.commit = self._durable.snapshot.index
        for number in range(self._count, len(recovered.records)):
            replay(self._durable, recovered.records[number], number)
        self._count = len(recovered.records)
        return self._durable

    def holds(self, index: int, term: int) -> bool:
        durable = self.read()
        at = index - durable.snapshot.index - 1
        if at < 0:
            return index == 0 or durable.snapshot.index >= index
        return at < len(durable.entries) and durable.entries[at].term == term


@attrs.define(eq=False)
class Seen:
    """What was seen of one replica in its present life."""

    raft: Raft
    entries: list[Entry] = attrs.field(factory=list)
    base_index: int = 0
    commit: int = 0
    term: int = 0
    role: Role = Role.FOLLOWER
    configuration: Configuration | None = None
    """The committed one."""
    newest: Configuration | None = None


def _smallest_quorums(configuration: Configuration) -> Iterator[tuple[NodeId, ...]]:
    voters = configuration.voters
    return combinations(voters, len(voters) // 2 + 1)


class ConsensusChecker:
    def __init__(self, sim: Simulation, disks: Mapping[str, SimDisk], raft_of: Callable[[str], Raft | None]) -> None:
        self._sim = sim
        self._raft_of = raft_of
        self._readers = {name: DiskReader(disk) for name, disk in disks.items()}
        self._seen: dict[str, Seen] = {}
        self._leaders: dict[int, str] = {}
        self._entries: dict[tuple[int, int], tuple[int, int]] = {}
        """(index, term) -> (checksum of the entry, term of the entry before)."""
        self._committed: dict[int, tuple[int, int]] = {}
        """index -> (term, checksum)."""
        self._configured = 0
        """Index of the newest configuration known to be committed."""
        self.committed = 0
        """The largest index known to be committed, anywhere."""
        self._votes: dict[tuple[str, bytes, int], str] = {}
        self._told: dict[str, Raft] = {}
        """Removed replicas that were told so, in the life in which they were."""
        self._origins: dict[int, list[bytes]] = {}
        """term -> the incarnations that were candidates in it."""
        self._states: dict[int, int] = {}
        self._rounds: dict[tuple[int, int], int] = {}
        """(term, round) -> when it began."""
        self._confirmed: dict[int, tuple[int, int]] = {}
        """term -> (newest round that a quorum confirmed, when it began)."""
        self._counted: dict[int, int] = {}
        """term -> from when its leader counts older leases."""
        sim.watch(self.after_step)

    # -- after each step --

    def after_step(self, name: str) -> None:
        if name not in self._readers:
            return
        raft = self._raft_of(name)
        if raft is None or raft.is_failed:
            return
        seen = self._seen.get(name)
        if seen is None or seen.raft is not raft:
            seen = self._seen[name] = Seen(raft)
        self._check_log(name, seen)
        if raft.core.commit > seen.commit:
            self._check_commit(name, seen)
        self._check_term(name, seen)
        if raft.core.log.configuration is not seen.newest:
            seen.newest = raft.core.log.configuration
            self._check_configurations(name, raft)
        self._check_rounds(raft)

    def _check_log(self, name: str, seen: Seen) -> None:
        """I33: an index and a term name one entry, and everything before it. By induction it is enough to compare each
        entry's predecessor."""
        log = seen.raft.core.log
        entries, base = log.entries, log.base_index
        if base != seen.base_index:
            shift = base - seen.base_index
            seen.entries = seen.entries[shift:] if 0 < shift <= len(seen.entries) else []
            seen.base_index = base
        known = seen.entries
        same = min(len(known), len(entries))
        while same and known[same - 1] is not entries[same - 1]:
            same -= 1
        if same == len(known) == len(entries):
            return
        for at in range(same, len(entries)):
            entry = entries[at]
            before = entries[at - 1].term if at else log.base_term
            value = (crc32(entry.data, entry.kind), before)
            self._sim.checked("I33")
            known_value = self._entries.setdefault((entry.index, entry.term), value)
            if known_value != value:
                self._sim.violate("I33", f"{name} has another entry {entry.index} of term {entry.term}, or another before it")
        seen.entries = list(entries)

    def _check_term(self, name: str, seen: Seen) -> None:
        core = seen.raft.core
        if core.role is Role.CANDIDATE and core.term > seen.term:
            self._origins.setdefault(core.term, []).append(core.replica)
        if core.term > seen.term:
            origins = self._origins.get(core.term)
            if origins and seen.configuration is not None:
                self._sim.checked("I38")
                if all(origin in seen.configuration.retired for origin in origins):
                    self._sim.violate("I38", f"{name} entered term {core.term}, which a removed member made")
        if core.role is Role.LEADER and (seen.role is not Role.LEADER or core.term != seen.term):
            self._check_leader(name, seen.raft)
        seen.term, seen.role, seen.configuration = core.term, core.role, core.log.configuration_at(core.commit)

    def _check_leader(self, name: str, raft: Raft) -> None:
        sim, core = self._sim, raft.core
        sim.checked("I32")
        if self._leaders.setdefault(core.term, name) != name:
            sim.violate("I32", f"{name} leads term {core.term}, and so does {self._leaders[core.term]}")
        sim.checked("I34")
        if self.committed > core.commit and core.log.term_at(self.committed) != self._committed[self.committed][0]:
            sim.violate("I34", f"{name} leads term {core.term} without the committed entry {self.committed}")
        configuration = core.log.configuration
        assert configuration is not None
        for voter in sorted(raft.election.granted):
            sim.checked("I38")
            replica = configuration.members[voter].replica
            if replica and self._votes.get((voter, replica, core.term)) != name:
                sim.violate("I38", f"{name} counted a vote of {voter} that its member of that incarnation did not give")
        self._counted[core.term] = sim.now_ns - raft.election.lease_age_ns()
        for term in self._confirmed:
            self._check_lease(term, core.term)

    def _check_lease(self, old: int, new: int) -> None:
        """L6: a lease that an old leader confirmed was renewed before its round began, so before a new one counts from."""
        if old < new:
            self._sim.checked("I42")
            if self._counted[new] < self._confirmed[old][1]:
                self._sim.violate(
                    "I42", f"the leader of term {new} counts leases from before a round that term {old} confirmed"
                )

    def _check_configurations(self, name: str, raft: Raft) -> None:
        """I34 rests on this: quorums of any two configurations that may still decide something meet (R21, R22)."""
        mine = raft.core.log.configuration
        if mine is None or not self._may_decide(raft):
            return
        for other in self._seen:
            raft_there = self._raft_of(other)
            if raft_there is None or other == name or not self._may_decide(raft_there):
                continue
            theirs = raft_there.core.log.configuration
            if theirs is not None and theirs is not mine:
                self._sim.checked("I34")
                for one in _smallest_quorums(mine):
                    if theirs.has_quorum([node for node in theirs.voters if node not in one]):
                        self._sim.violate("I34", f"a quorum of {name}'s configuration and one of {other}'s do not meet")
                        return

    def _may_decide(self, raft: Raft) -> bool:
        """Its newest configuration is not older than the newest committed one, nor on a branch that has lost."""
        log = raft.core.log
        index = log.configuration_index
        if index < self._configured:
            return False
        at = min(self.committed, log.last_index)
        return at not in self._committed or log.term_at(at) in (None, self._committed[at][0])

    def _check_commit(self, name: str, seen: Seen) -> None:
        """I35: one entry per committed index. I36: a quorum had flushed it when it was first known to be committed."""
        core = seen.raft.core
        log = core.log
        for index in range(max(seen.commit, log.base_index) + 1, core.commit + 1):
            entry = log.entries[index - log.base_index - 1]
            value = (entry.term, crc32(entry.data, entry.kind))
            self._sim.checked("I35")
            if self._committed.setdefault(index, value) != value:
                self._sim.violate("I35", f"{name} commits another entry {index} than was committed before")
        if core.role is seen.role is Role.LEADER and core.term == seen.term and log.term_at(core.commit) != core.term:
            self._sim.violate(
                "I34", f"{name} commits entry {core.commit} of an earlier term by counting: its successor may lack it"
            )
        if core.commit > self.committed:
            self._check_flushed(name, seen.raft)
            self.committed = core.commit
        if log.configuration_index <= core.commit:
            self._configured = max(self._configured, log.configuration_index)
        seen.commit = core.commit

    def _check_flushed(self, name: str, raft: Raft) -> None:
        core = raft.core
        term = core.log.term_at(core.commit)
        self._sim.checked("I36")
        for configuration in (core.log.configuration, core.log.configuration_at(core.commit)):
            if configuration is None or term is None:
                continue
            holders = [voter for voter in configuration.voters if self._holds(voter, configuration, core.commit, term)]
            if configuration.has_quorum(holders):
                return
        self._sim.violate("I36", f"{name} committed entry {core.commit} of term {term}, which no quorum has flushed")

    def _holds(self, voter: NodeId, configuration: Configuration, index: int, term: int) -> bool:
        reader = self._readers[voter]
        return configuration.knows(voter, reader.disk.incarnation) and reader.holds(index, term)

    def _check_rounds(self, raft: Raft) -> None:
        """For L6: when did the newest round begin that a leader may take for confirmed?"""
        leadership = raft.leadership
        if leadership is None:
            return
        term, confirmed = raft.core.term, leadership.confirmed_round
        self._rounds.setdefault((term, leadership.round), self._sim.now_ns)
        if confirmed > self._confirmed.get(term, (0, 0))[0] and (term, confirmed) in self._rounds:
            self._confirmed[term] = (confirmed, self._rounds[term, confirmed])
            for new in self._counted:
                self._check_lease(term, new)

    def holds(self, name: str, index: int) -> bool:
        """The disk of ``name`` has the committed entry ``index``."""
        return index not in self._committed or self._readers[name].holds(index, self._committed[index][0])

    # -- what others tell --

    def sent_datagram(self, name: str, to: str, body: bytes) -> None:
        """I37: a vote that leaves is on the disk, and the only one of this incarnation in its term."""
        if body[2] not in _VOTES:
            return
        message = decode(body).message
        if isinstance(message, VoteRequest) and name in self._told:
            self._sim.checked("I38")
            if self._told[name] is self._raft_of(name):
                self._sim.violate("I38", f"{name} asks for the vote of {to} after it was told that it is removed")
        if isinstance(message, VoteAnswer) and message.granted:
            if message.pre:
                self._check_stickiness(name, to)
            else:
                self._voted(name, message.term, to)
        elif isinstance(message, VoteRequest) and not message.pre:
            self._voted(name, message.term, name)

    def got_datagram(self, name: str, body: bytes) -> None:
        """I38: from now on this life of a removed replica asks for no vote, not even in a pre-vote."""
        if body[2] == _REMOVED:
            raft = self._raft_of(name)
            if raft is not None and decode(body).receiver == raft.core.replica:
                self._told[name] = raft

    def untold(self) -> list[str]:
        """I38: replicas that were removed, and still take themselves for voters."""
        committed = next((seen.configuration for seen in self._seen.values() if self._is_newest(seen)), None)
        return [
            name
            for name in self._readers
            if committed is not None
            and (raft := self._raft_of(name)) is not None
            and raft.core.replica in committed.retired
            and raft.core.is_voter
        ]

    def _is_newest(self, seen: Seen) -> bool:
        raft = seen.raft
        return raft.core.commit >= self._configured and raft.core.log.configuration_index <= raft.core.commit

    def _check_stickiness(self, name: str, to: str) -> None:
        """I38, as far as it rests on voters: who hears its leader helps nobody to depose it (R17)."""
        raft = self._raft_of(name)
        if raft is None or raft.core.leader is None or raft.core.leader_contact_ns is None:
            return
        self._sim.checked("I38")
        if 0 < raft.core.now_ns - raft.core.leader_contact_ns < raft.core.timings.election_min_ns:
            self._sim.violate("I38", f"{name} would vote for {to} though it has just heard its leader")

    def _voted(self, name: str, term: int, candidate: str) -> None:
        reader = self._readers[name]
        self._sim.checked("I37")
        earlier = self._votes.setdefault((name, reader.disk.incarnation, term), candidate)
        durable = reader.read()
        if earlier != candidate:
            self._sim.violate("I37", f"{name} voted for {earlier} and for {candidate} in term {term}")
        elif durable.term < term or (durable.term == term and durable.vote != candidate):
            self._sim.violate("I37", f"{name} sent its vote of term {term} before it was flushed")

    def read_ready(self, name: str, floor: int, index: int) -> None:
        """I40: a read sees everything that was committed when it was asked."""
        self._sim.checked("I40")
        if index < floor:
            self._sim.violate("I40", f"{name} read at index {index} though {floor} had been committed before it was asked")

    def state(self, name: str, index: int, digest: int) -> None:
        """I41: the state after an index is the same everywhere."""
        self._sim.checked("I41")
        if self._states.setdefault(index, digest) != digest:
            self._sim.violate("I41", f"{name} has another state after index {index}")
