"""The other kind of world of the database campaign: whole DatabaseMachines, clients that keep a history, and a watch.

A client has one operation out at a time, at any node. If its fate is unknown it may ask again under the same identity, anywhere:
that must not apply it twice (R40). In the end the history must be linearizable and the watch whole (I40).
"""

from __future__ import annotations

import attrs

from ha_core.ids import ChannelName, NodeId, ReplicaId
from ha_core.machines.contract import Machine
from ha_core.machines.database import DatabaseMachine
from ha_core.machines.database_events import (
    RAFT,
    RAFT_SNAPSHOT,
    Applied,
    Arrived,
    DatabaseOutcome,
    DatabaseReply,
    DatabaseRequest,
    DatagramArrived,
    Found,
    LeaderChanged,
    Leading,
    OpenWatch,
    PeerDown,
    PeerUp,
    Reconfigure,
    Send,
    Transfer,
    WatchClosed,
    WatchEvents,
    WatchTaken,
)
from ha_core.machines.keyvalue.model import (
    Change,
    Compare,
    Delete,
    Get,
    Outcome,
    Put,
    Refusal,
    Refused,
    RequestId,
    RevisionEvents,
)
from ha_core.machines.messages import SendDatagram, SendRun
from ha_core.machines.raft.types import ChangeConfiguration as RaftChange
from ha_core.machines.raft.types import ConfigurationChanged, MessageRefused, TransferLeadership
from ha_core.testing.campaigns.database import CLUSTER, Replica, World, nothing
from ha_core.testing.linearizability import Kind, Operation, check_linearizable, check_revisions, check_watch
from ha_core.testing.simulator import SECOND, SimProcess, Simulation

TIMEOUT_NS = 2 * SECOND
MAX_UNKNOWN = 5
"""A key with more calls of unknown fate is left alone: the search for an order would take too long."""
_NEVER_HAPPENED = (Refusal.UNAVAILABLE, Refusal.NOT_LEADER, Refusal.BAD, Refusal.QUOTA, Refusal.TOO_MANY)


@attrs.define(eq=False)
class Client:
    """One operation at a time, at any node; ``life`` is that of the process that has it."""

    name: str
    request: int = 0
    node: str = ""
    life: int = 0
    operation: Operation | None = None
    change: Change | None = None
    is_uncertain: bool = False
    """It asks again what may have been carried out: no refusal can take that back."""


