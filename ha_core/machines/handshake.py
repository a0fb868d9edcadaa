"""HELLO, WELCOME, CONFIRM, READY: who are you, prove the cluster's key, and which session is this?

::

    dialer                                   acceptor
    HELLO   identity, versions, nonce  ->
                                       <-    WELCOME  identity, choice, nonce, proof(key, HELLO | WELCOME)
    CONFIRM proof(key, HELLO | WELCOME) ->
                                       <-    READY    the session stands; frames that count follow at once

Rules:

* Both proofs cover both nonces and everything that was said, under different labels: none can be replayed or reflected.
* The session id is a digest of both processes' identities and session epochs, so both ends compute the same one without
  asking, whoever dials, on every path. A process that gives a session up raises its epoch: the next session has another id.
* The acceptor says READY only after it has judged the dialer (a clone, an earlier life); until then the dialer has no session.
* Whoever finds a reason to refuse says it in REJECT with a code; the codes are ``REFUSALS``.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from hashlib import blake2b
from typing import Literal, NoReturn

import attrs

from ha_core.errors import DecodeError, RemoteProtocolError, UnsupportedVersionError
from ha_core.ids import Boot, LinkName, NodeId, SessionId, StoreId
from ha_core.machines import wire
from ha_core.machines.contract import Rng
from ha_core.machines.wire import Fields, Frame, FrameType, Plain

VERSION_MIN = 1
VERSION_MAX = 1
FEATURES = 0
NONCE_BYTES = 16
PROOF_BYTES = 32
MAX_HANDSHAKE_FRAMES = 8
TIMEOUT_NS = 5_000_000_000

Step = Literal["hello", "welcome", "confirm", "ready", "done"]

REFUSALS: Mapping[str, str] = {
    "cluster": "it belongs to another cluster",
    "key": "the cluster keys differ",
    "version": "no protocol version is spoken by both",
    "clone": "another live process, or another history, has the same store: one of the two is a clone",
    "stale": "it is an earlier life of a process that has restarted since",
    "self": "it is this node itself",
    "peer": "another node than the expected one answers at this address",
    "unknown": "it is not a member that is known here",
    "busy": "too many connections",
    "protocol": "it broke the protocol",
}
"""Why a handshake is refused: code -> words."""


@attrs.frozen(kw_only=True)
class Hello:
    """What each end says about itself."""

    cluster: str
    node: NodeId
    store: StoreId
    boot: Boot
    boots_digest: bytes
    """Rolling digest of all earlier boots of the store (``extend_boots_digest``)."""
    epoch: int
    """Counts the sessions that this process has given up; the session id covers it."""
    link: LinkName
    address: str
    """Where the sender is reached on this link (``host:port``), datagrams included; may be empty."""
    session: bytes
    """The session that the sender already has with the receiver; empty if none. Information only."""
    window_bytes: int
    window_messages: int
    """The credit with which every channel towards the sender begins."""
    nonce: bytes
    expected: str = ""
    """The dialer's idea of who answers."""
    version_min: int = VERSION_MIN
    version_max: int = VERSION_MAX
    features: int = FEATURES


@attrs.frozen
class SeenBoot:
    """The newest process that was seen running ``store``, as it said in its handshake."""

    peer: NodeId
    store: StoreId
    boot: Boot
    boots_digest: bytes


def extend_boots_digest(digest: bytes, boot: Boot) -> bytes:
    """The digest that the boot after ``boot`` says, if ``boot`` itself said ``digest`` (empty for the first)."""
    return blake2b(
        digest + boot.counter.to_bytes(8, "big") + boot.nonce.to_bytes(8, "big"), digest_size=16, person=b"ha-core boots"
    ).digest()


def session_id(one: Hello, other: Hello) -> SessionId:
    """The id of the session of two live processes, the same from either end."""
    digest = blake2b(one.cluster.encode(), digest_size=16, person=b"ha-core session")
    for end in sorted((one, other), key=lambda hello: hello.node):
        digest.update(wire.encode_fields({0: end.node, 1: end.store, 2: end.boot.counter, 3: end.boot.nonce, 4: end.epoch}))
    return SessionId(digest.digest())


def fresh_nonce(key: bytes, rng: Rng) -> bytes:
    """A nonce that nobody without the key can foresee, even having seen all earlier ones."""
    return blake2b(rng.getrandbits(256).to_bytes(32, "big"), digest_size=NONCE_BYTES, key=key, person=b"ha-core nonce").digest()


