"""Configuration: frozen, checked on the way in, every time in seconds; ``*_ns`` helpers for the machines.

Each knob of a profile says its formula and what turning it either way does.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import attrs
import cattrs
from cattrs.errors import BaseValidationError, ForbiddenExtraKeysError

from ha_core.errors import ConfigError
from ha_core.ids import LinkName, NodeId, parse_node_id


def ns(seconds: float) -> int:
    """Seconds as integer nanoseconds."""
    return round(seconds * 1_000_000_000)


@attrs.frozen(kw_only=True)
class Profile:
    """The timings of a cluster; equal on all of its hosts."""

    name: str
    renewal_s: float
    """Between a host's lease renewals, and between Raft heartbeats. Shorter: faster verdicts, more packets."""
    election_min_s: float
    """Shortest election timeout, at least twice ``renewal_s`` plus a round trip. Shorter: a dead leader is replaced earlier;
    too short: a busy one is deposed."""
    election_max_s: float
    """Longest; the spread keeps candidates from colliding."""
    prevote_retry_min_s: float
    """A lost pre-vote is tried again after this at least ..."""
    prevote_retry_max_s: float
    """... and this at most: far less than an election timeout."""
    lease_s: float
    """L: how long a host may run VMs after its last renewal. Must outlive a leader's death:
    election_max + 2 x prevote_retry_max + 2 x renewal + round trips <= L - M."""
    margin_s: float
    """M: the holder stops this much earlier: 2 % of L for clock rates, the kill time, the time for storage to settle."""
    probe_busy_s: float = 0.2
    """Between probes of a path on which data flows."""
    probe_idle_s: float = 1.0
    """Between probes of an idle path. Session data has its own, faster detection; this bounds how long an idle path's loss
    stays unseen."""
    probe_timeout_floor_s: float = 0.025
    """The smallest probe timeout: below it, our own scheduling is measured instead of the path."""
    down_s: float = 1.5
    """A path is DOWN (an event, its connection is closed) after this long without feedback."""
    up_after_s: float = 1.0
    """A path that was SUSPECT or DOWN is UP again after good probes over this long; doubles with each flap, up to 60 s."""
    guard_hang_s: float = 0.5
    """A guard whose beats stop for this long is killed and replaced."""
    agent_hang_s: float = 1.0
    """The same for aam and vpxa."""

    def __attrs_post_init__(self) -> None:
        if not 0 < self.renewal_s < self.election_min_s <= self.election_max_s:
            raise ConfigError(
                f"profile {self.name}: expected 0 < renewal_s < election_min_s <= election_max_s", field="profile"
            )
        if self.margin_s < 0.02 * self.lease_s:
            raise ConfigError(f"profile {self.name}: margin_s must be at least 2 % of lease_s", field="profile.margin_s")
        needed = self.election_max_s + 2 * self.prevote_retry_max_s + 2 * self.renewal_s
        if needed > self.lease_s - self.margin_s:
            raise ConfigError(
                f"profile {self.name}: lease_s - margin_s is {self.lease_s - self.margin_s:g} s, but a renewal needs "
                f"{needed:g} s to survive a leader's death: lengthen lease_s",
                field="profile.lease_s",
            )


LAN = Profile(
    name="lan", renewal_s=0.15, election_min_s=0.3, election_max_s=0.6, prevote_retry_min_s=0.05, prevote_retry_max_s=0.15,
    lease_s=2.0, margin_s=0.3,
)  # fmt: skip
FAST = Profile(
    name="fast", renewal_s=0.05, election_min_s=0.11, election_max_s=0.22, prevote_retry_min_s=0.02, prevote_retry_max_s=0.06,
    lease_s=0.7, margin_s=0.1, guard_hang_s=0.15,
)  # fmt: skip
AAM = Profile(
    name="aam", renewal_s=1.0, election_min_s=2.0, election_max_s=4.0, prevote_retry_min_s=0.2, prevote_retry_max_s=0.6,
    lease_s=15.0, margin_s=1.0, probe_idle_s=2.0,
)  # fmt: skip
PROFILES: Mapping[str, Profile] = {profile.name: profile for profile in (LAN, FAST, AAM)}


