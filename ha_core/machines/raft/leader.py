"""One leadership: from winning an election to stepping down. Nothing of it outlives that.

Proposals that arrive while a write of entries is in flight share the next append, which is one record here and one message to
each follower; it goes out while the record is being flushed, and our own copy counts only once durable (R7).

Source: dissertation sections 3.5, 3.10, 4, 6.4; check-quorum 6.2.
"""

from __future__ import annotations

import enum
from collections import deque
from hashlib import blake2b

import attrs

from ha_core.errors import invariant
from ha_core.ids import NodeId
from ha_core.machines.raft.configuration import Configuration, change_configuration, encode_configuration
from ha_core.machines.raft.core import Core
from ha_core.machines.raft.messages import (
    Append,
    AppendAnswer,
    Heartbeat,
    SnapshotAnswer,
    SnapshotChunk,
    TimeoutNow,
    encode_run,
)
from ha_core.machines.raft.progress import Progress, ProgressState, Transfer
from ha_core.machines.raft.reads import LeaderReads
from ha_core.machines.raft.types import (
    Appended,
    Change,
    ConfigurationRefused,
    Dropped,
    Entry,
    EntryKind,
    Lane,
    Promote,
    Propose,
    Reason,
)


class Ending(enum.Enum):
    """Why a leader steps down by itself."""

    NO_QUORUM = "no quorum has answered for an election timeout"
    NO_PROGRESS = "entries make no quorum progress"
    SLOW_STORE = "the own store does not finish a write"
    REMOVED = "removed from the configuration"


