"""Advantages of a group: how much better a rollout was than the other attempts at the same task.

    grpo            (r - mean) / (std + EPSILON)      Shao et al. 2024, DeepSeekMath; std over the group, divided by n
    mean             r - mean                         Liu et al. 2025, Dr. GRPO: no bias towards very easy and very hard tasks
    leave_one_out    r - mean of the others           Ahmadian et al. 2024, RLOO: the baseline does not depend on the rollout itself

Only rollouts whose status trains count (invariant 5): a failure of ours neither gets an advantage nor moves the baseline.
A rollout whose tokens are left out of the loss (too stale, cut off) still counts here: what it earned is news of the task,
whoever may learn from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from rl_core.overlong import Overlong, penalty
from rl_core.types import Floats, Group

Rewards = NDArray[np.float64]

EPSILON = 1e-6
"""Keeps the division defined when all rewards are equal; such groups have advantage 0 everywhere."""


KEEP = Overlong()


def grpo(rewards: Rewards) -> Rewards:
    """[n] -> [n], mean 0 and standard deviation 1 (0 if all rewards are equal)."""
    return (rewards - rewards.mean()) / (rewards.std() + EPSILON)


def mean(rewards: Rewards) -> Rewards:
    """[n] -> [n], mean 0, in units of reward."""
    return rewards - rewards.mean()


def leave_one_out(rewards: Rewards) -> Rewards:
    """[n] -> [n], n >= 2: r_i - mean_{j != i} r_j = n / (n - 1) * (r_i - mean)."""
    return (rewards - rewards.mean()) * (len(rewards) / (len(rewards) - 1))


RULES: Mapping[str, Callable[[Rewards], Rewards]] = {"grpo": grpo, "mean": mean, "leave_one_out": leave_one_out}


def group_advantages(group: Group, rule: str, overlong: Overlong = KEEP) -> Floats:
    """[G], one per rollout of `group`; 0 where the rollout does not train, and everywhere if fewer than two do."""
    if rule not in RULES:
        raise ValueError(f"advantage rule {rule!r}, wanted one of {', '.join(RULES)}; set learner.advantage")
    trains = np.array([r.verdict.status.trains for r in group.rollouts], bool)
    advantages = np.zeros(len(group.rollouts), np.float32)
    if trains.sum() >= 2:
        rewards = np.array([(r.verdict.reward or 0.0) + penalty(r, overlong) for r in group.trainable], np.float64)
        advantages[trains] = RULES[rule](rewards)
    return advantages
