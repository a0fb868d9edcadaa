"""Names and numbers that must not be confused (the table in docs/vocabulary.md says what changes each and when)."""

from __future__ import annotations

import re
from typing import NewType

import attrs

from ha_core.errors import ConfigError

NodeId = NewType("NodeId", str)
"""``service@fqdn``: stable, never an address."""
HostName = NewType("HostName", str)
"""The fully qualified, lower-case name of a host."""
LinkName = NewType("LinkName", str)
ChannelName = NewType("ChannelName", str)
VmName = NewType("VmName", str)
StoreId = NewType("StoreId", bytes)
"""16 random bytes: the incarnation of one app.db file."""
ReplicaId = NewType("ReplicaId", bytes)
"""16 random bytes: the incarnation of one node.db file."""
SessionId = NewType("SessionId", bytes)
Term = NewType("Term", int)
LogIndex = NewType("LogIndex", int)
Revision = NewType("Revision", int)
LeaseToken = NewType("LeaseToken", int)
FencingToken = NewType("FencingToken", int)

_NODE_ID = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}@[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")


def parse_node_id(text: str) -> NodeId:
    """``service@fqdn`` as a NodeId.

    Raises:
        ConfigError: the text has another form.
    """
    if not _NODE_ID.fullmatch(text):
        raise ConfigError(f"{text!r} is no node id: expected 'service@host.domain' in lower case", field="node", value=text)
    return NodeId(text)


def host_of(node: NodeId) -> HostName:
    """The host part of a node id."""
    return HostName(node.partition("@")[2])


@attrs.frozen(order=True)
class Boot:
    """One process life of a node: a counter that its store increments, and a random number that tells clones apart."""

    counter: int
    nonce: int

    @property
    def mark(self) -> bytes:
        """What names it in a file."""
        return self.counter.to_bytes(8, "big") + self.nonce.to_bytes(8, "big")


@attrs.frozen
class MessageId:
    """A durable message: number ``number`` (1, 2, 3, ...) of the channel (sender's store, receiver, channel name)."""

    store: StoreId
    to: NodeId
    channel: ChannelName
    number: int
