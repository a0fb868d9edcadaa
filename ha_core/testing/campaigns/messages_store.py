"""The transaction store of a simulated node (its app.db), and the oracle that watches every node's durable state.

A transaction is a list of operations. It changes the current image at once and the durable one when its flush is over; a crash
throws the current image away. The oracle sees each operation at the moment it becomes durable: it knows all that was ever
committed anywhere, and nothing of how the machines work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

import attrs

from ha_core.ids import Boot, ChannelName, NodeId, StoreId
from ha_core.machines.durable_admission import MESSAGE_BYTES, admits
from ha_core.machines.durable_events import Attempt, IncomingState, OutboxRun, OutgoingState
from ha_core.machines.durable_wire import START_DIGEST, chain, pack_run
from ha_core.machines.handshake import SeenBoot, extend_boots_digest
from ha_core.testing.simulator import SimDevice, Simulation

Outgoing = tuple[NodeId, ChannelName]
Incoming = tuple[StoreId, ChannelName]


def prefix(before: bytes, number: int, body: bytes) -> bytes:
    """The oracle's own prefix digest, by the definition in docs/protocol.md and not by the code under test."""
    return blake2b(before + number.to_bytes(8, "big") + body, digest_size=16).digest()


def outbox_bytes(bodies: Sequence[bytes]) -> int:
    """What these messages count against the outbox's bound."""
    return sum(len(body) + MESSAGE_BYTES for body in bodies)


def prefixes(before: bytes, first: int, bodies: Sequence[bytes]) -> list[bytes]:
    digests: list[bytes] = []
    for number, body in enumerate(bodies, first):
        before = prefix(before, number, body)
        digests.append(before)
    return digests


@attrs.define
class Image:
    """What an app.db holds. ``applied`` and ``sent`` are the oracle's own prefix digests, kept here so that they are restored
    and cloned with the file."""

    store: StoreId
    boot: Boot = Boot(0, 0)
    boots_digest: bytes = b""
    outgoing: dict[Outgoing, OutgoingState] = attrs.field(factory=dict)
    outbox: dict[Outgoing, tuple[OutboxRun, ...]] = attrs.field(factory=dict)
    incoming: dict[Incoming, IncomingState] = attrs.field(factory=dict)
    effects: dict[Incoming, int] = attrs.field(factory=dict)
    """The number of the last effect or dead letter."""
    applied: dict[Incoming, bytes] = attrs.field(factory=dict)
    sent: dict[Outgoing, bytes] = attrs.field(factory=dict)
    boots: dict[StoreId, SeenBoot] = attrs.field(factory=dict)
    rolled_back: bool = False
    """It is, or comes from, an old copy."""

    def outbox_bytes(self) -> dict[Outgoing, int]:
        """What each channel holds of the outbox."""
        return {key: sum(run.size for run in rows) for key, rows in self.outbox.items()}

    def copy(self) -> Image:
        return attrs.evolve(
            self,
            outgoing=dict(self.outgoing),
            outbox=dict(self.outbox),
            incoming=dict(self.incoming),
            effects=dict(self.effects),
            applied=dict(self.applied),
            sent=dict(self.sent),
            boots=dict(self.boots),
        )


# -- operations: what one transaction may do --


@attrs.frozen
class Send:
    run: OutboxRun
    bodies: Sequence[bytes]

    def apply(self, image: Image) -> None:
        run = self.run
        key = (run.to, run.name)
        old = image.outgoing.get(key) or OutgoingState(run.to, run.name, 0, 0, START_DIGEST)
        image.outgoing[key] = attrs.evolve(old, last=run.last)
        image.outbox[key] = (*image.outbox.get(key, ()), run)
        image.sent[key] = prefixes(image.sent.get(key, START_DIGEST), run.first, self.bodies)[-1]


@attrs.frozen
class Forget:
    to: NodeId
    name: ChannelName
    cursor: int
    digest: bytes

    def apply(self, image: Image) -> None:
        key = (self.to, self.name)
        image.outgoing[key] = attrs.evolve(image.outgoing[key], acked=self.cursor, acked_digest=self.digest)
        image.outbox[key] = tuple(run for run in image.outbox[key] if run.last > self.cursor)


@attrs.frozen
class Fork:
    to: NodeId
    name: ChannelName
    text: str

    def apply(self, image: Image) -> None:
        key = (self.to, self.name)
        old = image.outgoing.get(key) or OutgoingState(self.to, self.name, 0, 0, START_DIGEST)
        image.outgoing[key] = attrs.evolve(old, forked=self.text)


@attrs.frozen
class Count:
    peer: NodeId
    store: StoreId
    name: ChannelName
    attempt: Attempt

    def apply(self, image: Image) -> None:
        key = (self.store, self.name)
        old = image.incoming.get(key) or IncomingState(self.peer, self.store, self.name)
        image.incoming[key] = attrs.evolve(old, attempt=self.attempt)


