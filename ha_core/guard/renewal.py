"""The datagrams by which a host's guard renews its lease, authenticated by the cluster key.

Layout, big endian: magic ``HAG1``, kind (1 renewal, 2 answer), digest of the cluster's name (16 bytes), the body, and a
BLAKE2b tag of 16 bytes over everything before it, keyed with the cluster key. A decoder ignores bytes between the fields it
knows and the tag, so that fields can be added at the end. Nothing is longer than ``MAX_PACKET_BYTES``.

What the answering side must keep (rules L1-L6): only a leader answers; every copy of a number is answered to the address it
came from, but only the first one counts for the expiry (``ReplayFilter`` tells them apart); asks of an instance or a kernel
boot that was replaced are refused for ever, so their history belongs in the replicated record, not only in the filter of one
leader.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import struct
from collections import OrderedDict
from dataclasses import dataclass

MAGIC = b"HAG1"
KEY_BYTES = 32
MAX_PACKET_BYTES = 1200
MAX_HOST_BYTES = 253
MAX_HINTS = 16

_KIND_RENEWAL, _KIND_ANSWER = 1, 2
_TAG_BYTES = 16
_HEADER = struct.Struct(">4sB16s")
_RENEWAL = struct.Struct(">16s16sQQQB")
_ANSWER = struct.Struct(">16sQBBQQQQB")
_ARMED = 1
_MAX_U63 = (1 << 63) - 1


class RenewalError(ValueError):
    """A packet that is not to be used; ``code`` is a word for counters: short, magic, kind, cluster, tag, field."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Status(enum.IntEnum):
    CONFIRMED = 1
    """``lease_token`` is the host's lease, renewed as of the arrival of this number. It may be newer than the one asked
    with."""
    REVOKED = 2
    """``lease_token`` (the one asked with) is revoked, expired or unknown and will never be confirmed again: ask for a
    Grant."""
    REFUSED = 3
    """This host or this guard instance gets no lease: removed from the cluster, or replaced by a newer instance."""


@dataclass(frozen=True, slots=True)
class Renewal:
    """The guard of ``host`` asks to renew ``lease_token``; 0 asks for a Grant.

    ``number`` counts 1, 2, 3, ... in one ``instance`` (16 random bytes per guard process); the copies for all paths carry the
    same. ``created_ns`` is the host's CLOCK_BOOTTIME: it never goes back while ``boot_id`` (16 bytes, the kernel's) stays.
    """

    host: str
    boot_id: bytes
    instance: bytes
    lease_token: int
    number: int
    created_ns: int


@dataclass(frozen=True, slots=True)
class RenewalAnswer:
    """The active primary's answer to renewal ``number`` of guard ``instance``.

    ``continued_token``: the oldest token of the unbroken chain of Grants that ``lease_token`` continues (itself, if it
    continues none): runs of this host stamped with a token from there to ``lease_token`` now stand under ``lease_token``.
    ``lease_ns`` and ``margin_ns`` are L and M of that Grant and never change under one token. ``armed`` False: a lease
    without a deadline; a token may lose it, and never gets it back. ``hints``: (link, ``host:port``) where the primaries listen now.
    """

    instance: bytes
    number: int
    status: Status
    lease_token: int
    lease_ns: int = 0
    margin_ns: int = 0
    continued_token: int = 0
    armed: bool = True
    hints: tuple[tuple[str, str], ...] = ()


def cluster_digest(cluster: str) -> bytes:
    return hashlib.blake2b(cluster.encode(), digest_size=16, person=b"ha-core cluster").digest()


