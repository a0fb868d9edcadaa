"""The leader's side of host leases: answers guards' renewals, counts leases out, asks for Grants and Revokes.

Volatile: nothing here outlives a leadership, everything that must is in the log. Rules (docs/guarantees.md):

* L2  A renewal is answered only by a leader that has applied its own first entry and its own Lead, and only after a quorum
      round *begun after the renewal arrived*; one round serves all that wait.
* L3  Expiry = arrival + L. From the moment a Revoke is proposed that token is never confirmed again.
* L5  An expired token is never renewed: its holder asks for a new Grant. A holder that lost its lease on its side does not
      keep it by asking: it may be one that hears no answer.
* L6  A new leader counts old leases from the moment that the election vouches for (``counted_from_ns``): never shorter.

A delayed or repeated datagram moves nothing: only a renewal created later than the newest one confirmed counts.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

import attrs

from ha_core.guard.renewal import Renewal, RenewalAnswer, Status
from ha_core.ids import HostName, LeaseToken
from ha_core.machines.failover.commands import Command, Confirm, Grant, Lead, Revoke
from ha_core.machines.failover.inventory import Inventory
from ha_core.machines.failover.records import Lease, Mode, Role

MAX_PENDING: Final = 4096
MAX_HINTS: Final = 16


@attrs.frozen
class Answer:
    """Send ``answer`` back to where the renewal came from."""

    source: Hashable
    answer: RenewalAnswer


@attrs.frozen
class Round:
    """Prove by a quorum round that begins now that this node still leads; answer with ``round_done``."""

    number: int


@attrs.frozen
class Proposal:
    """Put ``command`` into the log; one at a time for each ``key``, and again if it was refused or its fate is open."""

    key: Hashable
    command: Command


Demand = Answer | Round | Proposal


@attrs.define
class _Pending:
    renewal: Renewal
    source: Hashable
    arrived_ns: int
    proven: bool = False
    """A round that began after its arrival has confirmed that we lead."""


@attrs.define
class _Count:
    """What this leader knows of one host's lease."""

    token: LeaseToken
    expiry_ns: int
    since_ns: int
    """When we began to count this token."""
    newest_created_ns: int = -1
    proven_ns: int | None = None
    """Arrival of the newest renewal under the token: its holder has heard an answer. An ask does not say so."""

    @property
    def proven(self) -> bool:
        return self.proven_ns is not None and self.proven_ns >= self.since_ns


