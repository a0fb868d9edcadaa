"""A replica's side of requests: writes become log entries, reads wait for a quorum round, leases are counted, watches served.

Rules of this file:

* All that one batch brings shares one append, and while ``MAX_APPENDS`` appends are under way what comes shares the next.
* A read, a renewal or a Confirm is answered after a round that began after it came; one round serves all that wait.
* A write is answered when its entry is applied; if this replica stops leading first its fate is open, and the client repeats it
  under the same identity.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TypeAlias

import attrs

from ha_core.errors import CompactedError
from ha_core.ids import LeaseToken, LogIndex, NodeId
from ha_core.machines.contract import Event
from ha_core.machines.database_events import (
    Confirm,
    Confirmed,
    DatabaseOutcome,
    Done,
    Found,
    Range,
    Reconfigure,
    Renew,
    Renewed,
    Transfer,
)
from ha_core.machines.database_leases import LeaseTimes
from ha_core.machines.database_wire import WireRequest, WriteRequest
from ha_core.machines.keyvalue.codec import encode_command, encode_entry, stands_alone
from ha_core.machines.keyvalue.machine import KeyValue
from ha_core.machines.keyvalue.model import Command, ExpireLeases, ExpireSessions, Get, Granted, Refusal, Refused, Reply, Revoke
from ha_core.machines.raft.types import (
    Appended,
    ChangeConfiguration,
    Dropped,
    Entry,
    EntryKind,
    Propose,
    ReadFailed,
    ReadIndex,
    ReadReady,
    Reason,
    Role,
    RoleChanged,
    TransferLeadership,
)

MAX_APPENDS = 2
GROUP_BYTES = 256 << 10
APPEND_BYTES = 1 << 20
MAX_ROUNDS = 4
PAGE_RECORDS = 10_000
SESSION_IDLE_NS = 3_600_000_000_000
SWEEP_NS = 60_000_000_000

Origin: TypeAlias = tuple[NodeId, int] | None
"""Who asked, and in which of its sessions with us (a process that restarts numbers its requests anew); None: this node."""
ServerRequest: TypeAlias = WireRequest | Confirm


@attrs.define
class _Append:
    entries: int


@attrs.define
class _Group:
    """One log entry on its way: who waits for which of its commands."""

    commands: list[Command]
    packed: list[bytes]
    waiters: list[tuple[Origin, int]]
    append: _Append
    members: bool = False
    term: int = 0


@attrs.frozen
class _Waiting:
    origin: Origin
    number: int
    request: Get | Range | Renew | Confirm | None
    """None: a watch waits to be opened."""
    arrived_ns: int


class DatabaseServer:
    """Pure; the DatabaseMachine takes ``raft_events`` and ``answers`` after each batch."""

    def __init__(self, node: NodeId, state: KeyValue, retry_ns: int) -> None:
        self.raft_events: list[Event] = []
        self.answers: list[tuple[Origin, int, DatabaseOutcome]] = []
        self.leader: NodeId | None = None
        self.term = 0
        self.leading = False
        """In office ..."""
        self.ready = False
        """... and our own first entry is applied."""
        self._node = node
        self._state = state
        self._retry_ns = retry_ns
        self._counted_from_ns = 0
        self._leases = LeaseTimes()
        self._next_request = 0
        self._queue: deque[tuple[Origin, int, WriteRequest]] = deque()
        self._proposed: dict[int, _Group] = {}
        self._appended: dict[int, _Group] = {}
        self._appends = 0
        self._reads: list[_Waiting] = []
        self._rounds: dict[int, list[_Waiting]] = {}
        self._sweep_ns: int | None = None
        self._seen: dict[int, tuple[int, int]] = {}

    # -- requests --

    def submit(self, origin: Origin, number: int, request: ServerRequest, now_ns: int) -> None:
        match request:
            case WriteRequest():
                if not self.leading:
                    self._refuse_leader(origin, number)
                else:
                    self._queue.append((origin, number, request))
            case Get() | Range():
                self._reads.append(_Waiting(origin, number, request, now_ns))
            case Renew() | Confirm():
                if not self.leading:
                    self._refuse_leader(origin, number)
                else:
                    self._reads.append(_Waiting(origin, number, request, now_ns))
            case Reconfigure(change):
                if not self.leading:
                    self._refuse_leader(origin, number)
                else:
                    self._appends += 1
                    group = _Group([], [], [(origin, number)], _Append(1), members=True)
                    self.raft_events.append(ChangeConfiguration(self._number(group), change))
            case Transfer(to):
                if not self.leading:
                    self._refuse_leader(origin, number)
                else:
                    self.raft_events.append(TransferLeadership(to))
                    self.answers.append((origin, number, Done()))

    def forget(self, peer: NodeId) -> None:
        """A client's session is down: it will ask again."""
        self._reads = [one for one in self._reads if one.origin is None or one.origin[0] != peer]

    def flush(self) -> None:
        """Hand what was collected to Raft."""
        if self._queue and self._appends < MAX_APPENDS:
            self._propose_queue()
        if self._reads and len(self._rounds) < MAX_ROUNDS:
            self._next_request += 1
            self._rounds[self._next_request] = self._reads
            self._reads = []
            self.raft_events.append(ReadIndex(self._next_request))

    def _propose_queue(self) -> None:
        queue = self._queue
        append = _Append(0)
        total = 0
        group: _Group | None = None
        size = 0
        while queue and total < APPEND_BYTES:
            origin, number, write = queue.popleft()
            command, packed = write.command, write.packed
            alone = stands_alone(command.body)
            if group is None or alone or size + len(packed) > GROUP_BYTES:
                if group is not None:
                    self._propose(group)
                group = _Group([], [], [], append)
                size = 0
            if type(command.body) is Revoke:
                self._leases.end(command.body.token)
            group.commands.append(command)
            group.packed.append(packed)
            group.waiters.append((origin, number))
            size += len(packed)
            total += len(packed)
            if alone:
                self._propose(group)
                group = None
        if group is not None:
            self._propose(group)
        self._appends += 1

    def _propose(self, group: _Group) -> None:
        group.append.entries += 1
        self.raft_events.append(Propose(self._number(group), encode_entry(group.packed)))

    def _number(self, group: _Group) -> int:
        self._next_request += 1
        self._proposed[self._next_request] = group
        return self._next_request

    def _propose_own(self, body: ExpireLeases | ExpireSessions) -> None:
        """A command of the leader's own; nobody waits for it, and it does not wait behind clients' appends."""
        command = Command(0, 0, 0, body)
        group = _Group([command], [encode_command(command)], [], _Append(0))
        self._appends += 1
        self._propose(group)

    # -- Raft's answers --

    def role_changed(self, effect: RoleChanged, now_ns: int) -> None:
        was_leading, old_term = self.leading, self.term
        self.leader = effect.leader
        self.term = effect.term
        self.leading = effect.role is Role.LEADER
        if self.leading and not (was_leading and old_term == effect.term):
            self._counted_from_ns = now_ns - effect.lease_age_ns
            self.ready = False
        if was_leading and not (self.leading and old_term == effect.term):
            self._resign()

    def _resign(self) -> None:
        self.ready = False
        self._leases.clear()
        self._sweep_ns = None
        for group in (*self._proposed.values(), *self._appended.values()):
            for origin, number in group.waiters:
                self._refuse_leader(origin, number)
        self._proposed.clear()
        self._appended.clear()
        self._appends = 0
        queue, self._queue = self._queue, deque()
        for origin, number, _ in queue:
            self._refuse_leader(origin, number)

    def appended(self, effect: Appended) -> None:
        group = self._proposed.pop(effect.request, None)
        if group is not None:
            group.term = effect.term
            self._appended[effect.index] = group

    def dropped(self, effect: Dropped, now_ns: int) -> None:
        group = self._proposed.pop(effect.request, None)
        if group is None:
            return
        self._done(group)
        for command in group.commands:
            if type(command.body) is ExpireLeases:
                for token in command.body.tokens:
                    self._leases.retry(token, now_ns + self._retry_ns)
        reason = effect.reason
        for origin, number in group.waiters:
            if reason in (Reason.NOT_LEADER, Reason.TRANSFERRING, Reason.STORAGE_FAILED):
                self._refuse_leader(origin, number)
            elif group.members:
                self.answers.append((origin, number, Refused(Refusal.MEMBERS, reason.value)))
            elif reason is Reason.TOO_LARGE:
                self.answers.append((origin, number, Refused(Refusal.BAD, reason.value)))
            else:
                self.answers.append((origin, number, Refused(Refusal.UNAVAILABLE, reason.value)))

    def _done(self, group: _Group) -> None:
        group.append.entries -= 1
        if group.append.entries == 0:
            self._appends -= 1

    def apply(self, entries: Sequence[Entry], now_ns: int) -> bool:
        """Apply committed entries and answer who waits; True if this made us ready to lead."""
        state = self._state
        became_ready = False
        for index, term, kind, data in entries:
            group = self._appended.pop(index, None) if self._appended else None
            if group is not None and group.term != term:
                self._done(group)
                for origin, number in group.waiters:
                    self._refuse_leader(origin, number)
                group = None
            if kind is EntryKind.COMMAND:
                replies = state.apply(LogIndex(index), data, None if group is None else group.commands)
                first = replies[0]
                # A repeated request is answered from its session with the token of then: only a new Grant begins to count.
                if self.ready and type(first) is Granted and first.token == index:
                    self._leases.granted(index, state.leases[index].ttl_ns, now_ns)
                if group is not None:
                    self._answer(group, replies)
            else:
                state.skip(LogIndex(index))
                if kind is EntryKind.NOOP and self.leading and term == self.term:
                    became_ready = self._lead(now_ns)
                if group is not None:
                    self._answer(group, (Done(),))
        return became_ready

    def _answer(self, group: _Group, replies: Sequence[Reply | Done]) -> None:
        self._done(group)
        answers = self.answers
        for (origin, number), reply in zip(group.waiters, replies, strict=False):
            answers.append((origin, number, reply))

    def _lead(self, now_ns: int) -> bool:
        self.ready = True
        self._leases.lead(self._state.leases, self._counted_from_ns)
        self._seen.clear()
        self._sweep_ns = now_ns + SWEEP_NS
        return True

    @property
    def counted_from_ns(self) -> int:
        return self._counted_from_ns

    def begin_watches(self, watches: Sequence[tuple[Origin, int]]) -> None:
        """Let the next round open them."""
        self._reads.extend([_Waiting(origin, number, None, 0) for origin, number in watches])

    def read_ready(self, effect: ReadReady) -> list[tuple[Origin, int]]:
        """Answer what waited for the round; the watches that it opens."""
        opened: list[tuple[Origin, int]] = []
        for one in self._rounds.pop(effect.request, ()):
            if one.request is None:
                opened.append((one.origin, one.number))
            else:
                self.answers.append((one.origin, one.number, self._read(one.request, one.arrived_ns)))
        return opened

    def read_failed(self, effect: ReadFailed) -> bool:
        """Refuse what waited for the round; True if watches must be tried again."""
        has_watches = False
        for one in self._rounds.pop(effect.request, ()):
            if one.request is None:
                has_watches = True
            else:
                refused = Refused(Refusal.UNAVAILABLE, effect.reason.value, self.leader)
                self.answers.append((one.origin, one.number, refused))
        return has_watches

    def _read(self, request: Get | Range | Renew | Confirm, arrived_ns: int) -> DatabaseOutcome:
        state = self._state
        match request:
            case Get(key):
                return Found(state.get(key), state.revision)
            case Range(prefix, limit, after, at):
                if at > state.revision:
                    return Refused(Refusal.BAD, f"revision {at} is still to come, the database is at {state.revision}")
                try:
                    return state.state.range(prefix, limit=min(limit, PAGE_RECORDS), after=after, at=at)
                except CompactedError as exc:
                    return Refused(Refusal.COMPACTED, str(exc), exc.first_index)
            case Confirm():
                if not self.ready:
                    return self._not_leader()
                return Confirmed(self.term)
            case Renew(token):
                return self._renew(token, arrived_ns)

    def _renew(self, token: LeaseToken, arrived_ns: int) -> DatabaseOutcome:
        if not self.ready:
            return self._not_leader()
        lease = self._state.leases.get(token)
        if lease is None or not self._leases.renew(token, lease.ttl_ns, arrived_ns):
            return Refused(Refusal.LEASE_NOT_FOUND, f"lease {token} is over")
        return Renewed(token, lease.ttl_ns)

    def _refuse_leader(self, origin: Origin, number: int) -> None:
        self.answers.append((origin, number, self._not_leader()))

    def _not_leader(self) -> Refused:
        leader = None if self.leader == self._node else self.leader
        return Refused(Refusal.NOT_LEADER, "this replica does not lead", leader)

    # -- time --

    def next_timer(self) -> int | None:
        if not self.ready:
            return None
        lease_ns, sweep_ns = self._leases.next_timer(), self._sweep_ns
        return sweep_ns if lease_ns is None or (sweep_ns is not None and sweep_ns < lease_ns) else lease_ns

    def handle_timer(self, now_ns: int) -> None:
        if not self.ready:
            return
        expired = self._leases.take_expired(now_ns, self._state.leases)
        if expired:
            self._propose_own(ExpireLeases(tuple(expired)))
        if self._sweep_ns is not None and now_ns >= self._sweep_ns:
            self._sweep_ns = now_ns + SWEEP_NS
            self._leases.prune(self._state.leases)
            self._sweep_sessions(now_ns)

    def _sweep_sessions(self, now_ns: int) -> None:
        """Forget client sessions that were idle for ``SESSION_IDLE_NS`` under this leader; the state machine compares."""
        seen, self._seen = self._seen, {}
        idle: list[tuple[int, int]] = []
        for number, session in self._state.sessions.items():
            last_index, since_ns = seen.get(number, (0, 0))
            if last_index != session.last_index:
                since_ns = now_ns
            self._seen[number] = (session.last_index, since_ns)
            if now_ns - since_ns >= SESSION_IDLE_NS:
                idle.append((number, session.last_index))
        if idle:
            self._propose_own(ExpireSessions(tuple(idle)))
