"""Leases in the log: Lead, Grant, Confirm, Revoke, Fenced (rules L1, L3, L5 at the head of procedures.py)."""

from __future__ import annotations

import attrs

from ha_core.errors import invariant
from ha_core.ids import LeaseToken, LogIndex
from ha_core.machines.failover import commands as c
from ha_core.machines.failover.commands import Outcome
from ha_core.machines.failover.procedure_registry import DONE, decide, procedure, refuse, runs_on, settings_of
from ha_core.machines.failover.records import (
    Epoch,
    Host,
    HostState,
    KvTransaction,
    Lease,
    Mode,
    RunState,
    Settings,
)


@procedure(c.Lead)
def lead(tx: KvTransaction, index: LogIndex, command: c.Lead) -> Outcome:
    epoch = Epoch.get(tx, "leader") or Epoch()
    if command.term < epoch.term:
        return refuse("a later leader took over")
    if command.term > epoch.term:
        Epoch(command.term, command.node, index).put(tx)
        decide(tx, index, "leading", host=command.node, token=command.term, why="elected")
    return DONE


@procedure(c.Grant)
def grant(tx: KvTransaction, index: LogIndex, ask: c.Grant) -> Outcome:
    if Host.get(tx, ask.host) is None:
        return refuse("unknown host")
    settings = settings_of(tx)
    lease = Lease.get(tx, ask.host)
    token = LeaseToken(index)
    fresh = Lease(
        ask.host, token, ask.boot, ask.instance, ask.created_ns, settings.lease_ns, settings.margin_ns,
        hold_ns=settings.lease_ns, armed=settings.mode is Mode.ARMED,
    )  # fmt: skip
    if lease is None:
        fresh.put(tx)
        decide(tx, index, "granted", host=ask.host, token=token, why="first lease of the host")
        return Outcome(True, token)
    invariant(lease.token < token and lease.candidate < token, "a lease token went back", host=ask.host)
    if ask.boot == lease.boot and ask.created_ns < lease.created_ns:
        return refuse("an older ask of the same boot")
    if ask.boot != lease.boot or (fresh.armed and not lease.armed):
        return _grant_candidate(tx, index, lease, ask)
    if lease.revoked:
        return _grant_after_revoke(tx, index, lease, fresh)
    # A guard that took a candidate for its lease, which then came to nothing, needs a token that is newer than that.
    offered = lease.candidate and lease.candidate_boot == lease.boot
    if ask.instance == lease.instance and _same_numbers(lease, settings) and not offered:
        return Outcome(True, lease.token)
    _continue(tx, index, lease, fresh)
    return Outcome(True, token)


def _same_numbers(lease: Lease, settings: Settings) -> bool:
    armed = settings.mode is Mode.ARMED
    return (lease.lease_ns, lease.margin_ns, lease.armed) == (settings.lease_ns, settings.margin_ns, armed)


def _grant_after_revoke(tx: KvTransaction, index: LogIndex, lease: Lease, fresh: Lease) -> Outcome:
    # L5: the old token is dead for ever, and the chain begins anew. What outlives its lease is still there, though, and held
    # again, because the kernel is the same.
    fresh.put(tx)
    for run in runs_on(tx, lease.host):
        if run.state is RunState.UNFENCED:
            attrs.evolve(run, lease=fresh.token, state=RunState.RUNNING).put(tx)
    decide(tx, index, "granted", host=lease.host, token=fresh.token, why="the lease before was revoked")
    return Outcome(True, fresh.token)


def _grant_candidate(tx: KvTransaction, index: LogIndex, lease: Lease, ask: c.Grant) -> Outcome:
    settings = settings_of(tx)
    numbers = (settings.lease_ns, settings.margin_ns, settings.mode is Mode.ARMED)
    known = (lease.candidate_boot, lease.candidate_instance)
    known_numbers = (lease.candidate_lease_ns, lease.candidate_margin_ns, lease.candidate_armed)
    if lease.candidate and (known, known_numbers) == ((ask.boot, ask.instance), numbers):
        return Outcome(True, lease.candidate)
    if lease.candidate_boot == ask.boot and ask.created_ns < lease.candidate_created_ns:
        return refuse("an older ask of the same boot")
    attrs.evolve(
        lease, candidate=LeaseToken(index), candidate_boot=ask.boot, candidate_instance=ask.instance,
        candidate_created_ns=ask.created_ns, candidate_lease_ns=settings.lease_ns, candidate_margin_ns=settings.margin_ns,
        candidate_armed=settings.mode is Mode.ARMED,
    ).put(tx)  # fmt: skip
    return Outcome(True, index)


