"""How old the weights behind a token's state are, from an engine's spans to the step's figures."""

from __future__ import annotations

import numpy as np
import pytest

from rl_core.drafts import CUT_OFF, joined
from rl_core.metrics import group_figures
from rl_core.types import Completion, VersionSpan
from rollout_workers.completions import state_age
from tests.unit.fakes import group_result


def spans(*tokens: tuple[int, int]) -> list[VersionSpan]:
    """Of (tokens, version), one after the other."""
    ends = np.cumsum([0, *(count for count, _ in tokens)])
    return [VersionSpan(start=int(a), stop=int(b), version=v) for a, b, (_, v) in zip(ends, ends[1:], tokens, strict=False)]


@pytest.mark.parametrize(
    ("tokens", "began", "age"),
    [
        ([(10, 4)], 4, (0, 0)),
        ([(10, 4), (5, 5), (2, 7)], 4, (5 * 1 + 2 * 3, 3)),
        ([(3, 7)], 5, (6, 2)),  # updates came while its prompt was read, or before what is shown of it
        ([], 0, (0, 0)),
    ],
)
def test_a_tokens_age_counts_from_the_version_its_request_began_under(
    tokens: list[tuple[int, int]], began: int, age: tuple[int, int]
) -> None:
    assert state_age(spans(*tokens), began) == age


def test_two_halves_of_a_turn_keep_their_own_ages() -> None:
    def half(total: int, oldest: int) -> Completion:
        return Completion(
            prompt_ids=np.array([1], np.int32), token_ids=np.array([2, 3], np.int32), logprobs=np.zeros(2, np.float32),
            spans=(VersionSpan(start=0, stop=2, version=6),), finish_reason=CUT_OFF, state_age_sum=total, state_age_max=oldest,
        )  # fmt: skip

    both = joined(half(3, 2), half(1, 1))
    assert (both.state_age_sum, both.state_age_max) == (4, 2)


def test_the_figures_are_the_mean_over_tokens_and_the_oldest() -> None:
    groups = [
        group_result(sampled_tokens=30, state_age_sum=12, state_age_max=1),
        group_result(sampled_tokens=10, state_age_sum=8, state_age_max=3),
    ]
    figures = group_figures(groups, 1.0)
    assert (figures["state_age_mean"], figures["state_age_max"]) == (0.5, 3.0)