class RenewalCodec:
    """Encodes and decodes for one cluster and key.

    Raises:
        RenewalError: the key has not 32 bytes.
    """

    def __init__(self, cluster: str, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise RenewalError("key", f"the cluster key has {len(key)} bytes, expected {KEY_BYTES}")
        self._digest = cluster_digest(cluster)
        self._keyed = hashlib.blake2b(key=key, digest_size=_TAG_BYTES, person=b"ha-core renewal")

    def encode_renewal(self, renewal: Renewal) -> bytes:
        host = renewal.host.encode()
        if not 0 < len(host) <= MAX_HOST_BYTES:
            raise RenewalError("field", f"host: expected 1 to {MAX_HOST_BYTES} bytes, found {len(host)}")
        _check_ids(renewal.boot_id, renewal.instance)
        body = _RENEWAL.pack(
            renewal.boot_id, renewal.instance, renewal.lease_token, renewal.number, renewal.created_ns, len(host)
        )
        return self._seal(_KIND_RENEWAL, body + host)

    def decode_renewal(self, packet: bytes) -> Renewal:
        """Raises RenewalError for anything that is no renewal of this cluster sealed with this key."""
        body = self._open(_KIND_RENEWAL, packet)
        if len(body) < _RENEWAL.size:
            raise RenewalError("short", f"a renewal of {len(packet)} bytes is too short")
        boot_id, instance, lease_token, number, created_ns, host_bytes = _RENEWAL.unpack_from(body)
        host = _text(body, _RENEWAL.size, host_bytes)
        if not host or not number:
            raise RenewalError("field", "a renewal without a host or a number")
        _check_range(lease_token, number, created_ns)
        return Renewal(host, boot_id, instance, lease_token, number, created_ns)

    def encode_answer(self, answer: RenewalAnswer) -> bytes:
        if len(answer.hints) > MAX_HINTS:
            raise RenewalError("field", f"hints: expected at most {MAX_HINTS}, found {len(answer.hints)}")
        _check_ids(answer.instance)
        parts = [
            _ANSWER.pack(
                answer.instance, answer.number, answer.status, _ARMED if answer.armed else 0, answer.lease_token,
                answer.continued_token, answer.lease_ns, answer.margin_ns, len(answer.hints),
            )
        ]  # fmt: skip
        for hint in answer.hints:
            for text in hint:
                data = text.encode()
                if len(data) > 255:
                    raise RenewalError("field", f"hints: {text[:40]!r}... is longer than 255 bytes")
                parts.append(bytes((len(data),)) + data)
        return self._seal(_KIND_ANSWER, b"".join(parts))

    def decode_answer(self, packet: bytes) -> RenewalAnswer:
        """Raises RenewalError for anything that is no answer of this cluster sealed with this key."""
        body = self._open(_KIND_ANSWER, packet)
        if len(body) < _ANSWER.size:
            raise RenewalError("short", f"an answer of {len(packet)} bytes is too short")
        instance, number, status, flags, token, continued, lease_ns, margin_ns, count = _ANSWER.unpack_from(body)
        _check_range(number, token, continued, lease_ns, margin_ns)
        if status not in (1, 2, 3) or count > MAX_HINTS or margin_ns > lease_ns or continued > token:
            raise RenewalError("field", "an answer with a field out of its range")
        hints: list[tuple[str, str]] = []
        at = _ANSWER.size
        for _ in range(count):
            link, at = _counted(body, at)
            address, at = _counted(body, at)
            hints.append((link, address))
        return RenewalAnswer(
            instance, number, Status(status), token, lease_ns, margin_ns, continued, bool(flags & _ARMED), tuple(hints)
        )

    def _seal(self, kind: int, body: bytes) -> bytes:
        packet = _HEADER.pack(MAGIC, kind, self._digest) + body
        if len(packet) + _TAG_BYTES > MAX_PACKET_BYTES:
            raise RenewalError("field", f"a packet of {len(packet)} bytes is longer than {MAX_PACKET_BYTES}")
        return packet + self._tag(packet)

    def _open(self, kind: int, packet: bytes) -> bytes:
        if not _HEADER.size + _TAG_BYTES <= len(packet) <= MAX_PACKET_BYTES:
            raise RenewalError("short", f"a packet of {len(packet)} bytes is none of ours")
        magic, packet_kind, digest = _HEADER.unpack_from(packet)
        if magic != MAGIC:
            raise RenewalError("magic", "the packet does not begin with HAG1")
        if packet_kind != kind:
            raise RenewalError("kind", f"expected kind {kind}, found {packet_kind}")
        if digest != self._digest:
            raise RenewalError("cluster", "the packet belongs to another cluster")
        if not hmac.compare_digest(self._tag(packet[:-_TAG_BYTES]), packet[-_TAG_BYTES:]):
            raise RenewalError("tag", "the packet was not sealed with this cluster's key")
        return packet[_HEADER.size : -_TAG_BYTES]

    def _tag(self, data: bytes) -> bytes:
        keyed = self._keyed.copy()
        keyed.update(data)
        return keyed.digest()


class Arrival(enum.Enum):
    NEW = "new"
    """A number not seen before: it counts for the expiry and is answered."""
    COPY = "copy"
    """The newest number over another path: answered there, but it moves nothing."""
    OLD = "old"
    """Replayed or overtaken: dropped."""


class ReplayFilter:
    """Tells fresh renewals from copies and replays; remembers ``max_hosts`` hosts, each with its newest renewal.

    A renewal older by ``created_ns`` than the newest of the same kernel boot is OLD whatever its instance: a delayed ask of a
    dead guard never passes for a new one.
    """

    def __init__(self, max_hosts: int = 4096, max_sources: int = 16) -> None:
        self._newest: OrderedDict[str, tuple[Renewal, set[object]]] = OrderedDict()
        self._max_hosts = max_hosts
        self._max_sources = max_sources

    def receive(self, renewal: Renewal, source: object) -> Arrival:
        """``source`` tells the paths apart (link and remote address); hashable."""
        known = self._newest.get(renewal.host)
        if known is not None and known[0].boot_id == renewal.boot_id:
            newest, sources = known
            if renewal == newest:
                if source in sources or len(sources) >= self._max_sources:
                    return Arrival.OLD
                sources.add(source)
                return Arrival.COPY
            if renewal.created_ns <= newest.created_ns:
                return Arrival.OLD
            if renewal.instance == newest.instance and renewal.number <= newest.number:
                return Arrival.OLD
        self._newest[renewal.host] = (renewal, {source})
        self._newest.move_to_end(renewal.host)
        if len(self._newest) > self._max_hosts:
            self._newest.popitem(last=False)
        return Arrival.NEW


def _check_ids(*ids: bytes) -> None:
    for value in ids:
        if len(value) != 16:
            raise RenewalError("field", f"expected an id of 16 bytes, found {len(value)}")


def _check_range(*numbers: int) -> None:
    for number in numbers:
        if number > _MAX_U63:
            raise RenewalError("field", f"{number} is out of range")


def _text(body: bytes, at: int, size: int) -> str:
    data = body[at : at + size]
    if len(data) != size:
        raise RenewalError("short", "a text reaches beyond the packet")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise RenewalError("field", "a text is not UTF-8") from None


def _counted(body: bytes, at: int) -> tuple[str, int]:
    if at >= len(body):
        raise RenewalError("short", "a text is missing at the end of the packet")
    size = body[at]
    return _text(body, at + 1, size), at + 1 + size
