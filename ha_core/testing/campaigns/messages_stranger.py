"""A stranger who connects to the nodes and sends garbage: random bytes, or a HELLO of ours with a few bits turned (I29)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import attrs

from ha_core.ids import LinkName, NodeId
from ha_core.machines.contract import Effect, Event
from ha_core.machines.messages import Connected, Dial, Disconnected, PathKey, Transmit, TransmitDatagram
from ha_core.testing.simulator import SECOND, SimConnections, SimNetwork, SimProcess, Simulation

PATIENCE_NS = 10 * SECOND
"""By then a node must have closed the connection."""


@attrs.frozen
class _Strike(Event):
    connection: int
    path: PathKey
    data: bytes


class _Attacker:
    """Dials, sends its bytes, and then a byte now and then until it is closed."""

    def __init__(self) -> None:
        self.data: dict[int, bytes] = {}
        self.open: dict[int, int] = {}
        """Connection -> since when it is connected."""
        self._effects: list[Effect] = []
        self._next_ns: int | None = None

    def receive(self, events: Sequence[Event], now_ns: int) -> None:
        for event in events:
            match event:
                case _Strike():
                    self.data[event.connection] = event.data
                    self._effects.append(Dial(event.connection, event.path))
                    self._effects.append(TransmitDatagram(event.path.link, event.path.remote, event.data[:1200]))
                case Connected():
                    self.open[event.connection] = now_ns
                    self._next_ns = now_ns + 2 * SECOND
                    self._effects.append(Transmit(event.connection, self.data[event.connection]))
                case Disconnected():
                    self.open.pop(event.connection, None)

    def handle_timer(self, now_ns: int) -> None:
        self._next_ns = now_ns + 2 * SECOND if self.open else None
        self._effects += [Transmit(number, b"\0") for number in self.open]

    def next_timer(self) -> int | None:
        return self._next_ns

    def take_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    def persisted(self, number: int, now_ns: int) -> None: ...
    def persist_failed(self, number: int, error: str, now_ns: int) -> None: ...


class Stranger:
    def __init__(
        self,
        sim: Simulation,
        network: SimNetwork,
        connections: SimConnections,
        targets: Sequence[Mapping[LinkName, str]],
    ) -> None:
        self._sim = sim
        self._targets = targets
        self._attacker = _Attacker()
        self._number = 0
        self._heard: list[bytes] = []
        self._seen: set[tuple[str, int]] = set()
        network.add_host("stranger")
        self._process = SimProcess(sim, "stranger", lambda process: self._attacker)
        connections.attach(self._process, {LinkName("a"): "10.0.1.99:7400", LinkName("b"): "10.0.2.99:7400"})

    def overhear(self, sender: str, connection: int, data: bytes) -> None:
        """The first bytes that a node sent on a connection."""
        if len(self._heard) < 16 and sender != "stranger" and (sender, connection) not in self._seen:
            self._seen.add((sender, connection))
            self._heard.append(data)

    def strike(self, rng: random.Random, amount: float) -> None:
        """Begin one attack."""
        link, remote = rng.choice(sorted(rng.choice(list(self._targets)).items()))
        data = rng.randbytes(rng.choice((1, 3, 40, 5000)))
        if self._heard and rng.random() < 0.6:
            turned = bytearray(rng.choice(self._heard))
            for _ in range(rng.randrange(0, 4)):
                turned[rng.randrange(len(turned))] ^= 1 << rng.randrange(8)
            data = bytes(turned[: rng.randrange(1, len(turned) + 1)] if rng.random() < 0.3 else turned) + data
        self._number += 2
        self._sim.fault("garbage")
        self._process.post(_Strike(self._number, PathKey(NodeId("nobody@nowhere.example"), link, remote), data))

    def judge(self) -> None:
        """Every connection was closed by the node in time."""
        if self._number:
            self._sim.checked("I29")
            now_ns = self._process.now_ns()
            late = [number for number, since in self._attacker.open.items() if now_ns - since > PATIENCE_NS]
            if late:
                self._sim.violate(
                    "I29", f"{len(late)} connections of a stranger are still open after {PATIENCE_NS // SECOND} s"
                )
