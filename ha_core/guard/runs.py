"""Carries out what the rules decide about runs: makes shims, writes their mappings, watches their inits, adopts those it
finds."""

from __future__ import annotations

import os
import selectors
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ha_core.guard.control import PROCESSES
from ha_core.guard.events import (
    NEVER,
    Event,
    KeepTombstone,
    KillRun,
    RunFound,
    RunGone,
    RunState,
    RunUp,
    StartRun,
    StopRun,
    WriteRun,
)
from ha_core.guard.kernel_timer import now_ns, probe_pid_namespace
from ha_core.guard.mapping import (
    SUFFIX,
    Containment,
    Field,
    RunMapping,
    RunPhase,
    boot_number,
    create_run,
    lock_free,
    open_run,
)
from ha_core.guard.processes import Process, boot_id, find_process, open_process, sample
from ha_core.guard.shim import Command, descendants, fork_shim

BOOT_MARK = "boot"
STARTING_TICK_NS = 10_000_000
_OVERDUE_NS = 50_000_000
_STALE_POLLS = 3
_INIT_ENDS_NS = 20_000_000
"""How long init has for the tree below it."""


@dataclass(slots=True)
class _Entry:
    mapping: RunMapping
    token: int
    child: int
    """The shim's pid if this process forked it and has not reaped it; 0: an earlier guard did; -1: it is dead."""
    shim: Process | None = None
    init: Process | None = None
    up: bool = False
    killed: bool = False
    """By this guard, because its lease was revoked."""
    orphan_ns: int = 0
    """Since when its init is without its shim, where no namespace ends it."""


