"""HELLO, WELCOME, CONFIRM, READY: both ends prove the key over everything that was said."""

from __future__ import annotations

import random
from typing import Any

import attrs
import pytest

from ha_core.errors import RemoteProtocolError
from ha_core.ids import Boot, LinkName, NodeId, StoreId
from ha_core.machines import handshake, wire
from ha_core.machines.handshake import Handshake, Hello
from ha_core.machines.peers import judge
from ha_core.machines.wire import Frame, FrameDecoder, FrameType

KEY = b"k" * 32


def hello(name: str, nonce: int = 1, **changes: Any) -> Hello:
    given = Hello(
        cluster="c1", node=NodeId(f"app@{name}"), store=StoreId(name.encode().ljust(16)), boot=Boot(1, 5), boots_digest=b"",
        epoch=0, link=LinkName("l1"), address="h:1", session=b"", window_bytes=1000, window_messages=10,
        nonce=nonce.to_bytes(16, "big"),
    )  # fmt: skip
    return attrs.evolve(given, **changes)


def ends(key: bytes = KEY, nonce: int = 1, **changes: Any) -> tuple[Handshake, Handshake]:
    dialer = Handshake(hello("h1", nonce, expected="app@h2"), KEY, (1000, 1), "welcome", "h2:1")
    return dialer, Handshake(hello("h2", nonce + 1, **changes), key, (2000, 2), "hello", "h1:1")


def frame(data: bytes) -> Frame:
    (found,) = FrameDecoder().feed(data)
    return found


def test_both_ends_know_each_other_and_compute_the_same_session() -> None:
    dialer, acceptor = ends()

    confirm = dialer.receive(frame(acceptor.receive(frame(dialer.begin()))))
    assert acceptor.receive(frame(confirm)) == b""
    assert (dialer.step, acceptor.step) == ("ready", "done")
    dialer.receive(frame(handshake.READY))

    assert dialer.step == "done"
    assert dialer.peer == acceptor.ours
    assert acceptor.peer == dialer.ours
    assert dialer.peer is not None
    assert acceptor.peer is not None
    assert handshake.session_id(dialer.ours, dialer.peer) == handshake.session_id(acceptor.ours, acceptor.peer)


@pytest.mark.parametrize("change", [{"epoch": 1}, {"boot": Boot(2, 5)}, {"boot": Boot(1, 6)}, {"store": StoreId(bytes(16))}])
def test_another_process_or_epoch_has_another_session(change: dict[str, Any]) -> None:
    one, other = hello("h1"), hello("h2")

    assert handshake.session_id(one, attrs.evolve(other, **change)) != handshake.session_id(one, other)


def test_the_dialer_finds_a_wrong_key_in_welcome() -> None:
    dialer, acceptor = ends(key=b"x" * 32)

    with pytest.raises(RemoteProtocolError, match="app@h2 at h2:1 does not have this cluster's key") as caught:
        dialer.receive(frame(acceptor.receive(frame(dialer.begin()))))

    assert caught.value.code == "key"


def test_the_acceptor_finds_a_wrong_key_in_confirm() -> None:
    dialer, acceptor = ends()
    acceptor.receive(frame(dialer.begin()))

    with pytest.raises(RemoteProtocolError) as caught:
        acceptor.receive(frame(wire.encode_frame(FrameType.CONFIRM, wire.encode_fields({0: bytes(32)}))))

    assert caught.value.code == "key"


def test_a_recorded_exchange_is_worth_nothing_against_fresh_nonces() -> None:
    dialer, acceptor = ends()
    first = dialer.begin()
    welcome = acceptor.receive(frame(first))
    confirm = dialer.receive(frame(welcome))

    later_dialer, later_acceptor = ends(nonce=50)
    later_dialer.begin()
    with pytest.raises(RemoteProtocolError):
        later_dialer.receive(frame(welcome))
    later_acceptor.receive(frame(first))
    with pytest.raises(RemoteProtocolError):
        later_acceptor.receive(frame(confirm))


def test_a_proof_cannot_be_reflected() -> None:
    dialer, acceptor = ends()
    welcome = frame(acceptor.receive(frame(dialer.begin())))
    proof = wire.bytes_field(wire.decode_fields(welcome.body), 1)

    with pytest.raises(RemoteProtocolError):
        acceptor.receive(frame(wire.encode_frame(FrameType.CONFIRM, wire.encode_fields({0: proof}))))


