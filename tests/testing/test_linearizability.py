"""The checkers accept histories of a real register under concurrency and refuse each kind of corruption."""

from __future__ import annotations

import random

import attrs
import pytest

from ha_core.machines.keyvalue.model import KeyEvent, Record, RevisionEvents
from ha_core.testing.linearizability import Kind, Operation, check_linearizable, check_revisions, check_watch


def simulate(rng: random.Random, *, clients: int, calls: int, keys: int = 3, unknown: float = 0.0) -> list[Operation]:
    """Each client calls, takes effect at a random instant, and returns; the register is real, so the history is good."""
    instants: list[tuple[int, int, int, int]] = []
    for client in range(clients):
        now = rng.randrange(50)
        for _ in range(calls):
            called = now
            effect = called + 1 + rng.randrange(60)
            returned = effect + 1 + rng.randrange(60)
            instants.append((effect, called, returned, client))
            now = returned + 1 + rng.randrange(30)
    state: dict[bytes, bytes | None] = {}
    history: list[Operation] = []
    revision = 0
    for number, (_, called, returned, client) in enumerate(sorted(instants)):
        key = b"k%d" % rng.randrange(keys)
        kind = rng.choice(list(Kind))
        value = b"v%d" % number if kind in (Kind.PUT, Kind.COMPARE_AND_PUT) else None
        expected = rng.choice([state.get(key), b"wrong"]) if kind is Kind.COMPARE_AND_PUT else None
        found = state.get(key) if kind is Kind.GET else None
        succeeded: bool | None = None
        if kind is Kind.COMPARE_AND_PUT:
            succeeded = expected == state.get(key)
        elif kind is Kind.DELETE:
            succeeded = state.get(key) is not None
        lost = kind is not Kind.GET and rng.random() < unknown
        if not (lost and rng.random() < 0.5) and (kind is Kind.PUT or succeeded):
            revision += 1
            state[key] = value
        history.append(
            Operation(
                client=f"c{client}", kind=kind, key=key, called_ns=called, returned_ns=None if lost else returned, value=value,
                expected=expected, found=found, succeeded=None if lost else succeeded, revision=None if lost else revision,
            )
        )  # fmt: skip
    return history


def test_good_histories_are_accepted(rng: random.Random) -> None:
    for _ in range(20):
        history = simulate(rng, clients=5, calls=15)
        assert check_linearizable(history) == []
        assert check_revisions(history) == []


def test_unknown_fates_may_have_happened_or_not(rng: random.Random) -> None:
    for _ in range(20):
        history = simulate(rng, clients=4, calls=10, unknown=0.15)
        assert check_linearizable(history) == []
        assert check_revisions(history) == []


def test_a_read_of_a_value_never_written_is_refused(rng: random.Random) -> None:
    for _ in range(20):
        history = simulate(rng, clients=4, calls=12)
        at = rng.choice([at for at, one in enumerate(history) if one.kind is Kind.GET])
        history[at] = attrs.evolve(history[at], found=b"never")
        (violation,) = check_linearizable(history)
        assert repr(history[at].key) in violation
        assert check_revisions(history)


def test_a_stale_read_is_refused() -> None:
    """R35: the write had returned before the read was called."""
    write = Operation(client="a", kind=Kind.PUT, key=b"k", called_ns=0, returned_ns=10, value=b"1", revision=1)
    again = Operation(client="a", kind=Kind.PUT, key=b"k", called_ns=20, returned_ns=30, value=b"2", revision=2)
    stale = Operation(client="b", kind=Kind.GET, key=b"k", called_ns=40, returned_ns=50, found=b"1", revision=1)
    overlapping = attrs.evolve(stale, called_ns=25)

    assert check_linearizable([write, again, stale])
    assert check_revisions([write, again, stale])
    assert check_linearizable([write, again, overlapping]) == []
    assert check_revisions([write, again, overlapping]) == []


