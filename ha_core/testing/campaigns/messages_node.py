"""A node of the messages campaign: endpoint and durable machines in one process, its store, and an application on top.

The application sends durable messages in transactions, answers some inside the transaction that handles them, fails on some
messages and is killed by others. What it says on sessions is in ``messages_talk.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ha_core.config import LAN
from ha_core.ids import ChannelName, LinkName, NodeId, StoreId
from ha_core.machines import messages as m
from ha_core.machines.contract import Effect, Event
from ha_core.machines.durable import REPORTS_CHANNEL, RUNS_CHANNEL, DurableMachine
from ha_core.machines.durable_events import (
    Acknowledged,
    BatchDone,
    ChannelForked,
    HandlerClosed,
    HandlerOpened,
    LoadOutbox,
    OutboxLoaded,
    OutboxRun,
    RememberBoot,
    RunBatch,
    RunsCommitted,
)
from ha_core.machines.endpoint import EndpointMachine
from ha_core.machines.handshake import VERSION_MAX, VERSION_MIN
from ha_core.testing.campaigns.messages_newer import NEWER, NewerEndpoint
from ha_core.testing.campaigns.messages_store import (
    Count,
    Forget,
    Fork,
    Operation,
    Oracle,
    Remember,
    SimStore,
    Step,
    outbox_bytes,
)
from ha_core.testing.campaigns.messages_talk import Talker
from ha_core.testing.simulator import MILLISECOND, SECOND, SimClock, SimConnections, SimProcess, Simulation

CLUSTER = "campaign"
PROFILE = LAN
OURS = (VERSION_MIN, VERSION_MAX)
KEY = bytes(range(32))
CHANNELS = (ChannelName("orders"), ChannelName("bulk"))
REPLIES = ChannelName("replies")
_STRANGER = (".1.99:", ".2.99:")
_HONEST_REFUSALS = ("clone", "stale", "busy", "self")
_DURABLE = frozenset((RUNS_CHANNEL, REPORTS_CHANNEL))


class MessagesMachine:
    """Endpoint and durable machine composed: what one wants of the other stays inside."""

    def __init__(self, endpoint: EndpointMachine, durable: DurableMachine) -> None:
        self.endpoint = endpoint
        self.durable = durable
        self._effects: list[Effect] = []

    def receive(self, events: Sequence[Event], now_ns: int) -> None:
        to_durable = [event for event in events if isinstance(event, _DURABLE_EVENTS)]
        to_endpoint = [event for event in events if not isinstance(event, _DURABLE_EVENTS)]
        if to_endpoint:
            self.endpoint.receive(to_endpoint, now_ns)
        if to_durable:
            self.durable.receive(to_durable, now_ns)
        self._settle(now_ns)

    def handle_timer(self, now_ns: int) -> None:
        for machine in (self.endpoint, self.durable):
            timer = machine.next_timer()
            if timer is not None and timer <= now_ns:
                machine.handle_timer(now_ns)
        self._settle(now_ns)

    def next_timer(self) -> int | None:
        timers = [timer for timer in (self.endpoint.next_timer(), self.durable.next_timer()) if timer is not None]
        return min(timers, default=None)

    def take_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    def persisted(self, number: int, now_ns: int) -> None:
        raise AssertionError("neither machine persists by itself")

    def persist_failed(self, number: int, error: str, now_ns: int) -> None:
        raise AssertionError("neither machine persists by itself")

    def check(self) -> None:
        self.endpoint.check()
        self.durable.check()

    def _settle(self, now_ns: int) -> None:
        while True:
            up: list[Event | Effect] = []
            for effect in self.endpoint.take_effects():
                if isinstance(effect, m.DeliverRun) and effect.channel in _DURABLE:
                    up.append(effect)
                else:
                    if isinstance(effect, m.SessionUp | m.SessionDown):
                        up.append(effect)
                    self._effects.append(effect)
            if up:
                self.durable.receive(up, now_ns)
            down: list[Event] = []
            for item in self.durable.take_effects():
                if isinstance(item, m.SendRun | m.Consumed):
                    down.append(item)
                else:
                    assert isinstance(item, Effect)
                    self._effects.append(item)
            if not down:
                return
            self.endpoint.receive(down, now_ns)


_DURABLE_EVENTS = (RunsCommitted, OutboxLoaded, HandlerOpened, HandlerClosed, BatchDone)


class MessagesNode:
    """One process with its store; ``handler_fails`` decides by body and try whether a handler raises."""

    def __init__(
        self,
        sim: Simulation,
        name: str,
        node: NodeId,
        addresses: Mapping[LinkName, str],
        connections: SimConnections,
        oracle: Oracle,
        *,
        rate_ppm: int = 0,
    ) -> None:
        self.sim = sim
        self.name = name
        self.node = node
        self.peers: dict[NodeId, Mapping[LinkName, str]] = {}
        self.addresses = addresses
        self.oracle = oracle
        self.rng = sim.stream(f"application/{name}")
        limit_bytes = self.rng.choice((8 << 20, 8 << 20, 300_000, 20_000))
        self.store = SimStore(
            sim, name, lambda image, operation: oracle.observe(name, node, image, operation), limit_bytes=limit_bytes
        )
        self.reports: list[tuple[NodeId, str]] = []
        """(peer, text): forks and refusals that an administrator would hear of."""
        self.newer_share = 0.0
        """How often its process runs the next version: it may be upgraded, and taken back, with each life."""
        self.forks = 0
        self.talker = Talker(sim, name, self.rng, self._after)
        self._failures: dict[tuple[StoreId, ChannelName, int], int] = {}
        self.on_path_changed: Callable[[m.PathChanged], None] = lambda effect: None
        self.process = SimProcess(
            sim, name, self._build, clock=SimClock(sim, start_ns=self.rng.randrange(100) * SECOND, rate_ppm=rate_ppm),
            wake_ns=200_000, start=False,
        )  # fmt: skip
        self.process.observe(self)
        connections.attach(self.process, addresses)
        self._listen()

    # -- life --

    def _build(self, process: SimProcess) -> MessagesMachine:
        image, unclean = self.store.open()
        self.talker.begin()
        for (store, name), cursor in image.effects.items():
            self.sim.checked("I7")
            state = image.incoming.get((store, name))
            if state is None or state.cursor != cursor:
                self.sim.violate("I7", f"{self.name}: effects of {name!r} up to {cursor}, but the cursor is {state}")
        newer = self.rng.random() < self.newer_share
        endpoint = (NewerEndpoint if newer else EndpointMachine)(
            node=self.node, cluster=CLUSTER, key=KEY, store=image.store, boot=image.boot, boots_digest=image.boots_digest,
            links=self.addresses, profile=PROFILE, rng=process.rng, versions=NEWER if newer else OURS, seen=image.boots.values(),
        )  # fmt: skip
        if isinstance(endpoint, NewerEndpoint):
            endpoint.offer_features()
        durable = DurableMachine(
            outgoing=list(image.outgoing.values()),
            incoming=list(image.incoming.values()),
            unclean=unclean,
            max_attempts=3,
            seen=image.boots.values(),
        )
        self.sim.after(0, self._begin, process.lives)
        return MessagesMachine(endpoint, durable)

    def _begin(self, life: int) -> None:
        if self._lives(life):
            self.process.post(*(m.SetPeer(peer, addresses) for peer, addresses in self.peers.items()))
            self.process.post(*(HandlerOpened(name, self.rng.choice((1, 7, 100))) for name in (*CHANNELS, REPLIES)))

    def _lives(self, life: int) -> bool:
        return self.process.alive and self.process.lives == life

    def process_up(self, process: SimProcess) -> None:
        pass

    def process_down(self, process: SimProcess, *, silent: bool) -> None:
        self.store.device.crash()

    def fail_stop(self, error: str) -> None:
        """The store failed, or a handler took the process with it: the node ends and is started again."""
        self.sim.trace("fail-stop", self.name, error)
        self.process.end()
        self.sim.after(self.rng.randrange(50, 500) * MILLISECOND, self.process.start)

    @property
    def machine(self) -> MessagesMachine | None:
        machine = self.process.machine
        assert machine is None or isinstance(machine, MessagesMachine)
        return machine

    # -- effects --

    def _listen(self) -> None:
        on = self.process.on
        self.talker.listen(self.process)
        on(LoadOutbox, self._load)
        on(Acknowledged, self._acknowledged)
        on(RunBatch, self._run_batch)
        on(RememberBoot, lambda effect: self._commit([Remember(effect.seen)]))
        on(ChannelForked, self._forked)
        on(m.PeerRefused, self._refused)
        on(m.RoomChanged, lambda effect: None)
        on(m.PathChanged, lambda effect: self.on_path_changed(effect))
        on(m.PeerReachable, lambda effect: None)

    def _after(self, longest_ns: int, call: Callable[..., None], *args: object) -> None:
        """Call later, if this process still lives."""
        life = self.process.lives

        def run() -> None:
            if self._lives(life):
                call(*args)

        self.sim.after(20_000 + int(self.rng.random() * longest_ns), run)

    def _commit(self, operations: Sequence[Operation], *events: Event) -> None:
        """Commit, and post ``events`` once that is durable."""
        life = self.process.lives

        def done(error: str | None) -> None:
            if self._lives(life):
                if error is not None:
                    self.fail_stop(error)
                else:
                    self.process.post(*events)

        self.store.commit(operations, done)

    def _load(self, effect: LoadOutbox) -> None:
        def load() -> None:
            rows = self.store.load(effect.to, effect.name, effect.start, effect.byte_count)
            self.process.post(OutboxLoaded(effect.to, effect.name, rows))

        self._after(MILLISECOND, load)

    def _acknowledged(self, effect: Acknowledged) -> None:
        self._commit([Forget(effect.to, effect.name, effect.cursor, effect.digest)])

    def _forked(self, effect: ChannelForked) -> None:
        self.forks += 1
        self.sim.trace("fork", self.name, effect.peer, effect.name, effect.text)
        self.reports.append((effect.peer, effect.text))
        if effect.outgoing:
            self._commit([Fork(effect.peer, effect.name, effect.text)])

    def _refused(self, effect: m.PeerRefused) -> None:
        self.sim.trace("refused", self.name, effect.peer, effect.code, effect.text)
        self.reports.append((NodeId(effect.peer), f"{effect.code}: {effect.text}"))
        if effect.code == "version" and not any(part in effect.text for part in _STRANGER):
            self.sim.violate("I30", f"{self.name} refuses a neighbour: {effect.text}")
            return
        if (
            effect.code not in _HONEST_REFUSALS
            and effect.peer in self.peers
            and not any(part in effect.text for part in _STRANGER)
        ):
            self.sim.violate("I28", f"{self.name} refuses a genuine node: {effect.code}: {effect.text}")

    def _run_batch(self, effect: RunBatch) -> None:
        if effect.attempt is None:
            self._after(2 * MILLISECOND, self._handle, effect)
            return
        life = self.process.lives

        def counted(error: str | None) -> None:
            if self._lives(life):
                if error is not None:
                    self.fail_stop(error)
                else:
                    self._after(2 * MILLISECOND, self._handle, effect)

        self.store.commit([Count(effect.peer, effect.store, effect.name, effect.attempt)], counted)

    # -- the application's handlers --

    def _handle(self, effect: RunBatch) -> None:
        """Handle a batch in one transaction: the effects, the cursor, the answers."""
        if effect.dead_letter:
            step = Step(effect.peer, effect.store, effect.name, effect.first, effect.bodies[:1], effect.digests[0], True)
            self._commit([step], BatchDone(effect.store, effect.name, effect.first, effect.digests[0]))
            return
        handled, error = 0, ""
        answers: list[bytes] = []
        for number, body in enumerate(effect.bodies, effect.first):
            if body.startswith(b"kill"):
                self.sim.fault("handler-kill")
                self.fail_stop("the handler ended the process")
                return
            if self._fails((effect.store, effect.name, number), body):
                self.sim.fault("handler-error")
                error = "the handler failed"
                break
            if body.startswith(b"ask"):
                answers.append(b"answer to " + body)
            handled += 1
        state = self.store.current.incoming.get((effect.store, effect.name))
        cursor, digest = effect.first - 1, state.digest if state is not None else bytes(16)
        operations: list[Operation] = []
        runs: list[OutboxRun] = []
        if handled:
            cursor, digest = effect.first + handled - 1, effect.digests[handled - 1]
            operations.append(
                Step(effect.peer, effect.store, effect.name, effect.first, effect.bodies[:handled], digest, False)
            )
        if answers:
            send = self.store.send(effect.peer, REPLIES, answers)
            operations.append(send)
            runs.append(send.run)
        done: list[Event] = [BatchDone(effect.store, effect.name, cursor, digest, error)]
        self._commit(operations, *([RunsCommitted(runs)] if runs else []), *done)

    def _fails(self, message: tuple[StoreId, ChannelName, int], body: bytes) -> bool:
        if not body.startswith((b"fail", b"poison")):
            return False
        self._failures[message] = self._failures.get(message, 0) + 1
        return body.startswith(b"poison") or self._failures[message] <= 1

    # -- what the application sends --

    def send_durable(self, to: NodeId, name: ChannelName, bodies: Sequence[bytes]) -> None:
        """Nothing is sent if the outbox has no room: the application does something else then."""
        admitted = self.store.admits(to, name, bodies)
        self.oracle.admitted(self.name, self.store, (to, name), outbox_bytes(bodies), admitted)
        if not admitted:
            return
        send = self.store.send(to, name, bodies)
        self._commit([send], RunsCommitted([send.run]))