def test_every_changed_byte_of_hello_or_welcome_is_noticed(rng: random.Random) -> None:
    for position in range(8, 200):
        dialer, acceptor = ends()
        data = bytearray(dialer.begin())
        if position >= len(data):
            break
        data[position] ^= 1 << rng.randrange(8)
        with pytest.raises(RemoteProtocolError):
            acceptor.receive(frame(dialer.receive(frame(acceptor.receive(frame(bytes(data)))))))


def test_versions_that_do_not_meet_are_named() -> None:
    dialer, acceptor = ends(version_min=1, version_max=1)
    dialer.ours = attrs.evolve(dialer.ours, version_min=7, version_max=9)

    with pytest.raises(RemoteProtocolError, match="versions 7 to 9, this node 1 to 1") as caught:
        acceptor.receive(frame(dialer.begin()))

    assert caught.value.code == "version"


def test_newer_peers_agree_on_what_both_speak() -> None:
    dialer, acceptor = ends()
    dialer.ours = attrs.evolve(dialer.ours, version_max=9, features=0xFF)

    acceptor.receive(frame(dialer.begin()))

    assert (acceptor.version, acceptor.features) == (1, 0)


def test_reject_says_who_and_why() -> None:
    dialer, _ = ends()

    with pytest.raises(RemoteProtocolError, match="app@h2 refused this node app@h1: cluster: it belongs to another") as caught:
        dialer.receive(frame(handshake.encode_reject("cluster")))

    assert caught.value.code == "cluster"


@pytest.mark.parametrize("step", ["hello", "welcome", "confirm", "ready"])
@pytest.mark.parametrize("kind", [kind for kind in FrameType if kind != FrameType.REJECT])
def test_frames_out_of_turn_are_refused(step: handshake.Step, kind: FrameType) -> None:
    turn = {"hello": FrameType.HELLO, "welcome": FrameType.WELCOME, "confirm": FrameType.CONFIRM, "ready": FrameType.READY}
    end = Handshake(hello("h1"), KEY, (1000, 1), step, "h2:1")

    if kind is turn[step] and kind is FrameType.READY:
        end.receive(frame(wire.encode_frame(kind, b"\x80")))
        return
    with pytest.raises(RemoteProtocolError):
        end.receive(frame(wire.encode_frame(kind, b"\x80")))


def test_an_endless_handshake_is_ended() -> None:
    end = Handshake(hello("h1"), KEY, (1000, 1), "hello", "h2:1")

    for _ in range(handshake.MAX_HANDSHAKE_FRAMES):
        end.receive(frame(wire.encode_frame(0x90, b"")))
    with pytest.raises(RemoteProtocolError, match="without proving itself"):
        end.receive(frame(wire.encode_frame(0x90, b"")))


def test_random_fields_give_a_clean_refusal(rng: random.Random) -> None:
    good = wire.decode_fields(frame(ends()[0].begin()).body)
    values: list[wire.Plain] = [-1, 1 << 63, "", "x" * 500, b"", bytes(5000), None, True, [], [[]], {}]
    for _ in range(1_000):
        fields = dict(good)
        fields[rng.choice(list(fields))] = rng.choice(values)
        _, acceptor = ends()
        try:
            acceptor.receive(Frame(FrameType.HELLO, 0, 0, memoryview(wire.encode_fields(fields))))  # type: ignore[arg-type]
        except RemoteProtocolError:
            pass


def test_lives_of_a_node_are_told_apart() -> None:
    last = hello("h2", boot=Boot(4, 44), boots_digest=b"d" * 16)
    after = handshake.extend_boots_digest(last.boots_digest, last.boot)

    def verdict(boot: Boot, digest: bytes, **changes: Any) -> str:
        return judge(last, attrs.evolve(last, boot=boot, boots_digest=digest, **changes))

    assert judge(None, last) == "next"
    assert verdict(Boot(4, 44), b"d" * 16) == "same"
    assert verdict(Boot(5, 1), after) == "next"
    assert verdict(Boot(9, 1), b"cannot be told") == "next"
    assert verdict(Boot(5, 1), b"e" * 16) == "clone"
    assert verdict(Boot(4, 45), b"d" * 16) == "clone"
    assert verdict(Boot(4, 44), b"e" * 16) == "clone"
    assert verdict(Boot(3, 1), b"") == "stale"
    assert verdict(Boot(1, 1), b"", store=StoreId(b"n" * 16)) == "next"
