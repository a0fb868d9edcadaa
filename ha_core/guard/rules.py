"""What the guard decides about the host's lease and its VMs, without I/O: the loop and the simulator both drive this machine.

Rules (numbers from the lease rules of docs/guarantees.md):

* Deadline = when the renewal was *created* + L - M; the answer's arrival never enters (L4). Without a lease, or after it
  expired or was revoked, the guard asks for a Grant and never renews the old token again (L5).
* A deadline is written only for runs stamped with the guard's own token (L1). A Grant that continues older tokens re-stamps
  their runs; every other run keeps the deadline it has. A new guard therefore extends nothing before its first answer.
* A run is started only under the very lease token that the guard holds, before its deadline, once per fencing token, never
  below a known fencing token, and never while an older run of the VM is not reaped (L7).
* A run in state stopped or failed is evidence: reaped, and this fencing token will never be started. It is kept as a tombstone.
* A lease without a deadline (disarmed) writes ``NEVER``. A token may lose its deadline, because no entry can revoke it then;
  it never gets one back: that takes a new Grant.
* Found revoked, runs are killed at once: their copies may already be on their way elsewhere.
* Another cluster counts its tokens anew: after joining one, what is reaped is forgotten, and what still lives keeps the
  deadline that it has.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from ha_core.guard.control import Reply, RunReport, StartRequest, StopRequest
from ha_core.guard.events import (
    NEVER,
    Answered,
    Asked,
    Effect,
    EndAsked,
    Ended,
    Event,
    ForgetRun,
    KeepTombstone,
    KillRun,
    Noted,
    Rejoined,
    Replied,
    Reported,
    Run,
    RunFound,
    RunGone,
    RunState,
    RunUp,
    SendRenewal,
    StartRun,
    StopRun,
    WriteRun,
)
from ha_core.guard.renewal import Renewal, RenewalAnswer, Status

MAX_RUNS = 4096
_MAX_PENDING = 256
_SHORTEST_POLL_NS = 10_000_000
_DISARMED_POLL_NS = 250_000_000


class GuardRules:
    """One guard process. Invariants: at most one run per VM, the one with the highest token ever seen; every unreaped run's
    deadline was confirmed under its own lease token; ``lease_token`` is 0 or unexpired as of the last call."""

    def __init__(
        self, *, host: str, boot_id: bytes, instance: bytes, renewal_ns: int, now_ns: int, fresh: bool = False
    ) -> None:
        """``fresh``: no earlier guard of this kernel boot has left its mark in the run directory. If the cluster knows better
        (its Grant continues an older one), runs may be alive of which nothing is known here: then nothing is started, and
        nothing is said to be reaped, until their deadlines are past."""
        self.host = host
        self.boot_id = boot_id
        self.instance = instance
        self.renewal_ns = renewal_ns
        self.lease_token = 0
        self.deadline_ns = 0
        self.lease_ns = 0
        self.margin_ns = 0
        self.armed = True
        self.ending = False
        self.sent = 0
        self.confirmed = 0
        self.last_confirmed_ns = 0
        self.hints: tuple[tuple[str, str], ...] = ()
        self.runs: dict[str, Run] = {}
        self._pending: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self._next_renewal_ns = now_ns
        self._event = 0
        self._fresh = fresh
        self._blind_until_ns = 0
        self._ended = False
        self._effects: list[Effect] = []

    # -- the contract of machines --

    def receive(self, events: Sequence[Event], now_ns: int) -> None:
        self._expire(now_ns)
        for event in events:
            match event:
                case Answered(answer):
                    self._answered(answer, now_ns)
                case Asked(request, StartRequest() as order):
                    self._effects.append(Replied(request, self._start(order, now_ns)))
                case Asked(request, StopRequest() as stop):
                    self._effects.append(Replied(request, self._stop(stop, now_ns)))
                case RunFound():
                    self._found(event, now_ns)
                case RunUp(vm, token):
                    run = self._run(vm, token)
                    if run is not None and run.state is RunState.STARTING:
                        self._enter(run, RunState.RUNNING, now_ns)
                case RunGone():
                    self._gone(event, now_ns)
                case EndAsked(stop_vms):
                    self._end(stop_vms, now_ns)
                case Rejoined():
                    self._rejoin(now_ns)

    def handle_timer(self, now_ns: int) -> None:
        self._expire(now_ns)
        if now_ns >= self._next_renewal_ns:
            self._renew(now_ns)

    def next_timer(self) -> int | None:
        if self.lease_token and self.armed:
            return min(self._next_renewal_ns, self.deadline_ns)
        return self._next_renewal_ns

    def take_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    # -- what others read --

    def holds_lease(self, now_ns: int) -> bool:
        return self.lease_token != 0 and now_ns < self.deadline_ns

    def reports(self) -> tuple[RunReport, ...]:
        """The present state of all runs, tombstones included, by name."""
        return tuple(self._report(self.runs[vm]) for vm in sorted(self.runs))

    def check(self) -> None:
        """Raises AssertionError for a broken invariant; the simulator calls it after each step."""
        for run in self.runs.values():
            if run.state.reaped or run.lost or run.lease_token != self.lease_token:
                continue
            if run.deadline_ns not in (NEVER, self.deadline_ns + run.shutdown_ns) and run.deadline_ns > self.deadline_ns:
                raise AssertionError(f"run {run.vm} has a deadline that its lease does not give")

    # -- the lease --

    def _renew(self, now_ns: int) -> None:
        self.sent += 1
        self._pending[self.sent] = (now_ns, self.lease_token)
        if len(self._pending) > _MAX_PENDING:
            self._pending.popitem(last=False)
        self._next_renewal_ns = now_ns + self.renewal_ns
        renewal = Renewal(self.host, self.boot_id, self.instance, self.lease_token, self.sent, now_ns)
        self._effects.append(SendRenewal(renewal))

    def _expire(self, now_ns: int) -> None:
        if self.lease_token and now_ns >= self.deadline_ns:
            self._effects.append(Noted(f"lease {self.lease_token} expired: no primary confirmed it in time"))
            self._lose_lease(now_ns, "lease expired", kill=False)

    def _lose_lease(self, now_ns: int, text: str, *, kill: bool) -> None:
        lost, self.lease_token, self.deadline_ns = self.lease_token, 0, 0
        self._pending.clear()
        self._next_renewal_ns = now_ns
        for run in self._live():
            if run.lease_token == lost:
                self._lose_run(run, now_ns, text, kill=kill)

    def _lose_run(self, run: Run, now_ns: int, text: str, *, kill: bool) -> None:
        run.lost = True
        run.text = text
        if kill:
            self._effects.append(KillRun(run.vm, run.token))
        if run.state is not RunState.STOPPING:
            self._enter(run, RunState.STOPPING, now_ns)

    def _rejoin(self, now_ns: int) -> None:
        self._effects.append(Noted("there is another cluster key: a lease is asked for anew"))
        self._lose_lease(now_ns, left := "its host has left the cluster", kill=False)
        self.hints = ()
        for run in self._live():
            if not run.lost:
                self._lose_run(run, now_ns, left, kill=False)
        for vm in [vm for vm, run in self.runs.items() if run.state.reaped]:
            del self.runs[vm]
            self._effects.append(ForgetRun(vm))

    def _answered(self, answer: RenewalAnswer, now_ns: int) -> None:
        sent = self._pending.get(answer.number) if answer.instance == self.instance else None
        if sent is None:
            return
        created_ns, asked_token = sent
        for number in [number for number in self._pending if number <= answer.number]:
            del self._pending[number]
        if answer.hints:
            self.hints = answer.hints
        if answer.status is Status.CONFIRMED:
            self._confirmed(answer, created_ns, now_ns)
        elif answer.status is Status.REVOKED and answer.lease_token == asked_token == self.lease_token != 0:
            self._effects.append(Noted(f"lease {self.lease_token} was revoked"))
            self._lose_lease(now_ns, "lease revoked", kill=True)
        elif answer.status is Status.REFUSED:
            self._effects.append(Noted("the active primary refuses this host a lease"))

    def _confirmed(self, answer: RenewalAnswer, created_ns: int, now_ns: int) -> None:
        token = answer.lease_token
        deadline_ns = created_ns + answer.lease_ns - answer.margin_ns if answer.armed else NEVER
        if token == 0 or token < self.lease_token or deadline_ns <= now_ns:
            return
        if token == self.lease_token:
            if (answer.lease_ns, answer.margin_ns) != (self.lease_ns, self.margin_ns) or (answer.armed and not self.armed):
                self._effects.append(Noted(f"lease {token}: an answer with other terms than its Grant was ignored"))
                return
            self.armed = answer.armed
            self.deadline_ns = max(self.deadline_ns, deadline_ns)
        else:
            self._granted(answer, deadline_ns, now_ns)
        self.confirmed += 1
        self.last_confirmed_ns = now_ns
        for run in self._live():
            if run.lease_token == token and not run.lost:
                run.deadline_ns = self._deadline_of(run)
                self._effects.append(WriteRun(run.vm, run.token, token, run.deadline_ns, self._poll_ns()))

    def _granted(self, answer: RenewalAnswer, deadline_ns: int, now_ns: int) -> None:
        token = answer.lease_token
        oldest = answer.continued_token or token
        self._effects.append(Noted(f"lease {token} granted" + (f", continues {oldest}" if oldest < token else "")))
        self.lease_token, self.deadline_ns = token, deadline_ns
        self.lease_ns, self.margin_ns, self.armed = answer.lease_ns, answer.margin_ns, answer.armed
        if self._fresh and oldest < token:
            self._blind_until_ns = now_ns + answer.lease_ns if answer.armed else NEVER
        self._fresh = False
        for run in self._live():
            if oldest <= run.lease_token <= token and not run.lost:
                run.lease_token = token
            elif run.lease_token < oldest:
                self._lose_run(run, now_ns, "lease revoked", kill=True)

    def _deadline_of(self, run: Run) -> int:
        return NEVER if self.deadline_ns == NEVER else self.deadline_ns + run.shutdown_ns

    def _poll_ns(self) -> int:
        return max(_SHORTEST_POLL_NS, (self.lease_ns - self.margin_ns) // 6) if self.armed else _DISARMED_POLL_NS

    # -- runs --

    def _start(self, order: StartRequest, now_ns: int) -> Reply:
        known = self.runs.get(order.vm)
        if known is not None and known.token == order.token:
            return Reply(0, run=self._report(known))
        if known is not None and known.token > order.token:
            return Reply(0, "stale-token", f"{order.vm}: token {order.token} is older than {known.token}", current=known.token)
        if known is not None and not known.state.reaped:
            return Reply(0, "not-reaped", f"{order.vm}: the run with token {known.token} is not gone yet")
        if self.ending:
            return Reply(0, "ending", f"{order.vm}: this guard is going down")
        if not self.holds_lease(now_ns):
            return Reply(0, "no-lease", f"{order.vm}: this host holds no lease")
        if order.lease != self.lease_token:
            text = f"{order.vm}: assigned under lease {order.lease}, held is {self.lease_token}"
            return Reply(0, "other-lease", text, current=self.lease_token)
        if known is None and self._is_blind(order.shutdown_s, now_ns):
            return Reply(0, "not-reaped", f"{order.vm}: an earlier guard's runs may still be alive")
        if known is None and len(self.runs) >= MAX_RUNS:
            return Reply(0, "bad-request", f"{order.vm}: {MAX_RUNS} VMs are known already")
        run = Run(order.vm, order.token, order.lease, RunState.STARTING, shutdown_ns=round(order.shutdown_s * 1e9))
        run.deadline_ns = self._deadline_of(run)
        self.runs[order.vm] = run
        self._effects.append(StartRun(order, run.deadline_ns, run.shutdown_ns, self._poll_ns()))
        self._enter(run, RunState.STARTING, now_ns)
        return Reply(0, run=self._report(run))

    def _stop(self, order: StopRequest, now_ns: int) -> Reply:
        run = self.runs.get(order.vm)
        if run is not None and run.token > order.token:
            # A higher token was started here only after this one was reaped, and this one can never be started again.
            gone = Run(order.vm, order.token, 0, RunState.STOPPED, event=self._next_event(now_ns), text="replaced")
            return Reply(0, run=self._report(gone))
        if run is None or run.token < order.token:
            return self._bury(order, run, now_ns)
        if not run.state.reaped:
            self._stop_run(run, now_ns + round(order.shutdown_s * 1e9), now_ns)
        return Reply(0, run=self._report(run))

    def _bury(self, order: StopRequest, known: Run | None, now_ns: int) -> Reply:
        """A token that never ran here is to be stopped: promise that it never will."""
        if known is not None and not known.state.reaped:
            return Reply(0, "not-reaped", f"{order.vm}: the older run with token {known.token} is not gone yet")
        if known is None and (self._fresh or self._is_blind(order.shutdown_s, now_ns)):
            return Reply(0, "not-reaped", f"{order.vm}: it is not known yet whether an earlier guard's run is alive")
        if known is None and len(self.runs) >= MAX_RUNS:
            return Reply(0, "bad-request", f"{order.vm}: {MAX_RUNS} VMs are known already")
        run = Run(order.vm, order.token, self.lease_token, RunState.STOPPED, text="never started")
        self.runs[order.vm] = run
        self._effects.append(KeepTombstone(run.vm, run.token, run.lease_token))
        self._enter(run, RunState.STOPPED, now_ns)
        return Reply(0, run=self._report(run))

    def _is_blind(self, shutdown_s: float, now_ns: int) -> bool:
        """Whether a run of this VM of which nothing is known may be alive: its shutdown time adds to its deadline."""
        return now_ns < self._blind_until_ns + (round(shutdown_s * 1e9) if self._blind_until_ns else 0)

    def _stop_run(self, run: Run, stop_by_ns: int, now_ns: int) -> None:
        if run.stop_by_ns and run.stop_by_ns <= stop_by_ns:
            return
        run.stop_by_ns = stop_by_ns
        self._effects.append(StopRun(run.vm, run.token, stop_by_ns))
        if run.state is not RunState.STOPPING:
            run.text = "stop asked for"
            self._enter(run, RunState.STOPPING, now_ns)

    def _found(self, found: RunFound, now_ns: int) -> None:
        known = self.runs.get(found.vm)
        if known is not None and known.token >= found.token:
            return
        self.runs[found.vm] = run = Run(
            found.vm, found.token, found.lease_token, found.state, found.deadline_ns, found.shutdown_ns, found.stop_by_ns,
            exit_code=found.exit_code, text=found.text,
        )  # fmt: skip
        if not run.state.reaped and run.stop_by_ns:
            run.state = RunState.STOPPING
        self._enter(run, run.state, now_ns)

    def _gone(self, gone: RunGone, now_ns: int) -> None:
        run = self._run(gone.vm, gone.token)
        if run is None or run.state.reaped:
            return
        run.exit_code = gone.exit_code
        asked = run.text if run.state is RunState.STOPPING else ""
        run.text = "; ".join(text for text in (asked, gone.text) if text)
        self._enter(run, RunState.STOPPED if gone.started else RunState.FAILED, now_ns)
        self._finish()

    def _end(self, stop_vms: bool, now_ns: int) -> None:
        self.ending = True
        if stop_vms:
            for run in self._live():
                self._stop_run(run, now_ns + run.shutdown_ns, now_ns)
            self._finish()
        elif not self._ended:
            self._ended = True
            self._effects.append(Ended())

    def _finish(self) -> None:
        if self.ending and not self._ended and not self._live():
            self._ended = True
            self._effects.append(Ended())

    def _live(self) -> list[Run]:
        return [run for run in self.runs.values() if not run.state.reaped]

    def _run(self, vm: str, token: int) -> Run | None:
        run = self.runs.get(vm)
        return run if run is not None and run.token == token else None

    def _enter(self, run: Run, state: RunState, now_ns: int) -> None:
        run.state = state
        run.event = self._next_event(now_ns)
        self._effects.append(Reported(self._report(run)))

    def _next_event(self, now_ns: int) -> int:
        # Beginning at the boot clock, a later guard's numbers are above those of an earlier one of this kernel boot.
        self._event = max(self._event + 1, now_ns)
        return self._event

    def _report(self, run: Run) -> RunReport:
        return RunReport(
            run.vm, run.token, run.lease_token, run.state.value, run.event, self.instance.hex(), run.exit_code, run.text
        )
