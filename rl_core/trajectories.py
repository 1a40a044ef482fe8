"""From a group to what the loss sees: one trajectory per rollout, or more where a turn did not continue the ids before it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rl_core.advantages import group_advantages
from rl_core.types import Completion, Group, Rollout, Trajectory


def trajectories(group: Group, rule: str) -> list[Trajectory]:
    """All trajectories of the rollouts of `group` that train; `rule` names how advantages are made (`advantages.RULES`)."""
    advantages = group_advantages(group, rule)
    return [
        trajectory
        for rollout, advantage in zip(group.rollouts, advantages, strict=True)
        if rollout.verdict.status.trains
        for trajectory in rollout_trajectories(rollout, float(advantage))
    ]


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
        loss_mask[start:stop] = True
        logprobs[start:stop] = completion.logprobs
        versions[start:stop] = completion.versions
    return Trajectory(env=env, token_ids=token_ids, loss_mask=loss_mask, logprobs=logprobs, versions=versions, advantage=advantage)
