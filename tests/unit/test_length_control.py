"""Group-relative length control: the published formula, and the rule that saying nothing never pays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_models.length_control import LengthControl, centred, length_control, top_of

ONLY_ANSWER = LengthControl(think=0.0, answer=1.0)


def test_the_worked_example_of_the_formula() -> None:
    assert centred([10, 30, 20], [0, 1, 2]) == {0: 0.5, 1: -0.5, 2: 0.0}
    assert length_control([1, 1, 1], [0, 0, 0], [10, 30, 20], ONLY_ANSWER) == [0.5, -0.5, 0.0]
    both = LengthControl(think=0.4, answer=0.2)
    assert length_control([1, 1], [100, 50], [10, 20], both) == pytest.approx([0.4 * -0.5 + 0.2 * 0.5, 0.4 * 0.5 + 0.2 * -0.5])


def test_a_group_of_equal_lengths_is_left_alone() -> None:
    assert length_control([1, 0, 1], [7, 7, 7], [5, 5, 5], LengthControl()) == [0.0, 0.0, 0.0]


def test_the_bonus_goes_to_the_shortest_of_the_best_only() -> None:
    control = LengthControl(think=0.0, answer=0.0, bonus_answer=0.3, top=0.5)
    assert length_control([0.9, 0.8, 0.1, 0.2], [0] * 4, [10, 20, 5, 30], control) == [0.0, 0.0, 0.0, 0.0], (
        "the shortest is not among the best"
    )
    assert length_control([0.9, 0.8, 0.1, 0.2], [0] * 4, [5, 20, 10, 30], control) == [0.3, 0.0, 0.0, 0.0]


def test_an_empty_answer_is_never_the_shortest() -> None:
    changes = length_control([0.0, 1.0, 1.0], [0, 0, 0], [0, 10, 20], ONLY_ANSWER)
    assert changes == [-0.5, 0.5, -0.5]
    assert length_control([0.0, 0.0], [0, 0], [0, 0], ONLY_ANSWER) == [0.0, 0.0]


def test_not_thinking_is_not_paid_where_others_think() -> None:
    changes = length_control([1, 1, 1], [0, 50, 100], [10, 10, 10], LengthControl(think=1.0, answer=0.0))
    assert changes == [0.0, 0.5, -0.5]


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rewards, 1 thought"):
        length_control([1, 1], [1], [1, 2], LengthControl())


def test_the_top_of_a_group_has_at_least_one_member() -> None:
    assert top_of([0.1, 0.9, 0.5], 0.01) == 0.9
    assert top_of([], 0.5) == float("inf")


rollout = st.tuples(st.floats(0, 1, allow_subnormal=False), st.integers(0, 400), st.integers(0, 400))


@given(
    st.lists(rollout, min_size=1, max_size=12),
    st.floats(0, 0.5, allow_subnormal=False),
    st.floats(0, 0.5, allow_subnormal=False),
    st.floats(0, 0.3, allow_subnormal=False),
)
def test_in_any_group_no_empty_answer_gains_and_none_gains_more_than_a_spoken_one(
    group: list[tuple[float, int, int]], think: float, answer: float, bonus: float
) -> None:
    rewards, thoughts, answers = (list(column) for column in zip(*group, strict=True))
    control = LengthControl(think=think, answer=answer, bonus_think=bonus, bonus_answer=bonus)
    changes = length_control(rewards, thoughts, answers, control)
    spoken = [c for c, length in zip(changes, answers, strict=True) if length]
    empty = [c for c, length in zip(changes, answers, strict=True) if not length]
    assert all(c <= 0 for c in empty)
    assert all(c <= min(spoken, default=0.0) for c in empty)
    plain = LengthControl(think=think, answer=answer)
    zero_sum = [c for c, length in zip(length_control(rewards, thoughts, answers, plain), answers, strict=True) if length]
    assert sum(zero_sum) == pytest.approx(0.0, abs=1e-9), "being short pays nothing to the group as a whole"
