"""Held-out evaluation: one rollout per task, the same tasks and the same dice whenever it is asked."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from rl_core.seams import GroupResult, RolloutWorkers
from rl_core.types import EpisodeSpec, Task

CONCURRENT_ROLLOUTS = 96
"""Episodes in flight during an evaluation: enough to keep the engines full while environments answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """One environment's score on held-out tasks."""

    pass_rate: float  # share of rollouts with full reward
    mean_reward: float
    n: int  # rollouts that count; failures of ours do not
    masked: int  # rollouts that ended in a failure of ours
    ci95: tuple[float, float]  # Wilson interval of pass_rate

    def to_json(self) -> dict[str, object]:
        return {"pass_rate": self.pass_rate, "mean_reward": self.mean_reward, "n": self.n, "masked": self.masked, "ci95": list(self.ci95)}


async def evaluate(
    workers: RolloutWorkers,
    *,
    tasks: Mapping[str, Iterator[Task]],
    specs: Mapping[str, EpisodeSpec],
    count: int,
    seed: int,
    label: str,
    record: Callable[[GroupResult], Awaitable[None]],
) -> dict[str, EvalResult]:
    """Roll out `count` tasks of each environment under whatever the engines hold. `label` starts the group ids."""
    room = asyncio.Semaphore(CONCURRENT_ROLLOUTS)

    async def one(index: int, task: Task) -> GroupResult:
        spec = specs[task.env]
        spec = replace(spec, group_size=1, sampling=replace(spec.sampling, seed=seed + index))
        async with room:
            result = await workers.run_group(f"{label}-{task.env}-{index:04d}", task, spec)
        await record(result)
        return result

    drawn = {name: [replace(t, env=name) for t in islice(stream, count)] for name, stream in tasks.items()}
    # Environments take turns, so that long and short episodes share the engines.
    order = sorted(((index, task) for rows in drawn.values() for index, task in enumerate(rows)), key=lambda row: row[0])
    results = await asyncio.gather(*(one(index, task) for index, task in order))
    return {name: score([r for r in results if r.env == name]) for name in drawn}


def score(results: Sequence[GroupResult]) -> EvalResult:
    """Pass rate and interval over the rollouts that count."""
    rewards = [r for result in results for r in result.rewards]
    passed = sum(r >= 1.0 for r in rewards)
    return EvalResult(
        pass_rate=passed / len(rewards) if rewards else 0.0,
        mean_reward=sum(rewards) / len(rewards) if rewards else 0.0,
        n=len(rewards),
        masked=sum(len(result.statuses) for result in results) - len(rewards),
        ci95=wilson(passed, len(rewards)),
    )


def wilson(passed: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927): well-behaved near 0 and 1, unlike p +- z sqrt(p(1-p)/n)."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = passed / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
