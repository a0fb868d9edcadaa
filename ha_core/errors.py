"""One error tree: the class says whose fault it is, attributes carry the data, the text says what, where and what to do.

``InvariantError`` stands outside the tree on purpose: it is a bug of ha-core, and ``except HAError`` must never hide it.
"""

from __future__ import annotations

from typing import ClassVar


class HAError(Exception):
    """Base of everything that ha-core raises for a reason other than a bug of its own."""

    retryable: ClassVar[bool] = False


class ConfigError(HAError, ValueError):
    """A configuration is unreadable or wrong: ``field`` names the key, ``value`` what was found there."""

    def __init__(self, text: str, *, field: str = "", value: object = None) -> None:
        super().__init__(text)
        self.field = field
        self.value = value


class ProtocolError(HAError):
    """A rule of the protocol was broken; abstract, so that the class always says by whom."""

    def __init__(self, *args: object) -> None:
        if type(self) is ProtocolError:
            raise TypeError("ProtocolError is abstract: raise LocalProtocolError or RemoteProtocolError")
        super().__init__(*args)


class LocalProtocolError(ProtocolError):
    """Our own caller broke the contract of the call."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol; ``peer`` is who it claims or is known to be, ``code`` a word for logs and metrics."""

    def __init__(self, text: str, *, peer: str = "", code: str = "protocol") -> None:
        super().__init__(text)
        self.peer = peer
        self.code = code


class DecodeError(RemoteProtocolError):
    """Bytes that are no frame, or a frame whose fields have wrong types or values."""


class FrameTooLargeError(RemoteProtocolError):
    """A frame or message longer than the negotiated limit; nothing was allocated for it."""


class UnsupportedVersionError(RemoteProtocolError):
    """The version ranges of the two ends do not meet."""


class SessionError(HAError):
    """A session between two live processes ended or cannot be made."""


class SessionExpiredError(SessionError):
    """The session is gone: the peer no longer knows it."""


class SessionResetError(SessionError):
    """The peer restarted: what was sent and not acknowledged was delivered once or not at all."""

    retryable = True


class StaleIncarnationError(SessionError):
    """The peer speaks for a store that a newer owner has replaced."""


class TransportError(HAError):
    """A transport could not be opened or broke."""

    retryable = True


class NoUsablePathError(TransportError):
    """No path to the peer is up; ``paths`` lists what was tried."""

    def __init__(self, text: str, *, paths: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.paths = paths


class ConsensusError(HAError):
    """The replicated database could not carry out a request."""


class NotLeaderError(ConsensusError):
    """This replica does not lead; ``leader`` names the node that does, if known."""

    retryable = True

    def __init__(self, text: str, *, leader: str | None = None) -> None:
        super().__init__(text)
        self.leader = leader


class ProposalDroppedError(ConsensusError):
    """The proposal certainly did not enter the log and never will."""

    retryable = True


class CompactedError(ConsensusError):
    """The revision or index asked for is compacted; ``first_index`` is the oldest one still held."""

    def __init__(self, text: str, *, first_index: int) -> None:
        super().__init__(text)
        self.first_index = first_index


class StorageError(HAError):
    """A store failed or refuses to open."""


class StoreLockedError(StorageError):
    """Another process owns the store."""


class CorruptRecordError(StorageError):
    """Stored bytes do not match their checksum and are no torn tail."""

    def __init__(self, text: str, *, offset: int = -1, expected_crc: int = 0, actual_crc: int = 0) -> None:
        super().__init__(text)
        self.offset = offset
        self.expected_crc = expected_crc
        self.actual_crc = actual_crc


class StorageFullError(StorageError):
    """The device is full: nothing acknowledged is lost, the write did not happen."""

    retryable = True


class OutboxFullError(StorageError):
    """The outbox of channel ``channel`` to ``to`` has no room: the transaction rolled back; wait for room and call again."""

    retryable = True

    def __init__(self, text: str, *, to: str = "", channel: str = "") -> None:
        super().__init__(text)
        self.to = to
        self.channel = channel


class ForkedError(StorageError):
    """A peer's store was restored from an older copy, or cloned: the channel's histories differ."""


class LeaseLostError(HAError):
    """The lease ran out or was revoked; what it protected must stop."""


class OutcomeUnknownError(HAError):
    """The request may or may not have been carried out; retrying with ``request`` is exactly-once."""

    retryable = True

    def __init__(self, text: str, *, request: object = None) -> None:
        super().__init__(text)
        self.request = request


class NotJoinedError(HAError):
    """The host belongs to no cluster (yet, or any more): another one may answer."""

    retryable = True


class NodeFailedError(HAError):
    """The node stopped because one of its parts failed; the cause is chained."""


class HypervisorError(HAError):
    """A hypervisor driver could not do what it was asked."""


class DriverTimeoutError(HypervisorError):
    """The driver did not answer within ``after_s`` seconds."""

    def __init__(self, text: str, *, after_s: float) -> None:
        super().__init__(text)
        self.after_s = after_s


class VmNotFoundError(HypervisorError):
    """The driver knows no VM of that name."""


class OperationFailedError(HypervisorError):
    """The driver tried and failed."""


class StartRefusedError(OperationFailedError):
    """The guard does not start this run now; ``code`` says why: not-reaped, no-lease, other-lease or ending."""

    retryable = True

    def __init__(self, text: str, *, code: str) -> None:
        super().__init__(text)
        self.code = code


class FencingError(HAError):
    """A host could not be fenced, or a token is too old."""


class FenceFailedError(FencingError):
    """The fence device did not confirm."""


class StaleFencingTokenError(FencingError):
    """``token`` is older than ``current``: a newer owner exists."""

    def __init__(self, text: str, *, token: int, current: int) -> None:
        super().__init__(text)
        self.token = token
        self.current = current


class AdmissionDeniedError(HAError):
    """Starting this would take capacity that is reserved for failovers."""

    def __init__(self, text: str, *, required: str = "", available: str = "", policy: str = "") -> None:
        super().__init__(text)
        self.required = required
        self.available = available
        self.policy = policy


class InvariantError(Exception):
    """A numbered rule of guarantees.md does not hold: a bug of ha-core."""


def invariant(condition: object, text: str, **context: object) -> None:
    """Raise InvariantError unless ``condition`` holds; active under ``python -O`` too."""
    if not condition:
        details = ", ".join(f"{key}={value!r}" for key, value in context.items())
        raise InvariantError(f"{text} ({details})" if details else text)


def leaves(error: BaseException) -> list[BaseException]:
    """The exceptions in a group, at any depth; an exception that is no group is its own only leaf."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]
