"""What all parts of a replica share: hard state, log, commit index, and the way out for effects.

Within one step (a batch of events, a timer, a completed write) everything that has to be durable becomes one record, or one
checkpoint; what is sent says what it waits for (R1):

* ``Wait.NOTHING``  a leader's appends and heartbeats, requests, what goes to the parent machine
* ``Wait.TERM``     what promises only the term or the vote
* ``Wait.ALL``      what promises entries: an append's answer
"""

from __future__ import annotations

import enum
from collections import deque

import attrs

from ha_core.errors import invariant
from ha_core.ids import NodeId
from ha_core.machines.contract import Effect, Gate, Rng
from ha_core.machines.raft.log import Log
from ha_core.machines.raft.messages import Message, encode, encode_run
from ha_core.machines.raft.records import encode_mark, encode_record
from ha_core.machines.raft.types import (
    Apply,
    ConfigurationChanged,
    Lane,
    Limits,
    MessageRefused,
    Reason,
    Role,
    RoleChanged,
    SendMessage,
    Timings,
)


class Wait(enum.Enum):
    NOTHING = 0
    TERM = 1
    ALL = 2


@attrs.define(eq=False)
class Core:
    """Invariants (``check``): ``applied == commit <= last``; a vote is for the present term; a leader leads its own term."""

    node: NodeId
    replica: bytes
    cluster: bytes
    timings: Timings
    limits: Limits
    rng: Rng
    log: Log
    mark: bytes = b""
    """Names this process life in the store (``records.encode_mark``); empty: nobody asks."""
    gate: Gate = attrs.field(factory=Gate)
    now_ns: int = 0
    term: int = 0
    vote: NodeId | None = None
    role: Role = Role.FOLLOWER
    leader: NodeId | None = None
    commit: int = 0
    verified: int = 0
    """Follower: the log is known to equal the present leader's up to here."""
    leader_contact_ns: int | None = None
    """When this replica last acknowledged, or was, a leader; None: not in this process life (L6)."""
    unready: set[NodeId] = attrs.field(factory=set)
    """Peers whose session is down."""
    refused_count: int = 0
    is_removed: bool = False
    """A member said that this incarnation was removed: it takes no part any more (I38)."""
    entry_write: int = 0
    """The newest write that holds entries."""
    _term_write: int = 0
    _is_hard_dirty: bool = False
    _is_checkpoint_due: bool = False
    _writes_ns: deque[tuple[int, int]] = attrs.field(factory=deque)
    _now: list[Effect] = attrs.field(factory=list)
    _gated: list[tuple[Wait, Effect]] = attrs.field(factory=list)
    _announced: object = None
    _announced_role: RoleChanged | None = None

    # -- state --

    def set_term(self, term: int, vote: NodeId | None) -> None:
        invariant(term > self.term or (term == self.term and self.vote in (None, vote)), "terms grow, votes stay", term=term)
        if term > self.term:
            self.verified = self.commit
        self.term, self.vote = term, vote
        self._is_hard_dirty = True

    def advance_commit(self, index: int) -> None:
        """Everything up to ``index`` is committed; hands it over to be applied."""
        if index > self.commit:
            invariant(index <= self.log.last_index, "commit <= last", commit=index, last=self.log.last_index)
            self._now.append(Apply(self.log.slice(self.commit + 1, index)))
            self.commit = index

    def leader_age_ns(self) -> int:
        """Time since this replica last acknowledged (or was) a leader; 0 if unknown (L6)."""
        if self.role is Role.LEADER or self.leader_contact_ns is None:
            return 0
        return max(0, self.now_ns - self.leader_contact_ns)

    @property
    def write_age_ns(self) -> int:
        """How long the oldest write that is not yet durable has been on its way."""
        return self.now_ns - self._writes_ns[0][1] if self._writes_ns else 0

    @property
    def is_voter(self) -> bool:
        configuration = self.log.configuration
        if configuration is None or self.is_removed:
            return False
        return configuration.is_voter(self.node) and configuration.knows(self.node, self.replica)

    @property
    def is_term_durable(self) -> bool:
        """The present term and vote are in the store."""
        return not self._is_hard_dirty and self.gate.durable >= self._term_write

    # -- effects --

    def emit(self, effect: Effect) -> None:
        self._now.append(effect)

    def refuse(self, sender: NodeId, reason: Reason) -> None:
        self.refused_count += 1
        self._now.append(MessageRefused(sender, reason))

    def announce_role(self, lease_age_ns: int = 0) -> None:
        role = RoleChanged(self.role, self.term, self.leader, lease_age_ns)
        if role != self._announced_role:
            self._announced_role = role
            self._now.append(role)

    def send(self, to: NodeId, message: Message, lane: Lane, wait: Wait = Wait.NOTHING, receiver: bytes | None = None) -> None:
        """``receiver``: the incarnation meant; None: the one in the configuration."""
        if receiver is None:
            configuration = self.log.configuration
            member = configuration.members.get(to) if configuration is not None else None
            receiver = member.replica if member is not None else b""
        effect = SendMessage(to, encode(self.cluster, self.replica, receiver, message), lane)
        if wait is Wait.NOTHING:
            self._now.append(effect)
        else:
            self._gated.append((wait, effect))

    def write_checkpoint(self) -> None:
        """Make the log's snapshot and what follows it the whole content of the store, at the end of this step."""
        self._is_checkpoint_due = True

    def finish(self) -> None:
        """End of a step: one write for all that must be durable, then what does not wait, then what does."""
        truncate_from, runs = self.log.take_unwritten()
        if self._is_checkpoint_due:
            self._write_checkpoint()
        elif runs or truncate_from or self._is_hard_dirty:
            self._wrote(self.gate.persist(encode_record(self.term, self.vote, self.commit, truncate_from, runs)), bool(runs))
        if self.log.configuration is not self._announced and self.log.configuration is not None:
            self._announced = self.log.configuration
            self._now.append(ConfigurationChanged(self.log.configuration))
        if self._now:
            self.gate.put_run(self._now)
            self._now = []
        if self._gated:
            for wait, effect in self._gated:
                self.gate.put(effect, after=self.gate.written if wait is Wait.ALL else self._term_write)
            self._gated = []

    def _write_checkpoint(self) -> None:
        rest = self.log.slice(self.log.snapshot.index + 1, self.log.last_index)
        record = encode_record(self.term, self.vote, self.commit, 0, [encode_run(rest)] if rest else [])
        records = (encode_mark(self.mark), record) if self.mark else (record,)
        self._wrote(self.gate.write_checkpoint(self.log.snapshot.payload, records), False)
        self._is_checkpoint_due = False

    def _wrote(self, number: int, has_entries: bool) -> None:
        self.log.wrote(number)
        self._writes_ns.append((number, self.now_ns))
        if has_entries:
            self.entry_write = number
        if self._is_hard_dirty:
            self._term_write = number
            self._is_hard_dirty = False

    def persisted(self, number: int) -> None:
        self.gate.persisted(number)
        self.log.persisted(number)
        while self._writes_ns and self._writes_ns[0][0] <= number:
            self._writes_ns.popleft()

    def check(self) -> None:
        self.log.check()
        invariant(self.log.snapshot.index <= self.commit <= self.log.last_index, "snapshot <= commit <= last")
        invariant(self.verified <= self.log.last_index, "verified <= last", verified=self.verified)
        invariant((self.role is Role.LEADER) == (self.leader == self.node), "a leader knows that it leads")
        invariant(self.role is Role.FOLLOWER or self.vote == self.node or self.role is Role.PRECANDIDATE, "own vote")
        invariant(not self._now and not self._gated, "every step ends with finish()")
