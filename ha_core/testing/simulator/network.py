"""The wires: a ``Flow`` is one direction between two hosts on one link, with its faults; ``SimNetwork`` has them all.

What travels on the wires is elsewhere: ``messages`` (datagrams and ordered channels, for machines above the endpoint) and
``connections`` (byte streams and UDP packets, for the endpoint machine). Both may share one network.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from zlib import crc32

from ha_core.testing.simulator.core import MICROSECOND, MILLISECOND, Simulation

Names = str | Iterable[str] | None
"""A name, several, or None for all."""

_REPLAYABLE = 8


class Flow:
    """One direction of one path. Shares (``loss``, ...) are probabilities per packet; a flow with ``cuts`` carries nothing."""

    __slots__ = (
        "_waiting", "clogged_until_ns", "corrupt", "cuts", "delay_ns", "duplicate", "jitter_ns", "link", "loss", "recent",
        "reorder", "replay", "source", "target",
    )  # fmt: skip

    def __init__(self, source: str, target: str, link: str) -> None:
        self.source = source
        self.target = target
        self.link = link
        self.cuts = 0
        self.clogged_until_ns = 0
        self.recent: deque[tuple[Callable[..., None], tuple[object, ...]]] = deque(maxlen=_REPLAYABLE)
        self._waiting: list[Callable[[], None]] = []
        self.calm()

    def __repr__(self) -> str:
        return f"<Flow {self.source}->{self.target} on {self.link}>"

    def calm(self) -> None:
        """No faults but cuts and clogs."""
        self.loss = self.duplicate = self.reorder = self.replay = self.corrupt = 0.0
        self.delay_ns = self.jitter_ns = 0

    def when_up(self, call: Callable[[], None]) -> None:
        """Call once, as soon as no cut lies on it."""
        self._waiting.append(call)

    def release(self) -> None:
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            call()


class Cut:
    """Flows that silently drop everything until ``heal``; cuts may overlap."""

    def __init__(self, sim: Simulation, kind: str, flows: Sequence[Flow]) -> None:
        self._sim = sim
        self._flows = flows
        self._open = True
        sim.fault(kind)
        sim.trace("cut", kind, *[f"{flow.source}>{flow.target}/{flow.link}" for flow in flows])
        for flow in flows:
            flow.cuts += 1

    def heal(self) -> None:
        if self._open:
            self._open = False
            self._sim.trace("heal", *[f"{flow.source}>{flow.target}/{flow.link}" for flow in self._flows])
            for flow in self._flows:
                flow.cuts -= 1
            for flow in self._flows:
                if not flow.cuts:
                    flow.release()


class SimNetwork:
    """All flows between hosts, and what is wrong with them."""

    def __init__(
        self,
        sim: Simulation,
        hosts: Sequence[str] = (),
        *,
        links: Sequence[str] = ("a", "b"),
        latency_ns: int = 100 * MICROSECOND,
        jitter_ns: int = 50 * MICROSECOND,
    ) -> None:
        """``latency_ns`` is the least one-way delay, ``jitter_ns`` the mean of what comes on top."""
        self.sim = sim
        self.links = tuple(links)
        self.hosts: list[str] = []
        self._latency_ns = latency_ns
        self._jitter_ns = jitter_ns
        self._rng = sim.stream("network")
        self._flows: dict[tuple[str, str, str], Flow] = {}
        self._cuts: list[Cut] = []
        for host in hosts:
            self.add_host(host)

    def add_host(self, host: str) -> None:
        for other in self.hosts:
            for link in self.links:
                self._flows[host, other, link] = Flow(host, other, link)
                self._flows[other, host, link] = Flow(other, host, link)
        self.hosts.append(host)

    def flow(self, source: str, target: str, link: str) -> Flow:
        return self._flows[source, target, link]

    def flows(self, source: Names = None, target: Names = None, link: Names = None) -> list[Flow]:
        """All flows from ``source`` to ``target`` on ``link``."""
        sources, targets, links = _set(source), _set(target), _set(link)
        return [
            flow
            for (a, b, name), flow in self._flows.items()
            if (sources is None or a in sources) and (targets is None or b in targets) and (links is None or name in links)
        ]

    def between(self, one: Names, other: Names, link: Names = None) -> list[Flow]:
        """Both directions."""
        return self.flows(one, other, link) + self.flows(other, one, link)

    def usable(self, source: str, target: str) -> Flow | None:
        """A flow that works at this moment, drawn at random; None if all are cut."""
        up = [flow for link in self.links if not (flow := self._flows[source, target, link]).cuts]
        if len(up) > 1:
            return up[self._rng.randrange(len(up))]
        return up[0] if up else None

    # -- faults --

    def cut(self, flows: Sequence[Flow], kind: str = "path-cut") -> Cut:
        """Drop everything on these flows, in silence, until the answer's ``heal()`` or ``heal_all``."""
        cut = Cut(self.sim, kind, flows)
        self._cuts.append(cut)
        return cut

    def cut_path(self, one: Names, other: Names, link: Names) -> Cut:
        return self.cut(self.between(one, other, link), "path-cut")

    def cut_one_way(self, source: Names, target: Names, link: Names = None) -> Cut:
        return self.cut(self.flows(source, target, link), "one-way-cut")

    def partition(self, *groups: Sequence[str]) -> Cut:
        """Hosts of different groups hear nothing of each other, on any link; hosts in no group are one more group."""
        named = {host for group in groups for host in group}
        sides = [list(group) for group in groups] + [[host for host in self.hosts if host not in named]]
        flows: list[Flow] = []
        for number, side in enumerate(sides):
            for other in sides[number + 1 :]:
                flows += self.between(side, other)
        return self.cut(flows, "partition")

    def isolate(self, host: str) -> Cut:
        return self.partition([host])

    def clog(self, flows: Sequence[Flow], duration_ns: int) -> None:
        """Hold everything back for so long, then let it all go at once."""
        self.sim.fault("clog")
        self.sim.trace("clog", duration_ns, *[f"{flow.source}>{flow.target}/{flow.link}" for flow in flows])
        for flow in flows:
            flow.clogged_until_ns = max(flow.clogged_until_ns, self.sim.now_ns + duration_ns)

    def heal_all(self) -> None:
        """No faults any more."""
        for flow in self._flows.values():
            flow.calm()
            flow.clogged_until_ns = 0
        cuts, self._cuts = self._cuts, []
        for cut in cuts:
            cut.heal()

    # -- packets --

    def transit_ns(self, flow: Flow) -> int:
        """How long the next packet takes, extra delay and clog included."""
        rng = self._rng
        delay = self._latency_ns + min(int(rng.expovariate(1.0) * self._jitter_ns), 20 * self._jitter_ns)
        if flow.delay_ns or flow.jitter_ns:
            self.sim.fault("delay")
            delay += flow.delay_ns + int(rng.random() * flow.jitter_ns)
        wait = flow.clogged_until_ns - self.sim.now_ns
        return delay if delay > wait else wait + int(rng.random() * 50_000)

    def lost(self, flow: Flow) -> bool:
        """Whether chance takes the next packet."""
        if flow.loss and self._rng.random() < flow.loss:
            self.sim.fault("loss")
            return True
        return False

    def packet(self, flow: Flow, deliver: Callable[..., None], *args: object) -> None:
        """Send one packet: ``deliver(*args)`` is called never, once or more often, sooner or later."""
        sim, rng = self.sim, self._rng
        if flow.cuts or self.lost(flow):
            return
        if flow.corrupt and rng.random() < flow.corrupt:
            args = tuple(_flip(argument, rng.getrandbits(30)) if isinstance(argument, bytes) else argument for argument in args)
            sim.fault("corrupt")
        delay = self.transit_ns(flow)
        if flow.reorder and rng.random() < flow.reorder:
            sim.fault("reorder")
            delay += rng.randrange(1, 20) * MILLISECOND
        sim.after(delay, self._arrive, flow, deliver, args)
        if flow.duplicate and rng.random() < flow.duplicate:
            sim.fault("duplicate")
            sim.after(self.transit_ns(flow), self._arrive, flow, deliver, args)
        if flow.replay:
            if flow.recent and rng.random() < flow.replay:
                sim.fault("replay")
                old, old_args = flow.recent[rng.randrange(len(flow.recent))]
                sim.after(rng.randrange(1, 5000) * MILLISECOND, self._arrive, flow, old, old_args)
            flow.recent.append((deliver, args))

    def _arrive(self, flow: Flow, deliver: Callable[..., None], args: tuple[object, ...]) -> None:
        if not flow.cuts:
            deliver(*args)


def _set(names: Names) -> frozenset[str] | None:
    if names is None:
        return None
    return frozenset((names,) if isinstance(names, str) else names)


def _flip(data: bytes, where: int) -> bytes:
    if not data:
        return data
    at, bit = (where >> 3) % len(data), where & 7
    return data[:at] + bytes((data[at] ^ (1 << bit),)) + data[at + 1 :]


def digest(body: object) -> int:
    """A cheap checksum of a body for the trace; 0 for what is no bytes."""
    return crc32(body) if isinstance(body, bytes) else 0
