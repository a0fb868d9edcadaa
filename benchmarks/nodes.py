"""Configurations of the nodes that benchmarks start: hosts on loopback addresses of their own, two links each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

from benchmarks.workers import Answer
from ha_core.config import LAN, Config
from ha_core.ids import LinkName, NodeId
from ha_core.security.key import create_key
from ha_core.testing.cable import Ports, lay_cables

LINKS = ("a", "b")


def lay_nodes(folder: Path, names: Sequence[str], *, voters: int, ports: Ports | None = None) -> list[dict[str, object]]:
    """A JSON configuration for each node; with ``ports`` their links run over cables. The first ``voters`` keep the database."""
    key = folder / "cluster.key"
    create_key(key)
    found = ports or {at: (real, real) for at, (_, real) in lay_cables(names, LINKS).items()}
    links = {name: {link: found[name, link][0] for link in LINKS} for name in names}
    bootstrap = {node_id(name): links[name] for name in names[:voters]}
    return [
        {
            "node": node_id(name),
            "data_dir": str(folder / name),
            "links": links[name],
            "bind": {link: found[name, link][1] for link in LINKS},
            "bootstrap": bootstrap,
            "role": "voter" if at < voters else "client",
            "key": str(key),
        }
        for at, name in enumerate(names)
    ]


def node_id(name: str) -> NodeId:
    return NodeId(f"bench@{name}.example")


def config_of(argument: Answer) -> Config:
    data_dir = Path(argument["data_dir"])
    data_dir.mkdir(parents=True, exist_ok=True)
    return Config(
        node=NodeId(argument["node"]),
        cluster="benchmark",
        data_dir=data_dir,
        links=_links(argument["links"]),
        bind=_links(argument["bind"]),
        bootstrap={NodeId(node): _links(links) for node, links in argument["bootstrap"].items()},
        role=cast(Literal["voter", "client"], argument["role"]),
        key_file=Path(argument["key"]),
        profile=LAN,
    )


def _links(links: Mapping[str, str]) -> dict[LinkName, str]:
    return {LinkName(name): address for name, address in links.items()}
