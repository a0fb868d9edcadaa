"""Looks at every messages node after each of its steps: queues (I17, I20), paths (I24), dials (I27), versions (I30).

Nothing here asks a machine what it intends: bounds are stated once more, from what the documentation promises.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import attrs

from ha_core.config import Profile, ns
from ha_core.ids import LinkName, NodeId, SessionId
from ha_core.machines.channels import QUEUE_BYTES, SendChannel
from ha_core.machines.connection import Connection
from ha_core.machines.durable_wire import FLIGHT_BYTES, MAX_MESSAGE_BYTES, RUN_BYTES
from ha_core.machines.messages import Dial, PathChanged, PathState, Priority
from ha_core.machines.session import Session
from ha_core.testing.campaigns.messages_node import MessagesMachine, MessagesNode
from ha_core.testing.simulator import SECOND, Simulation

AHEAD_BYTES: Final = 320 << 10
"""I20: what a heartbeat, or any other control frame, finds before it on its connection, at most ..."""
URGENT_BYTES: Final = 192 << 10
"""... and what an urgent message may: with less before it, it is on its way in the same step."""
BUSY_BYTES: Final = 64 << 10
"""A connection with so much before it is one that bulk saturates."""
LONGEST_HOLD_NS: Final = 60 * SECOND
STABLE_NS: Final = 60 * SECOND
RATE_SLACK: Final = 0.99
"""Clocks may run slower than virtual time."""
FIRST_DIALS: Final = 9
"""I27: dials of a path that never comes up within its first seven seconds, doubling from 25 ms; later one each 5 s."""
LATER_DIAL_NS: Final = 5 * SECOND


@attrs.define
class _Track:
    """One path as its PathChanged events tell it, in the present session."""

    state: PathState = PathState.NEW
    left_ns: int | None = None
    """When it was UP last."""
    up_ns: int = 0
    flaps: int = 0
    dials: int = 0
    """Since it was UP last."""
    counted_ns: int = 0
    joined: int = 0
    """Connections to the peer that were established meanwhile: with each of them the other paths are dialled at once."""


@attrs.define
class _Relation:
    """One node's view of one peer, in one life of the node."""

    life: int
    session: SessionId | None = None
    active: Connection | None = None
    known: frozenset[int] = frozenset()
    tracks: dict[LinkName, _Track] = attrs.field(factory=dict)