class LeaseServer:
    def __init__(self, node: str, inventory: Inventory, renewal_ns: int) -> None:
        self._node = node
        self._inventory = inventory
        self._renewal_ns = renewal_ns
        self._demands: list[Demand] = []
        self._term = 0
        self._counted_from_ns = 0
        self._counts: dict[HostName, _Count] = {}
        self._revoking: dict[LeaseToken, HostName] = {}
        self._pending: list[_Pending] = []
        self._in_round: list[_Pending] = []
        self._round = 0
        self._round_begun_ns: int | None = None
        self._looked_ns: int | None = None
        self._ticked_ns = 0

    # -- what it is told --

    def lead(self, term: int, counted_from_ns: int, now_ns: int) -> None:
        """This node leads in ``term`` and has applied its own first entry."""
        self.follow()
        self._term = term
        self._counted_from_ns = counted_from_ns
        self._looked_ns = self._ticked_ns = now_ns
        self._demands.append(Proposal(("lead", term), Lead(term, self._node)))

    def follow(self) -> None:
        """This node does not lead (any more): what was counted and who waits is forgotten."""
        self._term = 0
        self._counts.clear()
        self._revoking.clear()
        self._pending.clear()
        self._in_round.clear()
        self._round_begun_ns = None
        self._looked_ns = None

    def receive(self, renewal: Renewal, source: Hashable, now_ns: int) -> None:
        """A guard's renewal or ask, already authenticated; ``source`` is where the answer goes."""
        if not self._term:
            return
        self._look(now_ns)
        if len(self._pending) < MAX_PENDING:
            self._pending.append(_Pending(renewal, source, now_ns))
        self._begin_round(now_ns)

    def applied(self, now_ns: int) -> None:
        """The inventory has changed."""
        if not self._term:
            return
        self._look(now_ns)
        if self.serving:
            self._count_leases(now_ns)
            self._judge(now_ns)
            self._begin_round(now_ns)

    def round_done(self, number: int, term: int, now_ns: int) -> None:
        """A quorum round confirmed that we lead in ``term``; 0: it failed."""
        if not self._term or number != self._round:
            return
        self._look(now_ns)
        self._round_begun_ns = None
        waited, self._in_round = self._in_round, []
        for pending in waited:
            pending.proven = term == self._term
        self._pending = [*waited, *self._pending]
        if self.serving:
            self._judge(now_ns)
        if term == self._term:
            self._begin_round(now_ns)

    # -- what it says --

    @property
    def leading(self) -> bool:
        return self._term != 0

    @property
    def serving(self) -> bool:
        """Whether renewals may be answered: we lead, and our Lead is applied."""
        return self._term != 0 and self._inventory.epoch.term == self._term

    def fresh(self, now_ns: int) -> list[HostName]:
        """Hosts that renewed a moment ago: likely alive, and they hear us, so VMs may be placed there."""
        since_ns = now_ns - 4 * self._renewal_ns
        return [
            host
            for host, count in sorted(self._counts.items())
            if count.proven_ns is not None and count.proven_ns >= since_ns and count.token not in self._revoking
        ]

    def expiry_ns(self, host: HostName) -> int | None:
        """Until when this leader counts the host's lease; None: it does not."""
        count = self._counts.get(host)
        return None if count is None else count.expiry_ns

    def take_demands(self) -> list[Demand]:
        demands, self._demands = self._demands, []
        return demands

    def next_timer(self) -> int | None:
        if not self._term:
            return None
        times = [
            count.expiry_ns
            for host, count in self._counts.items()
            if self._armed(host) and count.token not in self._revoking and count.expiry_ns > self._ticked_ns
        ]
        return min([*times, self._ticked_ns + self._renewal_ns])

    def handle_timer(self, now_ns: int) -> None:
        if not self._term:
            return
        self._look(now_ns)
        self._ticked_ns = now_ns
        if not self.serving:
            self._demands.append(Proposal(("lead", self._term), Lead(self._term, self._node)))
            return
        self._count_leases(now_ns)
        self._drop_old(now_ns)
        self._judge(now_ns)
        self._begin_round(now_ns)
        self._revoke_expired(now_ns)

    # -- counting --

    def _look(self, now_ns: int) -> None:
        # If this process stood still, renewals wait unread in its sockets: nobody else is to blame, so leases last longer.
        if self._looked_ns is not None:
            stood_ns = now_ns - self._looked_ns - 2 * self._renewal_ns
            if stood_ns > 0:
                for count in self._counts.values():
                    count.expiry_ns += stood_ns + 2 * self._renewal_ns
                    count.since_ns = now_ns
        self._looked_ns = now_ns

    def _armed(self, host: HostName) -> bool:
        lease = self._inventory.leases.get(host)
        return lease is not None and lease.armed

    def _count_leases(self, now_ns: int) -> None:
        """Begin to count what is new: under an earlier leader's word from ``counted_from_ns``, else from now on."""
        for host, lease in sorted(self._inventory.leases.items()):
            if lease.revoked:
                self._counts.pop(host, None)
                self._revoking.pop(lease.token, None)
                continue
            if not lease.armed:
                self._revoking.pop(lease.token, None)  # no entry can revoke it any more
            count = self._counts.get(host)
            if count is None:
                since_ns = now_ns if self._granted_by_us(lease) else self._counted_from_ns
                self._counts[host] = _Count(lease.token, since_ns + lease.hold_ns, now_ns)
            elif count.token != lease.token:
                count.token = lease.token
                count.expiry_ns = max(count.expiry_ns, now_ns + lease.hold_ns)
                count.since_ns = now_ns
                count.newest_created_ns = -1
        for host in [host for host in self._counts if host not in self._inventory.leases]:
            del self._counts[host]

    def _granted_by_us(self, lease: Lease) -> bool:
        """Our Lead stands in the log before its Grant."""
        return lease.token > self._inventory.epoch.index

    def _revoke_expired(self, now_ns: int) -> None:
        waiting = {pending.renewal.host for pending in (*self._in_round, *self._pending)}
        for host, count in sorted(self._counts.items()):
            if not self._armed(host):
                continue
            if count.token in self._revoking:
                self._propose_revoke(host, count.token)
                continue
            # A renewal that arrived in time and waits for its round may still extend the lease.
            if now_ns < count.expiry_ns or (host in waiting and now_ns < count.expiry_ns + 2 * self._renewal_ns):
                continue
            self._revoking[count.token] = host
            self._propose_revoke(host, count.token)

    def _propose_revoke(self, host: HostName, token: LeaseToken) -> None:
        lease = self._inventory.leases[host]
        why = f"no renewal was confirmed for {lease.hold_ns / 1e9:g} s"
        self._demands.append(Proposal(("revoke", token), Revoke(host, token, self._term, why)))

    # -- rounds --

    def _begin_round(self, now_ns: int) -> None:
        if self._round_begun_ns is not None:
            if now_ns < self._round_begun_ns + 2 * self._renewal_ns:
                return
            # That one takes too long: another for all, its own included.
            self._pending = [*self._in_round, *self._pending]
            self._in_round = []
        unproven = [pending for pending in self._pending if not pending.proven]
        if not unproven:
            self._round_begun_ns = None
            return
        self._in_round = unproven
        self._pending = [pending for pending in self._pending if pending.proven]
        self._round += 1
        self._round_begun_ns = now_ns
        self._demands.append(Round(self._round))

    def _drop_old(self, now_ns: int) -> None:
        """A guard asks again every ``renewal_ns``: what waited longer than a few of them is not worth an answer."""
        oldest_ns = now_ns - 8 * self._renewal_ns
        self._pending = [pending for pending in self._pending if pending.arrived_ns >= oldest_ns]

    # -- judging --

    def _judge(self, now_ns: int) -> None:
        self._pending = [pending for pending in self._pending if not (pending.proven and self._answered(pending))]

    def _answered(self, pending: _Pending) -> bool:
        """Answer a renewal whose round is done, or ask the log for what it needs; False: it still waits for that."""
        renewal = pending.renewal
        host = HostName(renewal.host)
        lease = self._inventory.leases.get(host)
        if host not in self._inventory.hosts:
            return self._answer(pending, Status.REFUSED)
        if lease is None:
            return self._want_grant(pending)
        holder = (renewal.boot_id, renewal.instance)
        if lease.candidate and holder == (lease.candidate_boot, lease.candidate_instance) and self._candidate_current(lease):
            return self._answer_candidate(pending, lease)
        if holder == (lease.boot, lease.instance):
            if self._may_confirm(pending, lease):
                self._confirm(pending, lease)
                return True
            if renewal.lease_token and not self._was_offered(pending, lease):
                return self._answer(pending, Status.REVOKED)
            return self._is_deaf(pending, lease) or self._want_grant(pending)
        if renewal.boot_id == lease.boot and renewal.created_ns < lease.created_ns:
            return self._answer(pending, Status.REFUSED)
        if renewal.lease_token:
            return self._answer(pending, Status.REVOKED)
        return self._want_grant(pending)

    def _may_confirm(self, pending: _Pending, lease: Lease) -> bool:
        count = self._counts.get(lease.host)
        if lease.revoked or count is None or count.token != lease.token:
            return False
        if lease.token in self._revoking:  # L3
            return False
        if lease.armed and pending.arrived_ns >= count.expiry_ns:  # L5
            return False
        if self._is_deaf(pending, lease):
            return False
        asked = pending.renewal.lease_token
        return asked == 0 or (lease.continued or lease.token) <= asked <= lease.token

    def _is_deaf(self, pending: _Pending, lease: Lease) -> bool:
        """The holder asks for what it was told it has, though VMs run under it: it heard no answer until the lease ended on its
        side, and they with it. Unanswered, the lease ends here, too, and they start elsewhere. A guard that took over, and has
        not shown yet that it hears us, may ask for as long as its VMs can still be held."""
        count = self._counts.get(lease.host)
        if pending.renewal.lease_token or count is None or not lease.armed or lease.revoked:
            return False
        held = any(run.held and run.host == lease.host for run in self._inventory.runs.values())
        return held and (count.proven or pending.arrived_ns >= count.since_ns + lease.hold_ns)

    def _confirm(self, pending: _Pending, lease: Lease) -> None:
        renewal = pending.renewal
        count = self._counts[lease.host]
        if renewal.created_ns < count.newest_created_ns:
            return
        if renewal.created_ns > count.newest_created_ns:
            count.newest_created_ns = renewal.created_ns
            if renewal.lease_token:
                count.proven_ns = pending.arrived_ns
            count.expiry_ns = max(count.expiry_ns, pending.arrived_ns + lease.hold_ns)
        self._answer(pending, Status.CONFIRMED, lease)
        if not self._numbers_current(lease):
            self._propose_grant(renewal)

    def _numbers_current(self, lease: Lease) -> bool:
        settings = self._inventory.settings
        now = (settings.lease_ns, settings.margin_ns, settings.mode is Mode.ARMED)
        return (lease.lease_ns, lease.margin_ns, lease.armed) == now

    def _candidate_current(self, lease: Lease) -> bool:
        return not (lease.candidate_boot == lease.boot and self._numbers_current(lease) and not lease.revoked)

    def _was_offered(self, pending: _Pending, lease: Lease) -> bool:
        """The holder took a candidate for its lease that is none any more: its VMs go on, under a Grant that is newer still."""
        return pending.renewal.lease_token == lease.candidate and lease.candidate_boot == lease.boot and not lease.revoked

    def _answer_candidate(self, pending: _Pending, lease: Lease) -> bool:
        renewal = pending.renewal
        if renewal.lease_token == lease.candidate:
            self._demands.append(Proposal(("confirm", lease.candidate), Confirm(lease.host, lease.candidate)))
            return False
        chain = (lease.continued or lease.token) if lease.candidate_boot == lease.boot and not lease.revoked else 0
        self._demands.append(
            Answer(
                pending.source,
                RenewalAnswer(
                    renewal.instance, renewal.number, Status.CONFIRMED, lease.candidate, lease.candidate_lease_ns,
                    lease.candidate_margin_ns, chain or lease.candidate, lease.candidate_armed, self._hints(),
                ),
            )
        )  # fmt: skip
        return True

    def _want_grant(self, pending: _Pending) -> bool:
        self._propose_grant(pending.renewal)
        return False

    def _propose_grant(self, renewal: Renewal) -> None:
        ask = Grant(HostName(renewal.host), renewal.boot_id, renewal.instance, renewal.created_ns)
        self._demands.append(Proposal(("grant", renewal.host, renewal.boot_id, renewal.instance), ask))

    def _answer(self, pending: _Pending, status: Status, lease: Lease | None = None) -> bool:
        renewal = pending.renewal
        answer = RenewalAnswer(renewal.instance, renewal.number, status, renewal.lease_token)
        if lease is not None:
            answer = RenewalAnswer(
                renewal.instance, renewal.number, status, lease.token, lease.lease_ns, lease.margin_ns,
                lease.continued or lease.token, lease.armed, self._hints(),
            )  # fmt: skip
        self._demands.append(Answer(pending.source, answer))
        return True

    def _hints(self) -> tuple[tuple[str, str], ...]:
        voters = [host for _, host in sorted(self._inventory.hosts.items()) if host.role is not Role.SECONDARY]
        return tuple(address for host in voters for address in host.addresses)[:MAX_HINTS]
