"""What the database machines are told and what they ask for: requests of this node, watches, and what comes over the network.

The parent (the node's machine) turns the endpoint's SessionUp, SessionDown, DeliverRun and DeliverDatagram into PeerUp,
PeerDown, Arrived and DatagramArrived for the channels below, and posts the event inside each Send to the endpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import attrs

from ha_core.ids import ChannelName, LeaseToken, NodeId, Revision, SessionId
from ha_core.machines.contract import Effect, Event
from ha_core.machines.keyvalue.model import (
    Call,
    Change,
    Get,
    Grant,
    Page,
    Record,
    Reply,
    RequestId,
    RevisionEvents,
    Revoke,
)
from ha_core.machines.messages import (
    Consumed,
    DeliverDatagram,
    DeliverRun,
    SendDatagram,
    SendRun,
    SessionDown,
    SessionUp,
)
from ha_core.machines.raft.types import Change as MemberChange

DATABASE = ChannelName("database")
"""Requests, replies and watches between nodes."""
RAFT = ChannelName("raft")
"""Raft's appends (session channel) and its votes, heartbeats and read rounds (datagram topic)."""
RAFT_SNAPSHOT = ChannelName("raft-snapshot")
CHANNELS = (DATABASE, RAFT, RAFT_SNAPSHOT)


# -- operations --


@attrs.frozen
class Range:
    """Records under ``prefix`` with keys greater than ``after``, as of revision ``at`` (0: now). A page also ends at
    256 KiB."""

    prefix: bytes
    limit: int = 1000
    after: bytes = b""
    at: int = 0


@attrs.frozen
class Renew:
    """Keep a lease for another full ttl, counted by the leader from the arrival of this request."""

    token: LeaseToken


@attrs.frozen
class Confirm:
    """Prove that this replica leads: answered by Confirmed after a quorum round that began after the request came, with our
    own first entry applied (rule L2), else refused. Never forwarded."""


@attrs.frozen
class Reconfigure:
    change: MemberChange


@attrs.frozen
class Transfer:
    """Hand leadership to ``to``."""

    to: NodeId


Write: TypeAlias = Change | Grant | Revoke | Call
Read: TypeAlias = Get | Range
Operation: TypeAlias = Write | Read | Renew | Confirm | Reconfigure | Transfer


# -- outcomes --


@attrs.frozen
class Found:
    """Answer to Get: the record, None if the key is not there, as of ``revision``."""

    record: Record | None
    revision: Revision


@attrs.frozen
class Renewed:
    """Answer to Renew; the holder counts ``ttl_ns`` from the moment at which it *made* the request."""

    token: LeaseToken
    ttl_ns: int


@attrs.frozen
class Confirmed:
    term: int


@attrs.frozen
class Done:
    """Answer to Reconfigure (committed) and Transfer (begun)."""


DatabaseOutcome: TypeAlias = Reply | Found | Page | Renewed | Confirmed | Done


# -- events from this node --


@attrs.frozen
class DatabaseRequest(Event):
    """Carry out ``operation`` and answer with a DatabaseReply, after ``timeout_ns`` at the latest.

    ``identity``: repeat the write that had this identity; without one it gets its own. A write that ends with the refusal
    UNKNOWN has its identity, (session, sequence), in the refusal's ``detail``.
    """

    request: int
    operation: Operation
    timeout_ns: int = 10_000_000_000
    identity: RequestId | None = None


@attrs.frozen
class OpenWatch(Event):
    """Watch ``prefix`` for what changes after revision ``after`` (None: after now). The first WatchEvents says that the watch
    stands."""

    watch: int
    prefix: bytes
    after: int | None = None


@attrs.frozen
class WatchTaken(Event):
    """``count`` events of a watch were taken out of its queue: there is room for as many more."""

    watch: int
    count: int


@attrs.frozen
class CloseWatch(Event):
    watch: int


# -- events from the network --


@attrs.frozen
class PeerUp(Event):
    """A session stands; what we send is meant for it and none other."""

    peer: NodeId
    session: SessionId | None = None


@attrs.frozen
class PeerDown(Event):
    peer: NodeId


@attrs.frozen
class Arrived(Event):
    """Messages of one of ``CHANNELS``, in order."""

    peer: NodeId
    channel: ChannelName
    bodies: Sequence[bytes]


@attrs.frozen
class DatagramArrived(Event):
    """A datagram of topic ``RAFT``."""

    peer: NodeId
    body: bytes


# -- effects --


@attrs.frozen
class Send(Effect):
    """Post ``event`` to the endpoint."""

    event: SendRun | SendDatagram | Consumed


@attrs.frozen
class DatabaseReply(Effect):
    request: int
    outcome: DatabaseOutcome


@attrs.frozen
class WatchEvents(Effect):
    """``changes`` under the watch's prefix, oldest first, each revision whole; nothing is missing up to ``revision``. Without
    changes it is a bookmark."""

    watch: int
    revision: int
    changes: Sequence[RevisionEvents]


@attrs.frozen
class WatchClosed(Effect):
    """The watch is over: what comes after revision ``resume`` is compacted up to ``compacted``. Nothing was skipped up to
    ``resume``; read anew and watch after that read's revision."""

    watch: int
    resume: int
    compacted: int


@attrs.frozen
class Applied(Effect):
    """This replica's state is that after log index ``index``; ``changes`` is what came since the last Applied.

    ``restored``: the state was replaced as a whole; read it anew.
    """

    index: int
    revision: int
    changes: Sequence[RevisionEvents]
    restored: bool = False


@attrs.frozen
class LeaderChanged(Effect):
    """The leader or the term changed, as far as this node knows."""

    leader: NodeId | None
    term: int


@attrs.frozen
class Leading(Effect):
    """This node leads in ``term`` and has applied its own first entry, and with it everything acknowledged before.

    ``counted_from_ns``: the moment from which leases granted or renewed under earlier leaders count (rule L6).
    """

    term: int
    counted_from_ns: int


def from_endpoint(effect: Effect) -> Event | None:
    """The database's event for an effect of the endpoint; None if it does not concern the database."""
    match effect:
        case DeliverRun(peer=peer, channel=channel, bodies=bodies):
            return Arrived(peer, channel, bodies) if channel in CHANNELS else None
        case DeliverDatagram(peer=peer, topic=topic, body=body):
            return DatagramArrived(peer, body) if topic == RAFT else None
        case SessionUp(peer=peer, session=session):
            return PeerUp(peer, session)
        case SessionDown(peer=peer):
            return PeerDown(peer)
    return None
