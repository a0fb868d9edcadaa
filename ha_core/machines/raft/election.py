"""Elections: pre-vote, vote, stickiness, and when to try.

```
FOLLOWER --election timeout--> PRECANDIDATE --quorum--> CANDIDATE --quorum--> LEADER
PRECANDIDATE --retry delay, no quorum--> PRECANDIDATE      CANDIDATE --refused or timeout--> PRECANDIDATE (R15)
```

A pre-vote changes no state at the voter. A refusal carries the voter's term, so that a candidate left behind catches up (R14).
A replica that heard from a leader within the shortest election timeout refuses both (R17), unless that leader itself asked for
the election (transfer). Only a granted vote, never a refused one, moves the voter's own timer (R18).

Source: dissertation sections 3.4, 3.6, 4.2.3, 9.6.
"""

from __future__ import annotations

import enum

import attrs

from ha_core.errors import invariant
from ha_core.ids import NodeId
from ha_core.machines.raft.core import Core, Wait
from ha_core.machines.raft.messages import Envelope, VoteAnswer, VoteRequest
from ha_core.machines.raft.types import Lane, Role


class Verdict(enum.Enum):
    PENDING = "pending"
    WON = "won"
    LOST = "lost"


@attrs.define(eq=False)
class Election:
    core: Core
    deadline_ns: int = 0
    """0: not armed yet."""
    abstain_until_ns: int = 0
    attempt: int = 0
    granted: dict[NodeId, int] = attrs.field(factory=dict)
    """Voter -> its leader age."""
    refused: set[NodeId] = attrs.field(factory=set)
    _own_age_ns: int = 0
    _is_excused: bool = False

    # -- the timer --

    def arm(self) -> None:
        """A fresh random election timeout from now."""
        timings = self.core.timings
        self._arm_within(timings.election_min_ns, timings.election_max_ns)
        self._is_excused = False

    def arm_retry(self) -> None:
        self._arm_within(self.core.timings.retry_min_ns, self.core.timings.retry_max_ns)

    def _arm_within(self, low_ns: int, high_ns: int) -> None:
        self.deadline_ns = max(self.core.now_ns + self.core.rng.randrange(low_ns, high_ns + 1), self.abstain_until_ns)

    def abstain(self) -> None:
        """Leave the next election to others, for one election timeout."""
        self.abstain_until_ns = self.core.now_ns + self.core.timings.election_max_ns
        self.arm()

    def may_campaign(self) -> bool:
        """Call when the timer fired; arms it again if this replica may not campaign now."""
        core = self.core
        late_ns = core.now_ns - self.deadline_ns
        if self.deadline_ns == 0 or not core.is_voter or core.write_age_ns > core.timings.election_max_ns:
            self.arm()
            return False
        if late_ns > core.timings.heartbeat_ns and not self._is_excused:
            # This process stood still: what the leader sent meanwhile may still be on its way to us.
            self.arm_retry()
            self._is_excused = True
            return False
        return True

    # -- the candidate --

    def start_pre_vote(self) -> Verdict:
        core = self.core
        self.attempt += 1
        self.granted, self.refused = {core.node: 0}, set()
        core.role, core.leader = Role.PRECANDIDATE, None
        self.arm_retry()
        core.announce_role()
        self._ask(VoteRequest(core.term + 1, True, self.attempt, core.log.last_index, core.log.last_term, False))
        return self._tally()

    def start_vote(self, transfer: bool = False) -> None:
        """Enter the next term. Our own vote counts, and the others are asked, once it is durable (R1, R7)."""
        core = self.core
        self.attempt += 1
        self.granted, self.refused = {}, set()
        self._own_age_ns = core.leader_age_ns()
        core.role, core.leader = Role.CANDIDATE, None
        core.set_term(core.term + 1, core.node)
        self.arm()
        core.announce_role()
        self._ask(VoteRequest(core.term, False, self.attempt, core.log.last_index, core.log.last_term, transfer))

    def _ask(self, request: VoteRequest) -> None:
        configuration = self.core.log.configuration
        assert configuration is not None
        for voter in configuration.voters:
            if voter != self.core.node:
                self.core.send(voter, request, Lane.DATAGRAM, Wait.NOTHING if request.pre else Wait.TERM)

    def persisted(self) -> Verdict:
        core = self.core
        if core.role is Role.CANDIDATE and core.node not in self.granted and core.is_term_durable:
            self.granted[core.node] = self._own_age_ns
            return self._tally()
        return Verdict.PENDING

    def receive_answer(self, sender: NodeId, answer: VoteAnswer) -> Verdict:
        core = self.core
        if core.role is not (Role.PRECANDIDATE if answer.pre else Role.CANDIDATE) or answer.attempt != self.attempt:
            return Verdict.PENDING
        if answer.granted:
            self.granted.setdefault(sender, answer.age_ns)
        else:
            self.refused.add(sender)
        return self._tally()

    def _tally(self) -> Verdict:
        configuration = self.core.log.configuration
        assert configuration is not None
        if configuration.has_quorum(self.granted):
            return Verdict.WON
        return Verdict.PENDING if configuration.can_still_win(self.refused) else Verdict.LOST

    def lease_age_ns(self) -> int:
        """The smallest leader age in the quorum that elected us (L6)."""
        return min(self.granted.values(), default=0)

    # -- the voter --

    @property
    def is_sticky(self) -> bool:
        """A leader is alive as far as we know: no election is needed."""
        core = self.core
        if core.role is Role.LEADER:
            return True
        contact_ns = core.leader_contact_ns
        return core.leader is not None and contact_ns is not None and core.now_ns - contact_ns < core.timings.election_min_ns

    def receive_pre_vote(self, sender: NodeId, envelope: Envelope, request: VoteRequest) -> None:
        core = self.core
        is_granted = (
            not self.is_sticky and request.term > core.term and core.log.is_covered_by(request.last_index, request.last_term)
        )
        # A grant is given in the candidate's own term: from ours, if that is older, it would be stale news there.
        term = request.term - 1 if is_granted else core.term
        answer = VoteAnswer(term, True, request.attempt, is_granted, 0)  # promises nothing, so it waits for nothing
        core.send(sender, answer, Lane.DATAGRAM, receiver=envelope.sender)

    def receive_request(self, sender: NodeId, envelope: Envelope, request: VoteRequest) -> None:
        """A request of our term or of an older one; a newer term has been entered before this is called."""
        core = self.core
        is_granted = (
            request.term == core.term
            and core.vote in (None, sender)
            and core.leader is None
            and core.log.is_covered_by(request.last_index, request.last_term)
        )
        if is_granted and core.vote is None:
            core.set_term(core.term, sender)
            self.arm()
        age_ns = core.leader_age_ns() if is_granted else 0
        answer = VoteAnswer(core.term, False, request.attempt, is_granted, age_ns)
        core.send(sender, answer, Lane.DATAGRAM, Wait.TERM, envelope.sender)

    def check(self) -> None:
        core = self.core
        if core.role is Role.CANDIDATE and core.node in self.granted:
            invariant(core.is_term_durable, "our own vote counts only once it is durable")
