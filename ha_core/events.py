"""What a node tells the program that embeds it, through ``Node.open_events``: nothing that matters happens in silence."""

from __future__ import annotations

import attrs

from ha_core.ids import ChannelName, LinkName, NodeId, Term


@attrs.frozen
class NodeEvent:
    """Base of all events."""


@attrs.frozen
class PathEvent(NodeEvent):
    """A path to a peer changed its state (``new``, ``probing``, ``up``, ``suspect``, ``down``)."""

    peer: NodeId
    link: LinkName
    remote: str
    state: str
    reason: str


@attrs.frozen
class PeerEvent(NodeEvent):
    """A peer's last path went down, or the first came up again."""

    peer: NodeId
    reachable: bool


@attrs.frozen
class SessionResetEvent(NodeEvent):
    """The peer restarted: what was sent on sessions and not acknowledged was delivered once or not at all."""

    peer: NodeId
    reason: str


@attrs.frozen
class PeerRefusedEvent(NodeEvent):
    """A connection was refused: another cluster, a wrong key, no common version, a clone."""

    peer: str
    code: str
    text: str


@attrs.frozen
class ForkedEvent(NodeEvent):
    """A peer's store was restored from an older copy or cloned; its channel stands still until an administrator decides."""

    peer: NodeId
    channel: ChannelName
    text: str


@attrs.frozen
class DeadLetterEvent(NodeEvent):
    """A message was set aside because its handler failed again and again; ``tx.dead_letters`` has it."""

    peer: NodeId
    channel: ChannelName
    number: int
    error: str


@attrs.frozen
class OutboxFullEvent(NodeEvent):
    peer: NodeId
    channel: ChannelName


@attrs.frozen
class LeaderEvent(NodeEvent):
    """The database has another leader; None: none is known."""

    leader: NodeId | None
    term: Term


@attrs.frozen
class LocalStallEvent(NodeEvent):
    """This process's event loop stood still for so long; deadlines were extended by as much."""

    stall_s: float