@attrs.frozen
class Step:
    """Effects of messages ``first``, ... with the step of the cursor; ``dead``: the one message was set aside instead."""

    peer: NodeId
    store: StoreId
    name: ChannelName
    first: int
    bodies: Sequence[bytes]
    digest: bytes
    """The machine's prefix digest at the last of them."""
    dead: bool

    @property
    def last(self) -> int:
        return self.first + len(self.bodies) - 1

    def apply(self, image: Image) -> None:
        key = (self.store, self.name)
        image.incoming[key] = IncomingState(self.peer, self.store, self.name, self.last, self.digest)
        image.effects[key] = self.last
        image.applied[key] = prefixes(image.applied.get(key, START_DIGEST), self.first, self.bodies)[-1]


@attrs.frozen
class Remember:
    """Which process of another store was seen."""

    seen: SeenBoot

    def apply(self, image: Image) -> None:
        image.boots[self.seen.store] = self.seen


Operation = Send | Forget | Fork | Count | Step | Remember
Observer = Callable[[Image, Operation], None]


class SimStore:
    """One node's app.db on a simulated device. ``observe(image, operation)`` is called before an operation becomes durable."""

    def __init__(self, sim: Simulation, name: str, observe: Observer, *, limit_bytes: int = 8 << 20) -> None:
        """``limit_bytes`` is what the outbox may hold, replies apart."""
        self.limit_bytes = limit_bytes
        self._sim = sim
        self._rng = sim.stream(f"store/{name}")
        self._observe = observe
        self.durable = Image(StoreId(self._rng.randbytes(16)))
        self.current = self.durable.copy()
        self.device: SimDevice[Sequence[Operation]] = SimDevice(sim, name, self._keep)

    def open(self) -> tuple[Image, bool]:
        """What a new process finds, its boot written first; and whether the last one did not close it."""
        unclean = self.durable.boot.counter > 0
        boot = Boot(self.durable.boot.counter + 1, self._rng.getrandbits(63))
        if unclean:
            self.durable.boots_digest = extend_boots_digest(self.durable.boots_digest, self.durable.boot)
        self.durable.boot = boot
        self.current = self.durable.copy()
        return self.current, unclean

    def commit(self, operations: Sequence[Operation], done: Callable[[str | None], None]) -> None:
        for operation in operations:
            operation.apply(self.current)
        self.device.write(operations, done)

    def admits(self, to: NodeId, name: ChannelName, bodies: Sequence[bytes]) -> bool:
        """Whether the outbox has room for a function that sends these."""
        used = self.current.outbox_bytes()
        return admits(used.get((to, name), 0), outbox_bytes(bodies), sum(used.values()), self.limit_bytes)

    def send(self, to: NodeId, name: ChannelName, bodies: Sequence[bytes]) -> Send:
        """The operation that sends ``bodies``, numbered after what the current image has sent."""
        key = (to, name)
        state = self.current.outgoing.get(key) or OutgoingState(to, name, 0, 0, START_DIGEST)
        rows = self.current.outbox.get(key, ())
        before = rows[-1].digest if rows else state.acked_digest
        first = state.last + 1
        size = outbox_bytes(bodies)
        digest = chain(before, first, bodies)[-1]
        run = OutboxRun(to, name, first, first + len(bodies) - 1, size, before, digest, pack_run(bodies))
        return Send(run, bodies)

    def load(self, to: NodeId, name: ChannelName, start: int, byte_count: int) -> Sequence[OutboxRun]:
        rows: list[OutboxRun] = []
        size = 0
        for run in self.durable.outbox.get((to, name), ()):
            if run.last >= start and (not rows or size < byte_count):
                rows.append(run)
                size += run.size
        return rows

    def restore(self, image: Image) -> None:
        """Put an old copy, or that of another node, in place; only while the owner is down."""
        self.device.crash()
        self.durable = image.copy()
        self.durable.rolled_back = True
        self.current = self.durable.copy()

    def lose(self) -> None:
        """A new file: another incarnation."""
        self.restore(Image(StoreId(self._rng.randbytes(16))))
        self.durable.rolled_back = False

    def _keep(self, operations: Sequence[Operation]) -> None:
        for operation in operations:
            self._observe(self.durable, operation)
            operation.apply(self.durable)


@attrs.define
class _Known:
    """One committed message in one history."""

    number: int
    body: bytes
    owners: set[str]
    digest: bytes = b""
    """What the machines say is the prefix digest here; empty if none has said so yet."""


