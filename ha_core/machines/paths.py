"""Is this path alive, and may it carry data? Evidence per connection, verdicts per path.

Rules:

* Evidence is proof about something that *we* sent on *this* connection: the answer to a probe, or the peer's absolute count
  of frames received on it. What we receive proves nothing about our own direction.
* Round trips are sampled from probes only, each with its own id, less the time that the peer says it spent on it. One that
  took longer than the probe timeout is no sample.
* A deadline counts from the oldest frame without evidence. What our own loop came late is added to every deadline: the first
  time in full, then within ``EXCUSE_NS``, or a loop that is late at every step would never see that a path is dead.
* At the first probe timeout data is copied to a second path; at the second one the path is SUSPECT, but only if another path
  of the same peer gave evidence meanwhile: all of them silent at once means a slow peer, not four broken networks.
* A path that failed is UP again only after good probes over ``up_after_s``, twice as long with each flap, unless no other
  path is UP: then at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import attrs

from ha_core.config import Profile, ns
from ha_core.errors import LocalProtocolError, RemoteProtocolError, invariant
from ha_core.machines.contract import Rng
from ha_core.machines.messages import PathKey, PathState

MILLISECOND_NS = 1_000_000
SECOND_NS = 1_000_000_000
ACK_DELAY_NS = 5 * MILLISECOND_NS
"""The longest that an end sits on an acknowledgement."""
GRANULARITY_NS = 10 * MILLISECOND_NS
MAX_TIMEOUT_NS = SECOND_NS
GRACE_NS = 5 * MILLISECOND_NS
"""Another path's fresh evidence must be so old before it condemns this one: their answers may be read in one batch."""
EXCUSE_NS = 100 * MILLISECOND_NS
"""For so long, beyond the first time, our own lag excuses silence between two timeouts."""
MAX_HOLD_NS = 60 * SECOND_NS
STABLE_NS = 60 * SECOND_NS
"""A flap is forgiven for each so much time UP."""
GOOD_PROBES = 3
MIN_REDIAL_NS = 50 * MILLISECOND_NS
MAX_REDIAL_NS = 10 * SECOND_NS
MARK_NS = MILLISECOND_NS
MAX_PINGS = 16
MAX_DOUBTFUL = 8

NEW, PROBING, UP, SUSPECT, DOWN = PathState

MOVES: Mapping[tuple[PathState, str], PathState] = {
    # dial: a connection is being tried. open: its handshake is done. good: evidence, and any hold-down is over.
    # silent: two probe timeouts while another path answers. lost: the connection is gone, or silent for down_s.
    (NEW, "dial"): PROBING,
    (NEW, "open"): PROBING,
    (PROBING, "dial"): PROBING,
    (PROBING, "open"): PROBING,
    (PROBING, "good"): UP,
    (PROBING, "silent"): PROBING,
    (PROBING, "lost"): DOWN,
    (UP, "open"): UP,
    (UP, "good"): UP,
    (UP, "silent"): SUSPECT,
    (UP, "lost"): DOWN,
    (SUSPECT, "open"): SUSPECT,
    (SUSPECT, "good"): UP,
    (SUSPECT, "silent"): SUSPECT,
    (SUSPECT, "lost"): DOWN,
    (DOWN, "dial"): DOWN,
    (DOWN, "open"): PROBING,
    (DOWN, "lost"): DOWN,
}
"""(state, what happened) -> state. Any other pair is a bug of the caller."""
HAPPENINGS = ("dial", "open", "good", "silent", "lost")


@attrs.define
class RoundTrip:
    """Smoothed round-trip time and its variance.

    Source: RFC 6298 section 2; RFC 9002 section 5.3.
    """

    smoothed_ns: int = 0
    variance_ns: int = 0

    def update(self, sample_ns: int) -> None:
        """Fold in one sample, less the time that the peer spent on it."""
        if self.smoothed_ns == 0:
            self.smoothed_ns, self.variance_ns = sample_ns, sample_ns // 2
            return
        self.variance_ns += (abs(self.smoothed_ns - sample_ns) - self.variance_ns) // 4
        self.smoothed_ns += (sample_ns - self.smoothed_ns) // 8

    def timeout_ns(self, floor_ns: int, deviations: int = 4) -> int:
        """The probe timeout: how long to wait for evidence."""
        timeout = self.smoothed_ns + max(deviations * self.variance_ns, GRANULARITY_NS) + ACK_DELAY_NS
        return min(max(timeout, floor_ns), MAX_TIMEOUT_NS)


