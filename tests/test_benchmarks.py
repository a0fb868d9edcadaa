"""Every benchmark runs with tiny parameters, and the harness computes what it says."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from benchmarks.__main__ import NAMES, load, main
from benchmarks.harness import Case, Goal, Peer, Result, at_least, at_most, p99, percentile, run_case, times_peer
from benchmarks.peers import limit_commit, limit_messages, redis_streams, volatile

FIELDS = ["bench", "case", "value", "unit", "min", "max", "repetitions", "peer", "goal", "met", "env"]
CASES = {
    "messages": {"durable-batch", "durable-each", "durable-ping-p50"},
    "session": {"one-call-each", "send-nowait"},
    "database": {"commit-1-p50", "commit-64-rate"},
    "paths": {"drop-stall-p99", "drop-stall-redundant-p99"},
    "failover": {"lan-follower-p99", "lan-leader-p99", "overlaps"},
    "flash": {"wear", "amplification-4k-16-group1"},
}


@pytest.mark.integration
@pytest.mark.parametrize("name", NAMES)
def test_benchmark_runs_and_prints_its_lines(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([name, "--smoke", "--json"])

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["case"] for line in lines} >= CASES[name]
    for line in lines:
        assert list(line) == FIELDS
        assert line["bench"] == name
        assert line["min"] <= line["max"]
        assert line["env"]["commit"]


def counting(values: Sequence[float], log: list[str], name: str) -> Case:
    found = iter(values)

    def measure() -> Sequence[float]:
        log.append(name)
        return [next(found)]

    return Case(name=name, unit="x/s", measure=measure, goal=Goal(words="none"), repetitions=3)


def test_repetitions_are_interleaved_and_medians_compared() -> None:
    log: list[str] = []
    ours, theirs = counting([0, 30, 10, 20], log, "ours"), counting([0, 4, 6, 5], log, "theirs")
    goal = Goal(words="at least 3 times", met=times_peer(3))
    case = Case(
        name="rate", unit="x/s", measure=ours.measure, goal=goal, peers=[Peer("theirs", theirs.measure, goal)], repetitions=3
    )

    (result,) = run_case("bench", case, {})

    assert log == ["ours", "theirs"] * 4
    assert (result.value, result.min, result.max) == (20, 10, 30)
    assert result.peer == {"name": "theirs", "value": 5}
    assert result.met is True
    assert "rate: 20.0 x/s (10.0 to 30.0, 3 repetitions); theirs: 5.0 x/s. Goal: at least 3 times: met" in result.as_text()


def test_goals_are_judged_only_against_what_was_measured() -> None:
    assert times_peer(2)(10, None) is None
    assert times_peer(2)(10, 6) is False
    assert at_least(5)(5, None)
    assert not at_most(5)(6, None)
    assert percentile([5, 1, 3], 50) == 3
    assert p99(range(1000)) == 990
    result = Result("b", "c", 1.0, "ms", 1.0, 1.0, 1, None, "g", None, {})
    assert list(json.loads(result.as_json())) == FIELDS


def test_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["nonsense"])
    assert "invalid choice" in capsys.readouterr().err


@pytest.mark.integration
def test_limit_skeletons_work() -> None:
    assert limit_messages.measure_rate(600, each=True)[0] > 0
    assert limit_commit.measure_rate(0.1, 4)[0] > 0


@pytest.mark.integration
@pytest.mark.skipif(not redis_streams.installed(), reason="redis-server or the package redis is not installed")
def test_redis_peer_works() -> None:
    assert redis_streams.measure_rate(600)[0] > 0
    assert len(redis_streams.measure_ping(3)) == 3


@pytest.mark.integration
@pytest.mark.parametrize("kind", volatile.NAMES)
def test_volatile_peers_work(kind: str) -> None:
    if not volatile.installed(kind):
        pytest.skip(f"{volatile.NAMES[kind]} is not installed")
    assert volatile.measure_rate(kind, 500)[0] > 0


def test_every_benchmark_has_three_sizes() -> None:
    for name in NAMES:
        assert set(load(name).SIZES) == {"smoke", "quick", "full"}
