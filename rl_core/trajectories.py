"""From a group to what the loss sees: one trajectory per rollout, or more where a turn did not continue the ids before it.

rollout  --> did it end by a fault of ours?      --yes--> neither reward nor tokens
         --> is it too stale, or cut off?        --yes--> its reward counts in the baseline, its tokens do not train
         --> otherwise                                    both
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

import numpy as np

from rl_core.advantages import KEEP, group_advantages
from rl_core.overlong import Overlong, is_truncated
from rl_core.types import Completion, Group, Rollout, Trajectory


class LeftOut(StrEnum):
    """Why the tokens of a rollout do not train although its reward counts."""

    STALE = "stale"
    TRUNCATED = "truncated"


def trajectories(group: Group, rule: str, *, overlong: Overlong = KEEP, oldest: int | None = None) -> list[Trajectory]:
    """All trajectories of the rollouts of `group` whose tokens train; `rule` names how advantages are made (`advantages.RULES`).

    `oldest`: the oldest policy version whose tokens train; None is any.
    """
    advantages = group_advantages(group, rule, overlong)
    return [
        trajectory
        for rollout, advantage in zip(group.rollouts, advantages, strict=True)
        if rollout.verdict.status.trains and left_out(rollout, overlong=overlong, oldest=oldest) is None
        for trajectory in rollout_trajectories(rollout, float(advantage))
    ]


def left_out(rollout: Rollout, *, overlong: Overlong = KEEP, oldest: int | None = None) -> LeftOut | None:
    """Why a rollout keeps its reward in the baseline but not its tokens, or None if they train.

    The bias of this: the baseline compares with rollouts of an older policy, whose mean reward is a little lower as a rule. It is
    the same for all siblings, so it shifts how much a task pushes, not which of its answers is preferred. Leaving the reward out
    as well would bias the other way, since long, slow answers are the stale ones.
    """
    if oldest is not None and rollout.min_version is not None and rollout.min_version < oldest:
        return LeftOut.STALE
    if overlong.rule == "mask" and is_truncated(rollout):
        return LeftOut.TRUNCATED
    return None


def rollout_trajectories(rollout: Rollout, advantage: float) -> list[Trajectory]:
    """Merge turns whose prompt repeats all ids before it (invariant 1), so that each sampled token is trained exactly once."""
    return [_joined(rollout.env, run, advantage) for run in _runs(rollout.completions)]


def _runs(completions: tuple[Completion, ...]) -> Iterator[list[Completion]]:
    """Cut the turns where a prompt is not an extension of the ids before it."""
    run: list[Completion] = []
    for completion in completions:
        if run and not _extends(completion, run[-1]):
            yield run
            run = []
        run.append(completion)
    if run:
        yield run


def _extends(completion: Completion, earlier: Completion) -> bool:
    prompt, split, end = completion.prompt_ids, len(earlier.prompt_ids), len(earlier.prompt_ids) + len(earlier.token_ids)
    return (
        len(prompt) >= end and np.array_equal(prompt[:split], earlier.prompt_ids) and np.array_equal(prompt[split:end], earlier.token_ids)
    )


def _joined(env: str, run: list[Completion], advantage: float) -> Trajectory:
    """P0 + A0 + E0 + A1 ... as one trajectory; see `Trajectory` for the layout."""
    last = run[-1]
    token_ids = np.concatenate([last.prompt_ids, last.token_ids]).astype(np.int32)
    loss_mask = np.zeros(len(token_ids), bool)
    logprobs = np.zeros(len(token_ids), np.float32)
    versions = np.full(len(token_ids), -1, np.int32)
    for completion in run:
        start = len(completion.prompt_ids)
        stop = start + len(completion.token_ids)
        assert np.array_equal(token_ids[start:stop], completion.token_ids), f"a turn of {env!r} does not continue the ids before it"
        sampled = completion.sampled
        loss_mask[start:stop] = sampled
        logprobs[start:stop] = np.where(sampled, completion.logprobs, 0.0)
        versions[start:stop] = np.where(sampled, completion.versions, -1)
    return Trajectory(env=env, token_ids=token_ids, loss_mask=loss_mask, logprobs=logprobs, versions=versions, advantage=advantage)
