"""Message level: what the endpoint offers to the machines above it, without the endpoint.

* Datagrams go over every link at once, each copy on its own; they may be lost, late, doubled and out of order.
* A channel delivers in order and without a gap until its session is reset, whatever happens to the paths; with every path cut
  it waits. A session stands while both processes live: it is reset when one of them ends, or by ``reset``. What was in flight
  then is lost. Each end is told "down" before "up".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ha_core.testing.simulator.core import MILLISECOND
from ha_core.testing.simulator.network import SimNetwork, digest
from ha_core.testing.simulator.process import SimProcess

OnDatagram = Callable[[str, str, object], None]
"""(sender, topic, body)"""
OnMessage = Callable[[str, str, object], None]
"""(sender, channel, body)"""
OnSession = Callable[[str, bool], None]
"""(peer, up)"""


class _Member:
    __slots__ = ("datagram", "host", "message", "process", "session", "sessions")

    def __init__(
        self, process: SimProcess, host: str, datagram: OnDatagram | None, message: OnMessage | None, session: OnSession | None
    ) -> None:
        self.process = process
        self.host = host
        self.datagram = datagram
        self.message = message
        self.session = session
        self.sessions: set[str] = set()
        """The peers with which it believes to have a session."""


class _Lane:
    """One direction of one channel in one session."""

    __slots__ = ("bodies", "last_ns", "waiting")

    def __init__(self) -> None:
        self.bodies: deque[object] = deque()
        self.last_ns = 0
        self.waiting = 0
        """How many of ``bodies`` wait for a usable path; the others are on their way."""


class _Session:
    __slots__ = ("lanes", "live", "one", "other")

    def __init__(self, one: str, other: str) -> None:
        self.one = one
        self.other = other
        self.live = True
        self.lanes: dict[tuple[str, str], _Lane] = {}


class SimMessages:
    """Datagrams, channels and sessions between attached processes, by process name."""

    def __init__(self, network: SimNetwork, *, reconnect_ns: int = 20 * MILLISECOND) -> None:
        self.network = network
        self.sim = network.sim
        self._rng = self.sim.stream("messages")
        self._members: dict[str, _Member] = {}
        self._sessions: dict[tuple[str, str], _Session] = {}
        self._reconnect_ns = reconnect_ns
        self._connecting: set[tuple[str, str]] = set()

    def attach(
        self,
        process: SimProcess,
        *,
        host: str = "",
        on_datagram: OnDatagram | None = None,
        on_message: OnMessage | None = None,
        on_session: OnSession | None = None,
    ) -> None:
        """Join ``process`` (on ``host``, by default the host of its own name); the callbacks usually post an event to it."""
        member = _Member(process, host or process.name, on_datagram, on_message, on_session)
        for other in self._members:
            self._connect_later(process.name, other)
        self._members[process.name] = member
        process.observe(self)

    # -- sending --

    def send_datagram(self, sender: str, to: str, body: object, topic: str = "") -> None:
        """One copy on every link."""
        source, target = self._members[sender], self._members.get(to)
        if target is None:
            return
        self.sim.trace("datagram", sender, to, topic, digest(body))
        if source.host == target.host:
            self.sim.after(50_000, self._datagram, sender, to, topic, body)
            return
        network = self.network
        for link in network.links:
            flow = network.flow(source.host, target.host, link)
            network.packet(flow, self._datagram, sender, to, topic, body)

    def send(self, sender: str, to: str, channel: str, body: object) -> bool:
        """Queue on a channel.

        Returns:
            False if ``sender`` has no session with ``to`` at this moment: the message is dropped.
        """
        session = self._sessions.get(_pair(sender, to))
        if session is None or not session.live or to not in self._members[sender].sessions:
            return False
        self.sim.trace("send", sender, to, channel, digest(body))
        lane = session.lanes.get((sender, channel))
        if lane is None:
            lane = session.lanes[sender, channel] = _Lane()
        lane.bodies.append(body)
        if lane.waiting:
            lane.waiting += 1
        else:
            self._launch(session, lane, sender, to, channel, 0)
        return True

    def reset(self, one: str, other: str) -> None:
        """End the session of two live processes (a fault): both are told, what is in flight is lost, a new one follows."""
        session = self._sessions.get(_pair(one, other))
        if session is not None and session.live:
            self.sim.fault("reset")
            self._end(session)
            for name, peer in ((one, other), (other, one)):
                self.sim.after(self._rng.randrange(1, 30) * MILLISECOND, self._tell_down, name, peer)
            self._connect_later(one, other)

    # -- delivery --

    def _datagram(self, sender: str, to: str, topic: str, body: object) -> None:
        member = self._members[to]
        if member.process.alive and member.datagram is not None:
            self.sim.trace("got datagram", to, sender, topic, digest(body))
            member.datagram(sender, topic, body)

    def _launch(self, session: _Session, lane: _Lane, sender: str, to: str, channel: str, delay_ns: int) -> None:
        source, target = self._members[sender].host, self._members[to].host
        if source == target:
            delay_ns += 50_000
        else:
            network = self.network
            flow = network.usable(source, target)
            if flow is None:
                lane.waiting += 1
                if lane.waiting == 1:
                    self._wait(session, lane, sender, to, channel)
                return
            delay_ns += network.transit_ns(flow)
            while network.lost(flow):
                delay_ns += self._rng.randrange(25, 100) * MILLISECOND
        lane.last_ns = max(lane.last_ns, self.sim.now_ns + delay_ns)
        self.sim.at(lane.last_ns, self._deliver, session, lane, sender, to, channel)

    def _wait(self, session: _Session, lane: _Lane, sender: str, to: str, channel: str) -> None:
        """Every path is cut: go on when the first heals."""

        def resume() -> None:
            if not session.live or not lane.waiting:
                return
            count, lane.waiting = lane.waiting, 0
            for _ in range(count):
                self._launch(session, lane, sender, to, channel, self._rng.randrange(1, 60) * MILLISECOND)

        network = self.network
        for flow in network.flows(self._members[sender].host, self._members[to].host):
            flow.when_up(resume)

    def _deliver(self, session: _Session, lane: _Lane, sender: str, to: str, channel: str) -> None:
        if not session.live:
            return
        body = lane.bodies.popleft()
        member = self._members[to]
        self.sim.trace("got", to, sender, channel, digest(body))
        if member.message is not None:
            member.message(sender, channel, body)

    # -- sessions --

    def process_up(self, process: SimProcess) -> None:
        for other in self._members:
            if other != process.name:
                self._connect_later(process.name, other)

    def process_down(self, process: SimProcess, *, silent: bool) -> None:
        self._members[process.name].sessions.clear()
        for other in self._members:
            session = self._sessions.get(_pair(process.name, other))
            if session is not None and session.live:
                self._end(session)
                source = self._members[process.name].host
                if not silent and (
                    source == self._members[other].host or self.network.usable(source, self._members[other].host)
                ):
                    self.sim.after(self._rng.randrange(1, 50) * MILLISECOND, self._tell_down, other, process.name)

    def _end(self, session: _Session) -> None:
        session.live = False
        session.lanes.clear()

    def _tell_down(self, name: str, peer: str) -> None:
        """Unless a newer session has begun meanwhile (which told it)."""
        session = self._sessions.get(_pair(name, peer))
        member = self._members[name]
        if (session is None or not session.live) and peer in member.sessions and member.process.alive:
            member.sessions.discard(peer)
            self.sim.trace("session down", name, peer)
            if member.session is not None:
                member.session(peer, False)

    def _connect_later(self, one: str, other: str) -> None:
        pair = _pair(one, other)
        if pair not in self._connecting:
            self._connecting.add(pair)
            self.sim.after(int(self._rng.uniform(0.2, 1.5) * self._reconnect_ns), self._connect, pair)

    def _connect(self, pair: tuple[str, str]) -> None:
        self._connecting.discard(pair)
        standing = self._sessions.get(pair)
        if standing is not None and standing.live:
            return
        members = self._members[pair[0]], self._members[pair[1]]
        if not (members[0].process.alive and members[1].process.alive):
            return
        hosts = members[0].host, members[1].host
        frozen = members[0].process.frozen or members[1].process.frozen
        if frozen or (hosts[0] != hosts[1] and not self._two_way(*hosts)):
            self._connect_later(*pair)
            return
        self._sessions[pair] = _Session(*pair)
        for member, peer in zip(members, (pair[1], pair[0]), strict=True):
            if peer in member.sessions and member.session is not None:
                member.session(peer, False)
            member.sessions.add(peer)
            self.sim.trace("session up", member.process.name, peer)
            if member.session is not None:
                member.session(peer, True)

    def _two_way(self, one: str, other: str) -> bool:
        network = self.network
        return any(
            not network.flow(one, other, link).cuts and not network.flow(other, one, link).cuts for link in network.links
        )


def _pair(one: str, other: str) -> tuple[str, str]:
    return (one, other) if one < other else (other, one)
