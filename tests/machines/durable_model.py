"""Two or more durable machines with stores in memory, joined by sessions that the test makes, cuts and reorders."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence

import attrs

from ha_core.ids import Boot, ChannelName, NodeId, SessionId, StoreId
from ha_core.machines.contract import Effect, Event
from ha_core.machines.durable import DurableMachine
from ha_core.machines.durable_events import (
    Acknowledged,
    Attempt,
    BatchDone,
    ChannelForked,
    IncomingState,
    LoadOutbox,
    OutboxLoaded,
    OutboxRun,
    OutgoingState,
    RememberBoot,
    RunBatch,
    RunsCommitted,
)
from ha_core.machines.durable_wire import START_DIGEST, chain, pack_run
from ha_core.machines.handshake import SeenBoot
from ha_core.machines.messages import Consumed, DeliverRun, PeerRefused, SendRun, SessionDown, SessionUp

Channel = tuple[NodeId, ChannelName]
Effects = list[tuple[StoreId, ChannelName, int, bytes]]


@attrs.define
class Disk:
    """What is durable: an app.db."""

    store: StoreId
    outgoing: dict[Channel, OutgoingState] = attrs.field(factory=dict)
    outbox: dict[Channel, list[OutboxRun]] = attrs.field(factory=dict)
    incoming: dict[tuple[StoreId, ChannelName], IncomingState] = attrs.field(factory=dict)
    effects: Effects = attrs.field(factory=list)
    dead: list[tuple[StoreId, ChannelName, int, str]] = attrs.field(factory=list)
    boots: dict[StoreId, SeenBoot] = attrs.field(factory=dict)


class Failing(Exception):
    """What a test's handler raises."""


class Crashed(Exception):
    """What a test's handler raises to end the process."""


