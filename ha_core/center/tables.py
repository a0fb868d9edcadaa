"""What the center shows, as rows: made from records of the database and from what each host says of itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from ha_core.ids import HostName
from ha_core.machines.failover.planner import Waiting
from ha_core.machines.failover.records import Host, Lease, Mode, Run, Settings, Vm, Wanted

Row = dict[str, object]
View = Mapping[str, object]
"""What a host's aam answers to ``cluster.status``."""


def host_rows(hosts: Iterable[Host], leases: Iterable[Lease], status: View, views: Mapping[HostName, View | str]) -> list[Row]:
    """``status``: as whoever was asked sees the members; ``views``: as each host sees itself, a text if it did not answer."""
    held = {lease.host: lease for lease in leases}
    primaries, learners = cast(Sequence[str], status["voters"]), cast(Sequence[str], status["learners"])
    rows: list[Row] = []
    for host in hosts:
        node = f"aam@{host.name}"
        lease = held.get(host.name)
        role = "primary" if node in primaries else "secondary" if node in learners else "not joined"
        view = views.get(host.name, "not asked")
        rows.append({
            "name": host.name, "state": host.state.value, "role": "active primary" if node == status["leader"] else role,
            "links": dict(host.addresses), "management": host.management, "cpu_mhz": host.cpu_mhz,
            "memory_mib": host.memory_mib, "containment": host.containment, "lease": lease.token if lease else 0,
            "lease_state": "none" if lease is None else "revoked" if lease.revoked else "held",
            "verdict": "unreachable" if isinstance(view, str) else view["verdict"],
            "verdict_reason": view if isinstance(view, str) else view.get("verdict_reason", ""),
        })  # fmt: skip
    return rows


def path_rows(views: Mapping[HostName, View | str]) -> list[Row]:
    """Every path of every host, as that host sees it."""
    rows: list[Row] = []
    for host, view in views.items():
        if isinstance(view, str):
            rows.append({"host": host, "peer": "", "link": "", "state": f"unreachable: {view}", "rtt_ms": ""})
        else:
            rows.extend({"host": host, **path} for path in cast(Sequence[Row], view["paths"]))
    return sorted(rows, key=lambda row: (str(row["host"]), str(row["peer"]), str(row["link"])))


def vm_rows(vms: Iterable[Vm], runs: Iterable[Run], waiting: Iterable[Waiting]) -> list[Row]:
    last = {run.vm: run for run in runs}
    waits = {one.vm: one.reason for one in waiting}
    rows: list[Row] = []
    for vm in vms:
        run = last.get(vm.name)
        rows.append({
            "name": vm.name, "wanted": vm.wanted.value, "priority": vm.priority.name.lower(), "after": list(vm.after),
            "host": run.host if run and not run.free else "", "token": run.token if run else 0,
            "state": _state(vm, run), "why": run.why if run else "", "text": run.text if run else "",
            "waits": waits.get(vm.name, ""),
        })  # fmt: skip
    return rows


def _state(vm: Vm, run: Run | None) -> str:
    if run is not None and run.failed:
        return "failed"
    if run is None or run.free:
        return "waiting" if vm.wanted is Wanted.STARTED else "stopped"
    return run.state.value


def waiting_of(views: Iterable[View | str]) -> list[Waiting]:
    """Which VMs wait, and for what: the coordinator among those that answered knows."""
    for view in views:
        if not isinstance(view, str) and view.get("coordinating"):
            return [Waiting(*one) for one in cast(Sequence[tuple[str, str]], view["waiting"])]  # type: ignore[arg-type]
    return []


def notes(status: View, hosts: Sequence[Host], settings: Settings) -> list[str]:
    """What an administrator should know before something fails."""
    found: list[str] = []
    if settings.mode is Mode.DISARMED:
        found.append("the cluster is disarmed: nothing is fenced or restarted until 'ha-core cluster arm'")
    if len(hosts) == 2:
        found.append("two hosts: neither has a quorum alone, so that no VM restarts when one fails; add a third")
    if not status["leader"]:
        found.append("no active primary is known: the hosts that answer have no quorum")
    return found
