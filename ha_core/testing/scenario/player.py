"""Plays a scenario: the cluster forms, t = 0, the steps at their times, the expectations at theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ha_core.config import ns
from ha_core.testing.scenario.disks import Disks
from ha_core.testing.scenario.expectations import Judge
from ha_core.testing.scenario.forming import Forming
from ha_core.testing.scenario.model import Expect, Scenario, Step
from ha_core.testing.scenario.playable import check_playable
from ha_core.testing.scenario.record import Record
from ha_core.testing.scenario.result import PlayResult, Verdict
from ha_core.testing.scenario.state import State
from ha_core.testing.scenario.steps import Steps
from ha_core.testing.scenario.stream import Stream
from ha_core.testing.scenario.world import LOOK_NS, ScenarioWorld
from ha_core.testing.simulator import Simulation, TooManyViolationsError

STEPS_PER_S: Final = 2_000
"""More steps of machines than this, on each host in each virtual second, are a livelock."""


def play_scenario(scenario: Scenario, seed: int = 1) -> PlayResult:
    """Play in virtual time; equal seeds give equal results.

    Raises:
        ScenarioError: it asks for something that cannot be played, or the cluster that it describes cannot form.
    """
    check_playable(scenario)
    return Play(scenario, seed).run()


class Play:
    def __init__(self, scenario: Scenario, seed: int) -> None:
        limit = 200_000 + int(STEPS_PER_S * len(scenario.hosts) * (scenario.until_s + 200))
        self.scenario = scenario
        self.sim = sim = Simulation(seed, max_steps=limit)
        self.record = Record(sim)
        self.world = ScenarioWorld(sim, scenario, self.record)
        self.stream = Stream(self.world) if scenario.messages_per_s else None
        self.steps = Steps(self.world, Disks(self.world, self.stream))
        self.state = State(self.world, self.stream)
        self._judge = Judge(self.record, self.state, scenario.steps)
        self._verdicts: dict[int, Sequence[Verdict]] = {}
        self._opening: Sequence[str] = ()
        self._end_ns = 0

    def run(self) -> PlayResult:
        self.sim.every(LOOK_NS, self.world.watch_peers)
        self.sim.every(LOOK_NS, self.world.watch_waiting)
        forming = Forming(self.world)
        try:
            forming.run(self._begin)
            self.sim.run_until(self._end_ns, stop=lambda: forming.refused is not None)
        except TooManyViolationsError:
            pass
        if forming.refused is not None:
            raise forming.refused
        for number, expect in enumerate(self.scenario.expects):
            if number not in self._verdicts:
                self._verdicts[number] = self._judge.judge(expect)
        return self._result()

    def _begin(self) -> None:
        """t = 0."""
        self._end_ns = self.sim.now_ns + ns(self.scenario.until_s)
        self.record.begin()
        self.world.begin()
        self._opening = self.state.opening()
        for step in self.scenario.steps:
            self.sim.after(ns(step.at_s), self._step, step)
        for number, expect in enumerate(self.scenario.expects):
            if expect.at_s < self.scenario.until_s:
                self.sim.after(ns(expect.at_s), self._expect, number, expect)
        if self.stream is not None:
            self.stream.start()

    def _step(self, step: Step) -> None:
        for fate in self.world.fates.values():
            fate.counting = True
        self.steps.play(step)

    def _expect(self, number: int, expect: Expect) -> None:
        self._verdicts[number] = self._judge.judge(expect)

    def _result(self) -> PlayResult:
        sim, state = self.sim, self.state
        return PlayResult(
            title=self.scenario.title,
            seed=sim.seed,
            until_s=self.scenario.until_s,
            trace_hash=sim.trace_hash,
            opening=self._opening,
            lines=tuple(self.record.lines),
            vms=state.vms(),
            hosts=state.hosts(),
            failovers=tuple(self.record.failovers),
            messages=state.messages(),
            expectations=[verdict for number in sorted(self._verdicts) for verdict in self._verdicts[number]],
            checks=dict(sim.checks),
            violations=[self.record.placed(violation) for violation in sim.violations],
        )
