"""A small world for endpoint machines: virtual time, links that can be cut one way, processes that can be killed.

Byte streams behave as TCP does: a cut holds bytes back in silence and delivers them when it heals.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from ha_core.config import LAN, Profile
from ha_core.ids import Boot, ChannelName, LinkName, NodeId, StoreId
from ha_core.machines import messages as m
from ha_core.machines.contract import Effect, Event, feed
from ha_core.machines.endpoint import EndpointMachine
from ha_core.machines.handshake import extend_boots_digest

MS = 1_000_000
KEY = b"k" * 32
LINKS = (LinkName("l1"), LinkName("l2"))


def address(name: str, link: str) -> str:
    return f"{name}-{link}:7400"


def node_id(name: str) -> NodeId:
    return NodeId(f"app@{name}")


@attrs.define(eq=False)
class Wire:
    """One connection: both ends, and what a cut holds back in each direction."""

    link: str
    ends: tuple[tuple[Process, int], tuple[Process, int]]
    held: tuple[list[Callable[[], None]], list[Callable[[], None]]] = attrs.field(factory=lambda: ([], []))
    open: bool = True
    free_ns: list[int] = attrs.field(factory=lambda: [0, 0])
    """Per direction, when what was written before has left."""


@attrs.define(eq=False)
class Process:
    """One endpoint machine and all that it asked for."""

    world: World
    name: str
    machine: EndpointMachine
    boot: Boot
    digest: bytes
    alive: bool = True
    frozen: bool = False
    wires: dict[int, tuple[Wire, int]] = attrs.field(factory=dict)
    next_accept: int = 1
    inbox: list[Event] = attrs.field(factory=list)
    log: list[Effect] = attrs.field(factory=list)
    delivered: dict[str, list[bytes]] = attrs.field(factory=dict)
    delivered_at: list[int] = attrs.field(factory=list)
    consume: bool = True
    wake_ns: int | None = None
    transmitted: int = 0

    @property
    def node(self) -> NodeId:
        return node_id(self.name)

    def post(self, *events: Event) -> None:
        """Feed at once, or as soon as the process thaws."""
        if not self.alive:
            return
        self.inbox.extend(events)
        if not self.frozen:
            batch, self.inbox = self.inbox, []
            feed(self.machine, batch, self.world.now_ns, self)
            self.machine.check()

    def perform(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            self.world.perform(self, effect)

    def wake_at(self, when_ns: int | None) -> None:
        if when_ns is not None and when_ns != self.wake_ns:
            self.wake_ns = when_ns
            self.world.at(when_ns, lambda: self.wake(when_ns))

    def wake(self, when_ns: int) -> None:
        if self.wake_ns == when_ns:
            self.wake_ns = None
            self.post()

    def send(self, to: Process, *bodies: bytes, channel: str = "c", **options: object) -> None:
        self.post(m.SendRun(to.node, ChannelName(channel), bodies, **options))  # type: ignore[arg-type]

    def of(self, kind: type[Effect]) -> list[Effect]:
        return [effect for effect in self.log if isinstance(effect, kind)]

    def path_states(self) -> dict[str, m.PathState]:
        return {key.link: state for key, state, _ in self.machine.paths()}


class World:
    def __init__(self, seed: int = 1, latency_ns: int = MS // 5, profile: Profile = LAN) -> None:
        self.rng = random.Random(seed)
        self.now_ns = 1_000 * MS
        self.latency_ns = latency_ns
        self.profile = profile
        self.heap: list[tuple[int, int, Callable[[], None]]] = []
        self.count = 0
        self.processes: dict[str, Process] = {}
        self.cuts: set[tuple[str, str, str]] = set()
        self.wires: list[Wire] = []
        self.chunk = 0
        self.byte_ns = 0
        """How long a byte takes to be written: the inverse of the bandwidth."""
        self.datagram_tap: list[tuple[str, str, str, bytes]] = []
        self.dials = 0

    # -- building --

    def start(
        self, name: str, *, counter: int = 1, nonce: int | None = None, digest: bytes = b"", key: bytes = KEY,
        cluster: str = "c1", links: Sequence[str] = LINKS, **options: Any,
    ) -> Process:  # fmt: skip
        boot = Boot(counter, self.rng.getrandbits(64) if nonce is None else nonce)
        machine = EndpointMachine(
            node=node_id(name.partition("/")[0]),
            cluster=cluster,
            key=key,
            store=StoreId(name.partition("/")[0].encode().ljust(16, b"s")),
            boot=boot,
            boots_digest=digest,
            links={LinkName(link): address(name, link) for link in links},
            profile=self.profile,
            rng=random.Random(self.rng.getrandbits(64)),
            **options,
        )
        process = self.processes[name] = Process(self, name.partition("/")[0], machine, boot, digest)
        return process

    def meet(self, a: Process, b: Process, *, both: bool = True) -> None:
        self.know(a, b)
        self.know(b, a, dial=both)

    def know(self, a: Process, b: Process, *, dial: bool = True, at: str | None = None) -> None:
        a.post(m.SetPeer(b.node, {link: address(at or b.name, link) for link in LINKS}, dial))

    def kill(self, process: Process) -> None:
        process.alive = False
        for wire, side in list(process.wires.values()):
            self.close(wire, side)

    def restart(self, process: Process) -> Process:
        digest = extend_boots_digest(process.digest, process.boot)
        return self.start(process.name, counter=process.boot.counter + 1, digest=digest)

    # -- time --

    def at(self, when_ns: int, call: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.heap, (max(when_ns, self.now_ns), self.count, call))

    def run(self, ms: float, until: Callable[[], bool] | None = None) -> bool:
        end = self.now_ns + int(ms * MS)
        while self.heap and self.heap[0][0] <= end:
            self.now_ns, _, call = heapq.heappop(self.heap)
            call()
            if until is not None and until():
                return True
        self.now_ns = end
        return until is None

    def freeze(self, process: Process, ms: float) -> None:
        """The process stands still; then its timer fires, and only after that it reads what waits in its sockets."""
        process.frozen = True

        def thaw() -> None:
            if process.alive:
                feed(process.machine, [], self.now_ns, process)

        def read() -> None:
            process.frozen = False
            process.post()

        self.at(self.now_ns + int(ms * MS), thaw)
        self.at(self.now_ns + int((ms + 1) * MS), read)

    # -- the network --

    def cut(self, a: Process, b: Process, link: str, *, one_way: bool = False) -> None:
        self.cuts.add((a.name, b.name, link))
        if not one_way:
            self.cuts.add((b.name, a.name, link))

    def heal(self) -> None:
        self.cuts.clear()
        for wire in self.wires:
            for held in wire.held:
                waiting = held.copy()
                held.clear()
                for call in waiting:
                    call()

    def is_cut(self, a: Process, b: Process, link: str) -> bool:
        return (a.name, b.name, link) in self.cuts

    def carry(self, wire: Wire, side: int, call: Callable[[], None]) -> None:
        """Bring something from one end of a connection to the other, in order; held back while the direction is cut."""
        source, target = wire.ends[side][0], wire.ends[1 - side][0]
        if wire.held[side] or self.is_cut(source, target, wire.link):
            wire.held[side].append(lambda: self.carry(wire, side, call))
        else:
            self.at(self.now_ns + self.latency_ns, call)

    def perform(self, process: Process, effect: Effect) -> None:
        match effect:
            case m.Dial():
                self.dials += 1
                self.dial(process, effect)
            case m.Transmit():
                process.transmitted += len(effect.data)
                self.transmit(process, effect)
            case m.Disconnect():
                process.log.append(effect)
                entry = process.wires.pop(effect.connection, None)
                if entry is not None:
                    self.close(*entry)
            case m.TransmitDatagram():
                self.datagram(process, effect)
            case _:
                process.log.append(effect)
                if isinstance(effect, m.DeliverRun):
                    self.deliver(process, effect)

    def deliver(self, process: Process, effect: m.DeliverRun) -> None:
        process.delivered.setdefault(effect.channel, []).extend(effect.bodies)
        process.delivered_at.extend([self.now_ns] * len(effect.bodies))
        if process.consume:
            size = sum(map(len, effect.bodies))
            event = m.Consumed(effect.peer, effect.channel, len(effect.bodies), size)
            self.at(self.now_ns, lambda: process.post(event))

    def dial(self, process: Process, effect: m.Dial) -> None:
        host = effect.path.remote.partition(":")[0]
        name = host.rpartition("-")[0]
        target = self.processes.get(name)
        link = effect.path.link

        def arrive() -> None:
            if target is None or not target.alive or not process.alive:
                process.post(m.Disconnected(effect.connection, "connection refused"))
                return
            number = target.next_accept
            target.next_accept += 2
            wire = Wire(link, ((process, effect.connection), (target, number)))
            self.wires.append(wire)
            process.wires[effect.connection] = (wire, 0)
            target.wires[number] = (wire, 1)
            target.post(m.Accepted(number, LinkName(link), f"{process.name}-{link}:{40000 + number}"))
            self.at(self.now_ns + self.latency_ns, lambda: process.post(m.Connected(effect.connection)))

        blocked = target is not None and (self.is_cut(process, target, link) or self.is_cut(target, process, link))
        if not blocked:
            self.at(self.now_ns + self.latency_ns, arrive)

    def transmit(self, process: Process, effect: m.Transmit) -> None:
        entry = process.wires.get(effect.connection)
        if entry is None:
            return
        wire, side = entry
        size = self.chunk or len(effect.data)
        for at in range(0, len(effect.data), size):
            piece = effect.data[at : at + size]

            def arrive(piece: bytes = piece) -> None:
                target, number = wire.ends[1 - side]
                if wire.open and number in target.wires:
                    target.post(m.Received(number, piece))

            if self.byte_ns:
                wire.free_ns[side] = max(wire.free_ns[side], self.now_ns) + len(piece) * self.byte_ns
                self.at(wire.free_ns[side], lambda arrive=arrive: self.carry(wire, side, arrive))  # type: ignore[misc]
            else:
                self.carry(wire, side, arrive)
        event = m.Flushed(effect.connection, len(effect.data))
        self.at(wire.free_ns[side], lambda: process.post(event))

    def close(self, wire: Wire, side: int) -> None:
        """What was sent before the end still arrives."""

        def arrive() -> None:
            target, number = wire.ends[1 - side]
            wire.open = False
            if target.wires.pop(number, None) is not None:
                target.post(m.Disconnected(number, "closed by the peer"))

        self.carry(wire, side, arrive)

    def datagram(self, process: Process, effect: m.TransmitDatagram) -> None:
        name = effect.remote.partition(":")[0].rpartition("-")[0]
        target = self.processes.get(name)
        self.datagram_tap.append((process.name, name, effect.link, effect.data))
        if target is None or self.is_cut(process, target, effect.link):
            return
        event = m.DatagramReceived(effect.link, f"{process.name}:1", effect.data)
        self.at(self.now_ns + self.latency_ns, lambda: target.post(event))
