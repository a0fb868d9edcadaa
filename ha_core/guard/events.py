"""What the guard's rules are told and what they ask for: the seam between ``rules`` and the loop, or the simulator."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TypeAlias

from ha_core.guard.control import Reply, RunReport, StartRequest, StopRequest
from ha_core.guard.renewal import Renewal, RenewalAnswer

NEVER = (1 << 63) - 1
"""The deadline of a run under a lease that has none."""


class RunState(enum.Enum):
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def reaped(self) -> bool:
        return self in (RunState.STOPPED, RunState.FAILED)


@dataclass(slots=True)
class Run:
    """One run of one VM on this host. ``deadline_ns`` is what its shim may hold at most; ``lost``: never extended again."""

    vm: str
    token: int
    lease_token: int
    state: RunState
    deadline_ns: int = 0
    shutdown_ns: int = 0
    stop_by_ns: int = 0
    event: int = 0
    exit_code: int | None = None
    text: str = ""
    lost: bool = False


# -- told --


@dataclass(frozen=True, slots=True)
class Answered:
    """An authentic answer arrived."""

    answer: RenewalAnswer


@dataclass(frozen=True, slots=True)
class Asked:
    """A request over the control socket; the Reply effect carries ``request`` back."""

    request: int
    order: StartRequest | StopRequest


@dataclass(frozen=True, slots=True)
class RunFound:
    """Left by an earlier guard. A run that is not reaped is watched by the shell, which tells RunGone."""

    vm: str
    token: int
    lease_token: int
    deadline_ns: int
    shutdown_ns: int
    stop_by_ns: int
    state: RunState
    exit_code: int | None = None
    text: str = ""


@dataclass(frozen=True, slots=True)
class RunUp:
    vm: str
    token: int


@dataclass(frozen=True, slots=True)
class RunGone:
    """Init's pidfd said so, or the run certainly never began (``started`` False)."""

    vm: str
    token: int
    exit_code: int | None
    text: str
    started: bool = True


@dataclass(frozen=True, slots=True)
class EndAsked:
    stop_vms: bool


@dataclass(frozen=True, slots=True)
class Rejoined:
    """There is another cluster key: the host has joined another cluster, or its first one."""


Event: TypeAlias = Answered | Asked | RunFound | RunUp | RunGone | EndAsked | Rejoined

# -- asked for --


@dataclass(frozen=True, slots=True)
class SendRenewal:
    """To all primaries, on all links."""

    renewal: Renewal


@dataclass(frozen=True, slots=True)
class WriteRun:
    """Write lease token and deadline to the run's mapping, and how often its shim is to re-read it: (L - M) / 6."""

    vm: str
    token: int
    lease_token: int
    deadline_ns: int
    poll_ns: int


@dataclass(frozen=True, slots=True)
class StartRun:
    order: StartRequest
    deadline_ns: int
    shutdown_ns: int
    poll_ns: int


@dataclass(frozen=True, slots=True)
class StopRun:
    """Ask the run to end; its shim kills it at ``stop_by_ns``, whatever becomes of the guard."""

    vm: str
    token: int
    stop_by_ns: int


@dataclass(frozen=True, slots=True)
class KillRun:
    vm: str
    token: int


@dataclass(frozen=True, slots=True)
class KeepTombstone:
    """Remember beyond this guard's life that ``token`` will never be started."""

    vm: str
    token: int
    lease_token: int


@dataclass(frozen=True, slots=True)
class ForgetRun:
    """A reaped run, or the tombstone of one, of a cluster that this host has left."""

    vm: str


@dataclass(frozen=True, slots=True)
class Replied:
    request: int
    reply: Reply


@dataclass(frozen=True, slots=True)
class Reported:
    report: RunReport


@dataclass(frozen=True, slots=True)
class Noted:
    """One line for the log."""

    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The orderly end is reached: nothing is left that this guard must wait for."""


Effect: TypeAlias = (
    SendRenewal | WriteRun | StartRun | StopRun | KillRun | KeepTombstone | ForgetRun | Replied | Reported | Noted | Ended
)
