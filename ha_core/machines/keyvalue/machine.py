"""The key-value state machine: applies the log's commands, each by the same rules on every replica.

Nothing here reads a clock, draws a random number, iterates a set or computes with floats: leases and sessions end by commands
that the leader puts into the log, limits are part of the state, and a command that breaks a rule changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ha_core.errors import DecodeError, InvariantError, invariant
from ha_core.ids import LeaseToken, LogIndex, Revision
from ha_core.machines.keyvalue.codec import decode_entry
from ha_core.machines.keyvalue.formats import decode_snapshot, encode_snapshot, snapshot_hash
from ha_core.machines.keyvalue.model import (
    RESERVED,
    Body,
    Call,
    Called,
    Change,
    ClientSession,
    Command,
    Compact,
    Compare,
    Delete,
    DeletePrefix,
    ExpireLeases,
    ExpireSessions,
    Get,
    Grant,
    Granted,
    LeaseState,
    Limits,
    OpenSession,
    Outcome,
    Put,
    Record,
    Refusal,
    Refused,
    Relation,
    Reply,
    RevisionEvents,
    Revoke,
    SessionOpened,
    SetLimits,
    Snapshot,
    Target,
)
from ha_core.machines.keyvalue.plain import is_plain
from ha_core.machines.keyvalue.transaction import KvTransaction, Procedure, ProcedureError
from ha_core.machines.keyvalue.versions import RECORD_OVERHEAD_BYTES, VersionedMap, Writes

MAX_REPLIES = 4096
"""Unsettled requests of one session; a client keeps far fewer."""

_NOTHING: Sequence[Record | int | None] = (None,)


class KeyValue:
    """``apply`` takes the committed entries in order; everything else reads."""

    def __init__(self, procedures: Mapping[str, Procedure] | None = None) -> None:
        self.index = 0
        """The last log index applied."""
        self.state = VersionedMap()
        self.limits = Limits()
        self.leases: dict[int, LeaseState] = {}
        self.sessions: dict[int, ClientSession] = {}
        self._procedures = dict(procedures or {})
        self._changes: list[RevisionEvents] = []

    # -- reads --

    @property
    def revision(self) -> Revision:
        return Revision(self.state.revision)

    def get(self, key: bytes) -> Record | None:
        return self.state.get(key)

    def range(self, prefix: bytes) -> list[Record]:
        """Every record under ``prefix``, in key order."""
        records = [self.state.get(key) for key in self.state.keys(prefix)]
        return [record for record in records if record is not None]

    def take_changes(self) -> list[RevisionEvents]:
        """What was changed since the last call, for watches."""
        changes, self._changes = self._changes, []
        return changes

    # -- the log --

    def apply(self, index: LogIndex, data: bytes, commands: Sequence[Command] | None = None) -> Sequence[Reply]:
        """Apply one entry; a reply for each of its commands, or one refusal for an entry that breaks a rule.

        ``commands`` are those of ``data``, if the caller happens to hold them decoded and checked.
        """
        if commands is None:
            try:
                commands = decode_entry(data)
            except DecodeError as exc:
                self.skip(index)
                return (Refused(Refusal.BAD, str(exc)),)
        self.skip(index)
        replies = [self._once(index, command) for command in commands]
        limits = self.limits
        self.state.shrink_history(limits.history_revisions, limits.history_bytes)
        return replies

    def skip(self, index: LogIndex) -> None:
        """An entry that holds no command (a leader's no-op, a configuration)."""
        invariant(index > self.index, "entries are applied in order, once", index=index, applied=self.index)
        self.index = index

    def _once(self, index: LogIndex, command: Command) -> Reply:
        number, sequence, floor, body = command
        if not number:
            return self._apply(index, body)
        session = self.sessions.get(number)
        if session is None:
            return Refused(Refusal.SESSION_EXPIRED, f"client session {number} is not known any more")
        session.last_index = index
        if floor > session.floor:
            _settle(session, floor)
        replies = session.replies
        if sequence < session.floor:
            return Refused(Refusal.SETTLED, f"request {sequence} of session {number} was settled before")
        known = replies.get(sequence)
        if known is not None:
            return known
        if len(replies) >= MAX_REPLIES:
            return Refused(Refusal.TOO_MANY, f"session {number} has {MAX_REPLIES} unsettled requests")
        reply = self._apply(index, body)
        replies[sequence] = reply
        return reply

    def _apply(self, index: LogIndex, body: Body) -> Reply:
        match body:
            case Change():
                return self._change(body)
            case Grant(ttl_ns):
                if len(self.leases) >= self.limits.max_leases:
                    return Refused(Refusal.QUOTA, f"there are {self.limits.max_leases} leases already")
                self.leases[index] = LeaseState(ttl_ns)
                return Granted(LeaseToken(index))
            case Revoke(token):
                if token not in self.leases:
                    return Refused(Refusal.LEASE_NOT_FOUND, f"lease {token} is over")
                self._expire_leases((token,))
                return Outcome(True, self.revision)
            case Call():
                return self._call(index, body)
            case OpenSession():
                return self._open_session(index)
            case ExpireLeases(tokens):
                self._expire_leases(tokens)
            case ExpireSessions(sessions):
                for number, last_index in sessions:
                    session = self.sessions.get(number)
                    if session is not None and session.last_index == last_index:
                        del self.sessions[number]
            case Compact(revision):
                self.state.compact(revision)
            case SetLimits(limits):
                self.limits = limits
        return Outcome(True, self.revision)

    def _change(self, change: Change) -> Reply:
        succeeded = True
        for compare in change.compare:
            if not _holds(compare, self.state.get(compare.key)):
                succeeded = False
                break
        steps = change.then if succeeded else change.otherwise
        if len(steps) == 1:
            # The most frequent change of all, one put, needs no transaction to see its own writes.
            (step,) = steps
            if type(step) is Put:
                refused = self._put(step)
                return refused or Outcome(succeeded, self.revision, _NOTHING)
        transaction = KvTransaction(self.state)
        results: list[Record | int | None] = []
        for step in steps:
            match step:
                case Put(key, value, lease):
                    transaction.put(key, value, lease)
                    results.append(None)
                case Delete(key):
                    results.append(0 if transaction.get(key) is None else 1)
                    transaction.delete(key)
                case DeletePrefix(prefix):
                    results.append(transaction.delete_prefix(prefix))
                case Get(key):
                    results.append(transaction.record(key))
        refused = self._commit(transaction.writes)
        return refused or Outcome(succeeded, self.revision, results)

    def _call(self, index: LogIndex, call: Call) -> Reply:
        procedure = self._procedures.get(call.name)
        if procedure is None:
            return Refused(Refusal.PROCEDURE, f"no procedure is named {call.name!r}")
        transaction = KvTransaction(self.state)
        try:
            value = procedure(transaction, index, call.args)
        except InvariantError:
            raise
        except ProcedureError as exc:
            return Refused(Refusal.PROCEDURE, str(exc))
        except Exception as exc:  # a bug of the procedure must not stop every replica for ever at this index
            return Refused(Refusal.PROCEDURE, f"{call.name}: {type(exc).__name__}: {exc}")
        if not is_plain(value):
            return Refused(Refusal.PROCEDURE, f"{call.name} returned a {type(value).__name__}, which is no plain value")
        refused = self._commit(transaction.writes, procedure=True)
        return refused or Called(value, index, self.revision)

    def _commit(self, writes: Writes, *, procedure: bool = False) -> Refused | None:
        limits = self.limits
        room = limits.max_bytes if procedure else limits.max_bytes - limits.reserve_bytes
        for key, write in writes.items():
            if not procedure and key.startswith(RESERVED):
                return Refused(Refusal.RESERVED, f"keys under {RESERVED!r} are written by procedures only, not {key!r}")
            if write is not None and write[1] and write[1] not in self.leases:
                return Refused(Refusal.LEASE_NOT_FOUND, f"lease {write[1]} is over")
        growth = self.state.growth(writes)
        if growth > 0 and self.state.size_bytes + growth > room:
            return Refused(Refusal.QUOTA, f"the database holds {self.state.size_bytes} of {room} bytes: delete something first")
        group = self.state.commit(writes)
        if group is not None:
            self._changes.append(group)
            for key, record, previous in group.events:
                before = 0 if previous is None else previous.lease
                after = 0 if record is None else record.lease
                if before != after:
                    if before and before in self.leases:
                        self.leases[before].keys.pop(key, None)
                    if after:
                        self.leases[after].keys[key] = None
        return None

    def _put(self, put: Put) -> Refused | None:
        """``_commit`` of one put, in half the time where no lease and no quota is near."""
        key, value, lease = put.key, put.value, put.lease
        state, limits = self.state, self.limits
        previous = state.get(key)
        room = limits.max_bytes - limits.reserve_bytes - state.size_bytes - len(key) - len(value) - RECORD_OVERHEAD_BYTES
        if lease or (previous is not None and previous.lease) or room < 0 or key.startswith(RESERVED):
            return self._commit({key: (value, lease)})
        self._changes.append(state.put(key, value, 0))
        return None

    def _expire_leases(self, tokens: Sequence[int]) -> None:
        doomed: dict[bytes, tuple[bytes, int] | None] = {}
        for token in tokens:
            lease = self.leases.pop(token, None)
            if lease is not None:
                doomed.update(dict.fromkeys(sorted(lease.keys)))
        self._commit(doomed, procedure=True)

    def _open_session(self, index: LogIndex) -> Reply:
        if len(self.sessions) >= self.limits.max_sessions:
            del self.sessions[min(self.sessions, key=lambda number: (self.sessions[number].last_index, number))]
        self.sessions[index] = ClientSession(index)
        return SessionOpened(index)

    # -- snapshots --

    def snapshot(self) -> bytes:
        """Everything, as bytes that are equal on all replicas at this index."""
        state = self.state
        return encode_snapshot(
            Snapshot(
                self.index, state.revision, state.compacted, state.digest, self.limits, state.records(), state.history(),
                self.leases, self.sessions,
            )
        )  # fmt: skip

    def state_hash(self) -> bytes:
        """16 bytes, equal on all replicas at this index (I41); costs as much as a snapshot. ``digest`` costs nothing."""
        return snapshot_hash(self.snapshot())

    @property
    def digest(self) -> int:
        """A rolling checksum over every change ever made; equal on all replicas at this index (I41)."""
        return self.state.digest

    def restore(self, data: bytes) -> None:
        """Become the snapshot; raises CorruptRecordError and stays as it was if that is damaged."""
        snapshot = decode_snapshot(data)
        self.state = VersionedMap()
        self.state.restore(
            revision=snapshot.revision, compacted=snapshot.compacted, digest=snapshot.digest,
            records=snapshot.records, history=snapshot.history,
        )  # fmt: skip
        self.index = snapshot.index
        self.limits = snapshot.limits
        self.leases = dict(snapshot.leases)
        self.sessions = dict(snapshot.sessions)
        self._changes = []

    def check(self) -> None:
        """Invariants; costs as much as the state is large."""
        self.state.check()
        attached = {(token, key): None for token, lease in self.leases.items() for key in lease.keys}
        for record in self.state.records():
            if record.lease:
                invariant(
                    (record.lease, record.key) in attached, "a key hangs on a lease that does not know it", key=record.key
                )
                del attached[record.lease, record.key]
        invariant(not attached, "a lease holds keys that do not hang on it", keys=len(attached))


def _settle(session: ClientSession, floor: int) -> None:
    replies = session.replies
    if floor - session.floor <= len(replies):
        for sequence in range(session.floor, floor):
            replies.pop(sequence, None)
    else:
        session.replies = {sequence: reply for sequence, reply in replies.items() if sequence >= floor}
    session.floor = floor


def _holds(compare: Compare, record: Record | None) -> bool:
    actual: int | bytes
    match compare.target:
        case Target.VALUE:
            actual = b"" if record is None else record.value
        case Target.VERSION:
            actual = 0 if record is None else record.version
        case Target.CREATE_REVISION:
            actual = 0 if record is None else record.create_revision
        case Target.MOD_REVISION:
            actual = 0 if record is None else record.mod_revision
        case Target.LEASE:
            actual = 0 if record is None else record.lease
    operand = compare.operand
    if compare.relation is Relation.EQUAL:
        return actual == operand
    if compare.relation is Relation.NOT_EQUAL:
        return actual != operand
    if isinstance(actual, bytes) and isinstance(operand, bytes):
        return actual < operand if compare.relation is Relation.LESS else actual > operand
    if isinstance(actual, int) and isinstance(operand, int):
        return actual < operand if compare.relation is Relation.LESS else actual > operand
    return False