def _proof(key: bytes, label: bytes, hello: bytes, welcome: bytes) -> bytes:
    mac = blake2b(len(hello).to_bytes(4, "big"), digest_size=PROOF_BYTES, key=key, person=label)
    mac.update(hello)
    mac.update(welcome)
    return mac.digest()


def _encode_hello(hello: Hello, grease: tuple[int, Plain]) -> dict[int, Plain]:
    return {
        0: hello.version_min, 1: hello.version_max, 2: hello.features, 3: hello.cluster, 4: hello.node, 5: hello.store,
        6: hello.boot.counter, 7: hello.boot.nonce, 8: hello.boots_digest, 9: hello.link, 10: hello.address, 11: hello.epoch,
        12: hello.session, 13: hello.window_bytes, 14: hello.window_messages, 15: hello.nonce, 16: hello.expected,
        grease[0]: grease[1],
    }  # fmt: skip


def _decode_hello(fields: Fields) -> Hello:
    boots_digest = wire.bytes_field(fields, 8)
    session = wire.bytes_field(fields, 12)
    if len(boots_digest) > 64 or len(session) > 64:
        raise DecodeError("a digest of more than 64 bytes in HELLO", code="control")
    return Hello(
        version_min=wire.int_field(fields, 0, limit=1 << 16),
        version_max=wire.int_field(fields, 1, limit=1 << 16),
        features=wire.int_field(fields, 2),
        cluster=wire.str_field(fields, 3),
        node=NodeId(wire.str_field(fields, 4)),
        store=StoreId(wire.bytes_field(fields, 5, length=16)),
        boot=Boot(wire.int_field(fields, 6), wire.int_field(fields, 7)),
        boots_digest=boots_digest,
        link=LinkName(wire.str_field(fields, 9)),
        address=wire.str_field(fields, 10),
        epoch=wire.int_field(fields, 11),
        session=session,
        window_bytes=wire.int_field(fields, 13, limit=1 << 32),
        window_messages=wire.int_field(fields, 14, limit=1 << 32),
        nonce=wire.bytes_field(fields, 15, length=NONCE_BYTES),
        expected=wire.str_field(fields, 16, default=""),
    )


def claimed_node(frame: Frame) -> NodeId:
    """Who a HELLO says that it comes from, unproved."""
    return NodeId(wire.str_field(wire.decode_fields(frame.body), 4))


READY = wire.encode_frame(FrameType.READY, wire.encode_fields({}))


def encode_reject(code: str, versions: tuple[int, int] = (VERSION_MIN, VERSION_MAX)) -> bytes:
    """``versions``: the lowest and the highest that we speak."""
    return wire.encode_frame(FrameType.REJECT, wire.encode_fields({0: code, 1: versions[0], 2: versions[1]}))


def raise_rejected(frame: Frame, peer: str, ours: NodeId) -> NoReturn:
    """Raises RemoteProtocolError with what a REJECT says."""
    fields = wire.decode_fields(frame.body)
    code = wire.str_field(fields, 0, limit=32)
    words = REFUSALS.get(code, "for a reason that this version does not know")
    offered = ""
    if code == "version":
        offered = f" (it speaks {wire.int_field(fields, 1, default=0)} to {wire.int_field(fields, 2, default=0)})"
    raise RemoteProtocolError(
        f"{peer} refused this node {ours}: {code}: {words}{offered}", peer=peer, code=code if code in REFUSALS else "protocol"
    )