class ModelNode:
    """A node whose store is a Disk; ``work`` carries out what the machine asked of the store, when the test says so."""

    def __init__(self, name: str, store: bytes | None = None) -> None:
        self.name = NodeId(name)
        self.disk = Disk(StoreId(store or name.encode().ljust(16, b"-")[:16]))
        self.handler: Callable[[bytes], None] = lambda body: None
        self.forks: list[ChannelForked] = []
        self.refused: list[PeerRefused] = []
        self.out: dict[tuple[NodeId, ChannelName], deque[bytes]] = {}
        self.jobs: deque[LoadOutbox | RunBatch] = deque()
        self.boots = 0
        self.remembered = 0
        self.now_ns = 0
        self.acknowledged: list[Acknowledged] = []
        self.start(unclean=False)

    def start(self, unclean: bool = True, max_attempts: int = 3) -> None:
        """A new process over what is on the disk."""
        self.boots += 1
        self.out.clear()
        self.jobs.clear()
        self.machine = DurableMachine(
            outgoing=list(self.disk.outgoing.values()),
            incoming=list(self.disk.incoming.values()),
            unclean=unclean,
            max_attempts=max_attempts,
            seen=self.disk.boots.values(),
        )

    def feed(self, *events: Event | Effect) -> None:
        self.machine.receive(events, self.now_ns)
        for effect in self.machine.take_effects():
            match effect:
                case SendRun():
                    self.out.setdefault((effect.to, effect.channel), deque()).extend(effect.bodies)
                case LoadOutbox() | RunBatch():
                    self.jobs.append(effect)
                case Acknowledged():
                    self._forget(effect)
                case RememberBoot(seen):
                    self.remembered += 1
                    self.disk.boots[seen.store] = seen
                case ChannelForked():
                    self.forks.append(effect)
                    key = (effect.peer, effect.name)
                    if effect.outgoing:
                        state = self.disk.outgoing.get(key) or OutgoingState(effect.peer, effect.name, 0, 0, START_DIGEST)
                        self.disk.outgoing[key] = attrs.evolve(state, forked=effect.text)
                case PeerRefused():
                    self.refused.append(effect)
                case Consumed():
                    pass
                case _:
                    raise AssertionError(effect)
        self.machine.check()

    def wait(self, ns: int) -> None:
        self.now_ns += ns
        timer = self.machine.next_timer()
        if timer is not None and timer <= self.now_ns:
            self.machine.handle_timer(self.now_ns)
            self.feed()

    # -- sending --

    def commit(self, to: NodeId, name: str, bodies: Sequence[bytes], *, tell: bool = True) -> list[OutboxRun]:
        """A committed transaction with these sends; without ``tell`` the process dies before it hears of its commit."""
        key = (to, ChannelName(name))
        state = self.disk.outgoing.get(key, OutgoingState(to, ChannelName(name), 0, 0, START_DIGEST))
        rows = self.disk.outbox.setdefault(key, [])
        before = rows[-1].digest if rows else state.acked_digest
        first = state.last + 1
        digest = chain(before, first, bodies)[-1]
        size = sum(len(body) + 32 for body in bodies)
        run = OutboxRun(to, key[1], first, first + len(bodies) - 1, size, before, digest, pack_run(bodies))
        rows.append(run)
        self.disk.outgoing[key] = attrs.evolve(state, last=run.last)
        if tell:
            self.feed(RunsCommitted([run]))
        return [run]

    def _forget(self, effect: Acknowledged) -> None:
        self.acknowledged.append(effect)
        key = (effect.to, effect.name)
        state = self.disk.outgoing[key]
        self.disk.outgoing[key] = attrs.evolve(state, acked=effect.cursor, acked_digest=effect.digest)
        self.disk.outbox[key] = [run for run in self.disk.outbox[key] if run.last > effect.cursor]

    # -- the store's work --

    def work(self, count: int = 1_000_000, *, tell: bool = True) -> int:
        """Carry out up to ``count`` jobs."""
        done = 0
        while self.jobs and done < count:
            done += 1
            job = self.jobs.popleft()
            if isinstance(job, LoadOutbox):
                self._load(job)
            else:
                self._handle(job, tell)
        return done

    def _load(self, job: LoadOutbox) -> None:
        rows: list[OutboxRun] = []
        size = 0
        for run in self.disk.outbox.get((job.to, job.name), []):
            if run.last >= job.start and (not rows or size < job.byte_count):
                rows.append(run)
                size += run.size
        self.feed(OutboxLoaded(job.to, job.name, rows))

    def _handle(self, job: RunBatch, tell: bool) -> None:
        key = (job.store, job.name)
        state = self.disk.incoming.get(key, IncomingState(job.peer, job.store, job.name))
        assert job.first == state.cursor + 1
        if job.attempt is not None:
            state = attrs.evolve(state, attempt=job.attempt)
            self.disk.incoming[key] = state
        effects: Effects = []
        error = ""
        number, digest = state.cursor, state.digest
        if job.dead_letter:
            number, digest = job.first, job.digests[0]
            self.disk.dead.append((job.store, job.name, number, job.dead_letter))
        else:
            for number_, (body, digest_) in enumerate(zip(job.bodies, job.digests, strict=True), job.first):
                try:
                    self.handler(body)
                except Failing as exc:
                    error = str(exc) or "failing"
                    break
                effects.append((job.store, job.name, number_, body))
                number, digest = number_, digest_
        self.disk.effects.extend(effects)
        self.disk.incoming[key] = attrs.evolve(state, cursor=number, digest=digest, attempt=None)
        if tell:
            self.feed(BatchDone(job.store, job.name, number, digest, error))

    def bodies(self) -> list[bytes]:
        return [effect[3] for effect in self.disk.effects]

    def attempt(self) -> Attempt | None:
        return next(iter(self.disk.incoming.values())).attempt

    def backup(self) -> Disk:
        return copy.deepcopy(self.disk)


class Wire:
    """The session between two nodes."""

    def __init__(self, *nodes: ModelNode) -> None:
        self.one, self.two = nodes
        self.number = 0

    def up(self) -> None:
        self.number += 1
        session = SessionId(b"s%d" % self.number)
        for node, peer in ((self.one, self.two), (self.two, self.one)):
            node.out = {key: frames for key, frames in node.out.items() if key[0] != peer.name}
            node.feed(SessionUp(peer.name, session, peer.disk.store, Boot(peer.boots, 1)))

    def down(self) -> None:
        session = SessionId(b"s%d" % self.number)
        for node, peer in ((self.one, self.two), (self.two, self.one)):
            node.out = {key: frames for key, frames in node.out.items() if key[0] != peer.name}
            node.feed(SessionDown(peer.name, session, "cut"))

    def carry(self, count: int = 1_000_000) -> int:
        """Deliver up to ``count`` frames, one a time, both ways in turn."""
        carried = 0
        moved = True
        while moved and carried < count:
            moved = False
            for node, peer in ((self.one, self.two), (self.two, self.one)):
                for (to, channel), frames in list(node.out.items()):
                    if to == peer.name and frames and carried < count:
                        peer.feed(DeliverRun(node.name, channel, 1, [frames.popleft()]))
                        moved = True
                        carried += 1
        return carried

    def settle(self) -> None:
        """Carry and work until nothing moves."""
        while self.carry() + self.one.work() + self.two.work():
            pass
