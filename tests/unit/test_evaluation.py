"""Held-out evaluation counts only what the policy did, with an honest interval."""

from __future__ import annotations

import asyncio
import itertools
import random
from statistics import fmean

import pytest

from infra.run_state import Score
from rl_core.evaluation import evaluate, pass_at, score, wilson
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


def test_pass_at_k_is_the_share_of_subsets_with_a_success() -> None:
    counts = [(8, 0), (8, 1), (8, 5), (8, 8)]

    def by_counting(n: int, c: int, k: int) -> float:
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        return sum(map(any, subsets)) / len(subsets)

    assert pass_at(counts) == pytest.approx({k: fmean(by_counting(n, c, k) for n, c in counts) for k in (1, 2, 4, 8)})
    assert list(pass_at([(8, 1), (3, 1)])) == [1, 2]  # a rollout was lost: no task is asked for more than it has
    assert pass_at([]) == {}


def test_scores_are_broken_down_by_difficulty_and_by_length() -> None:
    def group(key: str, rewards: tuple[float, ...], tokens: int) -> GroupResult:
        return group_result(task_key=key, rewards=rewards, statuses=("ok",) * len(rewards), prompt_tokens=tokens * len(rewards))

    rows = [group("a", (1.0, 0.0), 100), group("b", (1.0, 1.0), 1024), group("c", (0.0, 0.0), 1025)]
    result = score(rows, {"a": "add", "b": "mul", "c": "mul"})
    assert {k: (b.pass_rate, b.n) for k, b in result.by_difficulty.items()} == {"add": (0.5, 2), "mul": (0.5, 4)}
    assert {k: (b.pass_rate, b.n) for k, b in result.by_length.items()} == {"<=128": (0.5, 2), "<=1024": (1.0, 2), "<=2048": (0.0, 2)}
    assert list(result.by_length) == ["<=128", "<=1024", "<=2048"]
    assert result.pass_rate == 0.5
    assert result.pass_at == {1: 0.5, 2: pytest.approx(2 / 3)}
    assert result.ci95 == wilson(1.5, 3)  # three tasks, not six independent tries
    assert Score.of(3, result.to_json()).to_json()["by_length"]["<=1024"] == {"pass_rate": 1.0, "n": 2}


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
