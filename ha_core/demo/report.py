"""What the demo measured, which bound each figure has, and how it is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import attrs

BOUNDS_MS: Final = {
    "path_cut_stall_ms": 50.0,
    "agent_killed_restarted_ms": 500.0,
    "agent_hung_restarted_ms": 2000.0,
    "guard_hung_restarted_ms": 700.0,
    "host_killed_vms_restarted_ms": 3000.0,
}
"""What each figure shall not exceed; more than three times its bound is a failure."""
TOLERATED: Final = 3


@attrs.define(kw_only=True)
class Report:
    """The object that ``ha-core demo --json`` prints; times in milliseconds."""

    hosts: int = 0
    paths_per_host: int = 0
    vms: int = 0
    messages: dict[str, int] = attrs.field(factory=dict)
    path_cut_stall_ms: float = 0.0
    agent_killed_restarted_ms: dict[str, float] = attrs.field(factory=dict)
    agent_hung_restarted_ms: dict[str, float] = attrs.field(factory=dict)
    vms_disturbed_by_agent_faults: int = 0
    isolation_margin_ms: float = 0.0
    containment: str = ""
    host_killed_declared_ms: float = 0.0
    host_killed_vms_restarted_ms: dict[str, float] = attrs.field(factory=dict)
    priority_order_kept: bool = False
    double_activations: int = 0
    database_equal: bool = False
    center_restarted: bool = False
    hosts_file_corrected: bool = False
    every_vm_back: bool = False
    late: list[str] = attrs.field(factory=list)
    ok: bool = False

    def finish(self) -> None:
        """Fill in what came later than its bound, and whether all held."""
        figures = self._figures()
        self.late = [f"{name}: {value:.0f} ms, bound {bound:.0f}" for name, value, bound in figures if value > bound]
        self.ok = (
            self.messages.get("lost") == 0
            and self.messages.get("duplicates") == 0
            and self.messages.get("out_of_order") == 0
            and self.messages.get("sent", 0) >= 1000
            and self.double_activations == 0
            and self.priority_order_kept
            and self.isolation_margin_ms > 0
            and self.database_equal
            and self.every_vm_back
            and self.center_restarted
            and self.vms_disturbed_by_agent_faults == 0
            and all(value <= TOLERATED * bound for _, value, bound in figures)
        )

    def _figures(self) -> list[tuple[str, float, float]]:
        """(what, measured, bound)."""
        rows = [("path_cut_stall_ms", self.path_cut_stall_ms, BOUNDS_MS["path_cut_stall_ms"])]
        for name, value in self.agent_killed_restarted_ms.items():
            rows.append((f"agent_killed_restarted_ms.{name}", value, BOUNDS_MS["agent_killed_restarted_ms"]))
        for name, value in self.agent_hung_restarted_ms.items():
            bound = BOUNDS_MS["guard_hung_restarted_ms" if name == "guard" else "agent_hung_restarted_ms"]
            rows.append((f"agent_hung_restarted_ms.{name}", value, bound))
        for name, value in self.host_killed_vms_restarted_ms.items():
            rows.append((f"host_killed_vms_restarted_ms.{name}", value, BOUNDS_MS["host_killed_vms_restarted_ms"]))
        return rows

    def table(self) -> str:
        """The report for a person."""
        rows: list[tuple[str, str, str]] = [
            ("cluster", f"{self.hosts} hosts, {self.paths_per_host} networks, {self.vms} VMs, {self.containment}", ""),
            ("messages", _pairs(self.messages), "0 lost, 0 duplicates"),
            ("one network cut: longest stall", f"{self.path_cut_stall_ms:.1f} ms", _bound("path_cut_stall_ms")),
            ("agent killed: restarted after", _times(self.agent_killed_restarted_ms), _bound("agent_killed_restarted_ms")),
            ("agent hung: restarted after", _times(self.agent_hung_restarted_ms), "<= 2000 ms, guard 700"),
            ("VMs disturbed by all that", str(self.vms_disturbed_by_agent_faults), "0"),
            ("host isolated, agents stopped: margin", f"{self.isolation_margin_ms:.0f} ms", "> 0"),
            ("host killed: declared failed after", f"{self.host_killed_declared_ms:.0f} ms", ""),
            (
                "host killed: VMs restarted after",
                _times(self.host_killed_vms_restarted_ms),
                _bound("host_killed_vms_restarted_ms"),
            ),
            ("priority order kept", _yes(self.priority_order_kept), "yes"),
            ("VMs that ever ran twice", str(self.double_activations), "0"),
            ("databases equal at the end", _yes(self.database_equal), "yes"),
            ("center restarted by HA", _yes(self.center_restarted), "yes"),
            ("every VM back", _yes(self.every_vm_back), "yes"),
            ("hosts file corrected", _yes(self.hosts_file_corrected), "yes"),
        ]
        widths = [max(len(row[number]) for row in rows) for number in range(2)]
        lines = [f"{what.ljust(widths[0])}  {found.ljust(widths[1])}  {bound}".rstrip() for what, found, bound in rows]
        lines += [f"late: {line}" for line in self.late]
        lines.append("It held." if self.ok else "IT DID NOT HOLD.")
        return "\n".join(lines)


def _bound(name: str) -> str:
    return f"<= {BOUNDS_MS[name]:.0f} ms"


def _times(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.0f}" for name, value in values.items()) + " ms" if values else "-"


def _pairs(values: Mapping[str, int]) -> str:
    return ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in values.items())


def _yes(value: bool) -> str:
    return "yes" if value else "NO"
