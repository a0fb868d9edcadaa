"""What the endpoint machine is told and what it asks for: the seam between messages and everything above and below them.

Above the seam stand applications' sessions, durable channels, Raft and the agents; below it the transports. All of it is data,
in runs: one object carries many messages.

Connections have a number: even ones are drawn by the machine (it dials), odd ones by the shell (it accepts).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence

import attrs

from ha_core.ids import Boot, ChannelName, LinkName, NodeId, SessionId, StoreId
from ha_core.machines.contract import Effect, Event
from ha_core.machines.handshake import SeenBoot


@attrs.frozen
class PathKey:
    """One path to a peer: over which of our links, to which of its addresses (``host:port``)."""

    peer: NodeId
    link: LinkName
    remote: str


class PathState(enum.Enum):
    """NEW -> PROBING -> UP -> SUSPECT -> DOWN; the table of moves is in machines/paths.py."""

    NEW = "new"
    PROBING = "probing"
    UP = "up"
    SUSPECT = "suspect"
    DOWN = "down"


class Priority(enum.IntEnum):
    """Lower goes first. Control frames of the endpoint itself go before all of these."""

    URGENT = 0
    """Raft appends, agent to agent."""
    NORMAL = 1
    """Applications' sessions."""
    BULK = 2
    """Durable channels; has a floor of one tenth, so that it never starves."""
    BACKGROUND = 3
    """Snapshots."""


# -- from above --


@attrs.frozen
class SetPeer(Event):
    """Know ``peer`` and its addresses, a ``host:port`` per link; dial it if ``dial``. Empty addresses: it will dial us."""

    peer: NodeId
    addresses: Mapping[LinkName, str]
    dial: bool = True


@attrs.frozen
class ForgetPeer(Event):
    peer: NodeId


@attrs.frozen
class SendRun(Event):
    """Queue ``bodies`` on a session channel, in order. Dropped with the session: listen for SessionDown."""

    to: NodeId
    channel: ChannelName
    bodies: Sequence[bytes]
    priority: Priority = Priority.NORMAL
    redundant: bool = False
    """Send on every live path at once; the first copy wins."""
    session: SessionId | None = None
    """Drop it unless this is still the session; None: whichever stands. For senders whose frames must not reach a new session
    before they heard of it (a parent machine may feed both ends of the seam in one batch)."""


@attrs.frozen
class SendDatagram(Event):
    """Send ``body`` (at most 1,200 bytes) on all live paths, at most once each; the newest of a topic wins."""

    to: NodeId
    topic: ChannelName
    body: bytes


@attrs.frozen
class Consumed(Event):
    """The application took ``count`` messages of ``byte_count`` bytes from a session channel: grant new credit."""

    peer: NodeId
    channel: ChannelName
    count: int
    byte_count: int
    session: SessionId | None = None
    """The session that delivered them: nothing is granted if it is over. None only where no reset can lie in between."""


# -- to above --


@attrs.frozen
class SessionUp(Effect):
    """A session with a live process of ``peer`` stands; comes before anything that it delivers."""

    peer: NodeId
    session: SessionId
    store: StoreId
    boot: Boot
    boots_digest: bytes = b""
    """Of all earlier boots of the store."""

    @property
    def seen(self) -> SeenBoot:
        """Whom the session is with, as later lives of this node have to remember it."""
        return SeenBoot(self.peer, self.store, self.boot, self.boots_digest)


@attrs.frozen
class SessionDown(Effect):
    """The session is over (the peer restarted, was forgotten or refused us): each queued or unacknowledged message was
    delivered once or not at all."""

    peer: NodeId
    session: SessionId
    reason: str


@attrs.frozen
class DeliverRun(Effect):
    """Messages ``first_seq``, ``first_seq`` + 1, ... of a session channel, exactly once and in order."""

    peer: NodeId
    channel: ChannelName
    first_seq: int
    bodies: Sequence[bytes]


@attrs.frozen
class DeliverDatagram(Effect):
    peer: NodeId
    topic: ChannelName
    body: bytes


@attrs.frozen
class RoomChanged(Effect):
    """A session channel that had run out of credit or queue room (512 KiB or 4,096 messages queued) has room again."""

    peer: NodeId
    channel: ChannelName


@attrs.frozen
class PathChanged(Effect):
    path: PathKey
    state: PathState
    reason: str


@attrs.frozen
class PeerReachable(Effect):
    """``reachable`` is False once every path is DOWN, True again with the first one UP. The session outlives it."""

    peer: NodeId
    reachable: bool


@attrs.frozen
class PeerRefused(Effect):
    """A handshake failed for a reason that an administrator should hear: other cluster, wrong key, version, clone."""

    peer: str
    code: str
    text: str


# -- from below --


@attrs.frozen
class Connected(Event):
    connection: int


@attrs.frozen
class Accepted(Event):
    connection: int
    link: LinkName
    remote: str


@attrs.frozen
class Received(Event):
    connection: int
    data: bytes


@attrs.frozen
class Flushed(Event):
    """``byte_count`` more bytes of what was transmitted have left for the kernel."""

    connection: int
    byte_count: int


@attrs.frozen
class Disconnected(Event):
    """The connection is gone, or a dial failed."""

    connection: int
    error: str


@attrs.frozen
class DatagramReceived(Event):
    link: LinkName
    remote: str
    data: bytes


# -- to below --


@attrs.frozen
class Dial(Effect):
    connection: int
    path: PathKey


@attrs.frozen
class Transmit(Effect):
    """Write ``data`` to the connection, after what was transmitted before."""

    connection: int
    data: bytes


@attrs.frozen
class Disconnect(Effect):
    connection: int
    reason: str


@attrs.frozen
class TransmitDatagram(Effect):
    link: LinkName
    remote: str
    data: bytes
