"""The stream of durable messages between all pairs of hosts: an application on each, with its own store on the host's device.

The endpoint and durable machines are the real ones, on the same simulated networks as the agents; the oracle of the messages
campaign judges every step of every cursor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Final

import attrs

from ha_core.ids import ChannelName, LinkName, NodeId, StoreId
from ha_core.machines import messages as m
from ha_core.machines.contract import Event
from ha_core.machines.durable import DurableMachine
from ha_core.machines.durable_events import (
    Acknowledged,
    BatchDone,
    ChannelForked,
    HandlerOpened,
    LoadOutbox,
    OutboxLoaded,
    RememberBoot,
    RunBatch,
    RunsCommitted,
)
from ha_core.machines.endpoint import EndpointMachine
from ha_core.testing.campaigns.messages_node import MessagesMachine
from ha_core.testing.campaigns.messages_store import (
    Count,
    Forget,
    Fork,
    Image,
    Operation,
    Oracle,
    Remember,
    Send,
    SimStore,
    Step,
)
from ha_core.testing.scenario.result import MessagesResult
from ha_core.testing.scenario.world import ScenarioWorld
from ha_core.testing.simulator import MILLISECOND, SECOND, SimConnections, SimProcess

CHANNEL: Final = ChannelName("scenario")
PORT: Final = 7400
KEY: Final = bytes(range(32))
TICK_NS: Final = 10 * MILLISECOND
"""Messages that are due within so long are sent in one go."""
BATCH: Final = 100
ATTEMPTS: Final = 5
"""How often a message is tried before it becomes a dead letter, as in a node's configuration by default."""
AGAIN_NS: Final = 200 * MILLISECOND
"""Until an application whose store failed is started again."""


class Application:
    """One process that sends and handles messages."""

    def __init__(self, stream: Stream, number: int, name: str) -> None:
        self.stream = stream
        self.sim = stream.world.sim
        self.host = stream.world.hosts[name]
        self.node = NodeId(f"app@{name}")
        self._failed = False
        links = stream.world.links_of(name)
        self.addresses = {LinkName(link): f"10.0.{net}.{number}:{PORT}" for net, link in enumerate(links, 1)}
        self.store = SimStore(self.sim, self.node, self._observe)
        self.process = self.host.host.add(
            SimProcess(self.sim, self.node, self._build, clock=self.host.host.clock, wake_ns=200_000, start=False)
        )
        self.process.observe(self)
        stream.connections.attach(self.process, self.addresses, host=name)
        on = self.process.on
        on(LoadOutbox, self._load)
        on(Acknowledged, lambda effect: self._commit([Forget(effect.to, effect.name, effect.cursor, effect.digest)]))
        on(RunBatch, self._run_batch)
        on(RememberBoot, lambda effect: self._commit([Remember(effect.seen)]))
        on(ChannelForked, self._forked)
        for kind in (m.SessionUp, m.SessionDown, m.RoomChanged, m.PathChanged, m.PeerReachable, m.PeerRefused):
            on(kind, lambda effect: None)

    # -- life --

    def _build(self, process: SimProcess) -> MessagesMachine:
        image, unclean = self.store.open()
        endpoint = EndpointMachine(
            node=self.node, cluster="scenario", key=KEY, store=image.store, boot=image.boot, boots_digest=image.boots_digest,
            links=self.addresses, profile=self.stream.world.profile, rng=process.rng,
            seen=image.boots.values(),
        )  # fmt: skip
        durable = DurableMachine(
            outgoing=list(image.outgoing.values()), incoming=list(image.incoming.values()), unclean=unclean, max_attempts=ATTEMPTS,
            seen=image.boots.values(),
        )  # fmt: skip
        self._after(0, self._begin)
        return MessagesMachine(endpoint, durable)

    def _begin(self) -> None:
        others = [other for other in self.stream.applications.values() if other is not self]
        self.process.post(*(m.SetPeer(other.node, other.addresses) for other in others), HandlerOpened(CHANNEL, BATCH))

    def process_up(self, process: SimProcess) -> None:
        pass

    def process_down(self, process: SimProcess, *, silent: bool) -> None:
        self.store.device.crash()

    def lose_store(self) -> None:
        """Its disk is replaced by an empty one."""
        self.process.end()
        self.store.lose()
        self._again()

    def _again(self) -> None:
        boots = self.host.host.boots

        def start() -> None:
            if self.host.booted and self.host.host.boots == boots:
                self.process.start()

        self.sim.after(AGAIN_NS, start)

    def _after(self, delay_ns: int, call: Callable[..., None], *args: object) -> None:
        """Call later, if this life still lasts."""
        life = self.process.lives

        def run() -> None:
            if self.process.alive and self.process.lives == life:
                call(*args)

        self.sim.after(delay_ns, run)

    def _commit(self, operations: Sequence[Operation], *events: Event, then: Callable[[], None] = lambda: None) -> None:
        """Commit; once that is durable, post ``events`` and go on with ``then``."""
        life = self.process.lives

        def done(error: str | None) -> None:
            if not self.process.alive or self.process.lives != life:
                return
            if error is not None:
                self._fail(error)
            else:
                self._failed = False
                self.process.post(*events)
                then()

        self.store.commit(operations, done)

    def _fail(self, error: str) -> None:
        """Its store failed; told once for a series of failures."""
        if not self._failed:
            self.stream.world.record.note(self.host.name, f"its application ends, and begins anew: {error}")
        self._failed = True
        self.process.end()
        self._again()

    def _observe(self, image: Image, operation: Operation) -> None:
        self.stream.oracle.observe(self.node, self.node, image, operation)
        self.stream.count(image, operation)

    # -- messages --

    def send(self, to: NodeId, bodies: Sequence[bytes]) -> None:
        send = self.store.send(to, CHANNEL, bodies)
        self._commit([send], RunsCommitted([send.run]))

    def _load(self, effect: LoadOutbox) -> None:
        def load() -> None:
            rows = self.store.load(effect.to, effect.name, effect.start, effect.byte_count)
            self.process.post(OutboxLoaded(effect.to, effect.name, rows))

        self._after(MILLISECOND, load)

    def _forked(self, effect: ChannelForked) -> None:
        self.stream.world.record.note(self.host.name, f"messages with {effect.peer} have forked: {effect.text}")
        if effect.outgoing:
            self._commit([Fork(effect.peer, effect.name, effect.text)])

    def _run_batch(self, effect: RunBatch) -> None:
        count = 1 if effect.dead_letter else len(effect.bodies)
        step = Step(
            effect.peer, effect.store, effect.name, effect.first, effect.bodies[:count], effect.digests[count - 1],
            dead=bool(effect.dead_letter),
        )  # fmt: skip
        done = BatchDone(effect.store, effect.name, step.last, step.digest)

        def handle() -> None:
            self._after(MILLISECOND, self._commit, [step], done)

        if effect.attempt is None:
            handle()
        else:
            self._commit([Count(effect.peer, effect.store, effect.name, effect.attempt)], then=handle)


