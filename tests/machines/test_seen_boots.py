"""A receiver remembers which process of another store it served, across its own restarts (I11, R12)."""

from __future__ import annotations

import pytest

from ha_core.ids import Boot, ChannelName, NodeId, SessionId, StoreId
from ha_core.machines import messages as m
from ha_core.machines.durable_events import HandlerOpened
from ha_core.machines.handshake import SeenBoot, extend_boots_digest
from tests.machines.durable_model import ModelNode, Wire
from tests.machines.endpoint_world import World

C = ChannelName("orders")
SENDER = NodeId("app@h2")
STORE = StoreId(b"h2".ljust(16, b"s"))
FIRST, SECOND = Boot(1, 11), Boot(2, 22)
SECOND_DIGEST = extend_boots_digest(b"", FIRST)
THIRD_DIGEST = extend_boots_digest(SECOND_DIGEST, SECOND)


def answer_to(counter: int, nonce: int, digest: bytes, *, store: StoreId = STORE) -> set[str]:
    """How a receiver that restarted after it saw ``SECOND`` meets another process: the codes with which it refuses it."""
    world = World()
    receiver = world.start("h1", seen=[SeenBoot(SENDER, store, SECOND, SECOND_DIGEST)])
    sender = world.start("h2", counter=counter, nonce=nonce, digest=digest)
    world.meet(receiver, sender)
    world.run(1_000)

    codes = {effect.code for effect in receiver.of(m.PeerRefused) if isinstance(effect, m.PeerRefused)}
    assert bool(codes) != bool(receiver.of(m.SessionUp))
    return codes


@pytest.mark.parametrize(
    ("counter", "nonce", "digest"),
    [(2, 22, SECOND_DIGEST), (3, 7, THIRD_DIGEST), (5, 7, b"unseen lives lie between")],
    ids=["the same process", "its next life", "a later life"],
)
def test_a_sender_that_went_on_is_served_by_a_receiver_that_restarted(counter: int, nonce: int, digest: bytes) -> None:
    assert answer_to(counter, nonce, digest) == set()


@pytest.mark.parametrize(
    ("counter", "nonce", "digest", "code"),
    [
        (1, 11, b"", "stale"),
        (2, 7, SECOND_DIGEST, "clone"),
        (2, 22, b"another history", "clone"),
        (3, 7, b"another history", "clone"),
    ],
    ids=["an older copy", "another process of that boot", "another history", "the next life of another history"],
)
def test_a_sender_that_went_back_is_refused_by_a_receiver_that_restarted(
    counter: int, nonce: int, digest: bytes, code: str
) -> None:
    assert answer_to(counter, nonce, digest) == {code}


def test_another_store_of_the_same_node_is_another_incarnation() -> None:
    assert answer_to(1, 11, b"", store=StoreId(b"o" * 16)) == set()


def test_an_incarnation_comes_back_behind_the_one_that_replaced_it_only_where_it_stood() -> None:
    world = World()
    receiver = world.start("h1", seen=[SeenBoot(SENDER, StoreId(b"o" * 16), SECOND, b"")])
    sender = world.start("h2")
    world.meet(receiver, sender)
    world.run(1_000)
    known = receiver.machine._lower.seen

    assert set(known) == {StoreId(b"o" * 16), STORE}
    assert known[STORE].boot == sender.boot


def pair() -> tuple[ModelNode, ModelNode, Wire]:
    one, two = ModelNode("a@h1.example"), ModelNode("b@h2.example")
    wire = Wire(one, two)
    wire.up()
    two.feed(HandlerOpened(C, 2048))
    wire.settle()
    return one, two, wire


def test_a_boot_is_written_once_before_the_first_effect_and_again_only_when_it_changes() -> None:
    one, two, wire = pair()
    assert two.remembered == 1

    one.commit(two.name, C, [b"1"])
    wire.settle()
    wire.down()
    wire.up()
    wire.settle()
    assert two.remembered == 1, "the same process in another session"

    one.start()
    wire.up()
    wire.settle()
    assert two.remembered == 2
    assert two.disk.boots[one.disk.store].boot.counter == one.boots


def test_a_receiver_that_restarted_writes_nothing_that_it_has_written() -> None:
    one, two, wire = pair()
    one.commit(two.name, C, [b"1"])
    wire.settle()

    two.start()
    two.feed(HandlerOpened(C, 2048))
    wire.up()
    one.commit(two.name, C, [b"2"])
    wire.settle()

    assert two.bodies() == [b"1", b"2"]
    assert two.remembered == 1


def test_a_store_without_a_history_is_not_worth_a_row() -> None:
    one, two, wire = pair()
    written = two.remembered

    two.feed(m.SessionUp(NodeId("c@h3.example"), SessionId(b"s9"), StoreId(b"volatile".ljust(16)), Boot(0, 7)))

    assert two.remembered == written
