"""Campaigns: what the simulator plays with many seeds. ``ha-core simulate --campaign NAME`` finds them here by name.

A campaign builds its world on the Simulation that it is given, plays a safety phase with faults and a liveness phase after
healing, and reports through ``sim.checked`` and ``sim.violate``. It is made anew for each seed.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import attrs

from ha_core.errors import ConfigError
from ha_core.testing.simulator import Simulation, TooManyViolationsError, Violation

CAMPAIGNS: Mapping[str, str] = {
    "cluster": "ha_core.testing.campaigns.cluster:ClusterCampaign",
    "database": "ha_core.testing.campaigns.database:DatabaseCampaign",
    "lag": "ha_core.testing.campaigns.lag:LagCampaign",
    "messages": "ha_core.testing.campaigns.messages:MessagesCampaign",
    "ping": "ha_core.testing.campaigns.ping:PingCampaign",
}
"""Name -> ``module:class``; imported when asked for."""


class Campaign(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def invariants(self) -> Sequence[str]:
        """Each must have been checked at least once over many seeds."""

    @property
    def faults(self) -> Sequence[str]:
        """Each must have taken effect at least once over many seeds."""

    def play(self, sim: Simulation) -> None: ...


@attrs.frozen
class SeedResult:
    seed: int
    steps: int
    virtual_s: float
    faults: Mapping[str, int]
    checks: Mapping[str, int]
    violations: Sequence[Violation]
    trace_hash: str


def load_campaign(name: str) -> Campaign:
    """A new campaign by name, or by ``module:class`` for one of your own.

    Raises:
        ConfigError: there is none of that name.
    """
    target = CAMPAIGNS.get(name, name if ":" in name else "")
    if not target:
        raise ConfigError(f"campaign {name!r}: there is none, expected one of {', '.join(CAMPAIGNS)}", field="campaign")
    module, _, attribute = target.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as exc:
        raise ConfigError(f"campaign {name!r}: cannot import {target}: {exc}", field="campaign", value=target) from exc
    campaign: Campaign = factory()
    return campaign


def play_seed(campaign: Campaign, seed: int, *, sim: Simulation | None = None) -> SeedResult:
    """Play one seed; an exception that escapes is reported as a violation of ``error``."""
    sim = sim or Simulation(seed)
    try:
        campaign.play(sim)
        sim.finish()
    except TooManyViolationsError:
        pass
    except Exception as error:
        try:
            sim.violate_error(f"campaign {campaign.name}", error)
        except TooManyViolationsError:
            pass
    return SeedResult(
        seed, sim.steps, sim.now_ns / 1e9, dict(sim.faults), dict(sim.checks), tuple(sim.violations), sim.trace_hash
    )