def split_address(text: str, field: str) -> tuple[str, int]:
    """``host:port`` as a pair.

    Raises:
        ConfigError: it is something else.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{field}: {text!r} is no address, expected 'host:port'", field=field, value=text)
    return host.strip("[]"), int(port)


@attrs.frozen(kw_only=True)
class Config:
    """What a node needs to start; ``Config.load`` reads it from TOML whose keys are these fields."""

    node: NodeId
    cluster: str
    data_dir: Path
    links: Mapping[LinkName, str]
    """Link name -> the ``host:port`` under which others reach this node on it (TCP and UDP)."""
    bind: Mapping[LinkName, str] = attrs.field(factory=dict)
    """Link name -> where to listen, if that is another address (behind address translation)."""
    bootstrap: Mapping[NodeId, Mapping[LinkName, str]] = attrs.field(factory=dict)
    """The first voters and their addresses; read only while the store is empty."""
    profile: Profile = LAN
    store: str = "sqlite"
    role: Literal["voter", "learner", "client"] = "voter"
    key_file: Path | None = None
    """The 32-byte cluster key, mode 0600; default ``data_dir/cluster.key``."""
    run_dir: Path | None = None
    """Sockets and shims' deadlines, on a tmpfs; default below /run or XDG_RUNTIME_DIR."""
    management: str = ""
    """``host:port`` of vpxa's API for the center; empty: its Unix socket only."""
    isolation_addresses: Sequence[str] = ()
    """Pinged by a host that has lost the quorum; any answer means partitioned, not isolated."""
    hosts_file: Path | None = None
    """Kept correct for managed names; None: no hosts file is touched."""
    cpu_mhz: int = 8000
    memory_mib: int = 16384
    max_transaction_s: float = 0.5
    outbox_max_bytes: int = 64 << 20
    message_attempts: int = 5
    """How often a durable message is handled before it becomes a dead letter."""

    def __attrs_post_init__(self) -> None:
        parse_node_id(self.node)
        if not self.cluster:
            raise ConfigError("cluster: expected a name, found an empty string", field="cluster", value=self.cluster)
        if not self.links:
            raise ConfigError("links: expected at least one 'name = \"host:port\"'", field="links", value=self.links)
        for link, address in self.links.items():
            split_address(address, f"links.{link}")
        for link, address in self.bind.items():
            split_address(address, f"bind.{link}")
            if link not in self.links:
                raise ConfigError(f"bind.{link}: there is no links.{link}", field=f"bind.{link}", value=address)
        for node, addresses in self.bootstrap.items():
            parse_node_id(node)
            for link, address in addresses.items():
                split_address(address, f"bootstrap.{node}.{link}")
        if self.max_transaction_s <= 0:
            raise ConfigError("max_transaction_s: expected a positive number of seconds", field="max_transaction_s")
        if self.outbox_max_bytes < 1 << 20:
            raise ConfigError("outbox_max_bytes: expected at least 1048576", field="outbox_max_bytes")
        if self.message_attempts < 1:
            raise ConfigError("message_attempts: expected at least 1", field="message_attempts")

    @property
    def key_path(self) -> Path:
        return self.key_file or self.data_dir / "cluster.key"

    def bind_address(self, link: LinkName) -> str:
        return self.bind.get(link, self.links[link])

    @classmethod
    def load(cls, path: Path | str) -> Config:
        """Read a TOML file whose keys are the fields of this class; ``profile`` is a name (lan, fast, aam) or a table.

        Relative paths are relative to the file's folder.

        Raises:
            ConfigError: the file cannot be read or a key is unknown, missing or wrong; the text names file, key and what
                is expected.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                data = tomllib.load(file)
        except OSError as exc:
            raise ConfigError(f"{path}: cannot read the configuration: {exc.strerror}", field="", value=str(path)) from exc
        except tomllib.TOMLDecodeError as exc:
            raise ConfigError(f"{path}: not valid TOML: {exc}", field="", value=str(path)) from exc
        try:
            config = _converter(path.parent).structure(data, cls)
        except ConfigError as exc:
            raise ConfigError(f"{path}: {exc}", field=exc.field, value=exc.value) from exc
        except BaseValidationError as exc:
            field, text = _first_problem(exc, "")
            raise ConfigError(f"{path}: {text}", field=field) from exc
        return config


def _converter(base: Path) -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)

    def scalar(kind: type) -> None:
        def structure(value: object, _: object) -> object:
            if kind is float and type(value) is int:
                return float(value)
            if type(value) is not kind:
                raise ConfigError(f"expected {_WORDS[kind]}, found {value!r}", value=value)
            return value

        converter.register_structure_hook(kind, structure)

    for kind in _WORDS:
        scalar(kind)

    def to_path(value: object, _: object) -> Path:
        if not isinstance(value, str) or not value:
            raise ConfigError(f"expected a path, found {value!r}", value=value)
        return base / value

    def to_profile(value: object, _: object) -> Profile:
        if isinstance(value, str):
            if value not in PROFILES:
                raise ConfigError(f"expected one of {', '.join(PROFILES)} or a table, found {value!r}", value=value)
            return PROFILES[value]
        if isinstance(value, dict):
            known = cast(dict[str, Any], value)
            preset = known.get("base", "lan")
            if preset not in PROFILES:
                raise ConfigError(f"base: expected one of {', '.join(PROFILES)}, found {preset!r}", value=preset)
            unknown = known.keys() - {field.name for field in attrs.fields(Profile)} - {"base"}
            if unknown:
                raise ConfigError(f"unknown key {min(unknown)!r}", value=known[min(unknown)])
            bad = [key for key, item in known.items() if key.endswith("_s") and type(item) not in (int, float)]
            if bad:
                raise ConfigError(f"{bad[0]}: expected a number of seconds, found {known[bad[0]]!r}", value=known[bad[0]])
            return attrs.evolve(PROFILES[preset], **({"name": "custom"} | {k: v for k, v in known.items() if k != "base"}))
        raise ConfigError(f"expected a name or a table, found {value!r}", value=value)

    def to_role(value: object, _: object) -> object:
        if value not in ("voter", "learner", "client"):
            raise ConfigError(f"expected voter, learner or client, found {value!r}", value=value)
        return value

    converter.register_structure_hook(Path, to_path)
    converter.register_structure_hook(Profile, to_profile)
    converter.register_structure_hook_func(lambda kind: kind == Literal["voter", "learner", "client"], to_role)
    return converter


_WORDS: Mapping[type, str] = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def _first_problem(exc: BaseException, at: str) -> tuple[str, str]:
    """The key and the text of the first problem in cattrs' tree of exceptions."""
    if isinstance(exc, ForbiddenExtraKeysError):
        key = f"{at}{min(exc.extra_fields)}"
        return key, f"{key}: unknown key"
    if isinstance(exc, BaseExceptionGroup):
        inner = exc.exceptions[0]
        note = (getattr(inner, "__notes__", None) or [""])[0]
        name = getattr(note, "name", None)
        index = getattr(note, "index", None)
        step = name if isinstance(name, str) else index if isinstance(index, str | int) else ""
        return _first_problem(inner, f"{at}{step}." if step != "" else at)
    if isinstance(exc, KeyError):
        key = at.rstrip(".") or str(exc.args[0])
        return key, f"{key}: missing"
    key = at.rstrip(".")
    return key, f"{key}: {exc}" if key else str(exc)
