"""Scenario files: a cluster, what befalls it, and what is expected, as TOML. docs/scenarios.md is their manual."""

from ha_core.testing.scenario.model import STEPS as STEPS
from ha_core.testing.scenario.model import Scenario as Scenario
from ha_core.testing.scenario.model import ScenarioError as ScenarioError
from ha_core.testing.scenario.player import play_scenario as play_scenario
from ha_core.testing.scenario.reader import load_scenario as load_scenario
from ha_core.testing.scenario.reader import parse_scenario as parse_scenario
from ha_core.testing.scenario.result import PlayResult as PlayResult
from ha_core.testing.scenario.story import tell as tell
