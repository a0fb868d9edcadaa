"""The six properties of watches, at one replica: ordered, unique, atomic, reliable, resumable, bookmarkable."""

from __future__ import annotations

import random

from ha_core.ids import LogIndex
from ha_core.machines.keyvalue import KeyValue
from ha_core.machines.keyvalue.codec import encode_command, encode_entry
from ha_core.machines.keyvalue.model import Change, Command, Delete, Limits, Put, RevisionEvents, SetLimits, Step
from ha_core.machines.keyvalue.watches import WINDOW_EVENTS, Watches, WatchOver, WatchRun


def change(state: KeyValue, *steps: Step) -> None:
    command = Command(0, 0, 0, Change(then=steps))
    state.apply(LogIndex(state.index + 1), encode_entry([encode_command(command)]))


def revisions(runs: list[WatchRun[str] | WatchOver[str]]) -> list[int]:
    return [group.revision for run in runs if isinstance(run, WatchRun) for group in run.changes]


def test_a_slow_watcher_gets_everything_in_order_once_and_whole(rng: random.Random) -> None:
    state, watches = KeyValue(), Watches[str]()
    watches.open("all", b"", 0)
    watches.open("some", b"a/", 0)
    got: dict[str, list[RevisionEvents]] = {"all": [], "some": []}
    untaken = {"all": 0, "some": 0}
    for number in range(3_000):
        keys = rng.sample([b"a/%d" % one for one in range(9)] + [b"b/%d" % one for one in range(9)], 3)
        change(state, *[Put(key, b"%d" % number) for key in keys])
        for run in watches.run(state.state):
            assert isinstance(run, WatchRun)
            got[run.watch].extend(run.changes)
            untaken[run.watch] += sum(len(group.events) for group in run.changes)
            assert untaken[run.watch] <= WINDOW_EVENTS + 3
        for name in ("all", "some"):
            if rng.random() < 0.3:
                count = rng.randrange(untaken[name] + 1)
                untaken[name] -= count
                watches.taken(name, count)
    for name in ("all", "some"):
        watches.taken(name, WINDOW_EVENTS)
    for run in watches.run(state.state):
        assert isinstance(run, WatchRun)
        got[run.watch].extend(run.changes)

    assert [group.revision for group in got["all"]] == list(range(1, 3_001))
    assert got["all"] == list(state.state.since(0))
    wanted = [(group.revision, event) for group in got["all"] for event in group.events if event.key.startswith(b"a/")]
    assert [(group.revision, event) for group in got["some"] for event in group.events] == wanted


def test_a_watch_resumes_after_a_revision_and_after_one_that_is_still_to_come() -> None:
    state, watches = KeyValue(), Watches[str]()
    for _ in range(5):
        change(state, Put(b"k", b""))
    watches.open("past", b"", 3)
    watches.open("future", b"", 7)

    assert revisions(watches.run(state.state)) == [4, 5]
    for _ in range(5):
        change(state, Put(b"k", b""))

    runs = watches.run(state.state)
    assert revisions([run for run in runs if run.watch == "past"]) == [6, 7, 8, 9, 10]
    assert revisions([run for run in runs if run.watch == "future"]) == [8, 9, 10]


def test_a_watch_at_a_compacted_revision_ends_with_where_to_resume() -> None:
    """R39."""
    state, watches = KeyValue(), Watches[str]()
    change(state, Put(b"other", b""))
    watches.open("slow", b"k", 0)
    watches.run(state.state)
    data = encode_entry([encode_command(Command(0, 0, 0, SetLimits(Limits(history_revisions=10))))])
    state.apply(LogIndex(state.index + 1), data)
    for _ in range(12):
        change(state, Put(b"k", b""))

    assert watches.run(state.state) == [WatchOver("slow", 1, 3)]
    assert len(watches) == 0


def test_bookmarks_tell_how_far_a_quiet_watch_has_come() -> None:
    state, watches = KeyValue(), Watches[str]()
    watches.open("quiet", b"none", 0)
    change(state, Put(b"k", b""))
    change(state, Delete(b"k"))

    assert watches.run(state.state) == []
    assert watches.bookmarks(state.state) == [WatchRun("quiet", 2, ())]
    assert watches.bookmarks(state.state) == []
