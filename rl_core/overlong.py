"""Answers that ran into the token budget: what they count for.

    keep      as any other: their reward is what the environment gave
    mask      their reward stays in the group's baseline, their tokens do not train (Yu et al. 2025, DAPO: overlong filtering)
    penalty   the reward falls before the budget ends (DAPO: soft overlong punishment). For the longest turn, of n tokens, with a
              budget of L tokens and a buffer of B = `buffer` * L:

                  n <= L - B            0
                  L - B < n < L         - ((n - (L - B)) / B) * weight
                  n = L, or cut off     - weight

A truncated answer says little of whether its reasoning was wrong; a zero for it teaches brevity, not sense. Masking is neutral
on length, the penalty prefers short answers smoothly. Evaluation, stored verdicts and the loop's filter see the environment's own
reward: the penalty exists within the learner alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from rl_core.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlong:
    """How one environment's overlong rollouts are treated."""

    rule: str = "keep"
    limit: int = 0  # L: budget of one turn, tokens
    buffer: float = 0.25  # B as a share of L
    weight: float = 1.0  # reward lost at the limit


def is_truncated(rollout: Rollout) -> bool:
    """Whether the token budget, not the policy, ended a turn of it."""
    return any(c.finish_reason == "length" for c in rollout.completions)


def penalty(rollout: Rollout, overlong: Overlong) -> float:
    """What is added to the reward, 0 or less; 0 unless the rule is `penalty`."""
    if overlong.rule != "penalty":
        return 0.0
    if is_truncated(rollout):
        return -overlong.weight
    longest = max((len(c.token_ids) for c in rollout.completions), default=0)
    room = overlong.buffer * overlong.limit
    return -overlong.weight * min(1.0, max(0.0, (longest - (overlong.limit - room)) / room))