class DatabaseWorld(World):
    """As World, with DatabaseMachines in place of Raft alone."""

    def __init__(self, sim: Simulation) -> None:
        self.machines: dict[str, DatabaseMachine] = {}
        self._clients = [Client(f"c{number}") for number in range(4)]
        self._waiting: dict[int, Client] = {}
        self._history: list[Operation] = []
        self._keys = [b"k0", b"k1", b"k2"]
        self._next_key = len(self._keys)
        self._unknown: dict[bytes, int] = {}
        self._value = 0
        self._watch_node = ""
        self._watch_life = 0
        self._watch = 0
        self._delivered: list[RevisionEvents] = []
        self._bookmark = 0
        self._committed: dict[int, RevisionEvents] = {}
        super().__init__(sim)
        sim.watch(self._check_state)

    # -- processes --

    def _add(self, name: NodeId) -> None:
        super()._add(name)
        process = self.replicas[name].process
        process.on(Send, lambda effect: self._carry(name, effect))
        process.on(DatabaseReply, lambda effect: self._replied(effect))
        process.on(Applied, lambda effect: self._applied(effect))
        process.on(WatchEvents, lambda effect: self._watched(process, effect))
        for kind in (WatchClosed, Leading, LeaderChanged, ConfigurationChanged, MessageRefused):
            process.on(kind, nothing)

    def _build(self, name: NodeId) -> Machine:
        replica = self.replicas[name]
        machine = self.machines[name] = DatabaseMachine(
            node=name,
            replica=ReplicaId(replica.disk.incarnation),
            profile=self.profile,
            rng=replica.process.rng,
            recovered=replica.disk.recover(),
            bootstrap=self.bootstrap_for(replica),
            cluster=CLUSTER,
            checkpoint_min_bytes=100 * self.checkpoint_every,
        )
        replica.raft = machine.raft
        return machine

    def _check_state(self, name: str) -> None:
        replica = self.replicas.get(name)
        if replica is not None and replica.process.alive:
            state = self.machines[name].state
            self.checker.state(name, state.index, state.digest)

    # -- the wires --

    def _carry(self, name: str, effect: Send) -> None:
        event = effect.event
        if isinstance(event, SendDatagram):
            self.checker.sent_datagram(name, event.to, event.body)
            self.messages.send_datagram(name, event.to, event.body)
        elif isinstance(event, SendRun):
            for body in event.bodies:
                if (name, event.to) in self.stalled and event.channel in (RAFT, RAFT_SNAPSHOT):
                    self.held.setdefault((name, event.to), []).append((event.channel, body))
                else:
                    self.messages.send(name, event.to, event.channel, body)

    def received(self, process: SimProcess, sender: str, channel: str, body: bytes) -> None:
        if channel:
            process.post(Arrived(NodeId(sender), ChannelName(channel), [body]))
        else:
            self.checker.got_datagram(process.name, body)
            process.post(DatagramArrived(NodeId(sender), body))

    def session(self, process: SimProcess, peer: str, up: bool) -> None:
        process.post(PeerUp(NodeId(peer)) if up else PeerDown(NodeId(peer)))

    # -- the administrator's words --

    def ask(self, replica: Replica, *changes: RaftChange | TransferLeadership) -> None:
        for change in changes:
            operation = Transfer(change.to) if isinstance(change, TransferLeadership) else Reconfigure(change.change)
            replica.process.post(DatabaseRequest(self.next_request(), operation, TIMEOUT_NS))

    # -- clients --

    def work(self) -> None:
        """One turn: clients that are free ask something, those whose node died give up."""
        for client in self._clients:
            if client.operation is None:
                if self.rng.random() < 0.3:
                    self._begin(client)
            elif self.replicas[client.node].process.lives != client.life or not self.replicas[client.node].process.alive:
                self._end(client, None)
        self._keep_watching()

    def _begin(self, client: Client) -> None:
        rng = self.rng
        kind = rng.choice([Kind.GET, Kind.GET, Kind.PUT, Kind.PUT, Kind.DELETE, Kind.COMPARE_AND_PUT])
        key = rng.choice(self._keys)
        self._value += 1
        value = b"%d" % self._value
        operation = Operation(client=client.name, kind=kind, key=key, called_ns=self.sim.now_ns, returned_ns=None)
        match kind:
            case Kind.GET:
                client.change = None
            case Kind.PUT:
                operation, client.change = attrs.evolve(operation, value=value), Change(then=[Put(key, value)])
            case Kind.DELETE:
                client.change = Change(then=[Delete(key)])
            case Kind.COMPARE_AND_PUT:
                expected = self._last_value(key)
                compare = Compare.missing(key) if expected is None else Compare.value(key, expected)
                operation = attrs.evolve(operation, value=value, expected=expected)
                client.change = Change(compare=[compare], then=[Put(key, value)])
        client.operation, client.is_uncertain = operation, False
        self._ask(client, None)

    def _last_value(self, key: bytes) -> bytes | None:
        """A value that the key may well have."""
        for operation in reversed(self._history[-20:]):
            if operation.key == key and operation.returned_ns is not None:
                return operation.found if operation.kind is Kind.GET else operation.value
        return None

    def _ask(self, client: Client, identity: RequestId | None) -> None:
        assert client.operation is not None
        nodes = [name for name, replica in self.replicas.items() if replica.process.alive]
        if not nodes:
            self._end(client, None if client.is_uncertain else Refused(Refusal.UNAVAILABLE, "no node is up"))
            return
        client.node = self.rng.choice(nodes)
        process = self.replicas[client.node].process
        client.life, client.request = process.lives, self.next_request()
        self._waiting[client.request] = client
        process.post(DatabaseRequest(client.request, client.change or Get(client.operation.key), TIMEOUT_NS, identity))

    def _replied(self, effect: DatabaseReply) -> None:
        client = self._waiting.pop(effect.request, None)
        if client is None or client.request != effect.request or client.operation is None:
            return
        outcome = effect.outcome
        if isinstance(outcome, Refused) and outcome.code is Refusal.UNKNOWN and self.rng.random() < 0.7:
            match outcome.detail:
                case (int(session), int(sequence)):
                    client.is_uncertain = True
                    self._ask(client, RequestId(session, sequence))
                    return
        self._end(client, outcome)

    def _end(self, client: Client, outcome: DatabaseOutcome | None) -> None:
        operation = client.operation
        assert operation is not None
        client.operation, client.request = None, 0
        match outcome:
            case Found(record, revision):
                found = None if record is None else record.value
                operation = attrs.evolve(operation, returned_ns=self.sim.now_ns, found=found, revision=revision)
            case Outcome(succeeded, revision, results):
                if operation.kind is Kind.DELETE:
                    succeeded = results[0] == 1
                operation = attrs.evolve(operation, returned_ns=self.sim.now_ns, succeeded=succeeded, revision=revision)
            case Refused(code) if (code in _NEVER_HAPPENED and not client.is_uncertain) or operation.kind is Kind.GET:
                return
            case None if operation.kind is Kind.GET:
                return
            case _:
                self._forget_key(operation.key)
        self._history.append(operation)

    def _forget_key(self, key: bytes) -> None:
        self._unknown[key] = self._unknown.get(key, 0) + 1
        if self._unknown[key] > MAX_UNKNOWN and key in self._keys:
            self._keys[self._keys.index(key)] = b"k%d" % self._next_key
            self._next_key += 1

    # -- the watch --

    def _keep_watching(self) -> None:
        """Open it anew, after what was delivered last, wherever its node died."""
        replica = self.replicas.get(self._watch_node)
        if replica is not None and replica.process.alive and replica.process.lives == self._watch_life:
            return
        nodes = [name for name, one in self.replicas.items() if one.process.alive]
        if nodes:
            self._watch_node = self.rng.choice(nodes)
            process = self.replicas[self._watch_node].process
            self._watch_life = process.lives
            self._watch += 1
            process.post(OpenWatch(self._watch, b"k", self._bookmark))

    def _watched(self, process: SimProcess, effect: WatchEvents) -> None:
        if effect.watch == self._watch:
            self._delivered.extend(effect.changes)
            self._bookmark = max(self._bookmark, effect.revision)
            process.post(WatchTaken(effect.watch, sum(len(group.events) for group in effect.changes)))

    def _applied(self, effect: Applied) -> None:
        for group in effect.changes:
            self._committed.setdefault(group.revision, group)

    # -- the end --

    def judge(self) -> None:
        """I40: the whole history, and what the watch saw of it."""
        super().judge()
        for client in self._clients:
            if client.operation is not None:
                self._end(client, None)
        self.sim.checked("I40", len(self._history))
        for text in check_linearizable(self._history)[:3] + check_revisions(self._history)[:3]:
            self.sim.violate("I40", text)
        committed = [self._committed[revision] for revision in sorted(self._committed)]
        self.sim.checked("I40", len(self._delivered))
        for text in check_watch(self._delivered, committed, prefix=b"k", after=0, until=self._bookmark)[:3]:
            self.sim.violate("I40", f"watch: {text}")
