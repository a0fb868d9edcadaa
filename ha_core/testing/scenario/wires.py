"""What a scenario does to the networks: which paths and links are off, and how bad each host's network is."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from ha_core.config import ns
from ha_core.testing.simulator import SimNetwork


@attrs.define
class Badness:
    """Of everything that a host sends or receives; shares are probabilities for each packet."""

    loss: float = 0.0
    delay: float = 0.0
    jitter: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0


class Wires:
    """State of the wires as the steps have left it; ``apply`` carries it over to the simulated network."""

    def __init__(self, network: SimNetwork, paths: Mapping[str, int]) -> None:
        """``paths``: how many networks each host has; it is on the first so many links."""
        self._network = network
        self._paths = dict(paths)
        self._inward: dict[tuple[str, int], bool] = {}
        self._outward: dict[tuple[str, int], bool] = {}
        self._links: dict[tuple[str, str], bool] = {}
        self._bad: dict[str, Badness] = {}

    # -- what steps change --

    def path(self, host: str, number: int, up: bool, *, inward: bool = True, outward: bool = True) -> None:
        """``number`` counts from 1."""
        if inward:
            self._inward[host, number] = up
        if outward:
            self._outward[host, number] = up
        self.apply()

    def all_paths(self, host: str, up: bool) -> None:
        for number in range(1, self._paths[host] + 1):
            self._inward[host, number] = self._outward[host, number] = up
        self.apply()

    def link(self, source: str, target: str, up: bool) -> None:
        """One direction."""
        self._links[source, target] = up
        self.apply()

    def worsen(self, host: str, kind: str, amount: float) -> None:
        setattr(self._bad.setdefault(host, Badness()), kind, amount)
        self.apply()

    def clear(self, host: str) -> None:
        self._bad.pop(host, None)
        self.apply()

    # -- what follows from it --

    def reaches_out(self, host: str) -> bool:
        """Some network of the host works both ways."""
        return any(
            self._outward.get((host, number), True) and self._inward.get((host, number), True)
            for number in range(1, self._paths[host] + 1)
        )

    def two_way(self, one: str, other: str) -> bool:
        """Some path between two hosts works both ways."""
        flow = self._network.flow
        return any(not flow(one, other, link).cuts and not flow(other, one, link).cuts for link in self._network.links)

    def apply(self) -> None:
        numbers = {link: number for number, link in enumerate(self._network.links, 1)}
        for flow in self._network.flows():
            number = numbers[flow.link]
            up = (
                number <= min(self._paths[flow.source], self._paths[flow.target])
                and self._outward.get((flow.source, number), True)
                and self._inward.get((flow.target, number), True)
                and self._links.get((flow.source, flow.target), True)
            )
            bad = [self._bad[host] for host in (flow.source, flow.target) if host in self._bad]
            flow.loss = _either(*(one.loss for one in bad))
            flow.duplicate = _either(*(one.duplicate for one in bad))
            flow.reorder = _either(*(one.reorder for one in bad))
            flow.delay_ns = sum(ns(one.delay) for one in bad)
            flow.jitter_ns = sum(ns(one.jitter) for one in bad)
            was_up, flow.cuts = not flow.cuts, int(not up)
            if up and not was_up:
                flow.release()


def _either(*shares: float) -> float:
    """The probability that at least one of independent things happens."""
    none = 1.0
    for share in shares:
        none *= 1.0 - share
    return 1.0 - none
