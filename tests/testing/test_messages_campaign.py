"""The messages campaign: some seeds hold, and its oracle sees what it must see."""

from __future__ import annotations

import pytest

from ha_core.ids import ChannelName, NodeId, StoreId
from ha_core.testing.campaigns import play_seed
from ha_core.testing.campaigns.messages import MessagesCampaign, node_id
from ha_core.testing.campaigns.messages_store import Forget, Oracle, Send, SimStore, Step, prefixes
from ha_core.testing.simulator import SECOND, Simulation

C = ChannelName("orders")
TO = NodeId("app@n2.example")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_seed_holds_and_repeats(seed: int) -> None:
    result = play_seed(MessagesCampaign(), seed)

    assert result.violations == ()
    assert result.checks["I2"] > 50


class Bench:
    """A sender's and a receiver's store under one oracle."""

    def __init__(self, seed: int = 1) -> None:
        self.sim = Simulation(seed)
        self.oracle = Oracle(self.sim, lambda process: True)
        self.sender = SimStore(self.sim, "n1", lambda image, op: self.oracle.observe("n1", node_id("n1"), image, op))
        self.receiver = SimStore(self.sim, "n2", lambda image, op: self.oracle.observe("n2", TO, image, op))

    @property
    def store(self) -> StoreId:
        return self.sender.durable.store

    def send(self, *bodies: bytes) -> Send:
        send = self.sender.send(TO, C, bodies)
        self.sender.commit([send], lambda error: None)
        self.sim.run_for(SECOND)
        return send

    def step(self, first: int, *bodies: bytes, digest: bytes | None = None) -> None:
        known = self.receiver.durable.applied.get((self.store, C), bytes(16))
        digest = digest or prefixes(known, first, bodies)[-1]
        self.receiver.commit([Step(node_id("n1"), self.store, C, first, bodies, digest, False)], lambda error: None)
        self.sim.run_for(SECOND)

    @property
    def violated(self) -> list[str]:
        return [found.invariant for found in self.sim.violations]


def test_effects_in_order_are_no_violation() -> None:
    bench = Bench()
    bench.send(b"1", b"2", b"3")

    bench.step(1, b"1", b"2")
    bench.step(3, b"3")

    assert bench.violated == []
    assert bench.sim.checks["I2"] == 2


@pytest.mark.parametrize(
    ("first", "body", "invariant"),
    [(2, b"2", "I2"), (4, b"4", "I3"), (3, b"x", "I8")],
)
def test_double_gap_and_changed_body_are_told_apart(first: int, body: bytes, invariant: str) -> None:
    bench = Bench()
    bench.send(b"1", b"2", b"3", b"4")
    bench.step(1, b"1", b"2")

    bench.step(first, body)

    assert bench.violated == [invariant]


def test_effect_without_a_committed_send_is_seen() -> None:
    bench = Bench()

    bench.step(1, b"1")

    assert bench.violated == ["I6"]


def test_forgetting_what_the_receiver_has_not_got_is_seen() -> None:
    bench = Bench()
    send = bench.send(b"1", b"2")
    bench.step(1, b"1")

    bench.sender.commit([Forget(TO, C, 2, send.run.digest)], lambda error: None)
    bench.sim.run_for(SECOND)

    assert bench.violated == ["I5"]


def test_mixing_two_histories_is_seen_though_the_numbers_fit() -> None:
    bench = Bench()
    bench.send(b"1")
    backup = bench.sender.durable.copy()
    bench.send(b"2")
    bench.step(1, b"1", b"2")

    bench.oracle.tampered.add(bench.store)
    bench.sender.restore(backup)
    bench.send(b"other 2", b"3")
    bench.step(3, b"3")

    assert bench.violated == ["I10"]


def test_number_used_twice_in_one_incarnation_is_seen() -> None:
    bench = Bench()
    bench.send(b"1")
    backup = bench.sender.durable.copy()
    bench.send(b"2")
    bench.sender.restore(backup)

    bench.send(b"other 2")

    assert bench.violated == ["I4"]


def test_uncommitted_sends_vanish_with_a_crash_or_stay_whole() -> None:
    outcomes = set()
    for seed in range(30):
        bench = Bench(seed)
        bench.send(b"1")
        bench.sender.commit([bench.sender.send(TO, C, [b"2"])], lambda error: None)
        bench.sender.device.crash()
        bench.sender.open()
        outcomes.add(bench.sender.current.outgoing[TO, C].last)

    assert outcomes == {1, 2}
