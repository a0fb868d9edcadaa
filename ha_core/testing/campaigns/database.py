"""The replicated database under everything that can go wrong: three to five voters, spare replicas that take the place of lost
disks, membership changes, transfers, reads and writes.

A seed plays Raft alone with a tiny state machine, which reaches further into its corners, or the whole DatabaseMachine.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from zlib import crc32

import attrs
import msgpack

from ha_core.config import FAST, LAN
from ha_core.ids import NodeId
from ha_core.machines.contract import Machine
from ha_core.machines.raft.configuration import Configuration, Member
from ha_core.machines.raft.raft import Raft
from ha_core.machines.raft.types import (
    AddLearner,
    Appended,
    Apply,
    Change,
    ChangeConfiguration,
    Checkpointed,
    ConfigurationChanged,
    Dropped,
    Entry,
    EntryKind,
    Lane,
    Limits,
    MessageRefused,
    PeerReady,
    PeerReset,
    Promote,
    Propose,
    RaftReceived,
    ReadFailed,
    ReadIndex,
    ReadReady,
    Remove,
    Restore,
    Role,
    RoleChanged,
    SendMessage,
    TransferLeadership,
)
from ha_core.testing.campaigns.consensus import ConsensusChecker
from ha_core.testing.simulator import (
    MICROSECOND,
    MILLISECOND,
    SECOND,
    Chaos,
    Fault,
    SimDisk,
    SimMessages,
    SimNetwork,
    SimProcess,
    Simulation,
    disk_faults,
    network_faults,
    process_faults,
    reset_faults,
)

CLUSTER = "campaign"
SAFETY_NS = 10 * SECOND
LIVENESS_NS = 20 * SECOND


def nothing(effect: object) -> None:
    """An effect that only a parent machine would need."""


@attrs.define(eq=False)
class Replica:
    """One node: its process, its disk, and the state machine of the Raft-only kind."""

    name: NodeId
    process: SimProcess
    disk: SimDisk
    raft: Raft | None = None
    index: int = 0
    chain: int = 0
    checkpoint_index: int = 0

    @property
    def live_raft(self) -> Raft | None:
        return self.raft if self.process.alive else None


class World:
    """The replicas and how they are joined; what the administrator and the clients of a seed do to them."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.rng = rng = sim.stream("world")
        self.profile = rng.choice([LAN, LAN, FAST])
        self.flush_ns = rng.choice([300 * MICROSECOND, 3 * MILLISECOND, 20 * MILLISECOND])
        voter_count = rng.choice([3, 3, 4, 4, 5])
        names = [NodeId(f"n{number}@campaign") for number in range(1, voter_count + rng.choice([1, 1, 2]) + 1)]
        self.network = SimNetwork(sim, names, links=("a", "b"))
        self.messages = SimMessages(self.network)
        self.replicas: dict[str, Replica] = {}
        self.limits = Limits(
            max_append_bytes=rng.choice([200, 2000]),
            max_inflight_messages=rng.choice([2, 8]),
            max_uncommitted_bytes=20_000,
            snapshot_chunk_bytes=rng.choice([64, 500]),
            snapshot_window_chunks=rng.choice([1, 4]),
            tail_entries=rng.choice([0, 10, 40]),
            cache_bytes=rng.choice([200, 4000]),
        )
        self.checkpoint_every = rng.choice([10, 30, 100])
        self._is_patient = rng.random() < 0.5
        """The administrator gives a removed node a new store only once that node knows that it was removed."""
        self._request = 0
        self._floors: dict[int, int] = {}
        self.held: dict[tuple[str, str], list[tuple[str, bytes]]] = {}
        """Channel messages that a stalled stream keeps back."""
        self.stalled: set[tuple[str, str]] = set()
        for name in names:
            self._add(name)
        self.voters = tuple(names[:voter_count])
        known = rng.random() < 0.7
        members = {name: Member(self.replicas[name].disk.incarnation if known else b"") for name in self.voters}
        self._bootstrap = Configuration(incoming=self.voters, members=members)
        self._first = {name: self.replicas[name].disk.incarnation for name in self.voters}
        self.checker = ConsensusChecker(
            sim, {name: replica.disk for name, replica in self.replicas.items()}, lambda name: self.replicas[name].live_raft
        )

    # -- processes --

    def _add(self, name: NodeId) -> None:
        disk = SimDisk(self.sim, name, flush_ns=self.flush_ns)

        def build(process: SimProcess) -> Machine:
            return self._build(name)

        process = SimProcess(self.sim, name, build, disk=disk, start=False)
        replica = self.replicas[name] = Replica(name, process, disk)
        process.on(SendMessage, lambda effect: self._send(name, effect))
        process.on(Apply, lambda effect: self._apply(replica, effect))
        process.on(Restore, lambda effect: self._restore(replica, effect))
        process.on(ReadReady, lambda effect: self.checker.read_ready(name, self._floors.pop(effect.request), effect.index))
        process.on(RoleChanged, lambda effect: self._role_changed(replica, effect))
        for kind in (Appended, Dropped, ReadFailed, ConfigurationChanged, MessageRefused):
            process.on(kind, nothing)
        self.messages.attach(
            process,
            on_datagram=lambda sender, topic, body: self._received(process, sender, "", body),
            on_message=lambda sender, channel, body: self._received(process, sender, channel, body),
            on_session=lambda peer, up: self._session(process, peer, up),
        )

    def _build(self, name: NodeId) -> Machine:
        replica = self.replicas[name]
        replica.index = replica.chain = replica.checkpoint_index = 0
        replica.raft = Raft(
            node=name,
            replica=replica.disk.incarnation,
            profile=self.profile,
            rng=replica.process.rng,
            recovered=replica.disk.recover(),
            bootstrap=self.bootstrap_for(replica),
            cluster=CLUSTER,
            limits=self.limits,
        )
        return replica.raft

    def bootstrap_for(self, replica: Replica) -> Configuration | None:
        """Only the first incarnations have it."""
        return self._bootstrap if self._first.get(replica.name) == replica.disk.incarnation else None

    def start(self) -> None:
        for replica in self.replicas.values():
            replica.process.start()

    # -- the wires --

    def _send(self, name: str, effect: SendMessage) -> None:
        if effect.lane is Lane.DATAGRAM:
            self.checker.sent_datagram(name, effect.to, effect.body)
            self.messages.send_datagram(name, effect.to, effect.body)
        elif (name, effect.to) in self.stalled:
            self.held.setdefault((name, effect.to), []).append((effect.lane.value, effect.body))
        else:
            self.messages.send(name, effect.to, effect.lane.value, effect.body)

    def _received(self, process: SimProcess, sender: str, channel: str, body: object) -> None:
        assert isinstance(body, bytes)
        self.received(process, sender, channel, body)

    def received(self, process: SimProcess, sender: str, channel: str, body: bytes) -> None:
        """``channel`` is empty for a datagram."""
        if not channel:
            self.checker.got_datagram(process.name, body)
        process.post(RaftReceived(NodeId(sender), body))

    def _session(self, process: SimProcess, peer: str, up: bool) -> None:
        if not up:
            self.held.pop((process.name, peer), None)
        self.session(process, peer, up)

    def session(self, process: SimProcess, peer: str, up: bool) -> None:
        process.post(PeerReady(NodeId(peer)) if up else PeerReset(NodeId(peer)))

    def stall_fault(self) -> Fault:
        """Streams from one node stand still while datagrams pass."""

        def begin(rng: random.Random, amount: float) -> Callable[[], None]:
            source = rng.choice(list(self.replicas))
            pairs = [(source, to) for to in self.replicas if to != source and rng.random() < 0.8]
            self.sim.fault("stream-stall")
            self.stalled.update(pairs)

            def end() -> None:
                for pair in pairs:
                    self.stalled.discard(pair)
                    for channel, body in self.held.pop(pair, []):
                        self.messages.send(*pair, channel, body)

            return end

        return Fault("stream-stall", begin)

    # -- the state machine of the Raft-only kind --

    def _apply(self, replica: Replica, effect: Apply) -> None:
        for entry in effect.entries:
            self._apply_entry(replica, entry)
        raft = replica.raft
        if raft is not None and replica.index - replica.checkpoint_index >= self.checkpoint_every:
            replica.checkpoint_index = replica.index
            state: bytes = msgpack.packb((replica.index, replica.chain, b"x" * self.rng.randrange(2000)))
            replica.process.post(Checkpointed(replica.index, state))

    def _apply_entry(self, replica: Replica, entry: Entry) -> None:
        if entry.index != replica.index + 1:
            self.sim.violate("I35", f"{replica.name} applies {entry.index} after {replica.index}")
        replica.index = entry.index
        if entry.kind is EntryKind.COMMAND:
            replica.chain = crc32(entry.data, replica.chain)
        self.checker.state(replica.name, entry.index, replica.chain)

    def _restore(self, replica: Replica, effect: Restore) -> None:
        if effect.index < replica.index:
            self.sim.violate("I35", f"{replica.name} goes back from {replica.index} to a snapshot at {effect.index}")
        replica.index, replica.chain, _ = msgpack.unpackb(effect.state)
        replica.checkpoint_index = replica.index
        self.checker.state(replica.name, effect.index, replica.chain)

    # -- clients and administrator --

    def _role_changed(self, replica: Replica, effect: RoleChanged) -> None:
        """Some administrators do not wait until a leader has settled (R21), nor do some readers (R33)."""
        raft = replica.raft
        configuration = raft.core.log.configuration if raft is not None else None
        if effect.role is Role.LEADER and configuration is not None and self.rng.random() < 0.5:
            request = self.next_request()
            self._floors[request] = self.checker.committed
            replica.process.post(ReadIndex(request))
            self.ask(replica, *self._hasty_changes(configuration))

    @property
    def leader(self) -> Replica | None:
        """Of those that think so, the one of the newest term."""
        leading = [
            (raft.core.term, name)
            for name, replica in self.replicas.items()
            if (raft := replica.live_raft) is not None and raft.core.role is Role.LEADER
        ]
        return self.replicas[max(leading)[1]] if leading else None

    def next_request(self) -> int:
        self._request += 1
        return self._request

    def ask(self, replica: Replica, *changes: ChangeConfiguration | TransferLeadership) -> None:
        """The administrator's words to a leader."""
        replica.process.post(*changes)

    def judge(self) -> None:
        """What can only be said at the end."""
        self.sim.checked("I38")
        for name in self.checker.untold():
            self.sim.violate("I38", f"{name} was removed, everything is healed, and it still takes itself for a voter")

    def work(self) -> None:
        """One client turn: some writes at somebody who should lead, or a read anywhere."""
        rng = self.rng
        if rng.random() < 0.6:
            target = self.leader if rng.random() < 0.9 else rng.choice(list(self.replicas.values()))
            if target is not None:
                requests = [self.next_request() for _ in range(rng.choice([1, 1, 2, 6]))]
                size = rng.choice([1, 20, 200])
                target.process.post(*[Propose(request, request.to_bytes(8, "big") * size) for request in requests])
        else:
            target = rng.choice(list(self.replicas.values()))
            if target.process.alive:
                request = self.next_request()
                self._floors[request] = self.checker.committed
                target.process.post(ReadIndex(request))

    def administer(self) -> None:
        """One turn of the administrator: lost disks get replaced, members change, leaders hand over."""
        leader, rng = self.leader, self.rng
        raft = leader.live_raft if leader is not None else None
        configuration = raft.core.log.configuration if raft is not None else None
        if leader is None or raft is None or configuration is None:
            return
        if raft.core.log.configuration_index <= raft.core.commit:
            self._renew_removed(configuration)
        change = self._repair(configuration)
        if change is None and rng.random() < 0.3:
            change = self._any_change(configuration)
        if change is not None:
            self.ask(leader, ChangeConfiguration(self.next_request(), change))
        elif rng.random() < 0.1:
            self.ask(leader, TransferLeadership(rng.choice(configuration.voters)))

    def _renew_removed(self, configuration: Configuration) -> None:
        """A node whose removal is committed may come back, but only with a new store."""
        for name, replica in self.replicas.items():
            if name in configuration.members or replica.disk.incarnation not in configuration.retired:
                continue
            raft = replica.live_raft
            if not self._is_patient or (raft is not None and not raft.core.is_voter):
                self._renew(replica)

    def _renew(self, replica: Replica) -> None:
        replica.process.end()
        replica.disk.lose()
        self.sim.after(self.rng.randrange(1, 1000) * MILLISECOND, replica.process.start)

    def _repair(self, configuration: Configuration) -> Change | None:
        """The next step towards every member having the disk that its node has now, and enough voters."""
        for node in configuration.nodes:
            if not configuration.knows(node, self.replicas[node].disk.incarnation):
                return Remove(node)
        if len(configuration.voters) < 3 or self.rng.random() < 0.2:
            if configuration.learners:
                return Promote(configuration.learners[0])
            for name, replica in self.replicas.items():
                if name not in configuration.members:
                    return AddLearner(NodeId(name), replica.disk.incarnation)
        return None

    def _hasty_changes(self, configuration: Configuration) -> list[ChangeConfiguration]:
        """One or two at once, removals above all: those part quorums soonest (R21, R22)."""
        rng = self.rng
        if len(configuration.voters) > 3 and rng.random() < 0.7:
            return [ChangeConfiguration(0, Remove(node)) for node in rng.sample(configuration.voters, rng.choice([1, 2]))]
        return [ChangeConfiguration(0, self._any_change(configuration)) for _ in range(rng.choice([1, 2]))]

    def contest(self) -> None:
        """A leader changes the members and is cut off in the same moment."""
        leader = self.leader
        raft = leader.live_raft if leader is not None else None
        configuration = raft.core.log.configuration if raft is not None else None
        if leader is not None and configuration is not None:
            self.ask(leader, *self._hasty_changes(configuration))
            cut = self.network.isolate(leader.name)
            self.sim.after(self.rng.randrange(500, 3000) * MILLISECOND, cut.heal)

    def _any_change(self, configuration: Configuration) -> Change:
        rng = self.rng
        node = rng.choice(list(self.replicas))
        match rng.randrange(3):
            case 0 if len(configuration.voters) > 3:
                return Remove(NodeId(node))
            case 1:
                return Promote(NodeId(node))
            case _:
                return AddLearner(NodeId(node), self.replicas[node].disk.incarnation)

    def lose_disk(self) -> None:
        """Replace the disk of a removed member, or of a voter without which the others still hold all that is committed."""
        leader = self.leader
        raft = leader.live_raft if leader is not None else None
        configuration = raft.core.log.configuration if raft is not None else None
        if leader is None or raft is None or raft.leadership is None or configuration is None:
            return
        is_pending = raft.core.log.configuration_index > raft.core.commit
        if is_pending or not all(member.replica for member in configuration.members.values()):
            return
        name = self.rng.choice(list(self.replicas))
        healthy = [
            node
            for node in configuration.voters
            if node != name
            and configuration.knows(node, self.replicas[node].disk.incarnation)
            and self.checker.holds(node, raft.core.commit)
        ]
        if name == leader.name or not configuration.has_quorum(healthy):
            return
        self._renew(self.replicas[name])


