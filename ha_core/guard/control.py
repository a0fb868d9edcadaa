"""What is spoken on ``guard.sock`` and on the beat sockets, as bytes and dataclasses.

``guard.sock``: a Unix stream socket (mode 0600, in a directory of mode 0700); one JSON object per line, requests of at most
64 KiB, answers of at most 4 MiB.

    {"id": 7, "op": "start", "vm": "db", "lease": 12, "token": 15, "argv": [...], "env": {}, "workdir": "/", "shutdown_s": 2.0}
    {"id": 8, "op": "stop", "vm": "db", "token": 15, "shutdown_s": 2.0}
    {"id": 9, "op": "list"}      {"id": 10, "op": "subscribe"}      {"id": 11, "op": "status"}
    {"id": 12, "op": "end", "stop_vms": true}

Answers carry the request's id: {"id": 7, "ok": true, "run": {...}} or {"id": 7, "ok": false, "error": "stale-token", "text":
...}. After ``subscribe`` each change of a run comes as {"report": {...}}, beginning with the present state of all.

* ``start`` and ``stop`` are answered at once with the state reached; how it goes on is told by reports. Both are idempotent:
  a start of a token that is known answers with that run's state, whatever it is. One fencing token is one run: it is never
  started twice.
* ``stop`` of a token that never ran leaves a tombstone: that token will never be started. So each run in state ``stopped`` or
  ``failed`` is the evidence for *Released*: reaped, and this Assign will never be started.
* Errors: stale-token (a higher token is known), not-reaped (an older run is not gone yet: try again), no-lease (none, or
  expired), other-lease (the Assign stands under another lease token than the guard's), ending (the guard is going down),
  bad-request.

Beats are datagrams on ``<run_dir>/<process>.beat``: whoever watches a process binds the socket under its own name; each process
sends to the other two. A beat names its sender, pid and start time, so that beats of a dead predecessor count for nothing.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass, field
from typing import TypeAlias

MAX_LINE_BYTES = 64 * 1024
MAX_REPLY_BYTES = 4 << 20
MAX_TOKEN = (1 << 63) - 2
MAX_NAME_BYTES = 100
MAX_SHUTDOWN_S = 86_400
SOCKET_NAME = "guard.sock"
PROCESSES = ("guard", "aam", "vpxa")

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"


class ControlError(ValueError):
    """A line that is no request or answer, or a request that was refused; ``code`` as listed above."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True)
class StartRequest:
    vm: str
    lease: int
    token: int
    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    shutdown_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StopRequest:
    vm: str
    token: int
    shutdown_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ListRequest:
    """All runs, tombstones included."""


@dataclass(frozen=True, slots=True)
class SubscribeRequest:
    """The present state of all runs, then each change."""


@dataclass(frozen=True, slots=True)
class StatusRequest:
    """The lease, the agents and the containment."""


@dataclass(frozen=True, slots=True)
class EndRequest:
    """End the guard and the agents; ``stop_vms`` False leaves the VMs to their deadline, None: as configured."""

    stop_vms: bool | None = None


Request: TypeAlias = StartRequest | StopRequest | ListRequest | SubscribeRequest | StatusRequest | EndRequest


@dataclass(frozen=True, slots=True)
class RunReport:
    """The state of one run. ``event`` orders the reports of one guard ``instance`` (hex); within one kernel boot a later
    instance's numbers are higher too. ``state``: starting, running, stopping, stopped, failed; the last two mean reaped and
    never to be started again."""

    vm: str
    token: int
    lease: int
    state: str
    event: int
    instance: str
    exit_code: int | None = None
    text: str = ""


@dataclass(frozen=True, slots=True)
class AgentStatus:
    name: str
    pid: int
    state: str
    restarts: int