@attrs.define(eq=False)
class Leadership:
    """Invariants (``check``): a follower's match never exceeds our log; at most one configuration is not yet committed."""

    core: Core
    noop_index: int
    peers: dict[NodeId, Progress] = attrs.field(factory=dict)
    round: int = 0
    ending: Ending | None = None
    reads: LeaderReads = attrs.field(init=False)
    heartbeat_ns: int = 0
    notice_ns: int | None = None
    """When the followers will be told of a commit by a heartbeat, unless an append does it before."""
    moved_ns: int = 0
    """When the commit index last moved, or the first entry that it lacks was appended."""
    transferee: NodeId | None = None
    transfer_end_ns: int = 0
    _pending: list[Propose] = attrs.field(factory=list)
    _pending_bytes: int = 0
    _uncommitted: deque[tuple[int, int]] = attrs.field(factory=deque)
    """(last index, size) of each own run that is not committed."""
    _uncommitted_bytes: int = 0

    def __attrs_post_init__(self) -> None:
        self.reads = LeaderReads(self.core)

    @classmethod
    def begin(cls, core: Core) -> Leadership:
        """The election is won: append the no-op that commits what earlier terms left, and say who leads."""
        self = cls(core, core.log.last_index + 1)
        self._follow_configuration()
        self._append([Entry(self.noop_index, core.term, EntryKind.NOOP, b"")])
        self.heartbeat_ns = core.now_ns + core.timings.heartbeat_ns
        self.moved_ns = core.now_ns
        self.begin_round()
        self.broadcast()
        return self

    @property
    def configuration(self) -> Configuration:
        configuration = self.core.log.configuration
        assert configuration is not None
        return configuration

    @property
    def is_settled(self) -> bool:
        """The no-op is committed and applied: reads and configuration changes may begin (R21, R33)."""
        return self.core.commit >= self.noop_index

    # -- proposals --

    def propose(self, proposal: Propose) -> None:
        size = len(proposal.data) + 16
        limits = self.core.limits
        if self.transferee is not None:
            self.core.emit(Dropped(proposal.request, Reason.TRANSFERRING))
        elif size > limits.max_command_bytes:
            self.core.emit(Dropped(proposal.request, Reason.TOO_LARGE))
        elif self._uncommitted_bytes + self._pending_bytes + size > limits.max_uncommitted_bytes:
            self.core.emit(Dropped(proposal.request, Reason.TOO_MANY_UNCOMMITTED))
        else:
            self._pending.append(proposal)
            self._pending_bytes += size

    def pump(self) -> None:
        """Append what was proposed, unless entries are being flushed: then it shares the next write."""
        core = self.core
        if not self._pending or core.gate.durable < core.entry_write:
            return
        proposals, self._pending, self._pending_bytes = self._take_pending()
        first, term = core.log.last_index + 1, core.term
        command = EntryKind.COMMAND
        start = 0
        while start < len(proposals):
            end, size = start, 0
            while end < len(proposals) and (end == start or size + len(proposals[end].data) <= core.limits.max_append_bytes):
                size += len(proposals[end].data)
                end += 1
            self._append([Entry(first + at, term, command, proposals[at].data) for at in range(start, end)])
            start = end
        for index, proposal in enumerate(proposals, first):
            core.emit(Appended(proposal.request, index, term))
        self.broadcast()
        self.notice_ns = None  # the appends carry the commit index

    def _take_pending(self) -> tuple[list[Propose], list[Propose], int]:
        """What fits into one record, what is left, and the size of that."""
        if self._pending_bytes <= self.core.limits.max_record_bytes:
            return self._pending, [], 0
        size = count = 0
        for proposal in self._pending:
            size += len(proposal.data) + 16
            if count and size > self.core.limits.max_record_bytes:
                break
            count += 1
        rest = self._pending[count:]
        return self._pending[:count], rest, sum(len(proposal.data) + 16 for proposal in rest)

    def _append(self, entries: list[Entry]) -> None:
        core = self.core
        if core.commit == core.log.last_index:
            self.moved_ns = core.now_ns
        run = encode_run(entries)
        core.log.append(entries, run)
        self._uncommitted.append((entries[-1].index, len(run)))
        self._uncommitted_bytes += len(run)

    # -- configuration --

    def change(self, request: int, change: Change) -> None:
        """Append the next configuration; it is in force at once (section 4.1)."""
        core = self.core
        try:
            if not self.is_settled:
                raise ConfigurationRefused(Reason.NOT_READY)  # R21
            if core.log.configuration_index > core.commit:
                raise ConfigurationRefused(Reason.CHANGE_PENDING)  # R22
            if isinstance(change, Promote) and not self._has_caught_up(change.node):
                raise ConfigurationRefused(Reason.NOT_CAUGHT_UP)  # R23
            configuration = change_configuration(self.configuration, change)
        except ConfigurationRefused as exc:
            core.emit(Dropped(request, exc.reason))
            return
        core.emit(Appended(request, self._append_configuration(configuration), core.term))

    def _append_configuration(self, configuration: Configuration) -> int:
        configuration.check()
        index = self.core.log.last_index + 1
        self._append([Entry(index, self.core.term, EntryKind.CONFIGURATION, encode_configuration(configuration))])
        self._follow_configuration()
        self.broadcast()
        return index

    def _has_caught_up(self, node: NodeId) -> bool:
        progress = self.peers.get(node)
        if progress is None:
            return True  # change_configuration says what is wrong with it
        silence_ns = self.core.now_ns - progress.contact_ns
        return (
            progress.state is ProgressState.REPLICATE
            and silence_ns <= self.core.timings.election_max_ns
            and progress.match + self.core.limits.promote_lag_entries >= self.core.log.last_index
        )

    def _follow_configuration(self) -> None:
        """Begin with those who are new, forget those who are gone or have another incarnation."""
        core, members = self.core, self.configuration.members
        for node in sorted(self.peers):
            member = members.get(node)
            if member is None or (member.replica and self.peers[node].replica not in (b"", member.replica)):
                del self.peers[node]
        if self.transferee not in self.peers:
            self.transferee = None
        for node in sorted(members):
            if node != core.node and node not in self.peers:
                progress = Progress(core.limits, next=core.log.last_index + 1, ready=node not in core.unready)
                progress.contact_ns = progress.advanced_ns = core.now_ns
                progress.replica = members[node].replica
                self.peers[node] = progress

    def _learn_replicas(self) -> None:
        """Put the incarnations of bootstrap members into the configuration, once all of the unknown have been heard."""
        configuration = self.configuration
        unknown = [node for node, member in configuration.members.items() if not member.replica]
        if not unknown or not self.is_settled or self.core.log.configuration_index > self.core.commit:
            return
        heard = {node: self.core.replica if node == self.core.node else self.peers[node].replica for node in unknown}
        if any(heard.values()):
            members = {
                node: attrs.evolve(member, replica=member.replica or heard.get(node, b""))
                for node, member in configuration.members.items()
            }
            self._append_configuration(attrs.evolve(configuration, members=members))

    # -- replication --

    def broadcast(self) -> None:
        for node, progress in self.peers.items():
            self.replicate(node, progress)

    def replicate(self, node: NodeId, progress: Progress) -> None:
        """Send what the follower lacks, as far as flow control lets us."""
        core, log = self.core, self.core.log
        while progress.can_send():
            if progress.next > log.last_index and progress.state is ProgressState.REPLICATE:
                break
            previous = progress.next - 1
            previous_term = log.term_at(previous)
            if previous_term is None:
                self._start_transfer(node, progress)
                break
            runs: tuple[bytes, ...] = ()
            last, size = previous, 0
            if progress.next <= log.last_index:
                runs, last, size = log.runs_from(progress.next, core.limits.max_append_bytes)
            core.send(node, Append(core.term, previous, previous_term, core.commit, runs), Lane.APPEND)
            progress.sent(last, size, core.now_ns)

    def receive_answer(self, node: NodeId, answer: AppendAnswer) -> None:
        progress = self._heard(node)
        if progress is None:
            return
        if answer.matched:
            invariant(answer.index <= self.core.log.last_index, "a follower matches what we never had", node=node)
            if progress.matched(answer.index, self.core.now_ns):
                self.advance_commit()
                self._continue_transfer_of_leadership()
        elif answer.index == progress.match > 0:
            # What it acknowledged is gone: a disk restored from an older copy (R12). Its acknowledgements stay void.
            self.core.refuse(node, Reason.REGRESSED)
        else:
            progress.refused(answer.index, self.core.log.agreement_before(answer.hint_index, answer.hint_term))
        self.replicate(node, progress)

    def advance_commit(self) -> None:
        """Commit what a quorum holds durably, once that includes an entry of our own term (section 3.6.2; R26)."""
        core = self.core
        index = self.configuration.quorum_value(self._match_of)
        if index <= core.commit or core.log.term_at(index) != core.term:
            return
        core.advance_commit(index)
        self.moved_ns = core.now_ns
        if self.notice_ns is None:
            self.notice_ns = core.now_ns + core.timings.notice_ns
        while self._uncommitted and self._uncommitted[0][0] <= index:
            self._uncommitted_bytes -= self._uncommitted.popleft()[1]
        if not core.is_voter and core.log.configuration_index <= index:
            self._leave()

    def _match_of(self, node: NodeId) -> int:
        return self.core.log.durable if node == self.core.node else self.peers[node].match

    # -- snapshots --

    def _start_transfer(self, node: NodeId, progress: Progress) -> None:
        snapshot = self.core.log.snapshot
        progress.start_transfer(Transfer(snapshot, blake2b(snapshot.payload, digest_size=32).digest()))
        self._send_chunks(node, progress)

    def _send_chunks(self, node: NodeId, progress: Progress) -> None:
        """Keep a window of chunks on the way."""
        core, transfer = self.core, progress.transfer
        if transfer is None or not progress.ready:
            return
        payload, size = transfer.snapshot.payload, core.limits.snapshot_chunk_bytes
        window_end = min(len(payload), transfer.acked + size * core.limits.snapshot_window_chunks)
        while transfer.sent < window_end:
            data = payload[transfer.sent : transfer.sent + size]
            chunk = SnapshotChunk(
                core.term, transfer.snapshot.index, transfer.snapshot.term, transfer.digest, len(payload),
                transfer.sent, blake2b(data, digest_size=16).digest(), data,
            )  # fmt: skip
            core.send(node, chunk, Lane.SNAPSHOT)
            transfer.sent += len(data)

    def receive_chunk_answer(self, node: NodeId, answer: SnapshotAnswer) -> None:
        progress = self._heard(node)
        if progress is None or progress.transfer is None or progress.transfer.snapshot.index != answer.index:
            return
        transfer = progress.transfer
        if answer.offset > transfer.acked:
            progress.advanced_ns = self.core.now_ns
            transfer.acked = min(answer.offset, len(transfer.snapshot.payload))
            transfer.sent = max(transfer.sent, transfer.acked)
        self._send_chunks(node, progress)

    # -- heartbeats and time --

    def begin_round(self) -> None:
        """A heartbeat to everybody under a number never used before in this term."""
        core = self.core
        self.round += 1
        self.notice_ns = None
        heartbeat = Heartbeat(core.term, self.round, core.commit)
        for node in self.peers:
            core.send(node, heartbeat, Lane.DATAGRAM)
        if self.is_settled:  # R33: before, the commit index may be behind what an earlier leader acknowledged
            self.reads.begin(self.round)
        self._confirm_rounds()

    def receive_heartbeat_answer(self, node: NodeId, round_number: int) -> None:
        progress = self._heard(node)
        if progress is not None and round_number <= self.round:
            progress.round = max(progress.round, round_number)
            self._confirm_rounds()

    @property
    def confirmed_round(self) -> int:
        """The newest round that a quorum has answered: this term was the newest one when it began."""
        return self.configuration.quorum_value(self._round_of)

    def _confirm_rounds(self) -> None:
        self.reads.confirm(self.confirmed_round)

    def _round_of(self, node: NodeId) -> int:
        return self.round if node == self.core.node else self.peers[node].round

    def _heard(self, node: NodeId) -> Progress | None:
        progress = self.peers.get(node)
        if progress is not None:
            progress.contact_ns = self.core.now_ns
        return progress

    def settle(self) -> None:
        """At the end of each step: append what waits, begin a round for new reads."""
        self.pump()
        if self.is_settled and self.reads.wants_round:
            self.begin_round()

    def next_timer(self) -> int:
        return self.heartbeat_ns if self.notice_ns is None else min(self.heartbeat_ns, self.notice_ns)

    def handle_timer(self) -> None:
        core = self.core
        if self.transferee is not None and core.now_ns >= self.transfer_end_ns:
            self.transferee = None
        if core.now_ns >= self.heartbeat_ns:
            self.heartbeat_ns = core.now_ns + core.timings.heartbeat_ns
            self._judge()
            if self.ending is not None:
                return
            self._learn_replicas()
            self._revive()
            self.begin_round()
            self.broadcast()
        elif self.notice_ns is not None and core.now_ns >= self.notice_ns:
            self.begin_round()

    def _judge(self) -> None:
        """May we go on leading? Check-quorum (R16), a store that hangs (R20), entries that go nowhere."""
        core, timings, configuration = self.core, self.core.timings, self.configuration
        alive = {node for node, progress in self.peers.items() if core.now_ns - progress.contact_ns <= timings.election_max_ns}
        if not configuration.has_quorum(alive | {core.node}):
            self.ending = Ending.NO_QUORUM
        elif core.write_age_ns > 2 * timings.election_max_ns:
            self.ending = Ending.SLOW_STORE
        elif core.commit < core.log.last_index and core.now_ns - self.moved_ns > 2 * timings.election_max_ns:
            # Datagrams may pass where TCP does not.
            moving = {node for node, progress in self.peers.items() if self._is_moving(progress)}
            if not configuration.has_quorum(moving | {core.node}):
                self.ending = Ending.NO_PROGRESS

    def _is_moving(self, progress: Progress) -> bool:
        core = self.core
        if progress.match == core.log.last_index:
            return True
        return core.now_ns - progress.advanced_ns <= 2 * core.timings.election_max_ns

    def _revive(self) -> None:
        """Ask again where answers are missing though the session stands."""
        core = self.core
        for node, progress in self.peers.items():
            progress.probing = False
            if core.now_ns - progress.advanced_ns > core.timings.election_max_ns:
                if progress.inflight:
                    progress.probe()
                elif progress.transfer is not None:
                    progress.transfer.sent = progress.transfer.acked
                    self._send_chunks(node, progress)

    # -- sessions --

    def reset_peer(self, node: NodeId, ready: bool) -> None:
        progress = self.peers.get(node)
        if progress is not None:
            progress.ready = ready
            progress.probe()
            self.replicate(node, progress)

    def learn_replica(self, node: NodeId, replica: bytes) -> None:
        progress = self.peers.get(node)
        if progress is not None and not progress.replica:
            progress.replica = replica

    # -- going --

    def transfer_leadership(self, to: NodeId) -> None:
        """Hand over once ``to`` has everything; proposals wait elsewhere meanwhile (section 3.10)."""
        if to in self.peers and self.configuration.is_voter(to):
            self.transferee = to
            self.transfer_end_ns = self.core.now_ns + self.core.timings.election_max_ns
            self._continue_transfer_of_leadership()

    def _continue_transfer_of_leadership(self) -> None:
        to = self.transferee
        if to is not None and not self._pending and self.peers[to].match == self.core.log.last_index:
            self.core.send(to, TimeoutNow(self.core.term), Lane.APPEND)

    def _leave(self) -> None:
        """Our removal is committed: tell everybody, and let the most advanced voter follow at once (R19)."""
        self.ending = Ending.REMOVED
        self.begin_round()
        voters = [node for node in self.configuration.voters if node in self.peers]
        if voters:
            heir = max(voters, key=lambda node: self.peers[node].match)
            self.core.send(heir, TimeoutNow(self.core.term), Lane.APPEND)

    def end(self, reason: Reason) -> None:
        """What was not appended never will be; what was may still be committed by others."""
        for proposal in self._pending:
            self.core.emit(Dropped(proposal.request, reason))
        self._pending = []
        self.reads.end(reason)

    def check(self) -> None:
        last = self.core.log.last_index
        for node in sorted(self.peers):
            self.peers[node].check()
            invariant(self.peers[node].match <= last, "a follower matches no more than the leader has", node=node)
        invariant(self._uncommitted_bytes == sum(size for _, size in self._uncommitted), "the size of what is uncommitted")
        self.reads.check()
        self.configuration.check()
