"""What the guard is told when it is started: one JSON object, in a file or on the command line.

    {"host": "h1.example", "cluster": "prod", "run_dir": "/run/ha-core", "log_dir": "/var/log/ha-core",
     "key_file": "/var/lib/ha-core/cluster.key", "links": {"a": "127.1.0.1:7400"},
     "renewal_s": 0.15, "guard_hang_s": 0.5, "agent_hang_s": 1.0,
     "agents": {"aam": ["/usr/bin/python3", "-m", "..."], "vpxa": [...]}}

``links``: link name -> the address that this host's endpoint is bound to; the guard binds the same host with a port of its own.
``run_dir`` lies on a tmpfs. Optional: ``environment`` (added to the agents' own), ``agent_start_s`` (10: until an agent's first
beat), ``stop_vms`` (true: SIGTERM to the guard ends the VMs in order; false: leaves them to their deadline), ``containment``
("auto" or "subreaper"), ``nice`` (-10: of guard and shims, where allowed; agents and VMs keep what the guard was started with),
``boot_id_file`` (where the lease's boot id is read; another file than the kernel's makes sense only
where a whole host is played by some processes).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields

from ha_core.guard.primaries import split_address

DEFAULT_NICE = -10
KERNEL_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class SettingsError(ValueError):
    """The text names the source, the key and what is expected."""


@dataclass(frozen=True, slots=True)
class Settings:
    host: str
    cluster: str
    run_dir: str
    log_dir: str
    key_file: str
    links: dict[str, str]
    renewal_s: float
    guard_hang_s: float
    agent_hang_s: float
    agents: dict[str, list[str]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    agent_start_s: float = 10.0
    stop_vms: bool = True
    containment: str = "auto"
    nice: int = DEFAULT_NICE
    boot_id_file: str = KERNEL_BOOT_ID


def load_settings(path: str) -> Settings:
    """Raises SettingsError."""
    try:
        with open(path) as file:
            text = file.read()
    except OSError as exc:
        raise SettingsError(f"{path}: cannot read the guard's settings: {exc.strerror}") from None
    return parse_settings(text, path)


def parse_settings(text: str, source: str) -> Settings:
    """Raises SettingsError."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise SettingsError(f"{source}: not valid JSON: {exc}") from None
    if not isinstance(data, dict):
        raise SettingsError(f"{source}: expected a JSON object")
    for key in data:
        if key not in {item.name for item in fields(Settings)}:
            raise SettingsError(f"{source}: {key}: unknown key")
    for key, check, words in _CHECKS:
        if key not in data:
            if key in _REQUIRED:
                raise SettingsError(f"{source}: {key}: missing, expected {words}")
        elif not check(data[key]):
            raise SettingsError(f"{source}: {key}: expected {words}, found {str(data[key])[:60]!r}")
    return Settings(**data)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value) and "\0" not in value


def _is_seconds(value: object) -> bool:
    return type(value) in (int, float) and isinstance(value, int | float) and 0.01 <= value <= 3600


def _is_texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _is_links(value: object) -> bool:
    return _is_texts(value) and isinstance(value, dict) and bool(value) and all(split_address(item) for item in value.values())


def _is_agents(value: object) -> bool:
    return isinstance(value, dict) and all(
        name in ("aam", "vpxa") and isinstance(argv, list) and argv and all(_is_text(item) for item in argv)
        for name, argv in value.items()
    )


_CHECKS = (
    ("host", _is_text, "a host's full name"),
    ("cluster", _is_text, "the cluster's name"),
    ("run_dir", _is_text, "a directory on a tmpfs"),
    ("log_dir", _is_text, "a directory"),
    ("key_file", _is_text, "the path of the cluster key"),
    ("links", _is_links, "an object of 'name': 'host:port'"),
    ("renewal_s", _is_seconds, "seconds"),
    ("guard_hang_s", _is_seconds, "seconds"),
    ("agent_hang_s", _is_seconds, "seconds"),
    ("agents", _is_agents, "an object with the command (a list of strings) of aam and vpxa"),
    ("environment", _is_texts, "an object of strings"),
    ("agent_start_s", _is_seconds, "seconds"),
    ("stop_vms", lambda value: isinstance(value, bool), "true or false"),
    ("containment", lambda value: value in ("auto", "subreaper"), "'auto' or 'subreaper'"),
    ("nice", lambda value: type(value) is int and -20 <= value <= 19, "a whole number from -20 to 19"),
    ("boot_id_file", _is_text, "a path"),
)
_REQUIRED = frozenset(
    ("host", "cluster", "run_dir", "log_dir", "key_file", "links", "renewal_s", "guard_hang_s", "agent_hang_s")
)
