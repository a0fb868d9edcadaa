from __future__ import annotations

from ha_core.guard.watch import Restarts, Sample, Verdict, Watch

MS = 1_000_000
S = 1_000 * MS
TICK = 100 * MS
LIMIT = 1_000 * MS
RUNNING = Sample("S", 0)


def play(watch: Watch, until_ns: int, *, beats: bool = False, samples: dict[str, Sample] | None = None) -> int | None:
    """Tick regularly; the instant of the first verdict on aam."""
    for now in range(TICK, until_ns + 1, TICK):
        if beats:
            watch.beat("aam", now)
        if watch.tick(samples or {"aam": RUNNING}, now):
            return now
    return None


def watching(*, started: bool = True, start_ns: int = 10 * S) -> Watch:
    watch = Watch(TICK, start_ns)
    watch.add("aam", LIMIT, 0, started=started)
    return watch


def test_a_process_that_beats_is_left_alone() -> None:
    assert play(watching(), 60 * S, beats=True) is None


def test_a_silent_process_is_hung_after_its_limit_and_not_before() -> None:
    assert play(watching(), 5 * S) == LIMIT + TICK


def test_a_stopped_process_is_judged_at_once() -> None:
    watch = watching()
    watch.beat("aam", TICK)

    assert watch.tick({"aam": Sample("T", 0)}, TICK) == [("aam", Verdict.STOPPED)]


def test_a_process_that_was_slow_once_is_not_hung() -> None:
    """H19."""
    watch = watching()
    watch.tick({"aam": RUNNING}, 100 * MS)
    for now in range(200 * MS, 1_000 * MS, TICK):
        assert not watch.tick({"aam": RUNNING}, now)
    watch.beat("aam", 1_000 * MS)

    assert not watch.tick({"aam": RUNNING}, 1_900 * MS)


def test_time_in_which_the_watcher_itself_stood_still_does_not_count() -> None:
    """H19, M20."""
    watch = watching()
    watch.beat("aam", 100 * MS)
    watch.tick({"aam": RUNNING}, 100 * MS)

    for now in (30 * S, 30 * S + 100 * MS):
        assert not watch.tick({"aam": RUNNING}, now), (
            "I45 violated: a living process was judged by its watcher's own standstill"
        )
    late = [now for now in range(30 * S + 200 * MS, 32 * S, TICK) if watch.tick({"aam": RUNNING}, now)]
    assert 30 * S + 800 * MS <= late[0] <= 30 * S + 1_200 * MS


def test_waiting_for_a_processor_does_not_count_but_only_up_to_once_the_limit() -> None:
    watch = watching()
    verdicts = [now for now in range(TICK, 5 * S, TICK) if watch.tick({"aam": Sample("R", now * 9 // 10)}, now)]

    assert 1_900 * MS <= verdicts[0] <= 2 * LIMIT + 2 * TICK


def test_a_process_that_was_just_launched_gets_its_time_until_the_first_beat() -> None:
    assert play(watching(started=False), 20 * S) == 10 * S + TICK


def test_after_its_first_beat_a_launched_process_has_the_common_limit() -> None:
    watch = watching(started=False)
    watch.beat("aam", 0)

    assert play(watch, 20 * S) == LIMIT + TICK


def test_beats_of_an_unknown_process_count_for_nothing() -> None:
    watch = watching()
    watch.beat("vpxa", 0)

    assert "vpxa" not in watch


def test_a_process_without_an_entry_in_proc_is_judged_by_its_silence() -> None:
    watch = watching()

    assert [now for now in range(TICK, 2 * S, TICK) if watch.tick({}, now)][0] == LIMIT + TICK


def test_a_process_that_died_is_launched_again_at_once() -> None:
    restarts = Restarts()
    restarts.launched(0)

    assert restarts.died(60 * S) == 60 * S
    restarts.launched(60 * S)
    assert restarts.died(61 * S) == 61 * S


def test_a_process_that_keeps_dying_young_is_launched_ever_later() -> None:
    restarts = Restarts()
    waits = []
    for now in range(0, 20 * S, S):
        restarts.launched(now)
        waits.append(restarts.died(now + 10 * MS) - now - 10 * MS)

    assert waits[:2] == [0, 0]
    assert waits == sorted(waits)
    assert waits[-1] == restarts.longest_ns
    assert restarts.count == 20


def test_a_long_life_ends_the_punishment() -> None:
    restarts = Restarts()
    for _ in range(10):
        restarts.launched(0)
        restarts.died(10 * MS)
    restarts.launched(0)

    assert restarts.died(60 * S) == 60 * S