@attrs.define
class _Sent:
    """What a store has durably sent to one receiver: the bodies of messages 1, 2, 3, ..."""

    bodies: list[bytes] = attrs.field(factory=list)


class Stream:
    def __init__(self, world: ScenarioWorld) -> None:
        self.world = world
        self.connections = SimConnections(world.network)
        self.oracle = Oracle(world.sim, lambda name: self._by_node[name].process.alive)
        self.applications = {name: Application(self, number, name) for number, name in enumerate(world.hosts, 1)}
        self._by_node: dict[str, Application] = {one.node: one for one in self.applications.values()}
        pairs = [(one, other) for one in self.applications for other in self.applications if one != other]
        self._pairs = cycle(pairs)
        self._alone = not pairs
        self._due = 0.0
        self._number = 0
        self._sent: dict[tuple[StoreId, NodeId], _Sent] = {}
        self._delivered: dict[bytes, None] = {}
        self._dead: dict[bytes, None] = {}
        """Set aside as dead letters: every try failed with the store of its receiver."""
        self._duplicates = 0

    def start(self) -> None:
        """t = 0."""
        for name, application in self.applications.items():
            if self.world.hosts[name].booted:
                application.process.start()
        if not self._alone:
            self.world.sim.every(TICK_NS, self._tick)

    def _tick(self) -> None:
        """Send what is due, to one pair after the other; an application that is down or stands still sends nothing."""
        self._due += self.world.scenario.messages_per_s * TICK_NS / SECOND
        count, self._due = int(self._due), self._due - int(self._due)
        bodies: dict[tuple[str, str], list[bytes]] = {}
        for _ in range(count):
            self._number += 1
            bodies.setdefault(next(self._pairs), []).append(b"message %d" % self._number)
        for (one, other), run in bodies.items():
            process = self.applications[one].process
            if process.alive and not process.frozen:
                self.applications[one].send(self.applications[other].node, run)

    # -- counting --

    def count(self, image: Image, operation: Operation) -> None:
        """An operation became durable."""
        if isinstance(operation, Send):
            self._sent.setdefault((image.store, operation.run.to), _Sent()).bodies.extend(operation.bodies)
        elif isinstance(operation, Step) and operation.dead:
            self._dead.update(dict.fromkeys(operation.bodies))
        elif isinstance(operation, Step):
            for body in operation.bodies:
                self._duplicates += body in self._delivered
                self._delivered[body] = None

    def result(self) -> MessagesResult:
        """Lost is what was committed, has had no effect, is no dead letter and is no longer kept to be sent."""
        lost = 0
        for (store, to), sent in self._sent.items():
            kept = self._kept(store, to)
            missing = [
                number for number, body in enumerate(sent.bodies, 1) if body not in self._delivered and body not in self._dead
            ]
            lost += sum(number not in kept for number in missing)
        total = sum(len(sent.bodies) for sent in self._sent.values())
        return MessagesResult(total, len(self._delivered), self._duplicates, lost, len(self._dead))

    def _kept(self, store: StoreId, to: NodeId) -> dict[int, None]:
        images = [one.store.durable for one in self.applications.values() if one.store.durable.store == store]
        runs = [run for image in images for run in image.outbox.get((to, CHANNEL), ())]
        return {number: None for run in runs for number in range(run.first, run.last + 1)}