class Oracle:
    """All that was ever committed, by prefix digest; judges each step of a cursor."""

    def __init__(self, sim: Simulation, alive: Callable[[str], bool]) -> None:
        self._sim = sim
        self._alive = alive
        self._histories: dict[tuple[StoreId, NodeId, ChannelName], dict[bytes, _Known]] = {}
        self._reached: dict[tuple[StoreId, NodeId, ChannelName], set[bytes]] = {}
        """Prefix digests that were durable at the receiver at some time."""
        self._owner: dict[tuple[str, StoreId], list[str]] = {}
        """Per receiving process: the owners of a store for which it has advanced, in order. It never goes back to an owner
        while the one that followed lives, not even after a restart."""
        self.tampered: set[StoreId] = set()
        """Stores that were restored or cloned: their numbers may be used again."""

    def observe(self, process: str, node: NodeId, image: Image, operation: Operation) -> None:
        if isinstance(operation, Send):
            self._sent(process, image, operation)
        elif isinstance(operation, Forget):
            self._forgotten(process, image, operation)
        elif isinstance(operation, Step):
            self._stepped(process, node, image, operation)

    def admitted(self, process: str, store: SimStore, key: Outgoing, size: int, admitted: bool) -> None:
        """I19: the outbox is bounded; nobody is refused who holds no more than is free, and nobody takes more than that."""
        sim, used = self._sim, store.current.outbox_bytes()
        mine, free = used.get(key, 0) + size, store.limit_bytes - sum(used.values())
        where = f"{process}: {size} bytes more for {key[1]!r} to {key[0]}"
        sim.checked("I19")
        if not admitted:
            sim.fault("outbox-full")
            if mine <= free:
                sim.violate("I19", f"{where} are refused though {free} are free")
        elif mine > free:
            sim.violate("I19", f"{where} are taken, {mine} in all, with {free} of {store.limit_bytes} free: others starve")

    def _sent(self, process: str, image: Image, operation: Send) -> None:
        run = operation.run
        key = (image.store, run.to, run.name)
        known = self._histories.setdefault(key, {})
        before = image.sent.get((run.to, run.name), START_DIGEST)
        bodies = operation.bodies
        for number, (body, digest) in enumerate(zip(bodies, prefixes(before, run.first, bodies), strict=True), run.first):
            self._sim.checked("I4")
            if image.store not in self.tampered and number != len(known) + 1:
                text = f"{process}: number {number} to {run.to} on {run.name!r} after {len(known)} were committed"
                self._sim.violate("I4", text)
            message = known.setdefault(digest, _Known(number, body, set()))
            message.owners.add(process)
            if number == run.last:
                self._compare(process, message, run.digest)

    def _forgotten(self, process: str, image: Image, operation: Forget) -> None:
        self._sim.checked("I5")
        key = (image.store, operation.to, operation.name)
        reached = self._reached.get(key, set())
        mine = [
            digest for digest, message in self._histories.get(key, {}).items()
            if message.number == operation.cursor and process in message.owners
        ]  # fmt: skip
        if reached.isdisjoint(mine):
            text = f"{process} forgets up to {operation.cursor} of {operation.name!r}, never durable at {operation.to}"
            self._sim.violate("I5", text)

    def _stepped(self, process: str, node: NodeId, image: Image, step: Step) -> None:
        sim = self._sim
        key = (step.store, step.name)
        where = f"{process}: message {step.first} of {step.name!r} from {step.peer}"
        cursor = image.effects.get(key, 0)
        sim.checked("I2")
        sim.checked("I3")
        if step.first <= cursor:
            sim.violate("I2", f"{where}: the effect of {cursor} is there already")
            return
        if step.first > cursor + 1:
            sim.violate("I3", f"{where}: the cursor stands at {cursor}")
            return
        if step.dead:
            sim.checked("I12")
        known = self._histories.get((step.store, node, step.name), {})
        reached = self._reached.setdefault((step.store, node, step.name), set())
        digest = image.applied.get(key, START_DIGEST)
        for number, body in enumerate(step.bodies, step.first):
            digest = prefix(digest, number, body)
            sim.checked("I6")
            sim.checked("I8")
            found = known.get(digest)
            if found is None:
                self._unknown(where, number, body, known)
                return
            reached.add(digest)
            self._advanced(process, where, step.store, found)
        self._compare(process, known[digest], step.digest)

    def _compare(self, process: str, message: _Known, digest: bytes) -> None:
        """Sender and receivers must name the same digest for the same prefix."""
        self._sim.checked("I9")
        if not message.digest:
            message.digest = digest
        elif message.digest != digest:
            text = f"{process}: prefix digest {digest.hex()} at {message.number}, elsewhere {message.digest.hex()}"
            self._sim.violate("I9", text)

    def _unknown(self, where: str, number: int, body: bytes, known: dict[bytes, _Known]) -> None:
        same_number = [message for message in known.values() if message.number == number]
        if any(message.body == body for message in same_number):
            self._sim.violate("I10", f"{where}: {number} is of another history than what was applied before")
        elif same_number:
            self._sim.violate("I8", f"{where}: {number} has another body than was sent")
        else:
            self._sim.violate("I6", f"{where}: {number} was never committed")

    def _advanced(self, process: str, where: str, store: StoreId, found: _Known) -> None:
        if store not in self.tampered:
            return
        self._sim.checked("I11")
        owners = self._owner.setdefault((process, store), [])
        if len(found.owners) == 1:
            owner = next(iter(found.owners))
            if not owners or owners[-1] != owner:
                if owner in owners and self._alive(owners[-1]):
                    self._sim.violate("I11", f"{where}: advances for {owner} again, after {owners[-1]}")
                owners.append(owner)

    def share(self, store: StoreId, heir: str) -> None:
        """``heir`` begins to run from a copy: what was committed so far is its, too."""
        self.tampered.add(store)
        for (owned, _, _), known in self._histories.items():
            if owned == store:
                for message in known.values():
                    message.owners.add(heir)