def _continue(tx: KvTransaction, index: LogIndex, lease: Lease, fresh: Lease) -> None:
    # L1: one entry retires the old token and re-stamps what stood under it; no instant in between has neither.
    chain = lease.continued or lease.token
    attrs.evolve(fresh, continued=chain, hold_ns=max(fresh.hold_ns, lease.hold_ns)).put(tx)
    for run in runs_on(tx, lease.host):
        if run.lease == lease.token and run.held:
            attrs.evolve(run, lease=fresh.token).put(tx)
    decide(tx, index, "continued", host=lease.host, token=fresh.token, why="another guard of the same kernel boot")


@procedure(c.Confirm)
def confirm(tx: KvTransaction, index: LogIndex, command: c.Confirm) -> Outcome:
    lease = Lease.get(tx, command.host)
    if lease is None or not command.token or lease.candidate != command.token:
        return refuse("no such candidate")
    armed = lease.candidate_armed and settings_of(tx).mode is Mode.ARMED
    fresh = Lease(
        lease.host, lease.candidate, lease.candidate_boot, lease.candidate_instance, lease.candidate_created_ns,
        lease.candidate_lease_ns, lease.candidate_margin_ns, hold_ns=lease.candidate_lease_ns, armed=armed,
    )  # fmt: skip
    if lease.boot == fresh.boot:
        if lease.revoked:
            return _grant_after_revoke(tx, index, lease, fresh)
        _continue(tx, index, lease, fresh)
        return Outcome(True, fresh.token)
    # L1: the other kernel boot has proved that it lives, so everything of the one before is gone.
    fresh.put(tx)
    host = Host.get(tx, lease.host)
    if host is not None and host.state in (HostState.SHUTDOWN, HostState.FREEZE):
        attrs.evolve(host, state=HostState.ONLINE).put(tx)
    for run in runs_on(tx, lease.host):
        if run.held or run.state is RunState.UNFENCED:
            attrs.evolve(run, state=RunState.LOST, text="the host booted anew").put(tx)
    decide(tx, index, "rebooted", host=lease.host, token=fresh.token, why="another kernel boot: its VMs are gone")
    return Outcome(True, fresh.token)


@procedure(c.Revoke)
def revoke(tx: KvTransaction, index: LogIndex, command: c.Revoke) -> Outcome:
    lease = Lease.get(tx, command.host)
    if lease is None or lease.token != command.token:
        return refuse("not the host's lease")
    if lease.revoked:
        return DONE
    if not lease.armed:
        return refuse("the cluster is disarmed: leases have no deadline")
    # L3: a leader that confirms renewals has seen its own Lead applied, so only its own verdict on them can be meant.
    if command.term != (Epoch.get(tx, "leader") or Epoch()).term:
        return refuse("the verdict of another leader")
    attrs.evolve(lease, revoked=True).put(tx)
    for run in runs_on(tx, lease.host):
        if run.lease == lease.token and run.held:
            lost = RunState.UNFENCED if run.outlives else RunState.LOST
            attrs.evolve(run, state=lost, text="the lease was revoked").put(tx)
    decide(tx, index, "revoked", host=lease.host, token=lease.token, why=command.why)
    return DONE


@procedure(c.Fenced)
def fenced(tx: KvTransaction, index: LogIndex, command: c.Fenced) -> Outcome:
    lease = Lease.get(tx, command.host)
    if lease is None or lease.token != command.token:
        return refuse("not the host's lease")
    attrs.evolve(lease, revoked=True).put(tx)
    for run in runs_on(tx, lease.host):
        if run.held or run.state is RunState.UNFENCED:
            attrs.evolve(run, state=RunState.LOST, text="the host was fenced").put(tx)
    decide(tx, index, "fenced", host=lease.host, token=lease.token, why=command.why)
    return DONE
