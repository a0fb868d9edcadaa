"""The Raft machine: one replica. Composes core, election, following, leadership and reads; events in, effects out.

Order within a step: events, then what waits for their sum (an append, a read round), then ``Core.finish`` with its one record.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import attrs

from ha_core.config import Profile
from ha_core.errors import DecodeError, LocalProtocolError, invariant
from ha_core.ids import NodeId, ReplicaId
from ha_core.machines.contract import Effect, Event, Rng
from ha_core.machines.raft.configuration import Configuration, encode_configuration
from ha_core.machines.raft.core import Core, Wait
from ha_core.machines.raft.election import Election, Verdict
from ha_core.machines.raft.follower import Following
from ha_core.machines.raft.leader import Ending, Leadership
from ha_core.machines.raft.log import Log
from ha_core.machines.raft.messages import (
    Append,
    AppendAnswer,
    Envelope,
    Heartbeat,
    HeartbeatAnswer,
    Message,
    ReadAnswer,
    ReadRequest,
    Removed,
    SnapshotAnswer,
    SnapshotChunk,
    TimeoutNow,
    VoteAnswer,
    VoteRequest,
    decode,
    encode_run,
)
from ha_core.machines.raft.reads import FollowerReads, RemoteRead
from ha_core.machines.raft.records import Durable, encode_checkpoint, recover
from ha_core.machines.raft.types import (
    ChangeConfiguration,
    Checkpointed,
    Dropped,
    Entry,
    EntryKind,
    Lane,
    Limits,
    PeerReady,
    PeerReset,
    Propose,
    RaftReceived,
    ReadFailed,
    ReadIndex,
    Reason,
    Recovered,
    Restore,
    Role,
    Timings,
    TransferLeadership,
)

_FROM_LEADER = (Append, Heartbeat, SnapshotChunk, TimeoutNow)
_ANSWERS = (AppendAnswer, HeartbeatAnswer, VoteAnswer, SnapshotAnswer)


@attrs.frozen
class RaftStatus:
    """For explanations and metrics."""

    role: Role
    term: int
    leader: NodeId | None
    commit: int
    last_index: int
    durable: int
    first_index: int
    configuration: Configuration | None
    peers: tuple[tuple[NodeId, str, int], ...]
    """Leader: (node, progress state, match)."""
    refused_count: int


class Raft:
    """A machine per machines/contract.py."""

    def __init__(
        self,
        *,
        node: NodeId,
        replica: ReplicaId | bytes,
        profile: Profile,
        rng: Rng,
        recovered: Recovered | None = None,
        bootstrap: Configuration | None = None,
        cluster: str = "",
        limits: Limits | None = None,
        mark: bytes = b"",
    ) -> None:
        """``replica``: the incarnation of the record store. ``bootstrap``: the first configuration, equal on all of its
        voters, read only while the store is empty (R25); None: wait until a leader sends us one. ``mark``: what the shell wrote
        with ``records.encode_mark`` for this process life; checkpoints keep it.

        Raises:
            CorruptRecordError: ``recovered`` is no history of this format.
            LocalProtocolError: ``bootstrap`` does not have this node, or has it under another incarnation.
        """
        limits = limits or Limits()
        durable = recover(recovered) if recovered is not None else Durable()
        digest = blake2b(cluster.encode(), digest_size=8).digest()
        log = Log.restored(limits, durable.snapshot, durable.entries)
        self.core = core = Core(node, bytes(replica), digest, Timings.of(profile), limits, rng, log, mark)
        core.term, core.vote = durable.term, durable.vote
        core.commit = core.verified = durable.snapshot.index
        self.election = Election(core, attempt=rng.getrandbits(48))
        self.following = Following(core)
        self.leadership: Leadership | None = None
        self.reads = FollowerReads(core, nonce=rng.getrandbits(48))
        self.is_failed = False
        if core.term == 0 and log.last_index == 0 and bootstrap is not None:
            self._bootstrap(bootstrap)
        if durable.snapshot.index:
            core.emit(Restore(durable.snapshot.index, durable.snapshot.term, durable.snapshot.state))
        core.advance_commit(durable.commit)
        core.finish()

    def _bootstrap(self, configuration: Configuration) -> None:
        """Every bootstrap voter begins with the same first entry, so it needs no vote."""
        configuration.check()
        if not configuration.knows(self.core.node, self.core.replica):
            raise LocalProtocolError(f"bootstrap: {self.core.node} is not in it, or under another replica id: correct it")
        entry = Entry(1, 1, EntryKind.CONFIGURATION, encode_configuration(configuration))
        self.core.set_term(1, None)
        self.core.log.append([entry], encode_run([entry]))

    # -- the contract --

    def receive(self, events: Sequence[Event], now_ns: int) -> None:
        self.core.now_ns = now_ns
        if self.is_failed:
            self._fail_requests(events)
        else:
            for event in events:
                self._receive(event)
            self._settle()
        self.core.finish()

    def handle_timer(self, now_ns: int) -> None:
        self.core.now_ns = now_ns
        if self.is_failed:
            return
        self.reads.handle_timer()
        if self.leadership is not None:
            self.leadership.handle_timer()
        elif now_ns >= self.election.deadline_ns:
            if self.election.may_campaign():
                self._decide(self.election.start_pre_vote())
            elif not self.core.is_voter and not self.election.is_sticky:
                self._follow(self.core.term, None)  # a learner: the leader is silent, others will elect
        self._settle()
        self.core.finish()

    def next_timer(self) -> int | None:
        if self.is_failed:
            return None
        own = self.election.deadline_ns if self.leadership is None else self.leadership.next_timer()
        reads = self.reads.next_timer()
        return own if reads is None else min(own, reads)

    def take_effects(self) -> list[Effect]:
        return self.core.gate.take()

    def persisted(self, number: int, now_ns: int) -> None:
        self.core.now_ns = now_ns
        if self.is_failed:
            return
        self.core.persisted(number)
        self._decide(self.election.persisted())
        if self.leadership is not None:
            self.leadership.advance_commit()
        self._settle()
        self.core.finish()

    def persist_failed(self, number: int, error: str, now_ns: int) -> None:
        """The store is poisoned: this process life votes, answers and leads no more (R4)."""
        core = self.core
        core.now_ns = now_ns
        if self.is_failed:
            return
        core.gate.fail()
        self._end_leadership(Reason.STORAGE_FAILED)
        self.reads.end(Reason.STORAGE_FAILED)
        core.role, core.leader = Role.FOLLOWER, None
        core.announce_role()
        core.finish()
        self.is_failed = True

    # -- events --

    def _receive(self, event: Event) -> None:
        match event:
            case Propose():
                if self.leadership is not None:
                    self.leadership.propose(event)
                else:
                    self.core.emit(Dropped(event.request, Reason.NOT_LEADER))
            case RaftReceived():
                self._receive_message(event)
            case ReadIndex(request=request):
                if self.leadership is not None:
                    self.leadership.reads.add(request)
                else:
                    self.reads.add(request)
            case Checkpointed():
                self._checkpoint(event)
            case ChangeConfiguration(request=request, change=change):
                if self.leadership is not None:
                    self.leadership.change(request, change)
                else:
                    self.core.emit(Dropped(request, Reason.NOT_LEADER))
            case TransferLeadership(to=to):
                if self.leadership is not None:
                    self.leadership.transfer_leadership(to)
            case PeerReset(peer=peer) | PeerReady(peer=peer):
                self._reset_peer(peer, isinstance(event, PeerReady))
            case _:
                raise LocalProtocolError(f"raft: {type(event).__name__} is no event of this machine")

    def _fail_requests(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case Propose(request=request) | ChangeConfiguration(request=request):
                    self.core.emit(Dropped(request, Reason.STORAGE_FAILED))
                case ReadIndex(request=request):
                    self.core.emit(ReadFailed(request, Reason.STORAGE_FAILED))

    def _reset_peer(self, peer: NodeId, ready: bool) -> None:
        if ready:
            self.core.unready.discard(peer)
        else:
            self.core.unready.add(peer)
        if self.leadership is not None:
            self.leadership.reset_peer(peer, ready)

    def _checkpoint(self, event: Checkpointed) -> None:
        """Replace the log up to ``event.index`` by the state machine's state. An older one than we have changes nothing."""
        core, log = self.core, self.core.log
        invariant(event.index <= core.commit, "a checkpoint of what was applied", index=event.index)
        term, configuration = log.term_at(event.index), log.configuration_at(event.index)
        if event.index > log.snapshot.index and term is not None and configuration is not None:
            log.compact(encode_checkpoint(event.index, term, configuration, event.state))
            core.write_checkpoint()

    # -- messages --

    def _receive_message(self, event: RaftReceived) -> None:
        core, sender = self.core, event.sender
        try:
            envelope = decode(event.body)
        except DecodeError:
            core.refuse(sender, Reason.MALFORMED)
            return
        reason = self._refusal(sender, envelope)
        if reason is not None:
            core.refuse(sender, reason)
            if reason is Reason.RETIRED and isinstance(envelope.message, VoteRequest | ReadRequest):
                core.send(sender, Removed(core.term), Lane.DATAGRAM, receiver=envelope.sender)
            return
        message = envelope.message
        if isinstance(message, Removed) or core.is_removed:
            self._leave(sender, envelope)
            return
        if isinstance(message, VoteRequest) and message.pre:
            self.election.receive_pre_vote(sender, envelope, message)
            return
        if message.term > core.term:
            if isinstance(message, VoteRequest) and self.election.is_sticky and not message.transfer:
                answer = VoteAnswer(core.term, False, message.attempt, False, 0)
                core.send(sender, answer, Lane.DATAGRAM, Wait.TERM, envelope.sender)
                return
            self._follow(message.term, None)
        if message.term < core.term:
            self._answer_stale(sender, envelope, message)
            return
        self._dispatch(sender, envelope, message)

    def _leave(self, sender: NodeId, envelope: Envelope) -> None:
        """A member knows that we were removed: neither campaign nor answer any more, so that nobody is disturbed (I38).
        Nothing is written: after a restart we ask, and are told, again."""
        core = self.core
        if core.is_removed or envelope.receiver != core.replica:
            return
        core.is_removed = True
        self._follow(core.term, None)
        self.reads.end(Reason.REMOVED)
        core.refuse(sender, Reason.REMOVED)

    def _refusal(self, sender: NodeId, envelope: Envelope) -> Reason | None:
        """Why a message is not for us, or not from a member (R11, R13, I38). A sender that we do not know may be one that was
        added after the end of our log: its requests count, its answers do not."""
        core, configuration = self.core, self.core.log.configuration
        if envelope.cluster != core.cluster:
            return Reason.OTHER_CLUSTER
        if envelope.receiver not in (b"", core.replica):
            return Reason.OTHER_REPLICA
        committed = core.log.configuration_at(core.commit)
        leads_us = sender == core.leader and envelope.message.term == core.term  # a removed leader ends its term in order
        if committed is not None and envelope.sender in committed.retired and not leads_us:
            return Reason.RETIRED  # only once committed: until then it may rightly be elected by those who lack the removal
        if isinstance(envelope.message, _ANSWERS):
            if configuration is None or not configuration.knows(sender, envelope.sender):
                return Reason.NO_MEMBER
            if self.leadership is not None:
                self.leadership.learn_replica(sender, envelope.sender)
        return None

    def _answer_stale(self, sender: NodeId, envelope: Envelope, message: Message) -> None:
        """Tell who is behind what term it is."""
        core = self.core
        if isinstance(message, VoteRequest):
            self.election.receive_request(sender, envelope, message)
        elif isinstance(message, Heartbeat):
            core.send(sender, HeartbeatAnswer(core.term, 0), Lane.DATAGRAM, Wait.TERM, envelope.sender)
        elif isinstance(message, Append | SnapshotChunk):
            core.send(sender, AppendAnswer(core.term, False, 0, 0, 0), Lane.APPEND, Wait.TERM, envelope.sender)

    def _dispatch(self, sender: NodeId, envelope: Envelope, message: Message) -> None:
        """A message of our own term."""
        if isinstance(message, _FROM_LEADER):
            self._hear_leader(sender)
        leadership = self.leadership
        match message:
            case Append():
                self.following.receive_append(sender, envelope, message)
            case Heartbeat():
                self.following.receive_heartbeat(sender, envelope, message)
            case SnapshotChunk():
                self.following.receive_chunk(sender, envelope, message)
            case TimeoutNow():
                if self.core.is_voter:
                    self.election.start_vote(transfer=True)
            case VoteRequest():
                self.election.receive_request(sender, envelope, message)
            case VoteAnswer():
                self._decide(self.election.receive_answer(sender, message))
            case ReadRequest():
                self._receive_read(sender, envelope, message)
            case ReadAnswer():
                self.reads.receive_answer(message)
            case AppendAnswer() if leadership is not None:
                leadership.receive_answer(sender, message)
            case HeartbeatAnswer() if leadership is not None:
                leadership.receive_heartbeat_answer(sender, message.round)
            case SnapshotAnswer() if leadership is not None:
                leadership.receive_chunk_answer(sender, message)

    def _receive_read(self, sender: NodeId, envelope: Envelope, message: ReadRequest) -> None:
        if self.leadership is not None:
            self.leadership.reads.add(RemoteRead(sender, envelope.sender, message.nonce))
        else:
            answer = ReadAnswer(self.core.term, message.nonce, False, 0)
            self.core.send(sender, answer, Lane.DATAGRAM, receiver=envelope.sender)

    # -- roles --

    def _hear_leader(self, leader: NodeId) -> None:
        core = self.core
        invariant(core.role is not Role.LEADER, "I32 two leaders in one term", term=core.term, other=leader)
        core.leader_contact_ns = core.now_ns
        if core.leader != leader:
            core.role, core.leader = Role.FOLLOWER, leader
            core.announce_role()
        self.election.arm()

    def _follow(self, term: int, leader: NodeId | None) -> None:
        """Become a follower, in a newer term or after giving up leadership."""
        core = self.core
        was_follower = core.role is Role.FOLLOWER
        self._end_leadership(Reason.NOT_LEADER)
        if term > core.term:
            core.set_term(term, None)
        core.role, core.leader = Role.FOLLOWER, leader
        core.announce_role()
        if not was_follower:
            self.election.arm()

    def _end_leadership(self, reason: Reason) -> None:
        if self.leadership is not None:
            self.leadership.end(reason)
            self.leadership = None
            self.core.leader_contact_ns = self.core.now_ns

    def _decide(self, verdict: Verdict) -> None:
        """Act on what an election came to."""
        core = self.core
        if verdict is Verdict.WON and core.role is Role.PRECANDIDATE:
            self.election.start_vote()
        elif verdict is Verdict.WON:
            core.role, core.leader = Role.LEADER, core.node
            core.announce_role(self.election.lease_age_ns())
            self.leadership = Leadership.begin(core)
            for request in self.reads.take():
                self.leadership.reads.add(request)
        elif verdict is Verdict.LOST:
            self.election.arm_retry()

    def _settle(self) -> None:
        leadership = self.leadership
        if leadership is not None:
            leadership.settle()
            if leadership.ending is not None:
                self._follow(self.core.term, None)
                if leadership.ending in (Ending.NO_PROGRESS, Ending.SLOW_STORE):
                    self.election.abstain()
        self.reads.settle()

    # -- looking in --

    def status(self) -> RaftStatus:
        core = self.core
        peers = self.leadership.peers if self.leadership is not None else {}
        return RaftStatus(
            core.role, core.term, core.leader, core.commit, core.log.last_index, core.log.durable, core.log.base_index + 1,
            core.log.configuration, tuple((node, peers[node].state.value, peers[node].match) for node in sorted(peers)),
            core.refused_count,
        )  # fmt: skip

    def check(self) -> None:
        """Raise InvariantError if this replica contradicts itself."""
        self.core.check()
        self.election.check()
        invariant((self.leadership is not None) == (self.core.role is Role.LEADER), "a leadership exactly while leading")
        if self.leadership is not None:
            self.leadership.check()