class RunKeeper:
    """The living runs by VM name. ``tell`` feeds an event to the rules, ``log`` writes a line."""

    def __init__(
        self, run_dir: str, log_dir: str, host: str, selector: selectors.BaseSelector, tell: Callable[[Event], None],
        log: Callable[[str], None], *, containment: str,
    ) -> None:  # fmt: skip
        self._run_dir = run_dir
        self._log_dir = log_dir
        self._host = host
        self._selector = selector
        self._tell = tell
        self._log = log
        self._boot = boot_number(boot_id())
        self._entries: dict[str, _Entry] = {}
        self._files: dict[str, str] = {}
        self._children: list[int] = []
        self._namespaces = containment == "auto" and probe_pid_namespace()

    @property
    def containment(self) -> str:
        return "pid-namespace" if self._namespaces else "subreaper"

    def adopt(self) -> tuple[list[Event], bool]:
        """What earlier guards of this kernel boot left, and whether there was none at all (no mark in the run directory)."""
        mark = os.path.join(self._run_dir, BOOT_MARK)
        text = f"{self._boot}\n"
        try:
            with open(mark) as file:
                fresh = file.read() != text
        except FileNotFoundError:
            fresh = True
        found: dict[str, RunMapping] = {}
        for name in sorted(os.listdir(self._run_dir)):
            if not name.endswith(SUFFIX):
                continue
            path = os.path.join(self._run_dir, name)
            mapping = open_run(path)
            if mapping is None or mapping.get(Field.BOOT) != self._boot:
                os.unlink(path)
                continue
            other = found.get(mapping.vm)
            if other is not None and other.get(Field.TOKEN) > mapping.get(Field.TOKEN):
                mapping, other = other, mapping
            if other is not None:
                # Only a reaped run can have been replaced by a higher token.
                os.unlink(other.path)
                other.close()
            found[mapping.vm] = mapping
        events = [self._adopt_one(mapping) for mapping in found.values()]
        with open(mark, "w") as file:
            file.write(text)
        return list(events), fresh

    def _adopt_one(self, mapping: RunMapping) -> RunFound:
        self._files[mapping.vm] = mapping.path
        state, exit_code, why = RunState.STARTING, None, ""
        entry = _Entry(mapping, mapping.get(Field.TOKEN), 0)
        if mapping.get(Field.BURIED):
            state, why = RunState.STOPPED, "never started"
        elif not mapping.get(Field.INIT_PID) and lock_free(mapping.path) and not mapping.get(Field.INIT_PID):
            mapping.set(Field.BURIED, 1)
            state, why = RunState.FAILED, "never started: the guard ended meanwhile"
        else:
            self._look(entry)
            if mapping.get(Field.INIT_PID) and entry.init is None:
                gone = _describe(entry)
                state = RunState.STOPPED if gone.started else RunState.FAILED
                exit_code, why = gone.exit_code, gone.text
            elif mapping.get(Field.STATE) == RunPhase.RUNNING:
                state, entry.up = RunState.RUNNING, True
        found = RunFound(
            mapping.vm, entry.token, mapping.get(Field.LEASE_TOKEN), mapping.get(Field.DEADLINE), mapping.get(Field.SHUTDOWN),
            mapping.get(Field.STOP_BY), state, exit_code, why,
        )  # fmt: skip
        if state.reaped:
            self._release(entry)
        else:
            self._entries[mapping.vm] = entry
            self._log(f"adopted {mapping.vm} (token {entry.token})")
        return found

    # -- effects --

    def start(self, effect: StartRun, environment: Mapping[str, str]) -> None:
        order = effect.order
        try:
            mapping, lock = create_run(
                self._run_dir, order.vm, self._boot, token=order.token, lease_token=order.lease,
                deadline_ns=effect.deadline_ns, shutdown_ns=effect.shutdown_ns, poll_ns=effect.poll_ns,
            )  # fmt: skip
        except OSError as exc:
            self._tell(RunGone(order.vm, order.token, None, f"cannot make its run file: {exc.strerror}", started=False))
            return
        self._replace_file(order.vm, mapping.path)
        command = Command(
            order.argv, dict(environment) | order.env | self._identity(effect), order.workdir, self._log_path(order.vm)
        )
        try:
            pid = fork_shim(mapping, lock, command, namespaces=self._namespaces)
        except OSError as exc:
            mapping.set(Field.BURIED, 1)
            self._tell(RunGone(order.vm, order.token, None, f"cannot fork its shim: {exc.strerror}", started=False))
            return
        finally:
            os.close(lock)
        entry = _Entry(mapping, order.token, pid)
        entry.shim = open_process(pid)
        if entry.shim is not None:
            self._selector.register(entry.shim, selectors.EVENT_READ, lambda: self._check(entry))
        self._entries[order.vm] = entry

    def write(self, effect: WriteRun) -> None:
        entry = self._entry(effect.vm, effect.token)
        if entry is None:
            return
        mapping = entry.mapping
        urgent = mapping.get(Field.POLL) != effect.poll_ns or effect.deadline_ns < mapping.get(Field.DEADLINE)
        mapping.set(Field.LEASE_TOKEN, effect.lease_token)
        mapping.set(Field.POLL, effect.poll_ns)
        mapping.set(Field.DEADLINE, effect.deadline_ns)
        if urgent:
            self._wake(entry)

    def stop(self, effect: StopRun) -> None:
        entry = self._entry(effect.vm, effect.token)
        if entry is None:
            return
        entry.mapping.set(Field.STOP_BY, max(1, effect.stop_by_ns))
        self._look(entry)
        self._wake(entry)

    def kill(self, effect: KillRun) -> None:
        entry = self._entry(effect.vm, effect.token)
        if entry is not None:
            entry.killed = True
            entry.mapping.set(Field.STOP_BY, now_ns())
            self._look(entry)
            self._kill(entry)

    def bury(self, effect: KeepTombstone) -> None:
        try:
            mapping, lock = create_run(
                self._run_dir, effect.vm, self._boot, token=effect.token, lease_token=effect.lease_token, deadline_ns=1,
                shutdown_ns=0, poll_ns=0, buried=True,
            )  # fmt: skip
        except OSError as exc:
            self._log(f"cannot keep the tombstone of {effect.vm} (token {effect.token}): {exc.strerror}")
            return
        os.close(lock)
        self._replace_file(effect.vm, mapping.path)
        mapping.close()

    def forget(self, vm: str) -> None:
        """A reaped run, and its tombstone."""
        path = self._files.pop(vm, None)
        if path is not None:
            os.unlink(path)

    # -- watching --

    def next_tick_ns(self, now: int) -> int | None:
        """Runs that are not up yet, or end, are looked at often; the others with the guard's common tick."""
        urgent = any(not entry.up or entry.orphan_ns for entry in self._entries.values())
        return now + STARTING_TICK_NS if urgent else None

    def tick(self) -> None:
        now = now_ns()
        self._children = [pid for pid in self._children if not os.waitpid(pid, os.WNOHANG)[0]]
        for entry in list(self._entries.values()):
            self._check(entry)
            mapping = entry.mapping
            if self._entries.get(mapping.vm) is not entry:
                continue
            stop_by_ns = mapping.get(Field.STOP_BY)
            if stop_by_ns and now > stop_by_ns + _OVERDUE_NS:
                self._kill(entry)
            due_ns = min(mapping.get(Field.DEADLINE), stop_by_ns or NEVER)
            lag_ns = due_ns - mapping.get(Field.ARMED)
            if entry.shim is not None and entry.up and lag_ns > _STALE_POLLS * mapping.get(Field.POLL):
                # Somebody stopped the shim: it would die at the deadline that it armed last, although the lease is renewed.
                entry.shim.send(signal.SIGCONT)

    def _check(self, entry: _Entry) -> None:
        mapping = entry.mapping
        self._look(entry)
        if not mapping.get(Field.INIT_PID):
            # Lock first, record second: the shim records its init while it holds the lock.
            if lock_free(mapping.path) and not mapping.get(Field.INIT_PID):
                mapping.set(Field.BURIED, 1)
                self._gone(entry, RunGone(mapping.vm, entry.token, None, "its shim ended before it began", started=False))
            return
        if entry.init is None or entry.init.dead():
            self._gone(entry, _describe(entry))
            return
        if entry.shim is None or entry.shim.dead():
            self._forget_shim(entry)
            self._end_orphan(entry, entry.init)
        if not entry.up and mapping.get(Field.STATE) == RunPhase.RUNNING:
            entry.up = True
            self._tell(RunUp(mapping.vm, entry.token))

    def _end_orphan(self, entry: _Entry, init: Process) -> None:
        """Its shim is dead, so the run must end. In a namespace everything ends with init; without one init alone knows all that
        the VM forked, and ends it: only should it fail to (somebody stopped it) is that done from here, and init killed last."""
        if self._is_contained(entry):
            init.send(signal.SIGKILL)
            return
        now = now_ns()
        entry.orphan_ns = entry.orphan_ns or now
        if now < entry.orphan_ns + _INIT_ENDS_NS:
            return
        init.send(signal.SIGSTOP)  # it must not fork the VM just now
        alive = [pid for pid in descendants(init.pid) if (found := sample(pid)) is not None and found.state not in "ZX"]
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if not alive:
            init.send(signal.SIGKILL)

    @staticmethod
    def _is_contained(entry: _Entry) -> bool:
        return entry.mapping.get(Field.CONTAINMENT) == Containment.PID_NAMESPACE

    def _look(self, entry: _Entry) -> None:
        """Open pidfds of what has been recorded meanwhile."""
        mapping = entry.mapping
        if entry.shim is None and not entry.child and mapping.get(Field.SHIM_PID):
            entry.shim = open_process(mapping.get(Field.SHIM_PID), mapping.get(Field.SHIM_START))
            if entry.shim is not None:
                self._selector.register(entry.shim, selectors.EVENT_READ, lambda: self._check(entry))
        if entry.init is None and mapping.get(Field.INIT_PID):
            entry.init = open_process(mapping.get(Field.INIT_PID), mapping.get(Field.INIT_START))
            if entry.init is not None:
                self._selector.register(entry.init, selectors.EVENT_READ, lambda: self._check(entry))

    def _gone(self, entry: _Entry, event: RunGone) -> None:
        del self._entries[entry.mapping.vm]
        self._release(entry)
        self._tell(event)

    def _release(self, entry: _Entry) -> None:
        self._forget_shim(entry)
        if entry.init is not None:
            self._selector.unregister(entry.init)
            entry.init.close()
        entry.mapping.close()

    def _forget_shim(self, entry: _Entry) -> None:
        if entry.shim is not None:
            self._selector.unregister(entry.shim)
            entry.shim.close()
            entry.shim = None
        if entry.child > 0:
            self._children.append(entry.child)
            entry.child = -1

    def _kill(self, entry: _Entry) -> None:
        if entry.shim is not None:
            entry.shim.send(signal.SIGKILL)
        if entry.init is not None and (entry.shim is None or self._is_contained(entry)):
            self._end_orphan(entry, entry.init)

    def _wake(self, entry: _Entry) -> None:
        # Only once init is recorded: before that, the shim may not have blocked the signal yet, and it would die.
        if entry.shim is not None and entry.mapping.get(Field.INIT_PID):
            entry.shim.send(signal.SIGCONT)
            entry.shim.send(signal.SIGUSR1)

    def _entry(self, vm: str, token: int) -> _Entry | None:
        entry = self._entries.get(vm)
        return entry if entry is not None and entry.token == token else None

    def _replace_file(self, vm: str, path: str) -> None:
        old = self._files.get(vm)
        self._files[vm] = path
        if old is not None and old != path:
            os.unlink(old)

    def _log_path(self, vm: str) -> str:
        safe = "".join(char if char.isalnum() or char in "._-" else "_" for char in vm).lstrip(".") or "_"
        return os.path.join(self._log_dir, f"vm-{safe}.log")

    def _identity(self, effect: StartRun) -> dict[str, str]:
        order = effect.order
        return {
            "HA_CORE_VM": order.vm,
            "HA_CORE_HOST": self._host,
            "HA_CORE_FENCING_TOKEN": str(order.token),
            "HA_CORE_LEASE_TOKEN": str(order.lease),
        }


