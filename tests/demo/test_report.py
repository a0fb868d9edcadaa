"""The demo's verdict: every single broken promise turns it."""

from __future__ import annotations

import attrs
import pytest

from ha_core.demo.report import Report


def good() -> Report:
    return Report(
        hosts=3, paths_per_host=2, vms=6,
        messages={"sent": 2000, "delivered": 2000, "duplicates": 0, "lost": 0, "out_of_order": 0},
        path_cut_stall_ms=20, agent_killed_restarted_ms={"guard": 100}, agent_hung_restarted_ms={"guard": 600, "aam": 1200},
        isolation_margin_ms=200, host_killed_vms_restarted_ms={"web": 2200}, priority_order_kept=True, database_equal=True,
        center_restarted=True, every_vm_back=True, hosts_file_corrected=True,
    )  # fmt: skip


def test_a_run_that_held_is_ok() -> None:
    report = good()

    report.finish()

    assert report.ok
    assert report.late == []
    assert "It held." in report.table()


@pytest.mark.parametrize(
    "change",
    [
        {"messages": {"sent": 2000, "duplicates": 1, "lost": 0, "out_of_order": 0}},
        {"messages": {"sent": 2000, "duplicates": 0, "lost": 1, "out_of_order": 0}},
        {"messages": {"sent": 2000, "duplicates": 0, "lost": 0, "out_of_order": 1}},
        {"messages": {"sent": 999, "duplicates": 0, "lost": 0, "out_of_order": 0}},
        {"double_activations": 1}, {"priority_order_kept": False}, {"isolation_margin_ms": 0.0}, {"database_equal": False},
        {"every_vm_back": False}, {"center_restarted": False}, {"vms_disturbed_by_agent_faults": 1},
        {"path_cut_stall_ms": 151.0}, {"agent_hung_restarted_ms": {"guard": 2101.0}},
    ],
)  # fmt: skip
def test_every_broken_promise_turns_the_verdict(change: dict[str, object]) -> None:
    report = attrs.evolve(good(), **change)  # type: ignore[arg-type]

    report.finish()

    assert not report.ok
    assert "DID NOT HOLD" in report.table()


def test_what_is_late_is_named_and_tolerated_up_to_three_times_its_bound() -> None:
    report = attrs.evolve(good(), path_cut_stall_ms=60.0)

    report.finish()

    assert report.ok
    assert report.late == ["path_cut_stall_ms: 60 ms, bound 50"]
