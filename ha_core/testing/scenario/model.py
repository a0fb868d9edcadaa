"""What a scenario file says, as records.

The steps are the table ``STEPS``: words in lower case stand for themselves, ``a|b`` for either, words in capitals for a name or a
number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from ha_core.config import Profile
from ha_core.errors import ConfigError
from ha_core.testing.scenario.lines import Lines

STEPS: Sequence[str] = (
    "power HOST on|off",
    "network HOST on|off",
    "network HOST loss|duplicate|reorder SHARE",
    "network HOST delay|jitter SECONDS",
    "network HOST clear",
    "path HOST PATH on|off",
    "path HOST PATH in|out off",
    "link HOST HOST on|off",
    "link HOST -> HOST on|off",
    "agent HOST aam|vpxa|guard|all kill|stop|continue",
    "freeze HOST SECONDS",
    "disk HOST slow SECONDS",
    "disk HOST full|fail|lose|ok",
    "clock HOST jump|rate NUMBER",
    "fence HOST ok|fail",
    "fence HOST slow SECONDS",
    "shutdown HOST",
    "reboot HOST",
    "maintenance HOST on|off",
    "host HOST add|remove",
    "vm VM start|stop|ignore|add|remove",
    "vm VM stop after SECONDS",
    "vm VM migrate|relocate|moved HOST",
    "vm VM load AMOUNT AMOUNT",
    "disarm freeze|ignore",
    "arm",
    "crash-vm VM",
    "isolation-address HOST on|off",
    "center on|off",
    "storage HOST on|off",
)


class ScenarioError(ConfigError):
    """A scenario file is faulty; the text names file, line and what is wrong."""


@attrs.frozen
class Step:
    """``words`` is the step as written, word by word; numbers are parsed where they are used."""

    number: int
    """1, 2, ... in the order of the file."""
    at_s: float
    line: int
    words: Sequence[str]

    @property
    def text(self) -> str:
        return " ".join(self.words)


@attrs.frozen(kw_only=True)
class HostSpec:
    name: str
    line: int
    power: bool = False
    paths: int = 2
    cpu_mhz: int = 8000
    memory_mib: int = 16384
    store: str = "sqlite"


@attrs.frozen(kw_only=True)
class VmSpec:
    name: str
    line: int
    host: str = ""
    state: str = "started"
    priority: str = "medium"
    after: Sequence[str] = ()
    cpu_mhz: int = 500
    memory_mib: int = 512
    fail_start: int = 0
    fail_start_on: Mapping[str, int] = attrs.field(factory=dict)
    """Host -> how many starts fail there; -1: always."""
    fail_stop: int = 0
    fail_migrate: int = 0
    max_restart: int = 1
    max_relocate: int = 1
    failback: bool = True
    shutdown_s: float = 5.0
    start_s: float = 1.0
    safety: str = "lease"


@attrs.frozen(kw_only=True)
class RuleSpec:
    line: int
    kind: str
    vms: Sequence[str]
    hosts: Mapping[str, int] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Expect:
    """What must hold, ``at_s`` seconds into play or at the end; None: not asked for."""

    line: int
    at_s: float
    after_step: int = 0
    vm: str = ""
    host: str | None = None
    within_s: float | None = None
    not_on: Sequence[str] = ()
    state: str | None = None
    undisturbed: bool | None = None
    order: Sequence[str] = ()
    overlaps: int | None = None
    fenced: Sequence[str] | None = None
    leader: str | None = None
    messages_lost: int | None = None
    rules: bool | None = None
    host_state: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Scenario:
    path: str
    title: str
    profile: Profile
    until_s: float
    voters: int
    witness: bool
    leader: str
    formed: bool
    admission: tuple[str, int, Sequence[str]]
    """Policy, tolerate, failover hosts."""
    retries_s: Sequence[float]
    fencing: str
    shutdown: str
    messages_per_s: float
    hosts: Sequence[HostSpec]
    vms: Sequence[VmSpec]
    rules: Sequence[RuleSpec]
    steps: Sequence[Step]
    expects: Sequence[Expect]
    lines: Lines = attrs.field(eq=False, repr=False)

    def error(self, text: str, table: str, number: int = 0, key: str = "") -> ScenarioError:
        """Something is wrong with the ``number``-th (from 0) table of that name, or with one of its keys."""
        line = self.lines.of(table, number, key)
        return ScenarioError(f"{self.path}:{line}: {text}", field=f"{table}.{key}".strip("."))
