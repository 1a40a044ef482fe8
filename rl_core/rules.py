"""The rules of the objective by name, with what their bounds mean: what a config may say, without importing torch.

The formulas are in `learner/importance.py` and `learner/losses.py`; docs/objective.md has them in one table. Projects use the same
name with bounds that differ tenfold, so a run says in words which rules are in force (`LearnerConfig.objective`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a rule measures, the point that its bounds enclose, and the bounds that it has when a config gives none."""

    measures: str
    centre: float  # the value of the measure where the two policies are equal
    low: float
    high: float


RATIO = "train/behaviour ratio of a token"
PROXIMAL_RATIO = "proximal/behaviour ratio of a token"

IMPORTANCE: Mapping[str, Bounds] = {
    "masked": Bounds(measures=RATIO, centre=1.0, low=0.2, high=5.0),
    "icepop": Bounds(measures=PROXIMAL_RATIO, centre=1.0, low=0.5, high=5.0),
    "truncated": Bounds(measures=PROXIMAL_RATIO, centre=1.0, low=0.0, high=2.0),
    "sequence_mask": Bounds(measures="train/behaviour ratio of a trajectory", centre=1.0, low=0.0, high=3.0),
    "geometric_mask": Bounds(measures="geometric mean of the train/behaviour ratios of a trajectory", centre=1.0, low=0.99, high=1.01),
    "dppo": Bounds(measures="train less behaviour probability of a token", centre=0.0, low=-0.2, high=0.2),
    "none": Bounds(measures="nothing", centre=1.0, low=0.0, high=float("inf")),
}
"""Rules of `learner.importance.rule`. The first is the default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """The clip range 1 - low ... 1 + high that a policy loss has when a config gives none."""

    low: float
    high: float


POLICY_LOSSES: Mapping[str, Clip] = {
    "ppo": Clip(low=0.2, high=0.28),
    "gspo": Clip(low=3e-4, high=4e-4),
    "cispo": Clip(low=1.0, high=4.0),
}
"""Rules of `learner.policy_loss`. The first is the default."""

PROXIMAL = ("recomputed", "behaviour")
"""What the proximal policy is: the learner's own at the start of the step, or the one that sampled."""

ADVANTAGES = ("grpo", "mean", "leave_one_out")
"""Rules of `learner.advantage`; see rl_core/advantages.py."""

OVERLONG = ("keep", "mask", "penalty")
"""What becomes of a rollout that the token budget cut off; see rl_core/overlong.py."""
