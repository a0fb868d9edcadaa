"""Random faults over three database machines: histories stay linearizable, watches keep their properties, replicas agree.

One seed a test run (printed); more with ``pytest --seed``.
"""

from __future__ import annotations

import random

import attrs

from ha_core.ids import NodeId
from ha_core.machines.database_events import Found
from ha_core.machines.keyvalue.model import Change, Compare, Delete, Get, Outcome, Put, Refusal, Refused, RevisionEvents, Step
from ha_core.testing.linearizability import Kind, Operation, check_linearizable, check_revisions, check_watch
from tests.machines.database_cluster import MS, Cluster, Process, S, WatchLog

KEYS = [b"w/a", b"w/b", b"x/c"]


@attrs.define(eq=False)
class Caller:
    """One client: calls, waits for the answer, calls again; its history is in terms of what it saw."""

    cluster: Cluster
    node: NodeId
    rng: random.Random
    name: str
    history: list[Operation]
    process: Process | None = None
    request: int = 0
    operation: Operation | None = None
    count: int = 0

    def poll(self) -> None:
        present = self.cluster.processes.get(self.node)
        if self.operation is not None:
            if self.process is not present or self.process is None:
                self._returned(None)
            elif self.request in self.process.replies:
                outcome = self.process.replies[self.request]
                if not isinstance(outcome, Refused) or outcome.code is Refusal.UNKNOWN:
                    self._returned(outcome)
                else:
                    self.operation = None
        elif present is not None:
            self._call(present)

    def _call(self, process: Process) -> None:
        rng = self.rng
        kind, key = rng.choice(list(Kind)), rng.choice(KEYS)
        self.count += 1
        value = f"{self.name}.{self.count}".encode() if kind in (Kind.PUT, Kind.COMPARE_AND_PUT) else None
        expected: bytes | None = None
        if kind is Kind.COMPARE_AND_PUT and self.history and rng.random() < 0.8:
            expected = next((one.value or one.found for one in reversed(self.history) if one.key == key), None)
        self.operation = Operation(
            client=self.name,
            kind=kind,
            key=key,
            called_ns=self.cluster.now_ns,
            returned_ns=None,
            value=value,
            expected=expected,
        )
        timeout_ns = rng.choice([300 * MS, 3 * S])
        if kind is Kind.GET:
            self.request = self.cluster.submit(self.node, Get(key), timeout_ns=timeout_ns)
        else:
            step: Step = Delete(key) if value is None else Put(key, value)
            compare = Compare.missing(key) if expected is None else Compare.value(key, expected)
            change = Change((compare,) if kind is Kind.COMPARE_AND_PUT else (), (step,))
            self.request = self.cluster.submit(self.node, change, timeout_ns=timeout_ns)
        self.process = process

    def _returned(self, outcome: object) -> None:
        operation, self.operation = self.operation, None
        assert operation is not None
        now = self.cluster.now_ns
        if isinstance(outcome, Found):
            found = None if outcome.record is None else outcome.record.value
            operation = attrs.evolve(operation, returned_ns=now, found=found, revision=outcome.revision)
        elif isinstance(outcome, Outcome):
            succeeded = outcome.succeeded if operation.kind is Kind.COMPARE_AND_PUT else None
            if operation.kind is Kind.DELETE:
                succeeded = outcome.results[0] == 1
            operation = attrs.evolve(operation, returned_ns=now, succeeded=succeeded, revision=outcome.revision)
        elif operation.kind is Kind.GET:
            return
        self.history.append(operation)


def break_something(cluster: Cluster, rng: random.Random) -> None:
    alive = [node for node in cluster.nodes if node in cluster.processes]
    dead = [node for node in cluster.nodes if node not in cluster.processes]
    match rng.randrange(6):
        case 0 if alive:
            cluster.crash(rng.choice(alive))
        case 1 | 2 if dead:
            cluster.start(rng.choice(dead))
        case 3:
            one, other = rng.sample([*cluster.nodes, *cluster.clients], 2)
            cluster.cut(one, other)
        case 4:
            cluster.heal()
        case 5 if alive:
            cluster.freeze(rng.choice(alive), rng.randrange(1, 900) * MS)


def committed(cluster: Cluster, history: dict[int, RevisionEvents]) -> None:
    for node in cluster.nodes:
        process = cluster.processes.get(node)
        if process is not None:
            for applied in process.applied:
                for group in applied.changes:
                    assert history.setdefault(group.revision, group) == group, "replicas committed different things"
            process.applied.clear()


def play(seed: int) -> tuple[int, int]:
    """(calls with an answer, revisions); raises AssertionError on a violation."""
    rng = random.Random(seed)
    cluster = Cluster(clients=1, seed=rng.getrandbits(32), checkpoint_min_bytes=rng.choice([3_000, 8 << 20]))
    history: list[Operation] = []
    nodes = [*cluster.nodes, *cluster.clients]
    callers = [Caller(cluster, node, rng, f"{node}{number}", history) for node in nodes for number in (1, 2)]
    watches: list[tuple[Process, WatchLog]] = []
    revisions: dict[int, RevisionEvents] = {}
    end = cluster.now_ns + 5 * S
    next_fault = cluster.now_ns + 500 * MS
    while cluster.now_ns < end:
        cluster.run_for(rng.randrange(1, 40) * MS)
        for caller in callers:
            caller.poll()
        if rng.random() < 0.02:
            node = rng.choice([one for one in nodes if one in cluster.processes] or [None])
            if node is not None:
                watches.append((cluster.processes[node], cluster.watch(node, b"w/", 0)))
        committed(cluster, revisions)
        if cluster.now_ns >= next_fault:
            next_fault = cluster.now_ns + rng.randrange(50, 900) * MS
            break_something(cluster, rng)
    cluster.heal()
    for node in cluster.nodes:
        if node not in cluster.processes:
            cluster.start(node)
    assert isinstance(cluster.call(cluster.nodes[0], Change(then=(Put(b"w/end", b""),))), Outcome), "no progress after healing"
    cluster.run_for(5 * S)
    for caller in callers:
        caller.poll()
    committed(cluster, revisions)

    assert check_linearizable(history) == []
    assert check_revisions(history) == []
    everything = [group for _, group in sorted(revisions.items())]
    for process, log in watches:
        until = max(log.bookmark, 0)
        if cluster.processes.get(process.node) is process:
            assert log.closed is not None or until == len(everything), "a watch came to a standstill"
        assert check_watch(log.changes, everything, prefix=b"w/", after=0, until=until) == []
    cluster.check()
    return sum(one.returned_ns is not None for one in history), len(revisions)


def test_random_faults_break_no_promise(rng: random.Random) -> None:
    """I36, I40, I41."""
    seed = rng.getrandbits(32)
    print(f"seed {seed}")
    answered, revisions = play(seed)
    assert answered > 20
    assert revisions > 5
