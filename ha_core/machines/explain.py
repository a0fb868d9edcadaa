"""Why was this VM started, why was this host fenced: sentences from the decisions that the database keeps.

Decisions are written by the procedures in the entry that they explain, so the story is the same on every host and survives any
coordinator. The last ``records.HISTORY`` are kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from ha_core.ids import HostName, VmName
from ha_core.machines.failover.inventory import Inventory
from ha_core.machines.failover.planner import Waiting
from ha_core.machines.failover.records import Decision, Lease, Run

_WORDS = {
    "registered": "{host} was registered",
    "removed": "{host} was removed from the cluster",
    "granted": "{host} got lease {token}",
    "continued": "{host} got lease {token}, which continues the one before",
    "rebooted": "{host} booted anew and got lease {token}",
    "revoked": "{host} lost lease {token}: its VMs ended at its deadline",
    "fenced": "{host} was fenced",
    "leading": "{host} became the active primary (term {token})",
    "online": "{host} is online",
    "maintenance": "{host} went into maintenance",
    "shutdown": "{host} began to shut down",
    "freeze": "{host} began to shut down, its VMs wait for it",
    "armed": "the cluster was armed",
    "disarmed": "the cluster was disarmed",
    "assigned": "{vm} was assigned to {host} (token {token})",
    "recalled": "{vm} was told to stop on {host} (token {token})",
    "released": "{vm} ended on {host} (token {token})",
    "failed": "{vm} was given up after its last try on {host} (token {token})",
}


def sentence(decision: Decision) -> str:
    """One decision in words, with its log index."""
    words = _WORDS.get(decision.kind, "{host} {vm} " + decision.kind)
    text = words.format(host=decision.host, vm=decision.vm, token=decision.token).strip()
    return f"[{decision.index}] {text}" + (f": {decision.why}" if decision.why else "")


def story(decisions: Iterable[Decision], *, vm: str = "", host: str = "") -> list[Decision]:
    """The decisions about a VM or a host, oldest first. A VM's story has what happened to the hosts that it was on, while it
    was there."""
    ordered = sorted(decisions, key=lambda decision: decision.number)
    if not vm:
        return [one for one in ordered if not host or one.host == host]
    told: list[Decision] = []
    where = ""
    for one in ordered:
        if one.vm == vm:
            told.append(one)
            where = one.host if one.kind in ("assigned", "recalled") else ""
        elif where and one.host == where and not one.vm and one.kind not in ("granted", "continued"):
            told.append(one)
    return told


def explain_vm(inventory: Inventory, vm: VmName, waiting: Collection[Waiting] = ()) -> list[str]:
    """How the VM came to where it is, and what it waits for."""
    lines = [sentence(one) for one in story(inventory.decisions.values(), vm=vm)]
    definition, run = inventory.vms.get(vm), inventory.runs.get(vm)
    if definition is None and run is None:
        return [*lines, f"{vm}: there is no such VM"]
    wanted = definition.wanted.value if definition is not None else "unmanaged"
    return [*lines, f"now: wanted {wanted}, {_present(run)}", *_waits(vm, waiting)]


def explain_host(inventory: Inventory, host: HostName) -> list[str]:
    """What was decided about the host and its lease, and how it stands."""
    lines = [sentence(one) for one in story(inventory.decisions.values(), host=host)]
    record, lease = inventory.hosts.get(host), inventory.leases.get(host)
    if record is None:
        return [*lines, f"{host}: there is no such host"]
    return [*lines, f"now: {record.state.value}, {_lease(lease)}"]


def _present(run: Run | None) -> str:
    if run is None:
        return "never started"
    tries = f", {run.attempts} failed tries" if run.attempts else ""
    given_up = ", given up" if run.failed else ""
    return f"{run.state.value} on {run.host} (token {run.token}{tries}{given_up})"


def _lease(lease: Lease | None) -> str:
    if lease is None:
        return "it never had a lease"
    if lease.revoked:
        return f"lease {lease.token} is revoked"
    return f"it holds lease {lease.token}" + ("" if lease.armed else " without a deadline (disarmed)")


def _waits(vm: VmName, waiting: Collection[Waiting]) -> Sequence[str]:
    return [f"waits: {one.reason}" for one in waiting if one.vm == vm]
