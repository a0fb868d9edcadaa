"""The lag campaign: an hour of late event loops condemns no path."""

from __future__ import annotations

from ha_core.testing.campaigns import play_seed
from ha_core.testing.campaigns.lag import LagCampaign


def test_an_hour_of_lag_alone_brings_no_path_down() -> None:
    result = play_seed(LagCampaign(), 1)

    assert result.violations == ()
    assert result.virtual_s == 3600
    assert result.faults["lag"] > 200
    assert result.checks["I22"] > 10  # peers that stood still for longer are called DOWN, rightly