@attrs.define
class Liveness:
    """The evidence of one connection.

    Invariants: ``proved <= sent``; ``marks`` are ordered, each a (count of frames sent, when); ``deadline_ns`` is set if and
    only if there is a mark.
    """

    floor_ns: int
    sent: int = 0
    """Frames sent on this connection since the handshake."""
    proved: int = 0
    """How many of them the peer said it received."""
    received: int = 0
    """Frames received on it."""
    timeouts: int = 0
    """Probe timeouts since the last evidence."""
    deadline_ns: int | None = None
    evidence_ns: int = 0
    """When the last evidence arrived."""
    first_timeout_ns: int = 0
    condemned: bool = False
    """Another path answered after this one's first timeout; one grace period is left."""
    excused_ns: int | None = None
    """By how much our own lag has put the deadline off, beyond the first time; None: not yet, since evidence or a timeout."""
    marks: deque[tuple[int, int]] = attrs.field(factory=deque)
    pings: dict[int, int] = attrs.field(factory=dict)
    next_ping: int = 1
    doubtful: list[int] = attrs.field(factory=list)
    """Round trips beyond the timeout since the last one within it."""
    round_trip: RoundTrip = attrs.field(factory=RoundTrip)

    def timeout_ns(self) -> int:
        return self.round_trip.timeout_ns(self.floor_ns)

    def _doubt_ns(self) -> int:
        """The first timeout only begins to copy: a false one costs a few bytes, so it comes sooner than RFC 6298 would."""
        return self.round_trip.timeout_ns(self.floor_ns, deviations=2)

    def note_sent(self, now_ns: int) -> None:
        """The last of the ``sent`` frames asks for evidence."""
        marks = self.marks
        if marks and now_ns - marks[-1][1] < MARK_NS:
            marks[-1] = (self.sent, marks[-1][1])
            return
        marks.append((self.sent, now_ns))
        if self.deadline_ns is None:
            self.deadline_ns = now_ns + self._doubt_ns()

    def note_proved(self, count: int, now_ns: int) -> bool:
        """The peer says that it received ``count`` frames; True if that is news.

        Raises:
            RemoteProtocolError: we never sent so many.
        """
        if count > self.sent:
            raise RemoteProtocolError(f"the peer counts {count} frames received, {self.sent} were sent", code="count")
        if count <= self.proved:
            return False
        self.proved = count
        marks = self.marks
        while marks and marks[0][0] <= count:
            marks.popleft()
        self.timeouts = 0
        self.condemned = False
        self.excused_ns = None
        self.evidence_ns = now_ns
        self.deadline_ns = marks[0][1] + self._doubt_ns() if marks else None
        return True

    def ping(self, now_ns: int) -> int:
        """The id of a new probe."""
        number = self.next_ping
        self.next_ping += 1
        self.pings[number] = now_ns
        if len(self.pings) > MAX_PINGS:
            del self.pings[number - MAX_PINGS]
        return number

    def pong(self, number: int, peer_delay_ns: int, now_ns: int) -> bool:
        """True if it answers one of our probes, once."""
        sent_ns = self.pings.pop(number, None)
        if sent_ns is None:
            return False
        for older in [ping for ping in self.pings if ping < number]:
            del self.pings[older]
        self._sample(max(0, now_ns - sent_ns - peer_delay_ns))
        return True

    def _sample(self, sample_ns: int) -> None:
        """A round trip beyond the timeout was an outage or a stall, and would make the next one be noticed late; only if
        nothing else is seen for long, it is the path that became slower."""
        if self.round_trip.smoothed_ns == 0 or sample_ns <= self.timeout_ns():
            self.doubtful.clear()
            self.round_trip.update(sample_ns)
            return
        self.doubtful.append(sample_ns)
        if len(self.doubtful) == MAX_DOUBTFUL:
            self.round_trip.update(min(self.doubtful))
            self.doubtful.clear()

    def shift(self, lag_ns: int, earliest_ns: int) -> None:
        """Our own loop was late by so much: nothing that was sent before is to blame for it, and no deadline counts before
        ``earliest_ns``, since evidence may be waiting to be read."""
        self.pings = {number: when + lag_ns for number, when in self.pings.items()}
        if self.deadline_ns is None:
            return
        if self.excused_ns is None:
            self.excused_ns = 0
            self.first_timeout_ns += lag_ns
            self.deadline_ns = max(self.deadline_ns, earliest_ns - lag_ns)
        else:
            lag_ns = min(lag_ns, EXCUSE_NS - self.excused_ns)
            self.excused_ns += lag_ns
        self.deadline_ns += lag_ns
        self.marks = deque((count, when + lag_ns) for count, when in self.marks)

    def timed_out(self, now_ns: int, down_ns: int, other_ns: int) -> str:
        """A probe timeout: "down", "doubt" (the first), "suspect", or "wait"; sets the next deadline.

        Args:
            down_ns: silence for so long is the slow verdict.
            other_ns: when another connection of the peer last gave evidence (0: never).
        """
        if self.silent_ns(now_ns) >= down_ns:
            return "down"
        self.timeouts += 1
        self.excused_ns = None
        timeout = self.timeout_ns()
        verdict = "wait"
        if self.timeouts == 1:
            self.first_timeout_ns = now_ns
            verdict = "doubt"
        elif other_ns > self.first_timeout_ns:
            # One more grace: the answers of both paths may lie in the sockets, and the other one was read first.
            if self.condemned:
                verdict = "suspect"
            else:
                self.condemned = True
                timeout = GRACE_NS
        if self.timeouts > 3:
            timeout = min(timeout * 3 ** (min(self.timeouts, 20) - 3) // 2 ** (min(self.timeouts, 20) - 3), MAX_TIMEOUT_NS)
        self.deadline_ns = min(now_ns + timeout, self.marks[0][1] + down_ns)
        return verdict

    def silent_ns(self, now_ns: int) -> int:
        """For how long the oldest frame without evidence has waited."""
        return now_ns - self.marks[0][1] if self.marks else 0

    def check(self) -> None:
        invariant(self.proved <= self.sent, "more was proved than sent", proved=self.proved, sent=self.sent)
        invariant((self.deadline_ns is not None) == bool(self.marks), "a deadline if and only if something is unproved")


@attrs.define
class Path:
    """One path to one peer and the verdict on it; outlives its connections."""

    key: PathKey
    dialling: bool
    """Whether we dial on it (there is an address, and the peer may be dialled)."""
    state: PathState = NEW
    established: int | None = None
    """The connection that carries it."""
    dial: int | None = None
    """The connection that is being tried by us."""
    redial_ns: int | None = None
    failures: int = 0
    flaps: int = 0
    up_since_ns: int = 0
    good_since_ns: int | None = None
    good_count: int = 0
    troubled: bool = False
    """It was SUSPECT or DOWN in this session: it comes back only after a hold-down."""

    def move(self, happening: str) -> bool:
        """Apply the table; True if the state changed.

        Raises:
            LocalProtocolError: the table has no such move.
        """
        state = MOVES.get((self.state, happening))
        if state is None:
            raise LocalProtocolError(f"path {self.key.link} is {self.state.value}: no move for {happening!r}")
        changed = state is not self.state
        self.state = state
        return changed

    def hold_ns(self, profile: Profile) -> int:
        """How long good probes must last before the path is UP again."""
        return min(ns(profile.up_after_s) << min(max(self.flaps - 1, 0), 16), MAX_HOLD_NS)

    def note_bad(self, now_ns: int) -> None:
        """Count a flap when a path that was UP fails; forgive old ones."""
        self.good_since_ns = None
        self.good_count = 0
        if self.state is UP:
            self.flaps = max(0, self.flaps - (now_ns - self.up_since_ns) // STABLE_NS) + 1
            self.troubled = True

    def note_good(self, now_ns: int, profile: Profile, *, other_up: bool) -> bool:
        """Evidence arrived; True if the path is now UP and was not."""
        if self.state is UP:
            return False
        if self.good_since_ns is None:
            self.good_since_ns = now_ns
        self.good_count += 1
        if self.troubled and other_up:
            held = now_ns - self.good_since_ns >= self.hold_ns(profile) and self.good_count >= GOOD_PROBES
            if not held:
                return False
        self.move("good")
        self.up_since_ns = now_ns
        self.failures = 0
        return True

    def forgive(self) -> None:
        """The peer's process is another one: its restart was no flap of the network."""
        self.flaps = 0
        self.failures = 0
        self.troubled = False

    def next_redial_ns(self, rng: Rng) -> int:
        """The time to wait before the next dial: jittered, doubling from 50 ms to 10 s."""
        base = min(MIN_REDIAL_NS << min(self.failures, 20), MAX_REDIAL_NS)
        self.failures += 1
        return max(MIN_REDIAL_NS // 2, int(base * rng.uniform(0.5, 1.0)))