@dataclass(frozen=True, slots=True)
class GuardStatus:
    """``deadline_ns`` is CLOCK_BOOTTIME; 0 without a lease, -1 for a lease without a deadline (disarmed)."""

    host: str
    pid: int
    instance: str
    boot_id: str
    lease_token: int
    deadline_ns: int
    lease_ns: int
    margin_ns: int
    armed: bool
    renewals_sent: int
    renewals_confirmed: int
    last_confirmed_ns: int
    packets_refused: int
    containment: str
    agents: tuple[AgentStatus, ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer; of the payloads exactly that of the request's kind is set, none if ``error``. ``current``: with stale-token
    the fencing token known, with other-lease the lease token held."""

    id: int
    error: str = ""
    text: str = ""
    run: RunReport | None = None
    runs: tuple[RunReport, ...] | None = None
    status: GuardStatus | None = None
    current: int = 0


class LineDecoder:
    """Cuts a byte stream into lines of bounded length."""

    def __init__(self, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._buffer = bytearray()
        self._max = max_line_bytes

    def receive(self, data: bytes) -> list[bytes]:
        """Raises ControlError once a line is longer than allowed; the connection is then to be closed."""
        self._buffer += data
        *lines, rest = self._buffer.split(b"\n")
        if len(rest) > self._max or any(len(line) > self._max for line in lines):
            self._buffer.clear()
            raise ControlError("bad-request", f"a line is longer than {self._max} bytes")
        self._buffer = bytearray(rest)
        return [bytes(line) for line in lines if line]


_OPS: dict[str, type[Request]] = {
    "start": StartRequest, "stop": StopRequest, "list": ListRequest, "subscribe": SubscribeRequest, "status": StatusRequest,
    "end": EndRequest,
}  # fmt: skip
_OP_OF = {kind: op for op, kind in _OPS.items()}


def encode_request(number: int, request: Request) -> bytes:
    return _line({"id": number, "op": _OP_OF[type(request)], **asdict(request)})


def decode_request(line: bytes) -> tuple[int, Request]:
    """Raises ControlError("bad-request"): the text names the key and what was expected."""
    data = _object(line)
    number = _int(data, "id")
    op = data.get("op")
    if op == "start":
        argv = data.get("argv")
        if not isinstance(argv, list) or not argv or not all(_is_text(item) for item in argv):
            raise ControlError("bad-request", "argv: expected a list of strings, not empty")
        env = data.get("env", {})
        if not isinstance(env, dict) or not all(_is_text(item) for pair in env.items() for item in pair):
            raise ControlError("bad-request", "env: expected an object of strings")
        if any(not key or "=" in key for key in env):
            raise ControlError("bad-request", "env: a name is empty or contains '='")
        workdir = data.get("workdir", "/")
        if not isinstance(workdir, str) or not workdir or not _is_text(workdir):
            raise ControlError("bad-request", "workdir: expected a path")
        return number, StartRequest(
            _name(data), _int(data, "lease", 1), _int(data, "token", 1), tuple(str(item) for item in argv),
            {key: str(value) for key, value in env.items()}, workdir, _seconds(data),
        )  # fmt: skip
    if op == "stop":
        return number, StopRequest(_name(data), _int(data, "token", 1), _seconds(data))
    if op == "end":
        stop_vms = data.get("stop_vms")
        if stop_vms is not None and not isinstance(stop_vms, bool):
            raise ControlError("bad-request", "stop_vms: expected true, false or null")
        return number, EndRequest(stop_vms)
    for name, kind in (("list", ListRequest), ("subscribe", SubscribeRequest), ("status", StatusRequest)):
        if op == name:
            return number, kind()
    raise ControlError("bad-request", f"op: expected one of {', '.join(_OPS)}, found {str(op)[:40]!r}")


def request_id(line: bytes) -> int:
    """The id of a request that could not be decoded, for the answer; 0 if even that is missing."""
    try:
        return _int(_object(line), "id")
    except ControlError:
        return 0


def encode_reply(reply: Reply) -> bytes:
    if reply.error:
        return _line({"id": reply.id, "ok": False, "error": reply.error, "text": reply.text, "current": reply.current})
    data: dict[str, object] = {"id": reply.id, "ok": True}
    if reply.run is not None:
        data["run"] = asdict(reply.run)
    if reply.runs is not None:
        data["runs"] = [asdict(run) for run in reply.runs]
    if reply.status is not None:
        data["status"] = asdict(reply.status)
    return _line(data)


def encode_report(report: RunReport) -> bytes:
    return _line({"report": asdict(report)})


def decode_answer(line: bytes) -> Reply | RunReport:
    """What a client reads: an answer or a report. Raises ControlError."""
    data = _object(line)
    if "report" in data:
        return _run(data["report"])
    number = _int(data, "id")
    if data.get("ok") is not True:
        current = data.get("current")
        return Reply(
            number, str(data.get("error") or "unknown"), str(data.get("text") or ""),
            current=current if type(current) is int else 0,
        )  # fmt: skip
    run, runs, status = data.get("run"), data.get("runs"), data.get("status")
    return Reply(
        number,
        run=None if run is None else _run(run),
        runs=tuple(_run(item) for item in runs) if isinstance(runs, list) else None,
        status=None if status is None else _status(status),
    )


@dataclass(frozen=True, slots=True)
class Beat:
    name: str
    pid: int
    start_time: int
    number: int


_BEAT = struct.Struct(">4sQQQ8s")
_BEAT_MAGIC = b"HAB1"


def encode_beat(beat: Beat) -> bytes:
    return _BEAT.pack(_BEAT_MAGIC, beat.pid, beat.start_time, beat.number, beat.name.encode())


def decode_beat(data: bytes) -> Beat | None:
    """None for anything that is no beat."""
    if len(data) != _BEAT.size:
        return None
    magic, pid, start_time, number, name = _BEAT.unpack(data)
    text = name.rstrip(b"\0").decode("ascii", "replace")
    return Beat(text, pid, start_time, number) if magic == _BEAT_MAGIC and text in PROCESSES else None


def beat_path(run_dir: str, process: str) -> str:
    return f"{run_dir}/{process}.beat"


def _line(data: dict[str, object]) -> bytes:
    return json.dumps(data, separators=(",", ":")).encode() + b"\n"


def _object(line: bytes) -> dict[str, Json]:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        raise ControlError("bad-request", "the line is not JSON") from None
    if not isinstance(data, dict):
        raise ControlError("bad-request", "expected a JSON object")
    return data


def _int(data: dict[str, Json], key: str, minimum: int = 0) -> int:
    value = data.get(key)
    if type(value) is not int or not minimum <= value <= MAX_TOKEN:
        raise ControlError("bad-request", f"{key}: expected a whole number from {minimum}")
    return value


def _name(data: dict[str, Json]) -> str:
    value = data.get("vm")
    if not isinstance(value, str) or not value or not _is_text(value) or len(value.encode()) > MAX_NAME_BYTES:
        raise ControlError("bad-request", f"vm: expected a name of 1 to {MAX_NAME_BYTES} bytes")
    return value


def _is_text(value: Json) -> bool:
    """A string that the kernel takes: no NUL, and no half of a surrogate pair, which JSON can carry and UTF-8 cannot."""
    return isinstance(value, str) and "\0" not in value and not any("\ud800" <= char <= "\udfff" for char in value)


def _seconds(data: dict[str, Json]) -> float:
    value = data.get("shutdown_s", 0.0)
    if type(value) not in (int, float) or not isinstance(value, int | float) or not 0 <= value <= MAX_SHUTDOWN_S:
        raise ControlError("bad-request", f"shutdown_s: expected seconds from 0 to {MAX_SHUTDOWN_S}")
    return float(value)


def _run(data: Json) -> RunReport:
    if not isinstance(data, dict):
        raise ControlError("bad-request", "run: expected an object")
    exit_code = data.get("exit_code")
    return RunReport(
        _name(data), _int(data, "token", 1), _int(data, "lease"), str(data.get("state")), _int(data, "event"),
        str(data.get("instance")), exit_code if type(exit_code) is int else None, str(data.get("text") or ""),
    )  # fmt: skip


def _status(data: Json) -> GuardStatus:
    if not isinstance(data, dict):
        raise ControlError("bad-request", "status: expected an object")
    agents = data.get("agents")
    found = tuple(
        AgentStatus(str(item.get("name")), _int(item, "pid"), str(item.get("state")), _int(item, "restarts"))
        for item in (agents if isinstance(agents, list) else [])
        if isinstance(item, dict)
    )
    deadline_ns = data.get("deadline_ns")
    if type(deadline_ns) is not int:
        raise ControlError("bad-request", "deadline_ns: expected a whole number")
    return GuardStatus(
        host=str(data.get("host")),
        pid=_int(data, "pid"),
        instance=str(data.get("instance")),
        boot_id=str(data.get("boot_id")),
        lease_token=_int(data, "lease_token"),
        deadline_ns=deadline_ns,
        lease_ns=_int(data, "lease_ns"),
        margin_ns=_int(data, "margin_ns"),
        armed=data.get("armed") is True,
        renewals_sent=_int(data, "renewals_sent"),
        renewals_confirmed=_int(data, "renewals_confirmed"),
        last_confirmed_ns=_int(data, "last_confirmed_ns"),
        packets_refused=_int(data, "packets_refused"),
        containment=str(data.get("containment")),
        agents=found,
    )
