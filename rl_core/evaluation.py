"""Held-out evaluation: the same tasks and the same dice whenever it is asked, scored as a whole, by difficulty and by length."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import fmean, stdev

from rl_core.seams import GroupResult, RolloutWorkers
from rl_core.types import EpisodeSpec, Task

CONCURRENT_ROLLOUTS = 96
"""Episodes in flight during an evaluation: enough to keep the engines full while environments answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """The score of some of an environment's tasks."""

    pass_rate: float
    n: int  # rollouts that count

    def to_json(self) -> dict[str, float]:
        return {"pass_rate": self.pass_rate, "n": self.n}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """One environment's score on held-out tasks."""

    pass_rate: float  # pass@1: share of rollouts with full reward
    mean_reward: float
    n: int  # rollouts that count; failures of ours do not
    masked: int  # rollouts that ended in a failure of ours
    ci95: tuple[float, float]  # Wilson interval of pass_rate over the tasks; rollouts of one task are no independent evidence
    pass_at: Mapping[int, float]
    """k -> chance that one of k rollouts of a task passes, for k = 1, 2, 4, ... up to the rollouts per task."""
    by_difficulty: Mapping[str, Bucket]
    pass_at_ci95: Mapping[int, tuple[float, float]]
    """Intervals of `pass_at` over the tasks."""
    reward_ci95: tuple[float, float]  # of mean_reward over the tasks, normal approximation; (mean, mean) of a single task
    thinking_tokens: float  # per rollout, within thoughts
    thoughts_closed: float  # per rollout, by us, at the thinking budget
    by_length: Mapping[str, Bucket]
    """By tokens read: prompt and what the environment said."""

    def to_json(self) -> dict[str, object]:
        return {
            "pass_rate": self.pass_rate,
            "mean_reward": self.mean_reward,
            "n": self.n,
            "masked": self.masked,
            "ci95": list(self.ci95),
            "pass_at": {str(k): value for k, value in self.pass_at.items()},
            "pass_at_ci95": {str(k): list(value) for k, value in self.pass_at_ci95.items()},
            "reward_ci95": list(self.reward_ci95),
            "thinking_tokens": self.thinking_tokens,
            "thoughts_closed": self.thoughts_closed,
            "by_difficulty": {name: bucket.to_json() for name, bucket in self.by_difficulty.items()},
            "by_length": {name: bucket.to_json() for name, bucket in self.by_length.items()},
        }


async def evaluate(
    workers: RolloutWorkers,
    *,
    tasks: Mapping[str, Iterator[Task]],
    specs: Mapping[str, EpisodeSpec],
    count: int,
    seed: int,
    label: str,
    samples: int = 1,
    record: Callable[[GroupResult], Awaitable[None]],
) -> dict[str, EvalResult]:
    """Roll out `count` tasks of each environment, each `samples` times, under whatever the engines hold. `label` starts the group ids."""
    room = asyncio.Semaphore(CONCURRENT_ROLLOUTS)

    async def one(index: int, task: Task) -> GroupResult:
        spec = specs[task.env]
        spec = replace(spec, group_size=samples, sampling=replace(spec.sampling, seed=seed + index))
        async with room:
            result = await workers.run_group(f"{label}-{task.env}-{index:04d}", task, spec)
        await record(result)
        return result

    drawn = {name: [replace(t, env=name) for t in islice(stream, count)] for name, stream in tasks.items()}
    # Environments take turns, so that long and short episodes share the engines.
    order = sorted(((index, task) for rows in drawn.values() for index, task in enumerate(rows)), key=lambda row: row[0])
    results = await asyncio.gather(*(one(index, task) for index, task in order))
    difficulty = {task.key: task.difficulty for rows in drawn.values() for task in rows}
    return {name: score([r for r in results if r.env == name], difficulty) for name in drawn}


def score(results: Sequence[GroupResult], difficulty: Mapping[str, str] | None = None) -> EvalResult:
    """Of groups of one environment; `difficulty` by task key."""
    rewards = [r for result in results for r in result.rewards]
    counts = [(len(r.rewards), passes(r)) for r in results if r.rewards]
    pass_rate = fmean(c / n for n, c in counts) if counts else 0.0
    at = pass_at(counts)
    rollouts = max(1, sum(len(result.statuses) for result in results))
    return EvalResult(
        pass_rate=pass_rate,
        mean_reward=fmean(rewards) if rewards else 0.0,
        n=len(rewards),
        masked=sum(len(result.statuses) for result in results) - len(rewards),
        ci95=wilson(pass_rate * len(counts), len(counts)),
        pass_at=at,
        pass_at_ci95={k: wilson(value * len(counts), len(counts)) for k, value in at.items()},
        reward_ci95=normal([fmean(r.rewards) for r in results if r.rewards]),
        thinking_tokens=sum(r.thinking_tokens for r in results) / rollouts,
        thoughts_closed=sum(r.thoughts_closed for r in results) / rollouts,
        by_difficulty=buckets(results, lambda r: (difficulty or {}).get(r.task_key, "")),
        by_length=buckets(results, lambda r: length_bucket(r.prompt_tokens // max(1, len(r.statuses)))),
    )


def passes(result: GroupResult) -> int:
    return sum(r >= 1.0 for r in result.rewards)


def pass_at(counts: Sequence[tuple[int, int]]) -> dict[int, float]:
    """{k: pass@k} from (rollouts, of which passed) of each task, for the powers of two that every task has rollouts for.

    pass@k = mean over tasks of 1 - C(n - c, k) / C(n, k), the unbiased estimator of Chen et al., 2021 (arXiv:2107.03374, equation 1);
    1 - (1 - c/n)^k would be biased.
    """
    if not counts:
        return {}
    most = min(n for n, _ in counts)
    powers = [1 << i for i in range(most.bit_length())]
    return {k: fmean(1 - math.comb(n - c, k) / math.comb(n, k) for n, c in counts) for k in powers}


def buckets(results: Sequence[GroupResult], name: Callable[[GroupResult], str]) -> dict[str, Bucket]:
    """Scores by whatever `name` says of a group, in order of the names; lengths in order of length."""
    found: dict[str, list[GroupResult]] = {}
    for result in results:
        if result.rewards:
            found.setdefault(name(result), []).append(result)
    ordered = sorted(found.items(), key=lambda item: (len(item[0]) if item[0].startswith("<=") else 0, item[0]))
    return {
        bucket: Bucket(pass_rate=fmean(passes(r) / len(r.rewards) for r in mine), n=sum(len(r.rewards) for r in mine))
        for bucket, mine in ordered
    }


def length_bucket(tokens: int) -> str:
    """The power of two above: 700 -> "<=1024"."""
    return f"<={1 << max(6, (max(tokens, 1) - 1).bit_length())}"


def normal(values: Sequence[float], z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of the mean of independent values: mean +- z s / sqrt(n), s with n - 1."""
    if not values:
        return 0.0, 0.0
    mean, half = fmean(values), z * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return mean - half, mean + half


def wilson(passed: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927): well-behaved near 0 and 1, unlike p +- z sqrt(p(1-p)/n)."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = passed / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
