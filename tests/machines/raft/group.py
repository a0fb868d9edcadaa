"""Replicas in virtual time: a network of 1 ms, disks that flush in 1 ms, and handles for everything that can go wrong.

Random numbers are fixed fractions of their range: n1 draws the smallest timeouts, the last node the largest, so that stories
have the same first candidate every time.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from functools import partial

import attrs

from ha_core.config import LAN
from ha_core.ids import NodeId
from ha_core.interfaces import Recovered
from ha_core.machines.contract import Effect, Event, Persist, Persisted, PersistFailed, WriteCheckpoint, feed
from ha_core.machines.raft.configuration import Configuration, Member
from ha_core.machines.raft.messages import Message, decode, encode
from ha_core.machines.raft.raft import Raft
from ha_core.machines.raft.types import (
    AddLearner,
    Apply,
    Change,
    ChangeConfiguration,
    Checkpointed,
    Entry,
    Lane,
    Limits,
    PeerReady,
    PeerReset,
    Propose,
    RaftReceived,
    ReadIndex,
    Restore,
    Role,
    RoleChanged,
    SendMessage,
)

MS = 1_000_000
CLUSTER = "test"


@attrs.frozen
class Fraction:
    """An Rng that always draws at the same place of the range."""

    fraction: float

    def random(self) -> float:
        return self.fraction

    def randrange(self, start: int, stop: int, /) -> int:
        return start + int((stop - start - 1) * self.fraction)

    def getrandbits(self, k: int, /) -> int:
        return 100

    def uniform(self, a: float, b: float, /) -> float:
        return a + (b - a) * self.fraction


@attrs.define(eq=False)
class Disk:
    """``flush_ns`` None: frozen, writes wait for ever."""

    incarnation: bytes
    checkpoint: bytes | None = None
    records: list[bytes] = attrs.field(factory=list)
    flush_ns: int | None = MS
    error: str = ""
    waiting: list[Persist | WriteCheckpoint] = attrs.field(factory=list)
    busy: bool = False

    def keep(self, write: Persist | WriteCheckpoint) -> None:
        if isinstance(write, Persist):
            self.records.append(write.record)
        else:
            self.checkpoint, self.records = write.state, list(write.records)


@attrs.define(eq=False)
class Node:
    """Also the ``Ports`` of its machine."""

    group: Group
    name: str
    disk: Disk
    rng: Fraction
    raft: Raft | None = None
    life: int = 0
    timer_ns: int | None = None
    frozen: bool = False
    effects: list[Effect] = attrs.field(factory=list)
    """Everything it asked for but messages and writes."""
    applied: list[Entry] = attrs.field(factory=list)

    @property
    def id(self) -> NodeId:
        return node_id(self.name)

    @property
    def machine(self) -> Raft:
        assert self.raft is not None, f"{self.name} is down"
        return self.raft

    @property
    def role(self) -> Role:
        return self.machine.core.role

    @property
    def term(self) -> int:
        return self.machine.core.term

    @property
    def commit(self) -> int:
        return self.machine.core.commit

    def log(self) -> list[tuple[int, int]]:
        return [(entry.index, entry.term) for entry in self.machine.core.log.entries]

    def data(self) -> list[bytes]:
        """Commands applied, in order."""
        return [entry.data for entry in self.applied if entry.kind == 0]

    def of(self, kind: type) -> list[Effect]:
        return [effect for effect in self.effects if isinstance(effect, kind)]

    def step(self, *events: Event) -> None:
        assert self.raft is not None
        feed(self.raft, events, self.group.now_ns, self)
        self.raft.check()

    def wake_at(self, when_ns: int | None) -> None:
        self.timer_ns = when_ns
        if when_ns is not None:
            self.group.at(max(when_ns, self.group.now_ns), partial(self.group.wake, self, self.life, when_ns))

    def perform(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, SendMessage):
                self.group.send(self, effect)
            elif isinstance(effect, Persist | WriteCheckpoint):
                self.disk.waiting.append(effect)
                self.group.flush(self)
            else:
                self.effects.append(effect)
                if isinstance(effect, Apply):
                    self.applied.extend(effect.entries)
                if isinstance(effect, Restore):
                    self.applied.clear()
                self.group.report(self, effect)


def node_id(name: str) -> NodeId:
    return NodeId(f"{name}@test")


def short(node: str | None) -> str:
    return "none" if node is None else node.partition("@")[0]


@attrs.frozen
class Sent:
    sender: str
    to: str
    lane: Lane
    message: Message


class Group:
    def __init__(self, voters: int = 3, spares: int = 0, *, limits: Limits | None = None, known: bool = True) -> None:
        """``known``: the bootstrap configuration has the voters' incarnations."""
        self.now_ns = 0
        self.limits = limits
        self.sent: list[Sent] = []
        self.story: list[str] = []
        self.drop: Callable[[Sent], bool] = lambda sent: False
        """Messages for which this holds are lost."""
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._number = 0
        self._cut: set[frozenset[str]] = set()
        names = [f"n{number}" for number in range(1, voters + spares + 1)]
        self.nodes = {
            name: Node(self, name, Disk(name.encode().ljust(16, b".")), Fraction(number / len(names)))
            for number, name in enumerate(names)
        }
        self.bootstrap = Configuration(
            incoming=tuple(node_id(name) for name in names[:voters]),
            members={node_id(name): Member(self.nodes[name].disk.incarnation if known else b"") for name in names[:voters]},
        )
        self._bootstrapped = set(names[:voters])
        for name in names:
            self.start(name)

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    # -- time --

    def at(self, when_ns: int, call: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._heap, (when_ns, self._number, call))

    def run(self, duration_ms: float) -> None:
        end_ns = self.now_ns + int(duration_ms * MS)
        while self._heap and self._heap[0][0] <= end_ns:
            self.now_ns, _, call = heapq.heappop(self._heap)
            call()
        self.now_ns = end_ns

    def run_until(self, condition: Callable[[], bool], limit_ms: float = 5000) -> None:
        end_ns = self.now_ns + int(limit_ms * MS)
        while not condition():
            assert self._heap, "nothing happens any more"
            assert self._heap[0][0] <= end_ns, "it does not come to that"
            self.now_ns, _, call = heapq.heappop(self._heap)
            call()

    def wake(self, node: Node, life: int, when_ns: int) -> None:
        if node.life == life and node.raft is not None and node.timer_ns == when_ns and not node.frozen:
            node.step()

    # -- the network --

    def send(self, node: Node, effect: SendMessage) -> None:
        sent = Sent(node.name, short(effect.to), effect.lane, decode(effect.body).message)
        self.sent.append(sent)
        if not self.is_cut(sent.sender, sent.to) and not self.drop(sent):
            self.at(self.now_ns + MS, partial(self._deliver, sent, self.nodes[sent.to].life, effect.body))

    def _deliver(self, sent: Sent, life: int, body: bytes) -> None:
        node = self.nodes[sent.to]
        if node.raft is not None and (node.life == life or sent.lane is Lane.DATAGRAM):
            if node.frozen:
                self.at(self.now_ns + MS, partial(self._deliver, sent, life, body))
            elif not self.is_cut(sent.sender, sent.to):
                node.step(RaftReceived(node_id(sent.sender), body))

    def inject(
        self, to: str, sender: str, message: Message, replica: bytes | None = None, cluster: str = CLUSTER,
        receiver: bytes | None = None,
    ) -> None:  # fmt: skip
        """Hand ``to`` a message that ``sender`` might have sent, at once."""
        from hashlib import blake2b

        digest = blake2b(cluster.encode(), digest_size=8).digest()
        origin = self.nodes[sender].disk.incarnation if replica is None else replica
        body = encode(digest, origin, self.nodes[to].disk.incarnation if receiver is None else receiver, message)
        self.nodes[to].step(RaftReceived(node_id(sender), body))

    def is_cut(self, one: str, other: str) -> bool:
        return frozenset((one, other)) in self._cut

    def partition(self, *groups: Sequence[str]) -> None:
        """Nodes of different groups do not hear each other; nodes in no group are another."""
        side = {name: number for number, group in enumerate(groups) for name in group}
        self._cut = {
            frozenset((one, other))
            for one in self.nodes
            for other in self.nodes
            if one != other and side.get(one) != side.get(other)
        }

    def heal(self) -> None:
        """Join all again; sessions between those that were cut off begin anew."""
        cut, self._cut = self._cut, set()
        for pair in sorted(cut, key=sorted):
            for one, other in (sorted(pair), sorted(pair, reverse=True)):
                if self.nodes[one].raft is not None:
                    self.nodes[one].step(PeerReset(node_id(other)), PeerReady(node_id(other)))

    def messages(self, kind: type, sender: str | None = None, to: str | None = None) -> list[Message]:
        return [
            sent.message
            for sent in self.sent
            if isinstance(sent.message, kind) and sender in (None, sent.sender) and to in (None, sent.to)
        ]

    # -- disks --

    def flush(self, node: Node) -> None:
        disk = node.disk
        if disk.waiting and not disk.busy and disk.flush_ns is not None:
            disk.busy = True
            self.at(self.now_ns + disk.flush_ns, partial(self._flushed, node, node.life))

    def _flushed(self, node: Node, life: int) -> None:
        disk = node.disk
        if node.life != life or node.raft is None:
            return
        disk.busy = False
        writes, disk.waiting = disk.waiting, []
        if disk.error:
            node.step(*[PersistFailed(write.number, disk.error) for write in writes])
            return
        for write in writes:
            disk.keep(write)
        node.step(Persisted(writes[-1].number))
        self.flush(node)

    def freeze_disk(self, name: str) -> None:
        self.nodes[name].disk.flush_ns = None

    def thaw_disk(self, name: str) -> None:
        self.nodes[name].disk.flush_ns = MS
        self.flush(self.nodes[name])

    # -- life --

    def start(self, name: str) -> None:
        node = self.nodes[name]
        node.life += 1
        node.applied.clear()
        disk = node.disk
        disk.waiting, disk.busy = [], False
        node.raft = Raft(
            node=node.id, replica=disk.incarnation, profile=LAN, rng=node.rng,
            recovered=Recovered(disk.checkpoint, list(disk.records)),
            bootstrap=self.bootstrap if name in self._bootstrapped else None,
            cluster=CLUSTER, limits=self.limits,
        )  # fmt: skip
        node.step()
        for other in self.nodes.values():
            if other is not node and other.raft is not None:
                other.step(PeerReset(node.id), PeerReady(node.id))

    def crash(self, name: str, *, kept_writes: int = 0) -> None:
        """Lose what is not flushed, but for the first ``kept_writes`` that are on their way."""
        node = self.nodes[name]
        for write in node.disk.waiting[:kept_writes]:
            node.disk.keep(write)
        node.raft, node.life, node.timer_ns = None, node.life + 1, None

    def restart(self, name: str) -> None:
        if self.nodes[name].raft is not None:
            self.crash(name)
        self.start(name)

    def wipe(self, name: str) -> None:
        """A new disk: another incarnation of the node, without bootstrap."""
        self.crash(name)
        node = self.nodes[name]
        node.disk = Disk(f"{name}-{node.life}".encode().ljust(16, b"."))
        self._bootstrapped.discard(name)
        self.start(name)

    # -- requests --

    @property
    def leader(self) -> Node:
        leaders = [node for node in self.nodes.values() if node.raft is not None and node.role is Role.LEADER]
        return max(leaders, key=lambda node: node.term)

    def elect(self) -> Node:
        """Run until somebody leads and its no-op is committed everywhere that is up and joined to it."""
        self.run_until(lambda: any(node.raft is not None and node.role is Role.LEADER for node in self.nodes.values()))
        self.run(20)
        return self.leader

    def propose(self, name: str, *data: bytes) -> None:
        self.nodes[name].step(*[Propose(number, item) for number, item in enumerate(data, 1)])

    def read(self, name: str, request: int = 1) -> None:
        self.nodes[name].step(ReadIndex(request))

    def change(self, name: str, change: Change, request: int = 77) -> None:
        self.nodes[name].step(ChangeConfiguration(request, change))

    def add_learner(self, name: str, learner: str) -> None:
        self.change(name, AddLearner(node_id(learner), self.nodes[learner].disk.incarnation))

    def checkpoint(self, name: str, state: bytes = b"state") -> None:
        self.nodes[name].step(Checkpointed(self.nodes[name].commit, state))

    # -- the story --

    def report(self, node: Node, effect: Effect) -> None:
        text = _tell(effect)
        if text:
            self.story.append(f"{self.now_ns / 1e9:.3f} {node.name} {text}")


