"""Evidence and verdicts: the table of moves, the estimator, deadlines, hold-downs, redials."""

from __future__ import annotations

import random

import attrs
import pytest

from ha_core.config import LAN
from ha_core.errors import LocalProtocolError, RemoteProtocolError
from ha_core.ids import LinkName, NodeId
from ha_core.machines.messages import PathKey, PathState
from ha_core.machines.paths import (
    DOWN,
    HAPPENINGS,
    MAX_REDIAL_NS,
    MIN_REDIAL_NS,
    MOVES,
    NEW,
    PROBING,
    SUSPECT,
    UP,
    Liveness,
    Path,
    RoundTrip,
)

MS = 1_000_000
FLOOR = 25 * MS
DOWN_NS = 1_500 * MS


def path(state: PathState = NEW) -> Path:
    return Path(PathKey(NodeId("a@b"), LinkName("l"), "h:1"), True, state)


def sending(count: int = 1, at: int = 0) -> Liveness:
    live = Liveness(FLOOR)
    live.sent = count
    live.note_sent(at)
    return live


@pytest.mark.parametrize("state", PathState)
@pytest.mark.parametrize("happening", HAPPENINGS)
def test_every_pair_of_state_and_happening_is_a_move_or_an_error(state: PathState, happening: str) -> None:
    one = path(state)
    target = MOVES.get((state, happening))

    if target is None:
        with pytest.raises(LocalProtocolError, match=f"path l is {state.value}: no move for '{happening}'"):
            one.move(happening)
        assert one.state is state
    else:
        assert one.move(happening) == (target is not state)
        assert one.state is target


def test_only_evidence_leads_up_and_only_from_an_open_connection() -> None:
    assert {pair for pair, target in MOVES.items() if target is UP} == {
        (PROBING, "good"), (SUSPECT, "good"), (UP, "good"), (UP, "open"),
    }  # fmt: skip
    assert {MOVES[pair] for pair in MOVES if pair[1] == "lost"} == {DOWN}
    assert MOVES[UP, "silent"] is SUSPECT


def test_round_trips_follow_rfc_6298() -> None:
    trip = RoundTrip()
    trip.update(8 * MS)
    assert (trip.smoothed_ns, trip.variance_ns) == (8 * MS, 4 * MS)

    trip.update(16 * MS)
    assert (trip.smoothed_ns, trip.variance_ns) == (9 * MS, 5 * MS)


def test_the_peers_own_delay_is_no_round_trip_and_cannot_make_it_negative() -> None:
    live = Liveness(FLOOR)

    live.pong(live.ping(0), 49 * MS, 50 * MS)
    assert live.round_trip.smoothed_ns == MS
    live.pong(live.ping(0), 400 * MS, 10 * MS)

    assert 0 < live.round_trip.smoothed_ns < MS


def test_an_outage_is_no_round_trip() -> None:
    live = Liveness(FLOOR)
    live.pong(live.ping(0), 0, MS)

    for number in [live.ping(at * MS) for at in range(10, 300, 50)]:
        live.pong(number, 0, 350 * MS)

    assert live.timeout_ns() == FLOOR


def test_a_path_that_became_slower_is_believed_after_a_while() -> None:
    live = Liveness(FLOOR)
    live.pong(live.ping(0), 0, MS)

    for n in range(40):
        live.pong(live.ping(n * 1000 * MS), 0, (n * 1000 + 200) * MS)

    assert 200 * MS < live.timeout_ns() < 600 * MS


def test_the_probe_timeout_adapts_between_floor_and_a_second() -> None:
    assert RoundTrip().timeout_ns(FLOOR) == FLOOR
    slow = RoundTrip(80 * MS, 10 * MS)
    assert slow.timeout_ns(FLOOR) == 80 * MS + 40 * MS + 5 * MS
    assert RoundTrip(5_000 * MS, 0).timeout_ns(FLOOR) == 1_000 * MS


def test_the_deadline_counts_from_the_oldest_frame_without_evidence() -> None:
    live = sending(1, at=0)
    live.sent = 2
    live.note_sent(10 * MS)
    deadlines = [live.deadline_ns]
    for count in (1, 2):
        live.note_proved(count, 11 * MS)
        deadlines.append(live.deadline_ns)
        live.check()

    assert deadlines == [FLOOR, 10 * MS + FLOOR, None]


def test_frames_of_one_millisecond_share_the_older_mark() -> None:
    live = Liveness(FLOOR)
    for n in range(1000):
        live.sent += 1
        live.note_sent(n * 1000)

    assert len(live.marks) == 1
    assert live.silent_ns(5 * MS) == 5 * MS


def test_evidence_for_frames_that_were_never_sent_is_the_peers_fault() -> None:
    with pytest.raises(RemoteProtocolError, match="counts 2 frames received, 1 were sent"):
        sending(1).note_proved(2, 0)


def test_old_counts_are_no_evidence() -> None:
    live = sending(3)

    assert live.note_proved(3, 1)
    assert not live.note_proved(3, 2)
    assert not live.note_proved(1, 3)


