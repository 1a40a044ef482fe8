"""The planner: its engine against arithmetic, its forecasts against what must be so."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from infra.errors import UsageError
from infra.simulation.clock import Deadlock, simulate
from infra.simulation.engines import Engine
from infra.simulation.estimates import changed, from_config, from_run
from infra.simulation.planner import EnvPlan, Plan, forecast
from rl_core.config import LoopConfig
from rl_core.config_files import load_config
from rl_core.events import Event
from rl_core.run_store import RunStore, StoredRun
from tests.unit.stored_runs import group, store_run

PLAN = Plan(
    loop=LoopConfig(steps=8, groups_per_step=8, max_staleness=2),
    environments={"short": EnvPlan(mean_tokens=50), "long": EnvPlan(mean_tokens=400, spread=1.0, turns=4, step_s=0.5)},
    workers=2,
    learner_step_s=10.0,
)


def test_an_engine_shares_its_steps_among_the_sequences_that_run() -> None:
    """One sequence alone: 1.1 s a token. Two: 1.2 s. The long one runs 10 tokens beside the short one and 10 alone."""

    async def main() -> list[float]:
        engine = Engine(max_sequences=2, base_s=1.0, per_sequence_s=0.1)
        engine.load(0)
        loop = asyncio.get_running_loop()

        async def ends(tokens: float) -> float:
            await engine.decode(tokens)
            return loop.time()

        return await asyncio.gather(ends(10), ends(20), ends(5))  # the third waits for a place

    first, second, third = simulate(main())
    assert first == pytest.approx(12.0)
    assert third == pytest.approx(12.0 + 5 * 1.2)
    assert second == pytest.approx(third + 5 * 1.1)


def test_tokens_belong_to_the_version_that_was_live() -> None:
    async def main() -> dict[int, float]:
        engine = Engine(max_sequences=1, base_s=1.0, per_sequence_s=0.0)
        engine.load(0)
        running = asyncio.create_task(engine.decode(10))
        for version in (1, 2):
            await asyncio.sleep(4)
            engine.load(version)
        return await running

    assert simulate(main()) == pytest.approx({0: 4, 1: 4, 2: 2})


def test_a_virtual_clock_says_so_when_nothing_can_happen_any_more() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Deadlock, match="no timer is set"):
        simulate(main())


def test_synchronous_training_is_on_policy_and_slower_and_staleness_keeps_its_bound() -> None:
    ahead, synchronous = forecast(PLAN), forecast(PLAN.synchronous())
    assert synchronous.staleness_max == 0
    assert 0 < ahead.staleness_mean <= ahead.staleness_max <= 2
    assert ahead.groups_per_s > 1.2 * synchronous.groups_per_s
    assert ahead.learner_idle < synchronous.learner_idle
    assert ahead.engine_idle < synchronous.engine_idle


def test_groups_without_signal_are_the_drop_rate() -> None:
    plan = changed(PLAN, ["signal=0.5"])
    assert forecast(plan).filtered == pytest.approx(0.5, abs=0.12)


def test_numbers_come_from_the_config_or_by_hand_and_a_wrong_name_is_a_sentence() -> None:
    plan = from_config(load_config("configs/quickstart.yaml"))
    assert plan.environments["tools"].turns == 6
    plan = changed(plan, ["math.mean_tokens=300", "step_s=2", "workers=3"])
    assert (plan.environments["math"].mean_tokens, plan.environments["code"].step_s, plan.workers) == (300.0, 2.0, 3)
    for item in ("nope=1", "nope.mean_tokens=1", "math.workers=2", "workers=many", "workers=-1"):
        with pytest.raises(UsageError, match="--set"):
            changed(plan, [item])


def test_lengths_signal_and_times_are_measured_in_a_stored_run(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.add_groups([group("g0", rewards=(1.0, 0.0)), group("g1", rewards=(1.0, 1.0))], "train")
    metrics = {"step/seconds": 7.0, "step/waited_s": 3.0, "rollout/tokens_per_s": 100.0, "queue/in_flight": 2.0}
    store.emit(Event(kind="step", data={"version": 1, "metrics": metrics}))
    store.close()
    config = load_config("configs/quickstart.yaml")
    plan = from_run(config, StoredRun(tmp_path))
    math = plan.environments["math"]
    assert (math.mean_tokens, math.spread, math.signal, plan.learner_step_s) == (3.0, 0.0, 0.5, 4.0)
    sequences = 2.0 * math.group_size  # in flight: the engine makes 100 tokens a second of them
    assert sequences / (plan.base_s + sequences * plan.per_sequence_s) == pytest.approx(100.0)
    assert plan.environments["code"] == from_config(config).environments["code"]


def test_a_run_without_training_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no training rollouts"):
        from_run(load_config("configs/quickstart.yaml"), StoredRun(store_run(tmp_path)))