def _describe(entry: _Entry) -> RunGone:
    """How a run ended whose init is dead."""
    mapping = entry.mapping
    state, code = mapping.get(Field.STATE), mapping.get(Field.EXIT_CODE)
    if state == RunPhase.EXITED:
        how = f"ended with status {code}" if code >= 0 else f"ended by signal {-code}"
        return RunGone(mapping.vm, entry.token, code, how)
    if state == RunPhase.EXEC_FAILED:
        return RunGone(mapping.vm, entry.token, 127, f"cannot be run: {os.strerror(code)}", started=False)
    if state == RunPhase.SETUP_FAILED:
        return RunGone(mapping.vm, entry.token, None, "its shim could not be set up", started=False)
    if state == RunPhase.DAEMONISED:
        return RunGone(mapping.vm, entry.token, None, "killed: it left its process tree, which needs a PID namespace")
    stop_by_ns, now = mapping.get(Field.STOP_BY), now_ns()
    if stop_by_ns and now >= stop_by_ns and not entry.killed:
        return RunGone(mapping.vm, entry.token, -signal.SIGKILL, "killed after its shutdown time")
    if now >= mapping.get(Field.ARMED) and not entry.killed:
        return RunGone(mapping.vm, entry.token, -signal.SIGKILL, "killed at its deadline")
    return RunGone(mapping.vm, entry.token, -signal.SIGKILL, "killed")


def living_processes(run_dir: str) -> list[Process]:
    """All processes of a host's agents and VMs (shims and inits) that are alive; the caller closes them."""
    found = [find_process(run_dir, name) for name in PROCESSES]
    for name in sorted(os.listdir(run_dir)) if os.path.isdir(run_dir) else ():
        mapping = open_run(os.path.join(run_dir, name)) if name.endswith(SUFFIX) else None
        if mapping is not None:
            for pid, start in ((Field.SHIM_PID, Field.SHIM_START), (Field.INIT_PID, Field.INIT_START)):
                found.append(open_process(mapping.get(pid), mapping.get(start)))
            mapping.close()
    return [process for process in found if process is not None]