def _tell(effect: Effect) -> str:
    match effect:
        case RoleChanged(role=role, term=term, leader=leader, lease_age_ns=age_ns):
            age = f" age={age_ns // MS}ms" if role is Role.LEADER else ""
            return f"{role.value} term={term} leader={short(leader)}{age}"
        case Apply(entries=entries):
            return "apply " + " ".join(f"{entry.index}/{entry.term}:{_word(entry)}" for entry in entries)
        case Restore(index=index, term=term, state=state):
            return f"restore {index}/{term} {state.decode()}"
        case _:
            return _tell_answer(effect)


def _word(entry: Entry) -> str:
    return entry.data.decode() if entry.kind == 0 else entry.kind.name.lower()


def _tell_answer(effect: Effect) -> str:
    from ha_core.machines.raft.types import Appended, ConfigurationChanged, Dropped, MessageRefused, ReadFailed, ReadReady

    match effect:
        case Appended(request=request, index=index, term=term):
            return f"appended #{request} {index}/{term}"
        case Dropped(request=request, reason=reason) | ReadFailed(request=request, reason=reason):
            kind = "dropped" if isinstance(effect, Dropped) else "read failed"
            return f"{kind} #{request}: {reason.value}"
        case ReadReady(request=request, index=index):
            return f"read #{request} at {index}"
        case ConfigurationChanged(configuration=configuration):
            learners = f" learners={','.join(map(short, configuration.learners))}" if configuration.learners else ""
            return f"voters={','.join(map(short, configuration.voters))}{learners}"
        case MessageRefused(sender=sender, reason=reason):
            return f"refused {short(sender)}: {reason.value}"
    return ""
