"""What a follower does with appends, heartbeats and snapshots; terms have been compared before any of this is called.

Answers to appends wait until what they promise is durable (R1). Source: dissertation sections 3.5, 5.
"""

from __future__ import annotations

from hashlib import blake2b

import attrs

from ha_core.errors import DecodeError, invariant
from ha_core.ids import NodeId
from ha_core.machines.raft.core import Core, Wait
from ha_core.machines.raft.log import Log
from ha_core.machines.raft.messages import (
    Append,
    AppendAnswer,
    Envelope,
    Heartbeat,
    HeartbeatAnswer,
    SnapshotAnswer,
    SnapshotChunk,
    decode_run,
    encode_run,
)
from ha_core.machines.raft.records import Snapshot, decode_checkpoint
from ha_core.machines.raft.types import Lane, Reason, Restore


def accept_entries(log: Log, runs: tuple[bytes, ...], previous_index: int, commit: int) -> int:
    """Make the log equal to ``runs``, which follow the verified ``previous_index``; the last index then verified.

    Entries that are there already stay, with whatever follows them (R28); the first that differs goes, with all after it.

    Raises:
        DecodeError: the runs are no such entries; the log may hold some of them, all verified.
    """
    verified = previous_index
    for run in runs:
        entries = decode_run(run)
        if entries[0].index != verified + 1:
            raise DecodeError("raft: runs out of order", code="raft")
        verified = entries[-1].index
        new = 0
        while new < len(entries) and log.term_at(entries[new].index) == entries[new].term:
            new += 1
        if new == len(entries):
            continue
        if entries[new].index <= log.last_index:
            invariant(entries[new].index > commit, "I35 a committed entry is never truncated", index=entries[new].index)
            log.truncate(entries[new].index)
        log.append(entries[new:], run if new == 0 else encode_run(entries[new:]))
    return verified


@attrs.define(eq=False)
class Staging:
    """A snapshot that is arriving: verified as a whole before anything of it is used."""

    leader: NodeId
    term: int
    index: int
    digest: bytes
    total_bytes: int
    data: bytearray = attrs.field(factory=bytearray)

    def belongs(self, leader: NodeId, chunk: SnapshotChunk) -> bool:
        mine = (self.leader, self.term, self.index, self.digest, self.total_bytes)
        return mine == (leader, chunk.term, chunk.index, chunk.digest, chunk.total_bytes)


@attrs.define(eq=False)
class Following:
    core: Core
    _staging: Staging | None = None

    def receive_heartbeat(self, leader: NodeId, envelope: Envelope, heartbeat: Heartbeat) -> None:
        core = self.core
        core.advance_commit(min(heartbeat.commit, core.verified))
        answer = HeartbeatAnswer(core.term, heartbeat.round)
        core.send(leader, answer, Lane.DATAGRAM, Wait.TERM, envelope.sender)

    def receive_append(self, leader: NodeId, envelope: Envelope, append: Append) -> None:
        core, log = self.core, self.core.log
        if append.previous_index < core.commit and log.term_at(append.previous_index) is None:
            # Compacted here, so committed, so equal in the leader's log: it may go on from our commit index.
            answer = AppendAnswer(core.term, True, core.commit, 0, 0)
        elif log.term_at(append.previous_index) == append.previous_term:
            try:
                verified = accept_entries(log, append.runs, append.previous_index, core.commit)
            except DecodeError:
                core.refuse(leader, Reason.MALFORMED)
                return
            core.verified = max(core.verified, verified)
            core.advance_commit(min(append.commit, verified))  # R27: never past what this append has verified
            answer = AppendAnswer(core.term, True, verified, 0, 0)
        else:
            hint = log.agreement_before(append.previous_index, append.previous_term)
            answer = AppendAnswer(core.term, False, append.previous_index, hint, log.term_at(hint) or 0)
        core.send(leader, answer, Lane.APPEND, Wait.ALL, envelope.sender)

    def receive_chunk(self, leader: NodeId, envelope: Envelope, chunk: SnapshotChunk) -> None:
        """Stage a chunk; the last one installs the snapshot if it is newer than what is committed here (R30)."""
        core = self.core
        is_sound = blake2b(chunk.data, digest_size=16).digest() == chunk.chunk_digest
        if chunk.total_bytes > core.limits.max_snapshot_bytes or not is_sound:
            core.refuse(leader, Reason.MALFORMED)
            return
        if chunk.index <= core.commit:
            self._staging = None
            self._confirm(leader, envelope, core.commit)
            return
        staging = self._staging
        if staging is None or not staging.belongs(leader, chunk):
            staging = Staging(leader, chunk.term, chunk.index, chunk.digest, chunk.total_bytes)
            self._staging = staging
        if chunk.offset == len(staging.data) and chunk.offset + len(chunk.data) <= chunk.total_bytes:
            staging.data += chunk.data
        if len(staging.data) < staging.total_bytes:
            answer = SnapshotAnswer(core.term, chunk.index, len(staging.data))
            core.send(leader, answer, Lane.SNAPSHOT, Wait.TERM, envelope.sender)
            return
        self._staging = None
        snapshot = self._verified(staging)
        if snapshot is None:
            core.refuse(leader, Reason.MALFORMED)
            return
        self._install(snapshot)
        self._confirm(leader, envelope, max(snapshot.index, core.commit))

    @staticmethod
    def _verified(staging: Staging) -> Snapshot | None:
        payload = bytes(staging.data)
        if blake2b(payload, digest_size=32).digest() != staging.digest:
            return None
        try:
            snapshot = decode_checkpoint(payload)
        except DecodeError:
            return None
        return snapshot if snapshot.index == staging.index else None

    def _install(self, snapshot: Snapshot) -> None:
        core = self.core
        if core.log.term_at(snapshot.index) == snapshot.term:
            # The log reaches beyond it and agrees: nothing to restore, and what follows stays.
            core.verified = max(core.verified, snapshot.index)
            core.advance_commit(snapshot.index)
            return
        core.log.reset(snapshot)
        core.commit = core.verified = snapshot.index
        core.write_checkpoint()
        core.emit(Restore(snapshot.index, snapshot.term, snapshot.state))

    def _confirm(self, leader: NodeId, envelope: Envelope, index: int) -> None:
        self.core.send(leader, AppendAnswer(self.core.term, True, index, 0, 0), Lane.APPEND, Wait.ALL, envelope.sender)
