"""The lag campaign: an hour of two nodes whose event loops stall, on a network without a fault (I22).

Loops are late by a little all the time and by up to seconds now and then, one's own lag as well as the peer's; what waits in
the sockets then is read in pieces, before or after the timers. Nobody may call a path DOWN for that, unless the peer's loop
stood still for nearly ``down_s`` by itself: such a process is unreachable indeed. 24 seeds are a day.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from ha_core.config import LAN, ns
from ha_core.ids import Boot, ChannelName, LinkName, NodeId, StoreId
from ha_core.machines.contract import Effect, Event, feed
from ha_core.machines.endpoint import EndpointMachine
from ha_core.machines.messages import (
    Accepted,
    Connected,
    Consumed,
    DeliverRun,
    Dial,
    Disconnect,
    Disconnected,
    Flushed,
    PathChanged,
    PathState,
    Received,
    SendRun,
    SetPeer,
    Transmit,
)
from ha_core.testing.simulator import MICROSECOND, MILLISECOND, SECOND, Simulation, Timer

HOUR_NS = 3600 * SECOND
LINKS = (LinkName("a"), LinkName("b"))
LATENCY_NS = 150 * MICROSECOND
SHORT_LAG_NS = 2 * MILLISECOND
LAG_EVERY_NS = 15 * SECOND
LONGEST_LAG_NS = 5 * SECOND // 2
TALK_EVERY_NS = 20 * SECOND
HUNG_NS = ns(LAN.down_s) * 9 // 10
"""A peer that stood still for so long may be called unreachable."""


class LagCampaign:
    name = "lag"
    invariants = ("I22",)
    faults = ("lag", "short-lag")

    def play(self, sim: Simulation) -> None:
        one, other = Loop(sim, NodeId("app@n1.example"), 1), Loop(sim, NodeId("app@n2.example"), 2)
        one.peer, other.peer = other, one
        for loop in (one, other):
            loop.post(SetPeer(loop.other.node, loop.other.addresses))
            loop.lag_again()
        sim.every(TALK_EVERY_NS, one.talk)
        sim.run_for(HOUR_NS)
        sim.checked("I22")


class Loop:
    """An event loop with one endpoint machine, and its end of the wires."""

    def __init__(self, sim: Simulation, node: NodeId, number: int) -> None:
        self._sim = sim
        self.node = node
        self.addresses = {link: f"10.0.{at}.{number}:7400" for at, link in enumerate(LINKS, 1)}
        self.peer: Loop | None = None
        self._rng = sim.stream(f"loop/{node}")
        self._machine = EndpointMachine(
            node=node, cluster="campaign", key=bytes(32), store=StoreId(bytes([number]) * 16), boot=Boot(1, number),
            boots_digest=b"", links=self.addresses, profile=LAN, rng=sim.stream(f"machine/{node}"),
        )  # fmt: skip
        self._inbox: deque[Event] = deque()
        self._flushed: list[Event] = []
        """Told with whatever comes next: nothing waits for it."""
        self._remote: dict[int, int] = {}
        """Our number of a connection -> the peer's."""
        self._next_accept = 1
        self._timer: Timer | None = None
        self._busy_until_ns = 0
        self._lags: deque[tuple[int, int]] = deque(maxlen=8)
        """(when it ended, how long it was): the last stalls of this loop."""

    @property
    def other(self) -> Loop:
        assert self.peer is not None
        return self.peer

    # -- the loop --

    def post(self, event: Event) -> None:
        self._inbox.append(event)
        self._wake_at(self._sim.now_ns)

    def _wake_at(self, when_ns: int) -> None:
        """A busy loop comes to it when it is free; a free one is still late by a little."""
        due_ns = max(when_ns, self._busy_until_ns)
        if self._timer is None or self._timer.when_ns > due_ns:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._sim.at(due_ns + int(self._rng.random() * 100 * MICROSECOND), self._step)

    def _step(self) -> None:
        self._timer = None
        sim, rng = self._sim, self._rng
        if sim.now_ns < self._busy_until_ns:
            self._wake_at(sim.now_ns)
            return
        count = len(self._inbox)
        if count > 1 or rng.random() < 0.2:
            count = rng.randrange(count + 1)  # the timer may come first, and a socket be read later than another
        events = [*self._flushed, *(self._inbox.popleft() for _ in range(count))]
        self._flushed = []
        sim.steps += 1
        feed(self._machine, events, sim.now_ns, self)
        if rng.random() < 0.02:
            sim.fault("short-lag")
            self._stall(int(rng.expovariate(1.0) * SHORT_LAG_NS))
        if self._inbox:
            self._wake_at(sim.now_ns)

    def lag_again(self) -> None:
        """Stall now and then, for a millisecond or for seconds."""
        self._sim.after(int(self._rng.expovariate(1.0) * LAG_EVERY_NS), self._lag)

    def _lag(self) -> None:
        longest = math.log10(LONGEST_LAG_NS / MILLISECOND)
        duration_ns = int(10 ** self._rng.uniform(0.0, longest) * MILLISECOND)
        self._sim.fault("lag")
        self._sim.trace("lag", self.node, duration_ns)
        self._stall(duration_ns)
        self.lag_again()

    def _stall(self, duration_ns: int) -> None:
        began_ns = max(self._sim.now_ns, self._busy_until_ns)
        self._busy_until_ns = began_ns + duration_ns
        if self._lags and self._lags[-1][0] == began_ns:  # one lag right after another: never free between them
            _, before_ns = self._lags.pop()
            duration_ns += before_ns
        self._lags.append((self._busy_until_ns, duration_ns))

    def stood_still_ns(self, since_ns: int) -> int:
        """Its longest stall that was not over at ``since_ns``."""
        return max((duration_ns for end_ns, duration_ns in self._lags if end_ns >= since_ns), default=0)

    # -- the machine's world --

    def perform(self, effects: Sequence[Effect]) -> None:
        sim, other = self._sim, self.other
        for effect in effects:
            match effect:
                case Transmit(connection, data):
                    self._flushed.append(Flushed(connection, len(data)))
                    sim.after(LATENCY_NS, self._arrive, connection, data)
                case DeliverRun(peer, channel, _, bodies):
                    self.post(Consumed(peer, channel, len(bodies), sum(map(len, bodies))))
                case Dial(connection, path):
                    number, other._next_accept = other._next_accept, other._next_accept + 2
                    self._remote[connection], other._remote[number] = number, connection
                    sim.after(LATENCY_NS, other.post, Accepted(number, path.link, self.addresses[path.link]))
                    sim.after(2 * LATENCY_NS, self.post, Connected(connection))
                case Disconnect(connection, reason):
                    sim.trace("close", self.node, connection, reason)
                    sim.after(LATENCY_NS, self._closed, connection)
                case PathChanged(path, PathState.DOWN, reason):
                    self._judge(path.link, reason)

    def wake_at(self, when_ns: int | None) -> None:
        if when_ns is not None:
            self._wake_at(when_ns)

    def _arrive(self, connection: int, data: bytes) -> None:
        number = self._remote.get(connection)
        if number is not None:
            self.other.post(Received(number, data))

    def _closed(self, connection: int) -> None:
        number = self._remote.pop(connection, None)
        if number is not None:
            self.other._remote.pop(number, None)
            self.other.post(Disconnected(number, "closed by peer"))

    def _judge(self, link: LinkName, reason: str) -> None:
        """I22: nothing was wrong with the network; was it the peer?"""
        sim = self._sim
        sim.trace("down", self.node, link, reason)
        if reason.startswith("silent"):
            sim.checked("I22")
            still_ns = self.other.stood_still_ns(sim.now_ns - 2 * LONGEST_LAG_NS)
            if still_ns < HUNG_NS:
                text = (
                    f"{self.node} calls {link} DOWN ({reason}), but the peer stood still for {still_ns / SECOND:.3f} s at most"
                )
                sim.violate("I22", text)

    # -- the application --

    def talk(self) -> None:
        """A few messages, so that paths are busy for a while."""
        self.post(SendRun(self.other.node, ChannelName("talk"), [bytes(100)] * self._rng.randrange(1, 30)))