def test_a_lost_update_is_refused() -> None:
    """R40 and its like: two compare-and-puts cannot both have replaced the same value."""
    first = Operation(
        client="a", kind=Kind.COMPARE_AND_PUT, key=b"k", called_ns=0, returned_ns=10, value=b"1", succeeded=True, revision=1
    )
    second = attrs.evolve(first, client="b", value=b"2", revision=2)

    assert check_linearizable([first, second])
    assert check_revisions([first, second])


def test_a_write_that_vanishes_is_refused() -> None:
    """I36."""
    write = Operation(client="a", kind=Kind.PUT, key=b"k", called_ns=0, returned_ns=10, value=b"1", revision=1)
    read = Operation(client="b", kind=Kind.GET, key=b"k", called_ns=20, returned_ns=30, found=None, revision=1)

    assert check_linearizable([write, read])
    assert check_revisions([write, read])
    assert check_linearizable([attrs.evolve(write, returned_ns=None, revision=None), read]) == []


def test_reads_that_disagree_on_the_order_of_writes_are_refused() -> None:
    writes = [
        Operation(client=name, kind=Kind.PUT, key=b"k", called_ns=0, returned_ns=100, value=name.encode(), revision=number)
        for number, name in ((1, "a"), (2, "b"))
    ]

    def reads(client: str, *found: bytes) -> list[Operation]:
        return [
            Operation(client=client, kind=Kind.GET, key=b"k", called_ns=10 + 20 * at, returned_ns=20 + 20 * at, found=value)
            for at, value in enumerate(found)
        ]

    assert check_linearizable([*writes, *reads("c", b"a", b"b"), *reads("d", b"a", b"b")]) == []
    assert check_linearizable([*writes, *reads("c", b"a", b"b", b"a")])


def test_revisions_that_go_back_or_are_used_twice_are_refused() -> None:
    write = Operation(client="a", kind=Kind.PUT, key=b"k", called_ns=0, returned_ns=10, value=b"1", revision=5)
    later = Operation(client="b", kind=Kind.PUT, key=b"x", called_ns=20, returned_ns=30, value=b"2", revision=4)

    assert check_revisions([write, later])
    assert check_revisions([write, attrs.evolve(later, called_ns=5, revision=5)])
    assert check_revisions([write, attrs.evolve(later, revision=6)]) == []


def test_a_long_history_of_few_clients_is_quick(rng: random.Random) -> None:
    history = simulate(rng, clients=5, calls=200, keys=5)

    assert check_linearizable(history) == []
    assert check_revisions(history) == []


def group(revision: int, *keys: bytes) -> RevisionEvents:
    return RevisionEvents(revision, tuple(KeyEvent(key, Record(key, b"", 1, revision, 1, 0), None) for key in keys))


COMMITTED = [group(1, b"a"), group(2, b"b"), group(3, b"a", b"ab"), group(4, b"c"), group(5, b"a")]


def test_a_good_watch_is_accepted() -> None:
    delivered = [group(3, b"a", b"ab"), group(5, b"a")]
    assert check_watch(delivered, COMMITTED, prefix=b"a", after=1, until=5) == []
    assert check_watch([], COMMITTED, prefix=b"a", after=3, until=4) == []


@pytest.mark.parametrize(
    "delivered",
    [
        [group(5, b"a")],
        [group(3, b"a", b"ab")],
        [group(3, b"a"), group(5, b"a")],
        [group(5, b"a"), group(3, b"a", b"ab")],
        [group(3, b"a", b"ab"), group(3, b"a", b"ab"), group(5, b"a")],
        [group(1, b"a"), group(3, b"a", b"ab"), group(5, b"a")],
        [group(3, b"a", b"ab"), group(4, b"c"), group(5, b"a")],
    ],
)
def test_a_watch_that_skips_repeats_reorders_or_tears_is_refused(delivered: list[RevisionEvents]) -> None:
    """R39."""
    assert check_watch(delivered, COMMITTED, prefix=b"a", after=1, until=5)
