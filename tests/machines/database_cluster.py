"""DatabaseMachines joined in virtual time: disks that take a while, a network that can be cut, processes that can die."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Mapping, Sequence

import attrs

from ha_core.config import LAN
from ha_core.ids import NodeId, ReplicaId
from ha_core.interfaces import Recovered
from ha_core.machines.contract import Effect, Event, Persist, Persisted, WriteCheckpoint, feed
from ha_core.machines.database import DatabaseMachine
from ha_core.machines.database_client import DatabaseClientMachine
from ha_core.machines.database_events import (
    Applied,
    Arrived,
    CloseWatch,
    DatabaseOutcome,
    DatabaseReply,
    DatabaseRequest,
    DatagramArrived,
    Leading,
    OpenWatch,
    Operation,
    PeerDown,
    PeerUp,
    Send,
    WatchClosed,
    WatchEvents,
)
from ha_core.machines.keyvalue import Procedure
from ha_core.machines.keyvalue.model import RequestId, RevisionEvents
from ha_core.machines.messages import SendDatagram, SendRun
from ha_core.machines.raft.configuration import Configuration, Member

MS = 1_000_000
S = 1_000 * MS
FLUSH_NS = 300_000
DELAY_NS = 200_000


@attrs.define
class Disk:
    checkpoint: bytes | None = None
    records: list[bytes] = attrs.field(factory=list)


@attrs.define(eq=False)
class WatchLog:
    changes: list[RevisionEvents] = attrs.field(factory=list)
    bookmark: int = -1
    closed: WatchClosed | None = None


@attrs.define(eq=False)
class Process:
    """Also the ``Ports`` of its machine."""

    cluster: Cluster
    node: NodeId
    machine: DatabaseMachine | DatabaseClientMachine
    disk: Disk
    life: int = 0
    timer_ns: int | None = None
    flushing: bool = False
    queued: list[Persist | WriteCheckpoint] = attrs.field(factory=list)
    replies: dict[int, DatabaseOutcome] = attrs.field(factory=dict)
    watches: dict[int, WatchLog] = attrs.field(factory=dict)
    applied: list[Applied] = attrs.field(factory=list)
    led: list[Leading] = attrs.field(factory=list)
    sent: list[Send] = attrs.field(factory=list)

    @property
    def database(self) -> DatabaseMachine:
        assert isinstance(self.machine, DatabaseMachine)
        return self.machine

    def feed(self, *events: Event) -> None:
        feed(self.machine, events, self.cluster.now_ns, self)

    def perform(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Persist() | WriteCheckpoint():
                    self.queued.append(effect)
                case Send(event):
                    self.sent.append(effect)
                    if isinstance(event, SendRun):
                        self.cluster.carry(self, event.to, Arrived(self.node, event.channel, list(event.bodies)))
                    elif isinstance(event, SendDatagram):
                        assert len(event.body) <= 1200
                        self.cluster.carry(self, event.to, DatagramArrived(self.node, event.body))
                case DatabaseReply(request, outcome):
                    assert request not in self.replies, "answered twice"
                    self.replies[request] = outcome
                case WatchEvents(watch, revision, changes):
                    log = self.watches[watch]
                    log.changes.extend(changes)
                    log.bookmark = revision
                case WatchClosed(watch):
                    self.watches[watch].closed = effect
                case Applied():
                    self.applied.append(effect)
                case Leading():
                    self.led.append(effect)
        self._flush()

    def _flush(self) -> None:
        if self.queued and not self.flushing:
            self.flushing = True
            batch, self.queued = self.queued, []
            self.cluster.at(FLUSH_NS, self, lambda: self._flushed(batch))

    def _flushed(self, batch: Sequence[Persist | WriteCheckpoint]) -> None:
        for effect in batch:
            if isinstance(effect, Persist):
                self.disk.records.append(effect.record)
            else:
                self.disk.checkpoint, self.disk.records = effect.state, list(effect.records)
        self.flushing = False
        self.feed(Persisted(batch[-1].number))
        self._flush()

    def wake_at(self, when_ns: int | None) -> None:
        if when_ns is not None and when_ns != self.timer_ns:
            self.timer_ns = when_ns
            self.cluster.at(max(0, when_ns - self.cluster.now_ns), self, self._wake)

    def _wake(self) -> None:
        if self.timer_ns is not None and self.timer_ns <= self.cluster.now_ns:
            self.timer_ns = None
            self.feed()


class Cluster:
    def __init__(
        self,
        voters: int = 3,
        *,
        clients: int = 0,
        seed: int = 1,
        procedures: Mapping[str, Procedure] | None = None,
        checkpoint_min_bytes: int = 8 << 20,
    ) -> None:
        self.now_ns = 1 * S
        self.rng = random.Random(seed)
        self.nodes = [NodeId(f"aam@h{number}.example") for number in range(1, voters + 1)]
        self.clients = [NodeId(f"app@c{number}.example") for number in range(1, clients + 1)]
        self.processes: dict[NodeId, Process] = {}
        self._disks = {node: Disk() for node in self.nodes}
        self._procedures = procedures
        self._checkpoint_min_bytes = checkpoint_min_bytes
        self._cuts: set[frozenset[NodeId]] = set()
        self._heap: list[tuple[int, int, Process, int, Callable[[], None]]] = []
        self._count = 0
        self._request = 0
        self._lives = 0
        for node in (*self.nodes, *self.clients):
            self.start(node)

    # -- time --

    def at(self, delay_ns: int, process: Process, call: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self.now_ns + delay_ns, self._count, process, process.life, call))

    def step(self) -> None:
        self.now_ns, _, process, life, call = heapq.heappop(self._heap)
        if self.processes.get(process.node) is process and process.life == life:
            call()

    def run_for(self, duration_ns: int) -> None:
        end = self.now_ns + duration_ns
        while self._heap and self._heap[0][0] <= end:
            self.step()
        self.now_ns = end

    def run_until(self, condition: Callable[[], object], limit_ns: int = 10 * S) -> None:
        end = self.now_ns + limit_ns
        while not condition():
            assert self._heap, "nothing happens any more"
            assert self._heap[0][0] <= end, "it did not happen in time"
            self.step()

    # -- processes --

    def start(self, node: NodeId) -> Process:
        rng = random.Random(self.rng.getrandbits(64))
        self._lives += 1
        machine: DatabaseMachine | DatabaseClientMachine
        disk = Disk()
        if node in self.clients:
            machine = DatabaseClientMachine(node, self.nodes, retry_ns=50 * MS, resend_ns=600 * MS)
        else:
            disk = self._disks[node]
            machine = DatabaseMachine(
                node=node,
                replica=ReplicaId(node.encode()),
                profile=LAN,
                rng=rng,
                recovered=Recovered(disk.checkpoint, list(disk.records)) if disk.records or disk.checkpoint else None,
                bootstrap=Configuration(
                    tuple(self.nodes), members={one: Member(one.encode()) for one in self.nodes}
                ),
                procedures=self._procedures,
                cluster="test",
                checkpoint_min_bytes=self._checkpoint_min_bytes,
            )  # fmt: skip
        process = Process(self, node, machine, disk, self._lives)
        self.processes[node] = process
        process.feed()
        for other in sorted(self.processes):
            if other != node and frozenset((node, other)) not in self._cuts:
                process.feed(PeerUp(other))
                self.processes[other].feed(PeerUp(node))
        return process

    def crash(self, node: NodeId) -> None:
        del self.processes[node]
        for other in sorted(self.processes):
            if frozenset((node, other)) not in self._cuts:
                self.processes[other].feed(PeerDown(node))

    def freeze(self, node: NodeId, duration_ns: int) -> None:
        """Everything that should happen to it happens later, in order."""
        process = self.processes[node]
        later = [(at, count, one, life, call) for at, count, one, life, call in self._heap if one is process]
        end = self.now_ns + duration_ns
        self._heap = [item for item in self._heap if item[2] is not process]
        self._heap += [(max(at, end), count, one, life, call) for at, count, one, life, call in later]
        heapq.heapify(self._heap)

    # -- network --

    def carry(self, sender: Process, to: NodeId, event: Arrived | DatagramArrived) -> None:
        receiver = self.processes.get(to)
        if receiver is None or frozenset((sender.node, to)) in self._cuts:
            return

        def deliver() -> None:
            alive = self.processes.get(sender.node) is sender and frozenset((sender.node, to)) not in self._cuts
            if alive and receiver is not None:
                receiver.feed(event)

        self.at(DELAY_NS, receiver, deliver)

    def cut(self, one: NodeId, other: NodeId) -> None:
        self._cuts.add(frozenset((one, other)))
        for node, peer in ((one, other), (other, one)):
            if node in self.processes:
                self.processes[node].feed(PeerDown(peer))

    def heal(self) -> None:
        cuts, self._cuts = self._cuts, set()
        for pair in sorted(sorted(cut) for cut in cuts):
            for node, peer in (pair, pair[::-1]):
                if node in self.processes and peer in self.processes:
                    self.processes[node].feed(PeerUp(peer))

    def isolate(self, node: NodeId) -> None:
        for other in (*self.nodes, *self.clients):
            if other != node:
                self.cut(node, other)

    # -- use --

    def leader(self) -> NodeId:
        def leaders() -> list[NodeId]:
            return [node for node in self.nodes if node in self.processes and self.processes[node].database.is_leading]

        self.run_until(leaders)
        return max(leaders(), key=lambda node: self.processes[node].database.term)

    def follower(self) -> NodeId:
        leader = self.leader()
        return next(node for node in self.nodes if node != leader and node in self.processes)

    def submit(self, node: NodeId, operation: Operation, *, timeout_ns: int = 10 * S, identity: RequestId | None = None) -> int:
        self._request += 1
        self.processes[node].feed(DatabaseRequest(self._request, operation, timeout_ns, identity))
        return self._request

    def call(
        self, node: NodeId, operation: Operation, *, timeout_ns: int = 10 * S, identity: RequestId | None = None
    ) -> DatabaseOutcome:
        """Submit, and run until the answer is there."""
        replies = self.processes[node].replies
        request = self.submit(node, operation, timeout_ns=timeout_ns, identity=identity)
        self.run_until(lambda: request in replies, timeout_ns + S)
        return replies[request]

    def watch(self, node: NodeId, prefix: bytes, after: int | None = None) -> WatchLog:
        self._request += 1
        process = self.processes[node]
        log = process.watches[self._request] = WatchLog()
        process.feed(OpenWatch(self._request, prefix, after))
        return log

    def close_watches(self, node: NodeId) -> None:
        process = self.processes[node]
        for watch in process.watches:
            process.feed(CloseWatch(watch))

    def check(self) -> None:
        """I41, at the last index that everybody has applied."""
        hashes: dict[int, bytes] = {}
        for node in self.nodes:
            if node in self.processes:
                state = self.processes[node].database.state
                state.check()
                digest = state.state_hash()
                assert hashes.setdefault(state.index, digest) == digest, "replicas differ at the same index"
