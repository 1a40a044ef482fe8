"""Group-relative length control (Nemotron 3 Nano, arXiv:2512.20848, section on RLHF with a generative reward model).

For the N answers of one task, with thought length t_i and answer length a_i in tokens, and each length x on its own:

    w_i  = 1 - (x_i - min x) / (max x - min x)              1 for the shortest, 0 for the longest; 0 if all are equal
    w~_i = w_i - mean(w)                                    zero-centred: the group as a whole is paid nothing for being short
    change_i = think * w~_i(t) + answer * w~_i(a)
             + bonus_think  [t_i = min t and reward_i in the top of the group]
             + bonus_answer [a_i = min a and reward_i in the top of the group]

Assumption of the original: every answer is an answer. A policy that learns to say nothing has the smallest x of all, so we add one rule:
an empty answer has no length. It takes no part in min, max and mean, it gets no bonus, and its change is the lowest of the group's,
and never above 0. A thought may be empty, but it is not paid for that either: where others think, its w~(t) is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthControl:
    """Coefficients. Rewards are in [0, 1] by convention, so that 0.2 moves an answer by a fifth of the scale at most."""

    think: float = 0.2
    answer: float = 0.2
    bonus_think: float = 0.0
    bonus_answer: float = 0.0
    top: float = 0.2
    """Share of the group, by reward, that may earn a bonus."""


def length_control(
    rewards: Sequence[float], thought_lengths: Sequence[int], answer_lengths: Sequence[int], control: LengthControl
) -> list[float]:
    """What to add to each reward of a group. Lengths in tokens; an answer of length 0 is empty."""
    n = len(rewards)
    if not n == len(thought_lengths) == len(answer_lengths):
        raise ValueError(
            f"{n} rewards, {len(thought_lengths)} thought lengths and {len(answer_lengths)} answer lengths; wanted one of each"
        )
    said = [i for i in range(n) if answer_lengths[i] > 0]
    thought = [i for i in said if thought_lengths[i] > 0]
    by_thought, by_answer = centred(thought_lengths, thought), centred(answer_lengths, said)
    changes = {i: control.think * by_thought.get(i, 0.0) + control.answer * by_answer[i] for i in said}
    best = top_of([rewards[i] for i in said], control.top)
    for i in said:
        if rewards[i] >= best:
            shortest_thought = i in by_thought and thought_lengths[i] == min(thought_lengths[j] for j in thought)
            shortest_answer = answer_lengths[i] == min(answer_lengths[j] for j in said)
            changes[i] += control.bonus_think * shortest_thought + control.bonus_answer * shortest_answer
    lowest = min([0.0, *changes.values()])
    return [changes.get(i, lowest) for i in range(n)]


def centred(lengths: Sequence[int], among: Sequence[int]) -> dict[int, float]:
    """w~ of the rollouts `among`: lengths [10, 30, 20] of 0, 1, 2 -> {0: 0.5, 1: -0.5, 2: 0.0}."""
    if not among:
        return {}
    low, high = min(lengths[i] for i in among), max(lengths[i] for i in among)
    if low == high:
        return dict.fromkeys(among, 0.0)
    weights = {i: 1 - (lengths[i] - low) / (high - low) for i in among}
    mean = sum(weights.values()) / len(weights)
    return {i: w - mean for i, w in weights.items()}


def top_of(rewards: Sequence[float], share: float) -> float:
    """The lowest reward that belongs to the top `share` of a group; at least one rollout does."""
    if not rewards:
        return float("inf")
    ordered = sorted(rewards, reverse=True)
    return ordered[max(1, round(share * len(ordered))) - 1]
