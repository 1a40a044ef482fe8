"""Held-out scores of a checkpoint, on real engines and environments, at one or several thinking budgets.

    checkpoint --> Pool (engines, environment hosts) --> evaluate: the same tasks and the same dice at each budget --> Row

What it starts, it ends, however it is left: nothing of it outlives this process.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from infra.launch import episode_spec, task_source
from infra.ray_cluster import connect
from rl_core.config import RunConfig
from rl_core.evaluation import EvalResult, evaluate
from rl_core.seams import GroupResult
from rollout_workers.pool import Pool

Budget = int | None
"""Reasoning tokens per turn; None is no cap."""

Progress = Callable[[Budget, int, int], None]
"""Told the budget, and how many groups of how many are done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure."""

    budgets: Sequence[Budget] | None  # None: once, with each environment's own
    tasks: int  # per environment
    samples: int  # rollouts per task


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One environment's score at one budget."""

    env: str
    budget: Budget
    result: EvalResult

    def to_json(self) -> dict[str, Any]:
        return {"env": self.env, "budget": self.budget, **self.result.to_json()}


def run(config: RunConfig, plan: Plan, progress: Progress) -> list[Row]:
    """All rows, budget after budget. Ctrl-C and SIGTERM end it with KeyboardInterrupt, once nothing is left running."""
    try:
        connect(Path(config.runs_dir))
        return asyncio.run(_measure(config, plan, progress))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        ray.shutdown()


async def _measure(config: RunConfig, plan: Plan, progress: Progress) -> list[Row]:
    me = asyncio.current_task()
    assert me is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, me.cancel)
    progress(None, 0, 0)
    pool = await Pool.start(config)
    try:
        return [row for budgets in settings(config, plan) for row in await scores(config, plan, pool, budgets, progress)]
    finally:
        await pool.aclose()


def settings(config: RunConfig, plan: Plan) -> list[dict[str, Budget]]:
    """{environment: budget} of each evaluation to make."""
    if plan.budgets is None:
        return [{name: env.thinking_budget for name, env in config.environments.items()}]
    return [dict.fromkeys(config.environments, budget) for budget in plan.budgets]


async def scores(config: RunConfig, plan: Plan, pool: Pool, budgets: dict[str, Budget], progress: Progress) -> list[Row]:
    """The scores of all environments, each at its budget."""
    specs = {
        name: replace(episode_spec(env, config.rollout.num_workers), thinking_budget=budgets[name])
        for name, env in config.environments.items()
    }
    shown, done, total = next(iter(budgets.values())), 0, plan.tasks * len(specs)

    async def count(_: GroupResult) -> None:
        nonlocal done
        done += 1
        progress(shown, done, total)

    tasks = {name: task_source(config, name, "eval", config.eval.seed) for name in specs}  # the same ones as in a run's own evaluations
    results = await evaluate(
        pool, tasks=tasks, specs=specs, count=plan.tasks, seed=config.eval.seed,
        label=f"eval-{shown}", samples=plan.samples, record=count,
    )  # fmt: skip
    return [Row(env=name, budget=budgets[name], result=result) for name, result in results.items()]
