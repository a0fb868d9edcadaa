"""A node's own requests: their identities, where they are sent, when they are repeated, and when their fate is unknown.

Rules of this file:

* A write gets (session, sequence) once and keeps it however often it is sent, so that it is applied once.
* ``floor`` in each command is the lowest sequence whose reply we may still ask for. Requests whose fate stayed unknown keep
  theirs, the newest ``MAX_UNKNOWN`` of them and for ``MAX_BEHIND`` writes: the state machine keeps no more replies for us.
* A write that was never handed to a replica ends with UNAVAILABLE, one that was ends with UNKNOWN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import attrs

from ha_core.ids import NodeId, SessionId
from ha_core.machines.contract import Effect
from ha_core.machines.database_events import (
    DATABASE,
    Arrived,
    Confirm,
    DatabaseOutcome,
    DatabaseReply,
    DatabaseRequest,
    Range,
    Reconfigure,
    Send,
    Transfer,
)
from ha_core.machines.database_wire import (
    WireRequest,
    WriteRequest,
    encode_requests,
)
from ha_core.machines.keyvalue.codec import MAX_KEY_BYTES, encode_command, is_key, problem_of
from ha_core.machines.keyvalue.model import (
    Body,
    Call,
    Change,
    Command,
    Get,
    Grant,
    OpenSession,
    Outcome,
    Refusal,
    Refused,
    RequestId,
    Revoke,
    SessionOpened,
)
from ha_core.machines.keyvalue.plain import is_number
from ha_core.machines.messages import Consumed, Priority, SendRun

MAX_OUTSTANDING = 2048
"""Writes of this node under way; the state machine holds twice as many."""
MAX_HELD = 65_536
"""Writes that wait for others of this node to end."""
MAX_UNKNOWN = 1024
MAX_BEHIND = 3072
SESSION_TIMEOUT_NS = 10_000_000_000

ClientRequest: TypeAlias = WireRequest | Confirm


@attrs.define
class _Pending:
    """A request until its reply. ``request`` is the parent's number, None for a session's opening."""

    request: int | None
    operation: ClientRequest | None
    deadline_ns: int
    to_leader: bool
    body: Body | None = None
    identity: RequestId | None = None
    own_identity: bool = False
    target: NodeId | None = None
    sent_count: int = 0
    resend_ns: int = 0


class DatabaseClient:
    """Pure; the machine around it takes ``out`` (what goes where) and ``effects`` after each batch."""

    def __init__(self, node: NodeId, *, replica: bool, retry_ns: int, resend_ns: int, servers: Sequence[NodeId] = ()) -> None:
        """``replica``: this node serves its own reads. ``servers``: nodes to ask; the leader is learned."""
        self.out: dict[NodeId, list[tuple[int, ClientRequest]]] = {}
        self.effects: list[Effect] = []
        self.leader: NodeId | None = None
        self._node = node
        self._replica = replica
        self._retry_ns = retry_ns
        self._resend_ns = resend_ns
        self._servers: dict[NodeId, None] = dict.fromkeys(servers)
        self._up: dict[NodeId, None] = {node: None} if replica else {}
        self._pending: dict[int, _Pending] = {}
        self._next = 0
        self._deadline_at: int | None = None
        """No pending request has an earlier deadline."""
        self._waiting: dict[int, None] = {}
        """Numbers that no replica has: they go out with the next chance, at ``_retry_at`` at the latest."""
        self._retry_at: int | None = None
        self._resend_at: int | None = None
        self._session = 0
        self._opening = False
        self._held: dict[int, None] = {}
        """Writes that have no identity yet: there is no session, or too many are under way."""
        self._sequence = 0
        self._outstanding: dict[int, None] = {}
        self._unknown: dict[int, None] = {}
        self._turn = 0

    # -- requests of this node --

    def request(self, event: DatabaseRequest, now_ns: int) -> None:
        operation = event.operation
        deadline_ns = now_ns + event.timeout_ns
        self._next += 1
        number = self._next
        if isinstance(operation, Change | Grant | Revoke | Call):
            problem = problem_of(operation)
            if problem is None and len(self._held) >= MAX_HELD:
                problem = f"{MAX_HELD} writes of this node wait already"
                self.effects.append(DatabaseReply(event.request, Refused(Refusal.TOO_MANY, problem)))
                return
            if problem is not None:
                self.effects.append(DatabaseReply(event.request, Refused(Refusal.BAD, problem)))
                return
            pending = _Pending(event.request, None, deadline_ns, True, operation, event.identity)
            self._add(number, pending)
            self._start_write(number, pending, now_ns)
            return
        if isinstance(operation, Confirm) and not self._replica:
            self.effects.append(DatabaseReply(event.request, Refused(Refusal.NOT_LEADER, "this node has no replica")))
            return
        to_leader = not isinstance(operation, Get | Range)
        if not to_leader and not _is_sound(operation):
            problem = f"a key is at most {MAX_KEY_BYTES} bytes, a limit and a revision are whole numbers"
            self.effects.append(DatabaseReply(event.request, Refused(Refusal.BAD, problem)))
            return
        pending = _Pending(event.request, operation, deadline_ns, to_leader)
        self._add(number, pending)
        self._send(number, pending, now_ns)

    def _add(self, number: int, pending: _Pending) -> None:
        self._pending[number] = pending
        if self._deadline_at is None or pending.deadline_ns < self._deadline_at:
            self._deadline_at = pending.deadline_ns

    def _start_write(self, number: int, pending: _Pending, now_ns: int) -> None:
        identity = pending.identity
        if identity is None:
            if not self._session or len(self._outstanding) - len(self._unknown) >= MAX_OUTSTANDING:
                self._held[number] = None
                if not self._session:
                    self._open_session(now_ns)
                return
            self._sequence += 1
            identity = pending.identity = RequestId(self._session, self._sequence)
            pending.own_identity = True
            self._outstanding[self._sequence] = None
            if self._unknown:
                self._forget_unknown()
        # The state machine must not settle a repeated request of ours before it has answered it.
        mine = identity.session == self._session
        floor = next(iter(self._outstanding), self._sequence + 1) if mine else 0
        body = pending.body
        if body is not None:
            command = Command(identity.session, identity.sequence, min(floor, identity.sequence), body)
            pending.operation = WriteRequest(command, encode_command(command))
        self._send(number, pending, now_ns)

    def _open_session(self, now_ns: int) -> None:
        if self._opening:
            return
        self._opening = True
        command = Command(0, 0, 0, OpenSession())
        self._next += 1
        pending = _Pending(None, WriteRequest(command, encode_command(command)), now_ns + SESSION_TIMEOUT_NS, True)
        self._add(self._next, pending)
        self._send(self._next, pending, now_ns)

    # -- where to --

    def _target(self, pending: _Pending) -> NodeId | None:
        if isinstance(pending.operation, Confirm):
            return self._node
        if not pending.to_leader and self._replica:
            return self._node
        if self.leader is not None and self.leader in self._up:
            return self.leader
        if self._replica:
            return None
        candidates = sorted(self._up)
        if not candidates:
            return None
        return candidates[self._turn % len(candidates)]

    def any_server(self) -> NodeId | None:
        """A replica to watch at: the leader if it can be reached, else another."""
        if self.leader is not None and self.leader in self._up:
            return self.leader
        candidates = sorted(self._up)
        return candidates[self._turn % len(candidates)] if candidates else None

    def _send(self, number: int, pending: _Pending, now_ns: int) -> None:
        target = self._target(pending)
        if target is None or pending.operation is None:
            self._wait(number, now_ns)
            return
        pending.target = target
        pending.resend_ns = now_ns + (self._resend_ns << min(pending.sent_count, 4))
        pending.sent_count += 1
        if target != self._node and (self._resend_at is None or pending.resend_ns < self._resend_at):
            self._resend_at = pending.resend_ns
        self.out.setdefault(target, []).append((number, pending.operation))

    def _wait(self, number: int, now_ns: int) -> None:
        pending = self._pending[number]
        pending.target = None
        self._waiting[number] = None
        if self._retry_at is None:
            self._retry_at = now_ns + self._retry_ns

    def take_out(self) -> dict[NodeId, list[tuple[int, ClientRequest]]]:
        out, self.out = self.out, {}
        return out

    # -- what is learned --

    def leader_changed(self, leader: NodeId | None, now_ns: int) -> None:
        """Requests that only a leader can answer go to the new one."""
        if leader == self.leader:
            return
        self.leader = leader
        if leader is None or leader not in self._up:
            return
        for number, pending in self._pending.items():
            if pending.to_leader and pending.target is not None and pending.target != leader:
                self._waiting[number] = None
        self._flush(now_ns)

    def peer_up(self, peer: NodeId, now_ns: int) -> None:
        if self._replica or not self._servers or peer in self._servers:
            self._up[peer] = None
            self._flush(now_ns)

    def peer_down(self, peer: NodeId, now_ns: int) -> None:
        self._up.pop(peer, None)
        self.out.pop(peer, None)
        for number, pending in self._pending.items():
            if pending.target == peer:
                self._wait(number, now_ns)

    def _flush(self, now_ns: int) -> None:
        waiting, self._waiting = self._waiting, {}
        self._retry_at = None
        for number in waiting:
            pending = self._pending.get(number)
            if pending is not None and not isinstance(pending.operation, Confirm):
                self._send(number, pending, now_ns)

    # -- replies --

    def replied(self, source: NodeId, number: int, outcome: DatabaseOutcome, now_ns: int) -> None:
        pending = self._pending.get(number)
        if pending is None:
            return
        if type(outcome) is Outcome:
            self._finish(number, pending, outcome)
            if self._held:
                self._start_held(now_ns)
            return
        if isinstance(outcome, Refused):
            if outcome.code is Refusal.NOT_LEADER and not isinstance(pending.operation, Confirm):
                self._redirect(source, number, pending, outcome, now_ns)
                return
            if outcome.code in (Refusal.UNAVAILABLE, Refusal.TOO_MANY) and not isinstance(pending.operation, Confirm):
                if pending.target == source:
                    self._wait(number, now_ns)
                return
            if outcome.code is Refusal.SESSION_EXPIRED and pending.own_identity:
                self._session_expired(number, pending, now_ns)
                return
        if isinstance(outcome, SessionOpened):
            self._session_opened(number, outcome, now_ns)
            return
        self._finish(number, pending, outcome)
        if self._held:
            self._start_held(now_ns)

    def _redirect(self, source: NodeId, number: int, pending: _Pending, refused: Refused, now_ns: int) -> None:
        if pending.target not in (source, None):
            return  # it went elsewhere meanwhile
        hint = refused.detail
        if not self._replica:
            if self.leader == source:
                self.leader = None
            self._turn += 1
            if isinstance(hint, str) and hint != source:
                self.leader = NodeId(hint)
        target = self._target(pending)
        if target is not None and target != source and pending.sent_count <= 2:
            self._send(number, pending, now_ns)
        else:
            self._wait(number, now_ns)

    def _session_opened(self, number: int, opened: SessionOpened, now_ns: int) -> None:
        del self._pending[number]
        if not self._opening:
            return
        self._opening = False
        self._session = opened.session
        self._sequence = 0
        self._outstanding.clear()
        self._unknown.clear()
        self._start_held(now_ns)

    def _start_held(self, now_ns: int) -> None:
        while self._held and self._session and len(self._outstanding) - len(self._unknown) < MAX_OUTSTANDING:
            number = next(iter(self._held))
            del self._held[number]
            pending = self._pending.get(number)
            if pending is not None:
                self._start_write(number, pending, now_ns)

    def _session_expired(self, number: int, pending: _Pending, now_ns: int) -> None:
        identity = pending.identity
        if identity is not None and identity.session == self._session:
            self._session = 0
        if pending.sent_count > 1:
            # An earlier copy may have been applied while the session was still known.
            self._finish(number, pending, self._unknown_fate(pending))
            return
        pending.identity = None
        pending.own_identity = False
        pending.sent_count = 0
        self._start_write(number, pending, now_ns)

    def _finish(self, number: int, pending: _Pending, outcome: DatabaseOutcome) -> None:
        del self._pending[number]
        self._waiting.pop(number, None)
        self._held.pop(number, None)
        identity = pending.identity
        if identity is not None and identity.session == self._session:
            if isinstance(outcome, Refused) and outcome.code is Refusal.UNKNOWN:
                self._keep_unknown(identity.sequence)
            else:
                self._outstanding.pop(identity.sequence, None)
                self._unknown.pop(identity.sequence, None)
        if pending.request is not None:
            self.effects.append(DatabaseReply(pending.request, outcome))
        elif self._opening:
            self._opening = False

    def _keep_unknown(self, sequence: int) -> None:
        if sequence not in self._outstanding:
            return
        self._unknown[sequence] = None
        if len(self._unknown) > MAX_UNKNOWN:
            oldest = next(iter(self._unknown))
            del self._unknown[oldest]
            self._outstanding.pop(oldest, None)

    def _forget_unknown(self) -> None:
        """Give up those far behind: they alone would keep the replies of all that came after them."""
        oldest = next(iter(self._outstanding))
        while oldest in self._unknown and self._sequence - oldest > MAX_BEHIND:
            del self._unknown[oldest], self._outstanding[oldest]
            oldest = next(iter(self._outstanding))

    # -- time --

    def next_timer(self) -> int | None:
        earliest = self._deadline_at
        for time in (self._retry_at, self._resend_at):
            if time is not None and (earliest is None or time < earliest):
                earliest = time
        return earliest

    def handle_timer(self, now_ns: int) -> None:
        if self._deadline_at is not None and now_ns >= self._deadline_at:
            expired = [number for number, pending in self._pending.items() if pending.deadline_ns <= now_ns]
            self._deadline_at = None
            for number in expired:
                self._expire(number, self._pending[number], now_ns)
            deadlines = [pending.deadline_ns for pending in self._pending.values()]
            self._deadline_at = min(deadlines, default=None)
        if self._retry_at is not None and now_ns >= self._retry_at:
            self._flush(now_ns)
        if self._resend_at is not None and now_ns >= self._resend_at:
            self._resend(now_ns)

    def _expire(self, number: int, pending: _Pending, now_ns: int) -> None:
        if pending.sent_count and (pending.body is not None or isinstance(pending.operation, Reconfigure | Transfer)):
            outcome = self._unknown_fate(pending)
        else:
            outcome = Refused(
                Refusal.UNAVAILABLE, "no leader of the database answered in time; the request was not carried out"
            )
        self._finish(number, pending, outcome)
        if pending.request is None and self._held:
            self._open_session(now_ns)

    @staticmethod
    def _unknown_fate(pending: _Pending) -> Refused:
        identity = pending.identity
        detail = None if identity is None else (identity.session, identity.sequence)
        return Refused(Refusal.UNKNOWN, "the database did not answer in time: the request may have been carried out", detail)

    def _resend(self, now_ns: int) -> None:
        """A replica that was sent something and does not answer: ask again, elsewhere if there is a choice."""
        self._resend_at = None
        late: list[int] = []
        for number, pending in self._pending.items():
            if pending.target is not None and pending.target != self._node:
                if pending.resend_ns <= now_ns:
                    late.append(number)
                elif self._resend_at is None or pending.resend_ns < self._resend_at:
                    self._resend_at = pending.resend_ns
        if late and not self._replica:
            self.leader = None
            self._turn += 1
        for number in late:
            self._send(number, self._pending[number], now_ns)


def _is_sound(read: object) -> bool:
    match read:
        case Get(key):
            return is_key(key)
        case Range(prefix, limit, after, at):
            return is_key(prefix) and is_key(after) and is_number(limit) and is_number(at)
    return False


def send_requests(to: NodeId, session: SessionId | None, requests: Sequence[tuple[int, ClientRequest]]) -> Send:
    """Requests as one run for another node."""
    bodies = encode_requests([(number, one) for number, one in requests if not isinstance(one, Confirm)])
    return Send(SendRun(to, DATABASE, bodies, Priority.URGENT, session=session))


def consumed(peer: NodeId, session: SessionId | None, arrived: Arrived) -> Send:
    """``session`` is the one that delivered it: the batch may hold its end and the beginning of the next."""
    return Send(Consumed(peer, arrived.channel, len(arrived.bodies), sum(map(len, arrived.bodies)), session))
