"""The ``process`` driver: any command as a VM under a shim, through the guard's control socket.

The guard may be replaced at any moment: a call that loses its connection is made again (all of them are idempotent), and the
stream of reports reconnects and begins with the present state of all.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType

import trio

from ha_core.errors import (
    DriverTimeoutError,
    OperationFailedError,
    StaleFencingTokenError,
    StartRefusedError,
)
from ha_core.guard.control import (
    MAX_REPLY_BYTES,
    SOCKET_NAME,
    ControlError,
    GuardStatus,
    LineDecoder,
    ListRequest,
    Reply,
    Request,
    RunReport,
    StartRequest,
    StatusRequest,
    StopRequest,
    SubscribeRequest,
    decode_answer,
    encode_request,
)
from ha_core.ids import FencingToken, VmName
from ha_core.interfaces import VmReport, VmSpec

_RETRY_S = 0.02
_CHUNK_BYTES = 65_536
_REAPED = ("stopped", "failed")


class ProcessHypervisor:
    """Drives the guard whose run directory is ``run_dir``; ``timeout_s`` bounds how long a guard may be missing."""

    name = "process"
    outlives_agents = False

    def __init__(self, run_dir: Path | str, *, timeout_s: float = 10.0) -> None:
        self._path = str(Path(run_dir) / SOCKET_NAME)
        self._timeout_s = timeout_s

    async def start(self, spec: VmSpec, *, lease: int, token: FencingToken) -> None:
        """Start the run; returns once the command was executed (or the run of this token was known already).

        Raises:
            StaleFencingTokenError: the guard knows a higher token of this VM.
            StartRefusedError: not now: the older run is not reaped, or the guard does not hold this lease.
            OperationFailedError: it cannot be run, or ``spec.options`` are wrong.
            DriverTimeoutError: no guard answered.
        """
        reply = await self._call(_start_request(spec, lease, token))
        if reply.error == "stale-token":
            raise StaleFencingTokenError(reply.text, token=token, current=reply.current)
        if reply.error == "bad-request":
            raise OperationFailedError(f"{spec.name}: {reply.text}")
        if reply.error:
            raise StartRefusedError(reply.text, code=reply.error)
        run = await self._wait_while(("starting",), spec.name, token, self._timeout_s)
        if run.state == "failed":
            raise OperationFailedError(f"{spec.name}: {run.text}")

    async def stop(self, name: VmName, *, token: FencingToken, shutdown_s: float) -> None:
        """End the run of ``token`` (its shim kills it after ``shutdown_s``), or promise that it never begins.

        Returns once it is gone and certain never to be started.

        Raises:
            StartRefusedError: an older run of the VM is still there, stop that first.
            DriverTimeoutError: no guard answered, or the run outlived SIGKILL.
        """
        reply = await self._call(StopRequest(name, token, shutdown_s))
        if reply.error:
            raise StartRefusedError(reply.text, code=reply.error)
        if reply.run is None or reply.run.state not in _REAPED:
            await self._wait_while(("starting", "running", "stopping"), name, token, shutdown_s + self._timeout_s)

    async def list(self) -> Sequence[VmReport]:
        """All runs that the guard knows, those that are reaped included."""
        return [_report(run) for run in (await self._call(ListRequest())).runs or ()]

    async def status(self) -> GuardStatus:
        """The host's lease, the agents and the containment."""
        status = (await self._call(StatusRequest())).status
        if status is None:
            raise OperationFailedError(f"{self._path}: the guard gave no status")
        return status

    def reports(self) -> Reports:
        """Each change as it happens, across restarts of the guard; close it (``async with`` or ``aclose``)."""
        return Reports(self._path)

    async def _wait_while(self, states: Sequence[str], name: str, token: int, timeout_s: float) -> RunReport:
        with trio.move_on_after(timeout_s):
            while True:
                runs = (await self._call(ListRequest())).runs or ()
                run = next((run for run in runs if run.vm == name and run.token >= token), None)
                if run is not None and (run.state not in states or run.token > token):
                    return run
                await trio.sleep(_RETRY_S)
        raise DriverTimeoutError(f"{name}: still {states[-1]} after {timeout_s:g} s", after_s=timeout_s)

    async def _call(self, request: Request) -> Reply:
        with trio.move_on_after(self._timeout_s):
            while True:
                try:
                    return await self._call_once(request)
                except OSError:
                    await trio.sleep(_RETRY_S)
                except ControlError as exc:
                    raise OperationFailedError(f"{self._path}: the guard answered nonsense: {exc}") from exc
        raise DriverTimeoutError(f"{self._path}: no guard answered for {self._timeout_s:g} s", after_s=self._timeout_s)

    async def _call_once(self, request: Request) -> Reply:
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            await client.connect(self._path)
            await _send_all(client, encode_request(1, request))
            decoder = LineDecoder(MAX_REPLY_BYTES)
            while True:
                data = await client.recv(_CHUNK_BYTES)
                if not data:
                    raise ConnectionResetError
                for line in decoder.receive(data):
                    answer = decode_answer(line)
                    if isinstance(answer, Reply):
                        return answer


