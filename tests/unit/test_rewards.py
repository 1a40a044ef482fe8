"""Reward composition: what each role and each normalisation does, and where it is applied."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from environments.math import MathEnv
from infra.preflight import PreflightError, check_components
from reward_models.learned import reward_group
from rl_core.config import ConfigError, RunConfig
from rl_core.config_files import parse_config
from rl_core.rewards import Composer, RewardError, RewardRule, RunningScale
from rl_core.seams import GroupResult
from rl_core.types import Completion, Group, Rollout, Status, Task, Verdict, VersionSpan
from rollout_workers.rewards import RewardActors, recipe

RULE = RewardRule
METRIC = RewardRule(name="tokens", role="metric")


def rollout(components: dict[str, float], *, tokens: int = 4, status: Status = Status.OK, own: float = 0.0) -> Rollout:
    completion = Completion(
        prompt_ids=np.array([1], np.int32), token_ids=np.ones(tokens, np.int32), logprobs=np.zeros(tokens, np.float32),
        spans=(VersionSpan(start=0, stop=tokens, version=0),), finish_reason="stop",
    )  # fmt: skip
    verdict = Verdict(status=status, reward=own if status.trains else None, components=components)
    return Rollout(id="r", env="math", task_key="k", completions=(completion,), messages=(), verdict=verdict)


def group(*rollouts: Rollout) -> Group:
    return Group(id="g", task=Task(env="math", key="k", split="train", seed=0, public={}), rollouts=rollouts)


def rewards(rollouts: list[Rollout], *rules: RewardRule, composer: Composer | None = None) -> list[float | None]:
    composed = (composer or Composer()).compose(group(*rollouts), rules)
    return [r.verdict.reward for r in composed.rollouts]


def test_sums_are_weighted_gates_multiply_and_metrics_do_nothing() -> None:
    rollouts = [rollout({"correct": 1.0, "style": 0.5, "safe": 1.0}), rollout({"correct": 1.0, "style": 1.0, "safe": 0.5})]
    sums = (RULE(name="correct", weight=2.0), RULE(name="style", weight=-1.0))
    assert rewards(rollouts, *sums) == [1.5, 1.0]
    assert rewards(rollouts, *sums, RULE(name="safe", role="gate")) == [1.5, 0.5]
    assert rewards(rollouts, *sums, RULE(name="safe", role="metric")) == [1.5, 1.0]
    assert rewards(rollouts, RULE(name="style", role="gate"), RULE(name="safe", role="gate")) == [0.5, 0.5]


def test_components_are_stored_as_they_were_with_the_environments_own_reward_among_them() -> None:
    composed = Composer().compose(group(rollout({"correct": 1.0}, own=0.25, tokens=7)), (RULE(name="correct", weight=3.0), METRIC))
    verdict = composed.rollouts[0].verdict
    assert verdict.reward == 3.0
    assert dict(verdict.components) == {"correct": 1.0, "verified": 0.25, "tokens": 7.0}


def test_a_gate_that_is_not_passed_earns_nothing() -> None:
    rollouts = [
        rollout({"correct": 1.0, "format": 1.0}),
        rollout({"correct": 1.0, "format": 0.9}),
        rollout({"correct": 0.0, "format": 1.0}),
    ]
    assert rewards(rollouts, RULE(name="correct"), RULE(name="format", role="gate", at_least=1.0)) == [1.0, 0.0, 0.0]
    assert rewards(rollouts, RULE(name="correct"), RULE(name="format", role="gate", at_least=0.5)) == [1.0, 1.0, 0.0]
    assert rewards(rollouts, RULE(name="correct"), RULE(name="format", role="gate")) == [1.0, 0.9, 0.0]


def test_failing_a_gate_is_never_the_better_way_out_of_a_penalty() -> None:
    """An empty answer is the shortest; it must not be worth more than the longest honest one."""
    rollouts = [rollout({"format": 1.0}, tokens=50), rollout({"format": 1.0}, tokens=90), rollout({"format": 0.0}, tokens=1)]
    rules = (RULE(name="tokens", weight=-0.01), RULE(name="format", role="gate"))
    assert rewards(rollouts, *rules) == pytest.approx([-0.5, -0.9, -0.9])
    half = [rollout({"format": 1.0}, tokens=50), rollout({"format": 0.5}, tokens=90)]
    assert rewards(half, *rules) == pytest.approx([-0.5, -0.9]), "half a gate makes a penalty smaller"
    normalised = (RULE(name="tokens", weight=-1.0, normalise="group"), RULE(name="format", role="gate"))
    assert rewards(rollouts, *normalised) == pytest.approx([1.0, -1.0, -1.0], abs=1e-3)


def test_normalised_over_the_group_every_component_weighs_the_same_whatever_its_unit() -> None:
    rollouts = [rollout({"a": 1.0, "b": 1000.0}), rollout({"a": 0.0, "b": 3000.0})]
    both = (RULE(name="a", normalise="group"), RULE(name="b", weight=-1.0, normalise="group"))
    assert rewards(rollouts, *both) == pytest.approx([2.0, -2.0], abs=1e-3)
    assert rewards([rollout({"a": 0.3}), rollout({"a": 0.3})], both[0]) == [0.0, 0.0]


def test_a_running_scale_remembers_other_groups() -> None:
    composer, rule = Composer(), RULE(name="a", normalise="running")
    for value in (0.0, 10.0) * 50:
        rewards([rollout({"a": value})], rule, composer=composer)
    assert rewards([rollout({"a": 10.0}), rollout({"a": 5.0})], rule, composer=composer) == pytest.approx([1.0, 0.0], abs=0.05)
    assert set(composer.scales) == {"a"}


@given(st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=2, max_size=30))
def test_a_running_scale_has_the_mean_and_variance_of_all_it_saw(values: list[float]) -> None:
    scale = RunningScale()
    scale.add(np.array(values[:1]))
    scale.add(np.array(values[1:]))
    assert scale.mean == pytest.approx(np.mean(values), abs=1e-6, rel=1e-9)
    assert scale.squares / scale.count == pytest.approx(np.var(values), abs=1e-3, rel=1e-6)


def test_a_failure_of_ours_gets_no_reward_and_moves_no_scale() -> None:
    rollouts = [rollout({"a": 1.0}), rollout({"a": 99.0}, status=Status.INFRA_ERROR), rollout({"a": 0.0})]
    assert rewards(rollouts, RULE(name="a", normalise="group")) == [pytest.approx(1.0, abs=1e-3), None, pytest.approx(-1.0, abs=1e-3)]


def test_an_episode_that_ended_early_counts_nothing_for_what_it_lacks_and_an_ordinary_one_is_an_error() -> None:
    early = rollout({}, status=Status.INVALID_OUTPUT)
    assert rewards([rollout({"correct": 1.0}), early], RULE(name="correct")) == [1.0, 0.0]
    with pytest.raises(RewardError, match="names the component 'corect', which this environment does not have; did you mean 'correct'"):
        rewards([rollout({"correct": 1.0})], RULE(name="corect"))
    with pytest.raises(RewardError, match="the value nan"):
        rewards([rollout({"correct": float("nan")})], RULE(name="correct"))


def test_a_composed_group_can_have_signal_where_the_environments_own_rewards_are_equal() -> None:
    same = group(rollout({"correct": 1.0}, own=1.0, tokens=3), rollout({"correct": 1.0}, own=1.0, tokens=9))
    assert not same.has_signal
    composed = Composer().compose(same, (RULE(name="correct"), RULE(name="tokens", weight=-0.01)))
    assert composed.has_signal
    result = GroupResult.of(composed, 1.0)
    assert result.rewards == pytest.approx((0.97, 0.91))
    assert result.components == {"correct": 1.0, "verified": 1.0, "tokens": 6.0}


# --- configuration --------------------------------------------------------------------------------------------------------------


def config(rewards: dict[str, Any], *overrides: str) -> RunConfig:
    return parse_config({"environments": {"math": {"rewards": rewards}}}, overrides)


def paid(rewards: dict[str, Any], *rollouts: Rollout) -> list[float | None]:
    """What a config makes of a group, as the worker does it."""
    made = recipe(config(rewards).environments["math"], RewardActors(), len)
    return [r.verdict.reward for r in asyncio.run(reward_group(group(*rollouts), made)).rollouts]


def test_the_rewards_section_composes_components_of_the_verdict() -> None:
    section = {"correct": {"weight": 2.0}, "format": {"role": "gate"}, "tokens": {"role": "metric"}}
    right, wrong, broken = (rollout({"correct": c, "format": f}, own=c) for c, f in ((1.0, 1.0), (0.0, 1.0), (1.0, 0.0)))
    assert paid(section, right, wrong, broken) == [2.0, 0.0, 0.0]
    assert paid(section | {"verified": {"kind": "verified", "weight": 0.5}}, right, wrong) == [2.5, 0.0]


def test_a_weight_may_be_overridden_on_the_command_line() -> None:
    read = config({"correct": {}, "format": {"role": "gate"}}, "environments.math.rewards.correct.weight=3")
    assert recipe(read.environments["math"], RewardActors(), len).components == (
        RULE(name="correct", weight=3.0),
        RULE(name="format", role="gate"),
    )


def test_in_evaluation_the_environments_own_reward_stands_for_its_components() -> None:
    """One rollout has nobody to be compared with, and a pass must mean the same in every run."""
    section = {"correct": {"normalise": "group"}, "tokens": {"weight": -0.1}}
    assert paid(section, rollout({"correct": 1.0}, own=1.0)) == [1.0]
    assert paid(section, rollout({"correct": 1.0}, own=1.0), rollout({"correct": 0.0})) == pytest.approx([0.6, -1.4], abs=1e-3)


@pytest.mark.parametrize(
    ("rewards", "complaint"),
    [
        ({"correct": {"wieght": 1}}, "did you mean environments.math.rewards.correct.weight"),
        ({"correct": 1.0}, "wanted a mapping such as"),
        ({"correct": {"role": "gates"}}, "did you mean gate"),
        ({"correct": {"normalise": "batch"}}, "wanted one of none, group, running"),
        ({"correct": {"role": "gate", "normalise": "group"}}, "of the role weight only"),
        ({"correct": {"at_least": 0.5}}, "only the role gate"),
        ({"correct": {"role": "metric"}}, "has metrics only"),
        ({"correct": {"weight": "much"}}, "environments.math.rewards.correct.weight"),
    ],
)
def test_rewards_that_make_no_sense_are_refused_with_a_sentence(rewards: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        config(rewards)


def test_a_component_that_the_environment_does_not_have_is_refused_before_anything_starts() -> None:
    check_components("math", ["correct", "format", "tokens", "verified"], MathEnv.components)
    check_components("plugin", ["anything"], ())
    with pytest.raises(PreflightError, match="names the component 'fraction'"):
        check_components("math", ["fraction"], MathEnv.components)
