"""Held-out evaluation counts only what the policy did, with an honest interval."""

from __future__ import annotations

import asyncio
import random

import pytest

from rl_core.evaluation import evaluate, score, wilson
from rl_core.seams import GroupResult
from rl_core.types import EpisodeSpec, Task
from tests.unit.fakes import SPEC, FakeWorkers, group_result, simulate, tasks


def test_wilson_interval_matches_published_values() -> None:
    # Newcombe 1998, table I: 81/263 and 0/20
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_failures_of_ours_are_not_counted_as_zero() -> None:
    good = group_result(rewards=(1.0,), statuses=("ok",))
    broken = group_result(rewards=(), statuses=("infra_error",), num_trainable=0)
    result = score([good, broken, group_result(rewards=(0.5,), statuses=("ok",))])
    assert (result.n, result.masked, result.pass_rate, result.mean_reward) == (2, 1, 0.5, 0.75)


def test_every_task_is_rolled_out_once_with_its_own_fixed_seed() -> None:
    seen: list[tuple[str, str, int | None, int]] = []

    class Seen(FakeWorkers):
        async def run_group(self, group_id: str, task: Task, spec: EpisodeSpec) -> GroupResult:
            seen.append((task.env, task.key, spec.sampling.seed, spec.group_size))
            return await super().run_group(group_id, task, spec)

    recorded: list[GroupResult] = []

    async def record(result: GroupResult) -> None:
        recorded.append(result)
        await asyncio.sleep(0)

    sources = {"math": tasks("math"), "code": tasks("code")}
    results = simulate(
        evaluate(
            Seen(random.Random(0)), tasks=sources, specs=dict.fromkeys(sources, SPEC), count=130, seed=7, label="before", record=record
        )
    )
    assert len(seen) == len(set(seen)) == len(recorded) == 260
    assert {s[2] for s in seen} == set(range(7, 137))
    assert {s[3] for s in seen} == {1}
    assert set(results) == {"math", "code"}