@attrs.define
class Handshake:
    """One end of the exchange on one connection: frames in, frames out, until ``peer`` is known and proved.

    ``step`` is what is awaited next: hello and confirm (acceptor), welcome and ready (dialer), done.
    """

    ours: Hello
    key: bytes = attrs.field(repr=False)
    grease: tuple[int, Plain]
    step: Step
    remote: str
    peer: Hello | None = None
    """Whom the other end claims to be; proved once ``step`` is done."""
    version: int = 0
    features: int = 0
    _hello: bytes = b""
    _welcome: bytes = b""
    _frames: int = 0

    def begin(self) -> bytes:
        """The dialer's first frame."""
        self._hello = wire.encode_fields(_encode_hello(self.ours, self.grease))
        return wire.encode_frame(FrameType.HELLO, self._hello)

    def receive(self, frame: Frame) -> bytes:
        """Take the next frame; the answer to send (maybe empty).

        Raises:
            RemoteProtocolError: refuse the peer; ``code`` goes into the REJECT, the text to the administrator.
        """
        self._frames += 1
        if self._frames > MAX_HANDSHAKE_FRAMES:
            raise self._refuse("protocol", f"sent {self._frames} frames without proving itself")
        if frame.kind == FrameType.REJECT:
            raise_rejected(frame, self._name(), self.ours.node)
        if frame.kind == FrameType.HELLO and self.step == "hello":
            return self._answer(bytes(frame.body))
        if frame.kind == FrameType.WELCOME and self.step == "welcome":
            return self._confirm(frame)
        if frame.kind == FrameType.CONFIRM and self.step == "confirm":
            self._check(wire.bytes_field(wire.decode_fields(frame.body), 0, length=PROOF_BYTES), b"ha-core confirm")
            self.step = "done"
            return b""
        if frame.kind == FrameType.READY and self.step == "ready":
            self.step = "done"
            return b""
        if frame.kind & wire.IGNORABLE:
            return b""
        raise self._refuse("protocol", f"sent frame type {frame.kind} where {self.step} was expected")

    def _answer(self, body: bytes) -> bytes:
        fields = wire.decode_fields(body)
        self._judge_version(fields)
        peer = self._judge(_decode_hello(fields))
        if peer.expected and peer.expected != self.ours.node:
            raise self._refuse("peer", f"dialled {peer.expected} and reached {self.ours.node}: check the addresses")
        self.version = min(self.ours.version_max, peer.version_max)
        self.features = self.ours.features & peer.features
        answer = _encode_hello(self.ours, self.grease)
        answer |= {20: self.version, 21: self.features, 22: peer.version_min, 23: peer.version_max}
        self._hello, self._welcome = body, wire.encode_fields(answer)
        self.step = "confirm"
        proof = _proof(self.key, b"ha-core welcome", self._hello, self._welcome)
        return wire.encode_frame(FrameType.WELCOME, wire.encode_fields({0: self._welcome, 1: proof}))

    def _confirm(self, frame: Frame) -> bytes:
        outer = wire.decode_fields(frame.body)
        self._welcome = wire.bytes_field(outer, 0)
        fields = wire.decode_fields(self._welcome)
        self._judge_version(fields)
        peer = self._judge(_decode_hello(fields))
        self._check(wire.bytes_field(outer, 1, length=PROOF_BYTES), b"ha-core welcome")
        if self.ours.expected and peer.node != self.ours.expected:
            raise self._refuse("peer", f"is {peer.node}, not {self.ours.expected}: check the addresses")
        version = wire.int_field(fields, 20, limit=1 << 16)
        echo = (wire.int_field(fields, 22, limit=1 << 16), wire.int_field(fields, 23, limit=1 << 16))
        ours = self.ours
        if echo != (ours.version_min, ours.version_max) or not ours.version_min <= version <= ours.version_max:
            raise self._refuse("version", f"chose version {version} from an offer {echo} that we did not make")
        self.version, self.features = version, wire.int_field(fields, 21) & ours.features
        self.step = "ready"
        proof = _proof(self.key, b"ha-core confirm", self._hello, self._welcome)
        return wire.encode_frame(FrameType.CONFIRM, wire.encode_fields({0: proof}))

    def _judge_version(self, fields: Fields) -> None:
        """Before anything else is read: another version may have other fields."""
        low, high = wire.int_field(fields, 0, limit=1 << 16), wire.int_field(fields, 1, limit=1 << 16)
        ours = self.ours
        if max(low, ours.version_min) > min(high, ours.version_max):
            raise UnsupportedVersionError(
                f"peer at {self.remote} speaks protocol versions {low} to {high}, this node {ours.version_min} to "
                f"{ours.version_max}: upgrade the older one",
                peer=self.remote,
                code="version",
            )

    def _judge(self, peer: Hello) -> Hello:
        self.peer = peer
        if peer.cluster != self.ours.cluster:
            raise self._refuse("cluster", f"belongs to cluster {peer.cluster!r}, not to {self.ours.cluster!r}")
        if peer.node == self.ours.node:
            code = "self" if peer.boot == self.ours.boot else "clone"
            raise self._refuse(code, "has our own node id: " + REFUSALS[code])
        return peer

    def _check(self, proof: bytes, label: bytes) -> None:
        if not hmac.compare_digest(proof, _proof(self.key, label, self._hello, self._welcome)):
            raise self._refuse("key", "does not have this cluster's key: compare the key files")

    def _name(self) -> str:
        if self.peer is not None:
            return self.peer.node
        return self.ours.expected or self.remote

    def _refuse(self, code: str, text: str) -> RemoteProtocolError:
        return RemoteProtocolError(f"{self._name()} at {self.remote} {text}", peer=self._name(), code=code)
