"""Advantages and trajectories: who is compared with whom, and which token is trained how often."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_core.advantages import RULES, group_advantages, leave_one_out
from rl_core.overlong import Overlong, penalty
from rl_core.trajectories import LeftOut, left_out, trajectories
from rl_core.types import Rollout, Status
from tests.integration.learner_ranks import completion, group, random_groups, rollout


def scored(*rewards: float | None) -> object:
    """A group with these rewards; None is a rollout that an infrastructure error ended."""
    return group(
        *(
            rollout(completion([1], [2]), reward=r, status=Status.OK if r is not None else Status.INFRA_ERROR, key=str(i))
            for i, r in enumerate(rewards)
        )
    )


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [("grpo", [1.0, -1.0, 1.0, -1.0]), ("mean", [0.5, -0.5, 0.5, -0.5]), ("leave_one_out", [2 / 3, -2 / 3, 2 / 3, -2 / 3])],
)
def test_each_rule_gives_what_its_formula_says(rule: str, wanted: list[float]) -> None:
    assert group_advantages(scored(1.0, 0.0, 1.0, 0.0), rule) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("rule", list(RULES))
def test_a_rollout_that_failed_for_reasons_of_ours_has_no_advantage_and_moves_no_baseline(rule: str) -> None:
    with_failure, without = group_advantages(scored(1.0, None, 0.0, 0.0), rule), group_advantages(scored(1.0, 0.0, 0.0), rule)
    assert with_failure[1] == 0.0
    assert with_failure[[0, 2, 3]] == pytest.approx(without)


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("rewards", [(1.0, None, None), (None, None), (0.3, 0.3, 0.3)])
def test_a_group_without_comparison_has_no_advantage(rule: str, rewards: tuple[float | None, ...]) -> None:
    assert not group_advantages(scored(*rewards), rule).any()


@given(st.lists(st.floats(-5, 5, width=32, allow_subnormal=False), min_size=2, max_size=12))
def test_advantages_of_a_group_add_up_to_zero(rewards: list[float]) -> None:
    for rule in RULES:
        assert abs(float(group_advantages(scored(*rewards), rule).astype(np.float64).sum())) < 1e-3


@given(st.lists(st.floats(0, 1, width=32, allow_subnormal=False), min_size=2, max_size=12))
def test_leave_one_out_compares_with_the_mean_of_the_others(rewards: list[float]) -> None:
    values = np.array(rewards, np.float64)
    others = [(values.sum() - r) / (len(values) - 1) for r in values]
    assert leave_one_out(values) == pytest.approx(values - others, abs=1e-9)


def test_an_unknown_rule_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'ppo', wanted one of grpo, mean, leave_one_out"):
        group_advantages(scored(1.0, 0.0), "ppo")


def test_turns_that_continue_become_one_trajectory_with_the_environments_words_masked() -> None:
    first = completion([1, 2], [3, 4], [-0.1, -0.2], version=5)
    second = completion([1, 2, 3, 4, 9, 9], [6], [-0.3], version=6)
    worse = rollout(completion([1, 2], [8]), reward=0.0, key="w")
    better, _ = trajectories(group(rollout(first, second, reward=1.0), worse), "mean")
    assert better.token_ids.tolist() == [1, 2, 3, 4, 9, 9, 6]
    assert better.loss_mask.tolist() == [False, False, True, True, False, False, True]
    assert better.logprobs == pytest.approx([0, 0, -0.1, -0.2, 0, 0, -0.3])
    assert better.versions.tolist() == [-1, -1, 5, 5, -1, -1, 6]
    assert better.advantage == 0.5


def test_a_turn_whose_prompt_is_not_a_continuation_starts_a_new_trajectory() -> None:
    turns = [completion([1, 2], [3, 4]), completion([1, 2, 3, 5], [6]), completion([1, 2, 3, 5, 6, 7], [8])]
    rows = trajectories(group(rollout(*turns, reward=1.0), rollout(completion([1], [2]), reward=0.0)), "grpo")
    assert [r.token_ids.tolist() for r in rows[:2]] == [[1, 2, 3, 4], [1, 2, 3, 5, 6, 7, 8]]
    assert rows[0].advantage == rows[1].advantage
    assert rows[1].loss_mask.tolist() == [False] * 4 + [True, False, True]


@given(st.integers(0, 2**31))
def test_every_sampled_token_is_trained_exactly_once(seed: int) -> None:
    for g in random_groups(2, vocab=9, seed=seed, version=3):
        rows = trajectories(g, "grpo")
        sampled = [t for r in g.rollouts for c in r.completions for t in c.token_ids.tolist()]
        assert sum(int(r.loss_mask.sum()) for r in rows) == len(sampled)
        assert [t for r in rows for t in r.token_ids[r.loss_mask].tolist()] == sampled
        assert all((r.versions[r.loss_mask] == 3).all() for r in rows)


def answered(length: int, reward: float, *, version: int = 0, cut_off: bool = False, key: str = "r") -> Rollout:
    one = completion([1], list(range(length)), version=version)
    return rollout(replace(one, finish_reason="length" if cut_off else "stop"), reward=reward, key=key)


def test_a_stale_sibling_keeps_its_reward_in_the_baseline_and_its_tokens_out_of_the_loss() -> None:
    fresh, stale = answered(3, 1.0, version=5, key="fresh"), answered(4, 0.0, version=3, key="stale")
    rows = trajectories(group(fresh, stale), "mean", oldest=4)
    assert [(len(r), r.advantage) for r in rows] == [(4, 0.5)], "one row, compared with the mean of both"
    assert left_out(stale, oldest=4) is LeftOut.STALE
    assert left_out(fresh, oldest=4) is None
    assert [r.advantage for r in trajectories(group(fresh, stale), "mean")] == [0.5, -0.5]


def test_one_old_token_makes_a_rollout_stale() -> None:
    turns = completion([1, 2], [3, 4], version=3), completion([1, 2, 3, 4, 9], [6], version=5)
    assert left_out(rollout(*turns, reward=1.0), oldest=4) is LeftOut.STALE
    assert left_out(rollout(*turns, reward=1.0), oldest=3) is None


def test_a_cut_off_rollout_can_be_masked_and_still_counts_in_the_baseline() -> None:
    members = group(answered(3, 1.0), answered(9, 0.0, cut_off=True))
    assert [r.advantage for r in trajectories(members, "mean")] == [0.5, -0.5]
    assert [r.advantage for r in trajectories(members, "mean", overlong=Overlong(rule="mask"))] == [0.5]


@pytest.mark.parametrize(
    ("length", "cut_off", "wanted"), [(1, False, 0.0), (60, False, 0.0), (80, False, -0.25), (100, False, -0.5), (20, True, -0.5)]
)
def test_the_soft_penalty_falls_over_the_last_tokens_of_the_budget(length: int, cut_off: bool, wanted: float) -> None:
    """A budget of 100 tokens, the last 40 of which cost up to 0.5."""
    overlong = Overlong(rule="penalty", limit=100, buffer=0.4, weight=0.5)
    assert penalty(answered(length, 1.0, cut_off=cut_off), overlong) == pytest.approx(wanted)
    assert penalty(answered(length, 1.0, cut_off=cut_off), replace(overlong, rule="mask")) == 0.0


def test_the_penalty_makes_the_shorter_of_two_right_answers_better() -> None:
    members = group(answered(10, 1.0), answered(90, 1.0))
    assert not group_advantages(members, "mean").any()
    advantages = group_advantages(members, "mean", Overlong(rule="penalty", limit=100, buffer=0.4, weight=1.0))
    assert advantages == pytest.approx([0.375, -0.375])
