"""What the Raft machine is told and what it asks for; entries, roles, reasons and limits.

Propose and ChangeConfiguration are answered by Appended (the entry has an index and a term; it is decided once Apply brings
that index: with that term it happened, with another it never will) or Dropped (it certainly never enters the log).
ReadIndex is answered by ReadReady (everything up to ``index`` has been applied before this effect) or ReadFailed.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import attrs

from ha_core.config import Profile, ns
from ha_core.errors import ConsensusError
from ha_core.ids import LinkName, NodeId
from ha_core.machines.contract import Effect, Event

if TYPE_CHECKING:
    from ha_core.machines.raft.configuration import Configuration


class Recovered(Protocol):
    """What a record store held (``ha_core.interfaces.Recovered`` is one)."""

    @property
    def checkpoint(self) -> bytes | None: ...
    @property
    def records(self) -> Sequence[bytes]: ...


class Lane(enum.Enum):
    """How a message travels."""

    DATAGRAM = "datagram"
    """On all paths, may be lost, repeated or reordered."""
    APPEND = "append"
    """Session channel: in order, exactly once, until PeerReset."""
    SNAPSHOT = "snapshot"
    """The same, on a channel of low priority."""


class Role(enum.Enum):
    FOLLOWER = "follower"
    PRECANDIDATE = "pre-candidate"
    CANDIDATE = "candidate"
    LEADER = "leader"


class EntryKind(enum.IntEnum):
    COMMAND = 0
    NOOP = 1
    CONFIGURATION = 2


class Entry(NamedTuple):
    """A tuple, because a batch of them is packed and sliced whole on the hot path."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls on an entry
    term: int
    kind: EntryKind
    data: bytes


class Reason(enum.Enum):
    """Why something was dropped or failed."""

    NOT_LEADER = "this replica does not lead"
    STORAGE_FAILED = "the store of this replica failed"
    TOO_LARGE = "the command is too large"
    TOO_MANY_UNCOMMITTED = "too many bytes wait for a quorum"
    TRANSFERRING = "leadership is being transferred"
    NO_LEADER = "no leader is known"
    NO_QUORUM = "no quorum confirmed the read in time"
    NOT_READY = "the new leader's first entry is not committed yet"
    CHANGE_PENDING = "another configuration change is pending"
    NOT_CAUGHT_UP = "the learner has not caught up"
    NO_LEARNER = "no such learner"
    NO_MEMBER = "no such member"
    LAST_VOTER = "the last voter cannot be removed"
    OTHER_INCARNATION = "the member is a voter under another incarnation: remove it first"
    RETIRED = "this incarnation was removed for good"
    REMOVED = "this replica was removed from the database: let its node join anew with a new store"
    REGRESSED = "the replica has lost entries that it acknowledged: remove it and let it join anew"
    MALFORMED = "the message is malformed"
    OTHER_CLUSTER = "the message is from another cluster"
    OTHER_REPLICA = "the message is for another incarnation of this node"


class ConfigurationRefused(ConsensusError):
    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


@attrs.frozen(kw_only=True)
class Limits:
    """Bounds of queues and messages."""

    max_append_bytes: int = 128 << 10
    """An append takes further runs up to this. Larger: fewer messages; smaller: less delay for others on the channel."""
    max_inflight_messages: int = 64
    max_inflight_bytes: int = 384 << 10
    """Unanswered appends per follower; below the room of a session channel."""
    max_uncommitted_bytes: int = 16 << 20
    """Entries that wait for a quorum; beyond, proposals are dropped (R32)."""
    max_command_bytes: int = 3 << 19
    max_record_bytes: int = 4 << 20
    """A record takes further commands up to this."""
    snapshot_chunk_bytes: int = 32 << 10
    snapshot_window_chunks: int = 8
    max_snapshot_bytes: int = 1 << 30
    tail_entries: int = 4096
    tail_bytes: int = 4 << 20
    """Entries before the snapshot kept for slow followers (R31): both bounds hold."""
    cache_bytes: int = 4 << 20
    """Encoded runs kept to be sent again."""
    promote_lag_entries: int = 256
    """A learner this close to the end of the log has caught up (R23)."""


