"""ReadIndex: linearizable reads without writing, by a round of heartbeats begun after the read arrived.

The leader takes reads only after its own no-op is committed and applied (R33): before, its commit index may be behind what an
earlier leader acknowledged. A round number is never used twice in a term, nor a follower's nonce in its process life (R34).

Source: dissertation section 6.4.
"""

from __future__ import annotations

from typing import NamedTuple

import attrs

from ha_core.errors import invariant
from ha_core.ids import NodeId
from ha_core.machines.raft.core import Core
from ha_core.machines.raft.messages import ReadAnswer, ReadRequest
from ha_core.machines.raft.types import Lane, ReadFailed, ReadReady, Reason


class RemoteRead(NamedTuple):
    """A follower's question."""

    node: NodeId
    replica: bytes
    nonce: int


Reader = int | RemoteRead


@attrs.define(eq=False)
class LeaderReads:
    """Invariant: rounds of ``_waiting`` ascend."""

    core: Core
    _fresh: list[Reader] = attrs.field(factory=list)
    _waiting: list[tuple[int, int, list[Reader]]] = attrs.field(factory=list)
    """(the first round begun after they arrived, commit index then, who)."""

    def add(self, reader: Reader) -> None:
        self._fresh.append(reader)

    @property
    def wants_round(self) -> bool:
        """Somebody waits for a round that has not begun; one is on its way at a time, heartbeats apart."""
        return bool(self._fresh) and not self._waiting

    def begin(self, round_number: int) -> None:
        """Round ``round_number`` begins now and serves all that arrived before."""
        if self._fresh:
            self._waiting.append((round_number, self.core.commit, self._fresh))
            self._fresh = []

    def confirm(self, round_number: int) -> None:
        """A quorum has answered ``round_number``, so this term was the newest when that round began."""
        while self._waiting and self._waiting[0][0] <= round_number:
            _, index, readers = self._waiting.pop(0)
            for reader in readers:
                self._answer(reader, index)

    def _answer(self, reader: Reader, index: int) -> None:
        if isinstance(reader, RemoteRead):
            answer = ReadAnswer(self.core.term, reader.nonce, True, index)
            self.core.send(reader.node, answer, Lane.DATAGRAM, receiver=reader.replica)
        else:
            self.core.emit(ReadReady(reader, index))

    def end(self, reason: Reason) -> None:
        readers = [reader for _, _, some in self._waiting for reader in some] + self._fresh
        self._waiting, self._fresh = [], []
        for reader in readers:
            if isinstance(reader, RemoteRead):
                answer = ReadAnswer(self.core.term, reader.nonce, False, 0)
                self.core.send(reader.node, answer, Lane.DATAGRAM, receiver=reader.replica)
            else:
                self.core.emit(ReadFailed(reader, reason))

    def check(self) -> None:
        rounds = [item[0] for item in self._waiting]
        invariant(rounds == sorted(set(rounds)), "read rounds ascend")


@attrs.define(eq=False)
class FollowerReads:
    """Asks the leader on behalf of local readers, one question at a time; waits until what it named is applied here."""

    core: Core
    nonce: int
    """The first is random, so that answers to an earlier process life match nothing."""
    _fresh: list[tuple[int, int]] = attrs.field(factory=list)
    """(request, when it arrived)."""
    _asked: list[tuple[int, int]] = attrs.field(factory=list)
    _retry_ns: int = 0
    _confirmed: list[tuple[int, list[tuple[int, int]]]] = attrs.field(factory=list)

    def add(self, request: int) -> None:
        self._fresh.append((request, self.core.now_ns))

    def ask(self) -> None:
        """Send the next question if none is out."""
        if self._fresh and not self._asked:
            if self.core.leader is None:
                self._fail(self._fresh, Reason.NO_LEADER)
                self._fresh = []
                return
            self._asked, self._fresh = self._fresh, []
            self.nonce += 1
            self._retry_ns = self.core.now_ns + self.core.timings.heartbeat_ns
            self.core.send(self.core.leader, ReadRequest(self.core.term, self.nonce), Lane.DATAGRAM)

    def receive_answer(self, answer: ReadAnswer) -> None:
        if not self._asked or answer.nonce != self.nonce:
            return
        asked, self._asked = self._asked, []
        if answer.confirmed:
            self._confirmed.append((answer.index, asked))
        else:
            self._fail(asked, Reason.NOT_LEADER)

    def settle(self) -> None:
        """Answer those whose index has been applied."""
        if self._confirmed:
            waiting = []
            for index, readers in self._confirmed:
                if index <= self.core.commit:
                    for request, _ in readers:
                        self.core.emit(ReadReady(request, index))
                else:
                    waiting.append((index, readers))
            self._confirmed = waiting
        self.ask()

    def next_timer(self) -> int | None:
        due = [self._retry_ns] if self._asked else []
        if self._confirmed:
            due.append(self._confirmed[0][1][0][1] + self._patience_ns)
        return min(due, default=None)

    @property
    def _patience_ns(self) -> int:
        return 2 * self.core.timings.election_max_ns

    def handle_timer(self) -> None:
        """Ask again under a fresh nonce; give up on those who waited too long."""
        now_ns = self.core.now_ns
        if self._asked and now_ns >= self._retry_ns:
            self._fresh = self._asked + self._fresh
            self._asked = []
        oldest_ns = now_ns - self._patience_ns
        self._fail([item for item in self._fresh if item[1] <= oldest_ns], Reason.NO_QUORUM)
        self._fresh = [item for item in self._fresh if item[1] > oldest_ns]
        for _, readers in self._confirmed:
            self._fail([item for item in readers if item[1] <= oldest_ns], Reason.NO_QUORUM)
        kept = [(index, [item for item in readers if item[1] > oldest_ns]) for index, readers in self._confirmed]
        self._confirmed = [item for item in kept if item[1]]

    def take(self) -> list[int]:
        """Requests that nobody has confirmed yet: this replica now leads and confirms them itself."""
        requests = [request for request, _ in self._asked + self._fresh]
        self._asked, self._fresh = [], []
        return requests

    def end(self, reason: Reason) -> None:
        for readers in (self._fresh, self._asked, *(readers for _, readers in self._confirmed)):
            self._fail(readers, reason)
        self._fresh, self._asked, self._confirmed = [], [], []

    def _fail(self, readers: list[tuple[int, int]], reason: Reason) -> None:
        for request, _ in readers:
            self.core.emit(ReadFailed(request, reason))