def test_a_probe_is_answered_once_and_only_with_its_own_id() -> None:
    live = Liveness(FLOOR)
    first, second = live.ping(0), live.ping(10 * MS)

    assert not live.pong(99, 0, MS)
    assert live.pong(second, 0, 12 * MS)
    assert live.round_trip.smoothed_ns == 2 * MS
    assert not live.pong(second, 0, 13 * MS)
    assert not live.pong(first, 0, 13 * MS), "an answer to an older probe would be a sample of something else"


def test_unanswered_probes_take_bounded_room() -> None:
    live = Liveness(FLOOR)
    for n in range(1000):
        live.ping(n)

    assert len(live.pings) <= 16


def test_two_timeouts_condemn_a_path_only_if_another_one_answered_meanwhile() -> None:
    live = sending(at=0)
    assert live.timed_out(25 * MS, DOWN_NS, other_ns=24 * MS) == "doubt"
    assert live.deadline_ns == 50 * MS
    assert live.timed_out(50 * MS, DOWN_NS, other_ns=24 * MS) == "wait", "the other one's evidence is older than the doubt"
    assert live.timed_out(75 * MS, DOWN_NS, other_ns=60 * MS) == "wait", "the grace: both answers may lie in the sockets"
    assert live.deadline_ns == 80 * MS
    assert live.timed_out(80 * MS, DOWN_NS, other_ns=60 * MS) == "suspect"


def test_evidence_ends_the_doubt() -> None:
    live = sending(at=0)
    live.timed_out(25 * MS, DOWN_NS, 0)
    live.sent = 2
    live.note_sent(26 * MS)

    live.note_proved(1, 30 * MS)

    assert live.timeouts == 0
    assert live.timed_out(51 * MS, DOWN_NS, 50 * MS) == "doubt"


def test_silence_for_down_s_is_the_slow_verdict_and_timeouts_back_off_until_then() -> None:
    live = sending(at=0)
    verdicts, now = [], 0
    while "down" not in verdicts:
        assert live.deadline_ns is not None
        assert live.deadline_ns > now
        now = live.deadline_ns
        verdicts.append(live.timed_out(now, DOWN_NS, 0))

    assert now == DOWN_NS
    assert verdicts.count("wait") < 12


def test_our_own_lag_moves_every_deadline() -> None:
    live = sending(at=0)
    live.ping(0)

    live.shift(100 * MS, earliest_ns=140 * MS)

    assert live.deadline_ns == 140 * MS
    assert live.silent_ns(140 * MS) == 40 * MS
    live.pong(1, 0, 103 * MS)
    assert live.round_trip.smoothed_ns == 3 * MS


def test_a_fresh_path_is_up_with_the_first_evidence() -> None:
    one = path()
    one.move("dial")
    one.move("open")

    assert one.note_good(0, LAN, other_up=True)
    assert one.state is UP


def failed(one: Path, now: int) -> None:
    one.note_bad(now)
    one.move("silent")


def test_a_failed_path_waits_out_its_hold_down_while_another_is_up() -> None:
    one = path(UP)
    failed(one, 10_000 * MS)

    assert not one.note_good(10_100 * MS, LAN, other_up=True)
    assert not one.note_good(10_600 * MS, LAN, other_up=True)
    assert not one.note_good(11_099 * MS, LAN, other_up=True)
    assert one.note_good(11_100 * MS, LAN, other_up=True)


def test_a_failed_path_is_taken_at_once_if_there_is_no_other() -> None:
    one = path(UP)
    failed(one, 0)

    assert one.note_good(MS, LAN, other_up=False)


def test_a_bad_probe_begins_the_hold_down_anew() -> None:
    one = path(UP)
    failed(one, 0)
    one.note_good(100 * MS, LAN, other_up=True)
    one.note_good(900 * MS, LAN, other_up=True)
    one.note_bad(1_000 * MS)

    assert not one.note_good(1_200 * MS, LAN, other_up=True)
    assert not one.note_good(2_100 * MS, LAN, other_up=True)
    assert one.note_good(2_300 * MS, LAN, other_up=True)


def test_hold_downs_double_to_a_minute_and_are_forgiven_with_time() -> None:
    one, now, holds = path(UP), 0, []
    for _ in range(10):
        failed(one, now)
        holds.append(one.hold_ns(LAN) // MS)
        one.state, one.up_since_ns = UP, now
        now += 1_000 * MS
    assert holds == [1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000, 60_000, 60_000]

    one.up_since_ns = now
    failed(one, now + 3_600_000 * MS)

    assert one.hold_ns(LAN) == 1_000 * MS


def test_redials_are_jittered_and_double_up_to_ten_seconds() -> None:
    rng = random.Random(3)
    one = path()
    waits = [one.next_redial_ns(rng) for _ in range(20)]

    for attempt, wait in enumerate(waits):
        base = min(MIN_REDIAL_NS << attempt, MAX_REDIAL_NS)
        assert base / 2 <= wait <= base
    other = attrs.evolve(path())
    assert [other.next_redial_ns(rng) for _ in range(20)] != waits