@attrs.frozen
class Timings:
    """The profile in nanoseconds."""

    heartbeat_ns: int
    election_min_ns: int
    election_max_ns: int
    retry_min_ns: int
    retry_max_ns: int
    notice_ns: int = 2_000_000
    """A commit that no append carries to the followers is told them by an extra heartbeat after this."""

    @classmethod
    def of(cls, profile: Profile) -> Timings:
        return cls(
            heartbeat_ns=ns(profile.renewal_s),
            election_min_ns=ns(profile.election_min_s),
            election_max_ns=ns(profile.election_max_s),
            retry_min_ns=ns(profile.prevote_retry_min_s),
            retry_max_ns=ns(profile.prevote_retry_max_s),
        )


# -- configuration changes --


@attrs.frozen
class AddLearner:
    """Add ``node``, or give a member new addresses (same replica), or a learner's new incarnation its place."""

    node: NodeId
    replica: bytes
    addresses: Mapping[LinkName, str] = attrs.field(factory=dict)


@attrs.frozen
class Promote:
    """Learner to voter, once it has caught up."""

    node: NodeId


@attrs.frozen
class Remove:
    """The member's incarnation never takes part again; the node may come back under a new one."""

    node: NodeId


Change = AddLearner | Promote | Remove


# -- events --


@attrs.frozen
class RaftReceived(Event):
    sender: NodeId
    body: bytes


@attrs.frozen
class Propose(Event):
    request: int
    data: bytes


@attrs.frozen
class ReadIndex(Event):
    request: int


@attrs.frozen
class ChangeConfiguration(Event):
    request: int
    change: Change


@attrs.frozen
class TransferLeadership(Event):
    """Make ``to`` the leader; silently nothing if this replica does not lead or ``to`` is no voter."""

    to: NodeId


@attrs.frozen
class PeerReset(Event):
    """The session with ``peer`` is down: what was sent and not answered is lost. No appends until PeerReady."""

    peer: NodeId


@attrs.frozen
class PeerReady(Event):
    """A session with ``peer`` stands. Peers are taken for ready until a PeerReset."""

    peer: NodeId


@attrs.frozen
class Checkpointed(Event):
    """The state machine's whole state after applying ``index``: write it and compact the log."""

    index: int
    state: bytes


# -- effects --


@attrs.frozen
class SendMessage(Effect):
    to: NodeId
    body: bytes
    lane: Lane


@attrs.frozen
class Apply(Effect):
    """Committed entries, in order, each index exactly once in a process life (after the last Restore)."""

    entries: Sequence[Entry]


@attrs.frozen
class Appended(Effect):
    request: int
    index: int
    term: int


@attrs.frozen
class Dropped(Effect):
    request: int
    reason: Reason


@attrs.frozen
class ReadReady(Effect):
    request: int
    index: int


@attrs.frozen
class ReadFailed(Effect):
    request: int
    reason: Reason


@attrs.frozen
class RoleChanged(Effect):
    """This replica's role, term or known leader changed. With LEADER: ``lease_age_ns`` is the smallest time since a voter of
    the quorum that elected us last acknowledged (or was) a leader, 0 if one does not know (rule L6)."""

    role: Role
    term: int
    leader: NodeId | None
    lease_age_ns: int = 0


@attrs.frozen
class Restore(Effect):
    """Replace the state machine's state: it is now that after ``index``."""

    index: int
    term: int
    state: bytes


@attrs.frozen
class ConfigurationChanged(Effect):
    """The newest configuration in the log (in force, perhaps not yet committed), also once at the start."""

    configuration: Configuration


@attrs.frozen
class MessageRefused(Effect):
    """A message was not for us, not from a member, or malformed; or (REMOVED, once) ``sender`` says that we were removed. For
    events and metrics."""

    sender: NodeId
    reason: Reason
