"""Which steps are not taken."""

from __future__ import annotations

import math

import pytest

from learner.guard import ENOUGH, Guard


def experienced(factor: float = 10.0) -> Guard:
    guard = Guard(factor)
    for step in range(ENOUGH):
        guard.taken({"policy": 1.0 + step % 2, "MTP head": 0.1})
    return guard


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_bad_from_the_first_step_on(bad: float) -> None:
    assert Guard(0.0).judge(bad, {"policy": 1.0}) == f"the loss is {bad}"
    assert Guard(0.0).judge(0.1, {"policy": 1.0, "MTP head": bad}) == f"the gradient of the MTP head is {bad}"
    assert Guard(10.0).judge(bad, {}, spikes=False)


def test_a_spike_is_measured_against_the_parts_own_median() -> None:
    guard = experienced()
    assert guard.judge(0.0, {"policy": 14.9, "MTP head": 0.9}) == ""
    assert guard.judge(0.0, {"policy": 15.1, "MTP head": 0.1}).startswith(
        "the gradient of the policy is 15.1, 10 times the median of the last 8"
    )
    assert "MTP head" in guard.judge(0.0, {"policy": 1.0, "MTP head": 1.1})
    assert guard.judge(0.0, {"policy": 15.1}, spikes=False) == "", "a step done again is not judged again"
    assert experienced(factor=0.0).judge(0.0, {"policy": 1e9}) == ""


def test_the_first_steps_are_not_compared_and_slow_growth_is_no_spike() -> None:
    guard, norm = Guard(10.0), 1.0
    assert guard.judge(0.0, {"policy": 1e6}) == ""
    for _ in range(200):
        norm *= 1.1
        assert guard.judge(0.0, {"policy": norm}) == ""
        guard.taken({"policy": norm})


def test_a_restored_guard_judges_as_the_one_that_was_saved() -> None:
    again = Guard(10.0)
    again.taken({"policy": 100.0})
    again.restore(experienced().state())
    assert again.state() == experienced().state()
    assert again.judge(0.0, {"policy": 15.1})