class MessagesChecker:
    def __init__(self, sim: Simulation, nodes: Mapping[str, MessagesNode], profile: Profile) -> None:
        self._sim = sim
        self._nodes = nodes
        self._up_after_ns = ns(profile.up_after_s)
        self._relations: dict[tuple[str, NodeId], _Relation] = {}
        sim.watch(self.after_step)

    # -- after each step --

    def after_step(self, name: str) -> None:
        node = self._nodes.get(name)
        machine = node.machine if node is not None else None
        if node is None or machine is None:
            return
        for peer in node.peers:
            session = machine.endpoint.session_with(peer)
            if session is not None and session.connections:
                relation = self._relation(node, peer)
                if session.active is not relation.active:
                    self._switched(name, peer, session, relation)
                if session.connections.keys() != relation.known:
                    self._joined(node, peer, session, relation)
                self._check_queues(name, peer, session)
        if self._sim.steps % 16 == 0:
            self._check_memory(name, machine, node)

    def _relation(self, node: MessagesNode, peer: NodeId) -> _Relation:
        relation = self._relations.get((node.name, peer))
        if relation is None or relation.life != node.process.lives:
            relation = self._relations[node.name, peer] = _Relation(node.process.lives)
        return relation

    # -- queues --

    def _check_queues(self, name: str, peer: NodeId, session: Session) -> None:
        """I20: a heartbeat goes behind what its connection was given before, and that is bounded; urgent messages wait for
        room only."""
        for connection in session.connections.values():
            ahead = connection.unflushed
            if ahead < BUSY_BYTES:
                continue
            self._sim.checked("I20")
            if ahead > AHEAD_BYTES:
                text = f"{name}: {ahead} bytes are before the next heartbeat to {peer} on {connection.link}"
                self._sim.violate("I20", text)
            if connection is session.active and ahead < URGENT_BYTES:
                for channel in session.channels():
                    if channel.priority is Priority.URGENT and _may_go(channel):
                        text = f"{name}: {channel.name!r} to {peer} waits with {ahead} bytes before it"
                        self._sim.violate("I20", text)

    def _check_memory(self, name: str, machine: MessagesMachine, node: MessagesNode) -> None:
        self._sim.checked("I17")
        self._sim.checked("I18")  # these two by the session's own check(), after every step
        self._sim.checked("I25")
        slack = MAX_MESSAGE_BYTES + 2 * RUN_BYTES
        for outgoing in machine.durable.sender.channels.values():
            if outgoing.held_bytes > 3 * FLIGHT_BYTES + slack:
                self._sim.violate("I17", f"{name}: {outgoing.held_bytes} bytes of {outgoing.name!r} to {outgoing.to} held")
        for incoming in machine.durable.receiver.channels.values():
            if incoming.staged_bytes > FLIGHT_BYTES + slack:
                self._sim.violate("I17", f"{name}: {incoming.staged_bytes} bytes of {incoming.name!r} staged")
        for peer in node.peers:
            session = machine.endpoint.session_with(peer)
            for channel in session.channels() if session is not None else ():
                if channel.pending_bytes > QUEUE_BYTES + 4 * FLIGHT_BYTES:
                    text = f"{name}: {channel.pending_bytes} bytes queued on {channel.name!r} to {peer}"
                    self._sim.violate("I17", text)

    # -- paths --

    def _switched(self, name: str, peer: NodeId, session: Session, relation: _Relation) -> None:
        """I24: data leaves a path only if that is gone or in doubt."""
        before, relation.active = relation.active, session.active
        if relation.session != session.id or before is None or session.active is None:
            return
        self._sim.checked("I24")
        if session.connections.get(before.number) is before and before.path is not None and before.path.state is PathState.UP:
            text = f"{name}: data to {peer} moves from {before.link} to {session.active.link}, though both are UP"
            self._sim.violate("I24", text)

    def path_changed(self, node: MessagesNode, effect: PathChanged) -> None:
        """I24: a path that failed is UP again only after a time without trouble, the longer the more often that happened,
        unless there is no other."""
        relation, now_ns = self._relation(node, effect.path.peer), self._sim.now_ns
        track = relation.tracks.setdefault(effect.path.link, _Track())
        if track.state is PathState.UP:
            track.flaps = max(0, track.flaps - (now_ns - track.up_ns) // STABLE_NS) + 1
            track.left_ns = now_ns
        elif effect.state is PathState.UP:
            if track.left_ns is not None and any(other.state is PathState.UP for other in relation.tracks.values()):
                self._sim.checked("I24")
                hold_ns = min(self._up_after_ns << min(track.flaps - 1, 16), LONGEST_HOLD_NS)
                passed_ns = now_ns - track.left_ns
                if passed_ns < RATE_SLACK * hold_ns:
                    self._sim.violate(
                        "I24", f"{node.name}: {effect.path.link} to {effect.path.peer} failed {track.flaps} times and is UP "
                        f"{passed_ns / SECOND:.3f} s after the last time, though another path was UP",
                    )  # fmt: skip
            track.up_ns, track.dials = now_ns, 0
        track.state = effect.state

    def session_up(self, node: MessagesNode, peer: NodeId, session: SessionId) -> None:
        """Another process, or another session: its paths have no history."""
        relation = self._relation(node, peer)
        relation.session, relation.active = session, None
        for track in relation.tracks.values():
            track.left_ns, track.flaps, track.dials = None, 0, 0

    # -- connections --

    def dialled(self, name: str, effect: Dial) -> None:
        """I27: a path that does not come up is dialled ever more seldom."""
        node = self._nodes.get(name)
        if node is None:
            return
        relation, now_ns = self._relation(node, effect.path.peer), self._sim.now_ns
        track = relation.tracks.setdefault(effect.path.link, _Track())
        if not track.dials:
            track.counted_ns, track.joined = now_ns, 0
        track.dials += 1
        self._sim.checked("I27")
        allowed = FIRST_DIALS + track.joined + (now_ns - track.counted_ns) // LATER_DIAL_NS
        if track.dials > allowed:
            passed_s = (now_ns - track.counted_ns) / SECOND
            text = f"{name}: {track.dials} dials of {effect.path.link} to {effect.path.peer} in {passed_s:.3f} s"
            self._sim.violate("I27", f"{text}, at most {allowed} expected")

    def _joined(self, node: MessagesNode, peer: NodeId, session: Session, relation: _Relation) -> None:
        """I30: a connection speaks the highest version that both ends know, and only what both of them offer."""
        known, relation.known = relation.known, frozenset(session.connections)
        for number in sorted(relation.known - known):
            for track in relation.tracks.values():
                track.joined += 1
            connection = session.connections[number]
            ours, theirs = connection.ours, connection.theirs
            if ours is None or theirs is None:
                continue
            if ours.version_max != theirs.version_max or ours.features != theirs.features:
                self._sim.checked("I30")
            version, features = min(ours.version_max, theirs.version_max), ours.features & theirs.features
            if (connection.version, connection.features) != (version, features):
                text = f"{node.name} speaks version {connection.version} with {peer}, expected {version}"
                self._sim.violate("I30", f"{text}; features {connection.features}, expected {features}")


def _may_go(channel: SendChannel) -> bool:
    """It has a whole message that credit allows."""
    if not channel.pending_count or channel.used_messages >= channel.credit_messages:
        return False
    return channel.used_bytes + len(channel.pending[channel.start]) <= channel.credit_bytes
