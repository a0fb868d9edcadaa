"""A peer as the endpoint knows it, and the judgement whether who speaks in its name is its next life, or a clone."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from ha_core.ids import LinkName, NodeId
from ha_core.machines.connection import Connection
from ha_core.machines.datagrams import DatagramPort
from ha_core.machines.handshake import Hello, SeenBoot, extend_boots_digest
from ha_core.machines.paths import Path
from ha_core.machines.session import Session


@attrs.define(eq=False)
class Peer:
    """``last`` is what its newest process said about itself; it outlives the session."""

    node: NodeId
    addresses: Mapping[LinkName, str] = attrs.field(factory=dict)
    dial: bool = False
    paths: dict[LinkName, Path] = attrs.field(factory=dict)
    session: Session | None = None
    datagrams: DatagramPort | None = None
    last: Hello | None = None
    reachable: bool = False
    contenders: list[Connection] = attrs.field(factory=list)
    """Connections of what may be its next life, held until the present one has proved to be dead."""
    contest_end_ns: int | None = None
    contest_pings: dict[int, int] = attrs.field(factory=dict)
    """Per connection of the present life, the first probe whose answer proves that it still lives."""


def judge(last: Hello | SeenBoot | None, hello: Hello) -> str:
    """A code of ``handshake.REFUSALS``, or "same" process, or "next" life of the node.

    A store that was created anew is another incarnation of the node, not a clone.
    """
    if last is None or hello.store != last.store:
        return "next"
    if hello.boot == last.boot:
        return "same" if hello.boots_digest == last.boots_digest else "clone"
    if hello.boot.counter == last.boot.counter:
        return "clone"
    if hello.boot.counter < last.boot.counter:
        return "stale"
    if hello.boot.counter == last.boot.counter + 1 and hello.boots_digest != extend_boots_digest(last.boots_digest, last.boot):
        return "clone"
    return "next"