class Reports(AsyncIterator[VmReport]):
    """Reports of all runs, each newer than the one before it; never ends by itself."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._client: trio.socket.SocketType | None = None
        self._decoder = LineDecoder(MAX_REPLY_BYTES)
        self._ready: list[RunReport] = []
        self._events: dict[str, int] = {}

    async def __aenter__(self) -> Reports:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Reports:
        return self

    async def __anext__(self) -> VmReport:
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            while self._ready:
                run = self._ready.pop(0)
                if run.event > self._events.get(run.vm, 0):
                    self._events[run.vm] = run.event
                    return _report(run)
            try:
                await self._receive()
            except OSError:
                self._drop()
                await trio.sleep(_RETRY_S)

    async def aclose(self) -> None:
        self._drop()
        await trio.lowlevel.checkpoint()

    async def _receive(self) -> None:
        if self._client is None:
            self._client = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._decoder = LineDecoder(MAX_REPLY_BYTES)
            await self._client.connect(self._path)
            await _send_all(self._client, encode_request(1, SubscribeRequest()))
        data = await self._client.recv(_CHUNK_BYTES)
        if not data:
            raise ConnectionResetError
        try:
            answers = [decode_answer(line) for line in self._decoder.receive(data)]
        except ControlError as exc:
            raise ConnectionResetError(str(exc)) from exc
        self._ready += [answer for answer in answers if isinstance(answer, RunReport)]

    def _drop(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


async def _send_all(client: trio.socket.SocketType, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[await client.send(view) :]


def _start_request(spec: VmSpec, lease: int, token: int) -> StartRequest:
    unknown = spec.options.keys() - {"argv", "env", "workdir"}
    if unknown:
        raise OperationFailedError(
            f"{spec.name}: options.{min(unknown)}: unknown key; the process driver has argv, env, workdir"
        )
    argv, env, workdir = spec.options.get("argv"), spec.options.get("env", {}), spec.options.get("workdir", "/")
    if not isinstance(argv, list | tuple) or not argv or not all(isinstance(item, str) for item in argv):
        raise OperationFailedError(f"{spec.name}: options.argv: expected a list of strings, found {argv!r}")
    if not isinstance(env, dict) or not all(isinstance(item, str) for pair in env.items() for item in pair):
        raise OperationFailedError(f"{spec.name}: options.env: expected a table of strings, found {env!r}")
    if not isinstance(workdir, str):
        raise OperationFailedError(f"{spec.name}: options.workdir: expected a path, found {workdir!r}")
    return StartRequest(spec.name, lease, token, tuple(argv), dict(env), workdir, spec.shutdown_s)


def _report(run: RunReport) -> VmReport:
    return VmReport(VmName(run.vm), FencingToken(run.token), run.state, run.event, run.exit_code, run.text, run.instance)