def _world(sim: Simulation) -> World:
    """Two in three seeds play Raft alone."""
    from ha_core.testing.campaigns.database_clients import DatabaseWorld  # it builds on this module

    return DatabaseWorld(sim) if sim.stream("kind").random() < 0.34 else World(sim)


class DatabaseCampaign:
    """I32 to I38, I40 to I42 (rule L6), and progress (I26) once everything is healed."""

    name = "database"
    invariants = ("I26", "I32", "I33", "I34", "I35", "I36", "I37", "I38", "I40", "I41", "I42")
    faults = (
        "loss", "delay", "reorder", "duplicate", "replay", "path-cut", "one-way-cut", "partition", "clog", "reset",
        "disk-crash", "disk-torn", "disk-error", "disk-full", "disk-slow", "disk-lost", "crash", "power-loss", "freeze",
        "stream-stall",
    )  # fmt: skip

    def play(self, sim: Simulation) -> None:
        world = _world(sim)
        swarm = sim.swarm(self.faults)
        processes = [replica.process for replica in world.replicas.values()]
        faults = [
            *network_faults(world.network),
            *disk_faults([replica.disk.device for replica in world.replicas.values()]),
            *process_faults(processes),
            *reset_faults(world.messages.reset, list(world.replicas)),
            world.stall_fault(),
        ]
        chaos = Chaos(sim, faults, swarm, mean_interval_ns=world.rng.choice([100, 300, 800]) * MILLISECOND)
        world.start()
        chaos.start()
        sim.every(30 * MILLISECOND, world.work)
        sim.every(250 * MILLISECOND, world.administer)
        if swarm["partition"]:
            for _ in range(2):
                sim.after(world.rng.randrange(1, 9) * SECOND, world.contest)
        if swarm["disk-lost"]:
            for _ in range(2):
                sim.after(world.rng.randrange(2, 9) * SECOND, world.lose_disk)
        sim.run_for(SAFETY_NS)

        chaos.stop()
        world.network.heal_all()
        world.stalled.clear()
        world.start()
        sim.checked("I26")
        goal = world.checker.committed + 20
        if not sim.run_for(LIVENESS_NS, stop=lambda: self._is_done(world, goal)):
            sim.violate("I26", f"healed, but commits only go from {goal - 20} to {world.checker.committed}, or some lag behind")
        world.judge()

    @staticmethod
    def _is_done(world: World, goal: int) -> bool:
        leader = world.leader
        raft = leader.live_raft if leader is not None else None
        configuration = raft.core.log.configuration if raft is not None else None
        if configuration is None:
            return False
        commits = [
            raft.core.commit if (raft := world.replicas[node].live_raft) is not None else 0 for node in configuration.voters
        ]
        return min(commits) >= goal and not world.checker.untold()
