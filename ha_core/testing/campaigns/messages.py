"""The messages campaign: three or four nodes, two paths between each pair, everything that can go wrong, exactly once.

Real endpoint and durable machines over a simulated network at connection level; stores that lose what was not flushed. Some
seeds also restore a store from an older copy, run a clone of it, or lose it: then each channel concerned must either be whole
or be reported (P5). The safety phase has all faults; in the first liveness phase one path of each pair works (I26), in the
second everything does, and nothing may be missing (I1).
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from ha_core.ids import ChannelName, LinkName, NodeId
from ha_core.machines.durable_events import HandlerClosed, HandlerOpened
from ha_core.machines.messages import PathState
from ha_core.testing.campaigns.messages_checks import MessagesChecker
from ha_core.testing.campaigns.messages_node import CHANNELS, PROFILE, REPLIES, MessagesNode
from ha_core.testing.campaigns.messages_store import Image, Oracle
from ha_core.testing.campaigns.messages_stranger import Stranger
from ha_core.testing.campaigns.messages_talk import TALK
from ha_core.testing.simulator import (
    MILLISECOND,
    SECOND,
    Chaos,
    Cut,
    End,
    Fault,
    SimConnections,
    SimNetwork,
    Simulation,
    disk_faults,
    network_faults,
    process_faults,
    reset_faults,
)

LINKS = ("a", "b")
SAFETY_NS = 6 * SECOND
LIVENESS_NS = 15 * SECOND
FAILOVER_NS = 80 * MILLISECOND
"""Within this a message that was sent after a path was lost is handled at the other end."""
CALM_NS = 30 * MILLISECOND
PATIENCE_NS = 60 * SECOND
"""The second liveness phase: long enough for what was held down to come back."""


def node_id(name: str) -> NodeId:
    return NodeId(f"app@{name}.example")


def addresses(number: int) -> dict[LinkName, str]:
    return {LinkName(link): f"10.0.{net}.{number}:7400" for net, link in enumerate(LINKS, start=1)}


class MessagesCampaign:
    name = "messages"
    invariants = (
        "I1", "I2", "I3", "I4", "I5", "I6", "I7", "I8", "I9", "I10", "I11", "I12", "I13", "I14", "I15", "I16", "I17", "I18",
        "I19", "I20", "I21", "I23", "I24", "I25", "I26", "I27", "I28", "I29", "I30",
    )  # fmt: skip
    faults = (
        "loss", "delay", "reorder", "duplicate", "replay", "corrupt", "path-cut", "one-way-cut", "partition", "clog", "reset",
        "disk-crash", "disk-torn", "disk-error", "disk-full", "disk-slow", "crash", "power-loss", "freeze",
        "handler-error", "handler-kill", "handler-closed", "stall", "garbage", "restore", "clone", "store-lost", "outbox-full",
    )  # fmt: skip

    def play(self, sim: Simulation) -> None:
        world = World(sim, sim.swarm(self.faults))
        world.start()
        sim.run_for(SAFETY_NS)
        world.heal()
        world.live()
        world.judge()


class World:
    """All nodes, their network, what is sent on it and what befalls it."""

    def __init__(self, sim: Simulation, swarm: dict[str, float]) -> None:
        self.sim = sim
        self.swarm = swarm
        self.rng = sim.stream("world")
        self.network = SimNetwork(sim, links=LINKS)
        self.connections = SimConnections(self.network)
        self.oracle = Oracle(sim, lambda name: self.nodes[name].process.alive)
        self.nodes: dict[str, MessagesNode] = {}
        self.clone: MessagesNode | None = None
        self.turns: dict[str, ChannelName] = {}
        """The one channel on which a node sends, if that is not left to chance."""
        self.tampered: set[str] = set()
        """Names of nodes whose store was restored, cloned or lost."""
        self.burst = self.rng.random() < 0.15
        self._burst_ns = self.rng.randrange(1, 5) * SECOND
        self.sent = 0
        self.failover_ns = 0
        for number in range(1, (4 if self.rng.random() < 0.25 else 3) + 1):
            self._add(f"n{number}", node_id(f"n{number}"), number)
        for node in self.nodes.values():
            for other in self.nodes.values():
                if node is not other:
                    node.peers[other.node] = other.addresses
            node.newer_share = self.rng.choice((0.0, 0.0, 0.5, 1.0))
        self.names = list(self.nodes)
        self.stranger = Stranger(sim, self.network, self.connections, [node.addresses for node in self.nodes.values()])
        self.connections.tap = self.stranger.overhear
        self.chaos = Chaos(sim, self._faults(), swarm)
        self._until = 0
        self.checker = MessagesChecker(sim, self.nodes, PROFILE)
        self.connections.dial_tap = self.checker.dialled

    def _add(self, name: str, node_id: NodeId, number: int) -> MessagesNode:
        self.network.add_host(name)
        rate = self.rng.choice((0, 0, 3000, -3000))
        node = self.nodes[name] = MessagesNode(
            self.sim, name, node_id, addresses(number), self.connections, self.oracle, rate_ppm=rate
        )
        node.on_path_changed = lambda effect: self.checker.path_changed(node, effect)
        node.talker.on_session_up = lambda effect: self.checker.session_up(node, effect.peer, effect.session)
        return node

    # -- the safety phase --

    def start(self) -> None:
        self._until = self.sim.now_ns + SAFETY_NS
        for name, node in self.nodes.items():
            self.sim.after(self.rng.randrange(500) * MILLISECOND, node.process.start)
            self.sim.after(self.rng.randrange(800) * MILLISECOND, self._act, node, self.sim.stream(f"act/{name}"))
        self.chaos.start()
        if self.burst:
            self.sim.at(self._burst_ns, self._stall_one)

    def _stall_one(self) -> None:
        """Bulk runs against an application that takes nothing: credit must hold it."""
        end = self._stall(self.rng, 1.0)
        self.sim.after(SECOND, end)

    def _act(self, node: MessagesNode, rng: random.Random) -> None:
        """The application does something, again and again."""
        if self.sim.now_ns >= self._until:
            return
        self.sim.after(rng.randrange(20, 140) * MILLISECOND, self._act, node, rng)
        if not node.process.alive or node.process.frozen:
            return
        peer = rng.choice(list(node.peers))
        burst = self.burst and self._burst_ns <= self.sim.now_ns < self._burst_ns + SECOND
        size = 2000 if burst else rng.choice((10, 100, 1000))
        match rng.randrange(4):
            case 0 | 1:
                count = rng.randrange(50, 150) if burst else rng.randrange(1, 8)
                channel = rng.choice(CHANNELS)
                node.send_durable(peer, self.turns.get(node.name, channel), [self._body(node, rng, size) for _ in range(count)])
            case 2:
                machine = node.machine
                if machine is not None:
                    count = rng.randrange(100, 400) if burst else rng.randrange(1, 8)
                    node.talker.talk_anything(machine.endpoint, peer, count, size)
            case _:
                for other in node.peers:
                    node.talker.beat(other)

    def _body(self, node: MessagesNode, rng: random.Random, size: int) -> bytes:
        self.sent += 1
        kind, draw = b"do", rng.random()
        if draw < 0.1:
            kind = b"ask"
        elif draw < 0.12 and self.swarm["handler-error"]:
            kind = b"fail" if rng.random() < 0.8 else b"poison"
        elif draw < 0.121 and self.swarm["handler-kill"] and not self.burst:
            kind = b"kill"
        return b"%s %s %d " % (kind, node.name.encode(), self.sent) + bytes(size)

    def _faults(self) -> list[Fault]:
        nodes = list(self.nodes.values())
        return [
            *network_faults(self.network),
            *reset_faults(self.connections.reset, list(self.nodes)),
            *disk_faults([node.store.device for node in nodes]),
            *process_faults([node.process for node in nodes]),
            Fault("handler-closed", self._close_handler),
            Fault("stall", self._stall),
            Fault("garbage", self.stranger.strike),
            Fault("restore", self._restore, 0.8),
            Fault("clone", self._run_clone, 1.0),
            Fault("store-lost", self._lose_store, 0.3),
        ]

    def _some_node(self, rng: random.Random) -> MessagesNode:
        return self.nodes[rng.choice(self.names)]

    def _close_handler(self, rng: random.Random, amount: float) -> End:
        node, name = self._some_node(rng), rng.choice(CHANNELS)
        self.sim.fault("handler-closed")
        node.process.post(HandlerClosed(name))
        return lambda: node.process.post(HandlerOpened(name, 50))

    def _stall(self, rng: random.Random, amount: float) -> End:
        node = self._some_node(rng)
        self.sim.fault("stall")
        node.talker.stalled = True

        def end() -> None:
            node.talker.stalled = False
            node.talker.consume()

        return end

    # -- tampering with stores --

    def _tamper(self, node: MessagesNode, kind: str) -> bool:
        """Whether this seed may have this: one store a seed is tampered with, or no channel could be judged."""
        if self.tampered or self.sim.now_ns < SECOND:
            return False
        self.tampered.add(node.name)
        self.oracle.tampered.add(node.store.durable.store)
        self.sim.trace(kind, node.name)
        self.sim.fault(kind)
        return True

    def _restore(self, rng: random.Random, amount: float) -> None:
        node = self._some_node(rng)
        if not self._tamper(node, "restore"):
            return
        image = node.store.durable.copy()

        def put_back() -> None:
            node.process.end(silent=rng.random() < 0.5)
            lost = node.store.durable
            node.store.restore(image)
            self.sim.after(rng.randrange(10, 300) * MILLISECOND, node.process.start)
            if rng.random() < 0.7:
                cut = self.network.isolate(node.name)
                self.sim.after(400 * MILLISECOND, self._catch_up, node, lost, rng)
                self.sim.after(rng.randrange(600, 2000) * MILLISECOND, cut.heal)

        self.sim.after(rng.randrange(50, 2000) * MILLISECOND, put_back)

    def _catch_up(self, node: MessagesNode, lost: Image, rng: random.Random) -> None:
        """Unseen by others, a restored store commits so much that its numbers alone no longer show what happened."""
        if not node.process.alive:
            return
        for (to, name), state in lost.outgoing.items():
            now = node.store.current.outgoing.get((to, name))
            count = state.last - (now.last if now else 0) + rng.randrange(0, 4)
            if count > 0:
                node.send_durable(to, name, [self._body(node, rng, 10) for _ in range(count)])

    def _lose_store(self, rng: random.Random, amount: float) -> None:
        node = self._some_node(rng)
        if self._tamper(node, "store-lost"):
            node.process.end()
            node.store.lose()
            self.sim.after(rng.randrange(10, 500) * MILLISECOND, node.process.start)

    def _run_clone(self, rng: random.Random, amount: float) -> None:
        """Another machine begins to run from a copy of a node's files, under the same name; the original lives on."""
        node = self._some_node(rng)
        if not self._tamper(node, "clone"):
            return
        clone = self._add(f"clone-of-{node.name}", node.node, 9)
        clone.peers.update(node.peers)
        clone.store.restore(node.store.durable)
        self.oracle.share(node.store.durable.store, clone.name)
        self.clone = clone
        takes_turns = rng.random() < 0.4
        if takes_turns or rng.random() < 0.7:
            # They send on channels of their own, so that no digest tells the two apart.
            self.turns = {node.name: CHANNELS[0], clone.name: CHANNELS[1]}
        delay_ns = 0 if takes_turns else rng.randrange(600) * MILLISECOND
        self.sim.after(delay_ns, self._start_clone, clone)
        if takes_turns:
            self._take_turns(node, clone, rng)
            return
        if rng.random() < 0.6:
            # The original restarts until its boot numbers are past those of the clone, and is refused for that, too.
            for turn in range(1, 4):
                self.sim.after(delay_ns + turn * 350 * MILLISECOND, node.process.end)
                self.sim.after(delay_ns + (turn * 350 + 20) * MILLISECOND, node.process.start)
        self.sim.after(delay_ns + rng.randrange(1500, 5000) * MILLISECOND, clone.process.end)

    def _start_clone(self, clone: MessagesNode) -> None:
        if self.sim.now_ns < self._until:
            clone.process.start()
            self._act(clone, self.sim.stream("act/clone"))

    def _take_turns(self, node: MessagesNode, clone: MessagesNode, rng: random.Random) -> None:
        """The original is seen, then the clone, then the original again, by receivers that have restarted since."""
        cuts = [self.network.isolate(clone.name)]

        def swap(hidden: str, *, restart: bool) -> None:
            cuts.append(self.network.isolate(hidden))
            cuts.pop(0).heal()
            for name in self.names if restart else ():
                if name != node.name:
                    self.nodes[name].process.end()
                    self.sim.after(rng.randrange(5, 200) * MILLISECOND, self.nodes[name].process.start)

        first_ns, second_ns = rng.randrange(300, 800) * MILLISECOND, rng.randrange(1200, 2500) * MILLISECOND
        self.sim.after(first_ns, lambda: swap(node.name, restart=False))
        self.sim.after(second_ns, lambda: swap(clone.name, restart=True))

    # -- the liveness phases --

    def heal(self) -> None:
        self.chaos.stop()
        self.network.heal_all()
        if self.clone is not None:
            self.clone.process.end()
        for node in self.nodes.values():
            if node is not self.clone:
                node.process.crash_within(-1)
                node.process.start()

    def live(self) -> None:
        """One healthy path of each pair must do; then all are healthy."""
        pairs = [(one, other) for at, one in enumerate(self.names) for other in self.names[at + 1 :]]
        cuts = [self._cut_one_path(one, other) for one, other in pairs]
        self.sim.checked("I26")
        if not self._run_until_whole(LIVENESS_NS):
            self.sim.violate("I26", f"with one path of each pair: {'; '.join(self._missing())}")
        for cut in cuts:
            cut.heal()
        if self._run_until_whole(PATIENCE_NS) and self.rng.random() < 0.4:
            self._fail_over(pairs)

    def _fail_over(self, pairs: list[tuple[str, str]]) -> None:
        """I23: with all paths UP, lose one of each pair; what is sent then arrives in time."""
        for _ in range(150):
            self.sim.run_for(100 * MILLISECOND)
            if not self.tampered and self._all_up():
                break
        else:
            return
        cuts = [self._cut_one_path(one, other) for one, other in pairs]
        goals: dict[tuple[str, str], int] = {}
        for one, other in [*pairs, *((other, one) for one, other in pairs)]:
            sender, receiver = self.nodes[one], self.nodes[other]
            sender.send_durable(receiver.node, CHANNELS[0], [b"do after the cut"])
            goals[one, other] = sender.store.current.outgoing[receiver.node, CHANNELS[0]].last
        self.sim.checked("I23")
        began_ns = self.sim.now_ns
        while late := [pair for pair, goal in goals.items() if self._cursor(*pair) < goal]:
            if self.sim.now_ns - began_ns > FAILOVER_NS:
                text = ", ".join(f"{one} to {other}" for one, other in late)
                self.sim.violate("I23", f"{FAILOVER_NS / SECOND} s after a path was lost nothing has come from {text}")
                return
            for one, other in goals:
                # with traffic both ways, what is received could be mistaken for proof that sending works
                machine = self.nodes[one].machine
                if machine is not None:
                    self.nodes[one].talker.talk(machine.endpoint, self.nodes[other].node, TALK, 1, 100)
            self.sim.run_for(4 * MILLISECOND)
        self.failover_ns = self.sim.now_ns - began_ns
        for cut in cuts:
            cut.heal()
        self._run_until_whole(PATIENCE_NS)

    def _cursor(self, sender: str, receiver: str) -> int:
        state = self.nodes[receiver].store.durable.incoming.get((self.nodes[sender].store.durable.store, CHANNELS[0]))
        return state.cursor if state is not None else 0

    def _all_up(self) -> bool:
        """Every path is UP, and its probe timeout is again what it is without faults."""
        good: list[bool] = []
        for one in self.names:
            machine = self.nodes[one].machine
            if machine is None:
                return False
            good += [state is PathState.UP for _, state, _ in machine.endpoint.paths()]
            for other in self.nodes[one].peers:
                session = machine.endpoint.session_with(other)
                connections = session.connections.values() if session is not None else ()
                good += [connection.liveness.timeout_ns() <= CALM_NS for connection in connections]
        return len(good) == 2 * len(self.names) * (len(self.names) - 1) * len(LINKS) and all(good)

    def _cut_one_path(self, one: str, other: str) -> Cut:
        """Both ways, or one way only: what is received then proves nothing about what is sent."""
        link = self.rng.choice(LINKS)
        match self.rng.randrange(4):
            case 0:
                return self.network.cut_one_way(one, other, link)
            case 1:
                return self.network.cut_one_way(other, one, link)
            case _:
                return self.network.cut_path(one, other, link)

    def _run_until_whole(self, duration_ns: int) -> bool:
        end_ns = self.sim.now_ns + duration_ns
        while self.sim.now_ns < end_ns:
            self.sim.run_for(100 * MILLISECOND)
            if next(self._missing_lines(), None) is None:
                return True
        return False

    def _missing(self) -> list[str]:
        return list(self._missing_lines())[:5]

    def _channels(self) -> Iterator[tuple[MessagesNode, MessagesNode, ChannelName]]:
        for sender in self.names:
            for receiver in self.names:
                if sender != receiver:
                    for name in (*CHANNELS, REPLIES):
                        yield self.nodes[sender], self.nodes[receiver], name

    def _missing_lines(self) -> Iterator[str]:
        for node in self.names:
            if not self.nodes[node].process.alive:
                yield f"{node} is down"
        for sender, receiver, name in self._channels():
            sent = sender.store.durable.outgoing.get((receiver.node, name))
            got = receiver.store.durable.incoming.get((sender.store.durable.store, name))
            last, cursor = sent.last if sent else 0, got.cursor if got else 0
            if cursor != last and not self._excused(sender, receiver):
                yield f"{receiver.name} has {cursor} of {last} of {name!r} from {sender.name}"
        for one in self.names:
            for other in self.names:
                if one != other and not self._excused(self.nodes[one], self.nodes[other]):
                    yield from self._unfinished_sessions(self.nodes[one], self.nodes[other])

    def _unfinished_sessions(self, one: MessagesNode, other: MessagesNode) -> Iterator[str]:
        machine = one.machine
        session = machine.endpoint.session_with(other.node) if machine is not None else None
        if session is None:
            yield f"{one.name} has no session with {other.name}"
            return
        for channel in session.channels():
            if channel.pending_count or channel.base != channel.top:
                yield f"{one.name}: session channel {channel.name!r} to {other.name} does not drain"

    def _excused(self, one: MessagesNode, other: MessagesNode) -> bool:
        """Something was done to the store of one of them, and an administrator was told of it."""
        if one.name not in self.tampered and other.name not in self.tampered:
            return False
        return any(peer == other.node for peer, _ in one.reports) or any(peer == one.node for peer, _ in other.reports)

    # -- verdicts --

    def judge(self) -> None:
        sim = self.sim
        for sender, receiver, name in self._channels():
            sent = sender.store.durable.outgoing.get((receiver.node, name))
            if sent is None:
                continue
            got = receiver.store.durable.incoming.get((sender.store.durable.store, name))
            cursor = got.cursor if got else 0
            sim.checked("I1")
            if cursor < sent.last and not self._excused(sender, receiver):
                sim.violate("I1", f"{receiver.name} has {cursor} of {sent.last} of {name!r} from {sender.name}")
        sim.checked("I10")
        if not self.tampered:
            for node in self.nodes.values():
                if node.forks:
                    sim.violate("I10", f"{node.name} reports a fork that never was: {node.reports[-1][1]}")
        sim.checked("I21")
        stuck = [line for line in self._missing_lines() if "drain" in line]
        if stuck:
            sim.violate("I21", "; ".join(stuck[:5]))
        self.stranger.judge()
