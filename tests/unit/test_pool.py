"""The pool's decisions, without Ray: which worker takes up what another one left."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from rl_core.config import EnvironmentConfig, LoopConfig, ModelConfig, RolloutConfig, RunConfig
from rl_core.drafts import Draft, Drafts
from rl_core.seams import GroupResult
from rollout_workers.engine import EngineError
from rollout_workers.pool import MAX_RESTARTS, Place, Pool, PoolError
from rollout_workers.routing import Routing
from rollout_workers.worker import Job
from tests.unit.fakes import SPEC, group_result, tasks
from tests.unit.test_drafts import completion

TASK = next(tasks("math"))


class Workers(Pool):
    """A pool whose workers are names; those in `broken` die of every group until they are restarted."""

    def __init__(self, count: int, left: Drafts | None = None, **loop: int) -> None:
        config = RunConfig(
            model=ModelConfig(path="x"),
            environments={"math": EnvironmentConfig()},
            loop=LoopConfig(**loop),
            rollout=RolloutConfig(num_workers=count),
        )
        super().__init__(config, None)
        self.left = left or {}
        self.jobs: list[tuple[str, Job]] = []
        self.restarting = asyncio.Event()
        self.may_come_back = asyncio.Event()
        self.broken = {"w0.0"}
        for place in self._places.values():
            place.actor = f"{place.name}.0"

    async def _on(self, actor: Any, job: Job) -> GroupResult:
        self.jobs.append((actor, job))
        await asyncio.sleep(0)
        if actor in self.broken:
            raise EngineError(f"{actor} is gone")
        return group_result(group_id=job.group_id, continued=len(job.drafts))

    async def _left(self, groups: Any) -> dict[str, Drafts]:
        return dict.fromkeys(groups, self.left)

    async def _restart(self, place: Place, death: BaseException) -> Any:
        self._routing.down(place.name)
        place.restarts += 1
        self.restarting.set()
        await self.may_come_back.wait()
        if place.restarts > MAX_RESTARTS:
            raise PoolError("too often")
        place.actor = f"{place.name}.{place.restarts}"
        self._routing.up(place.name)


def draft(version: int) -> Draft:
    return Draft(completions=(completion([1, 2], 4, version),), at=0.0)


async def test_a_group_goes_on_at_once_on_a_worker_that_is_up() -> None:
    pool = Workers(2, {0: draft(0), 1: draft(0)})
    result = await pool.run_group("g", TASK, SPEC)
    assert [(actor, len(job.drafts)) for actor, job in pool.jobs] == [("w0.0", 0), ("w1.0", 2)]
    assert (result.attempts, result.continued) == (2, 2)
    assert result.history == "worker w0 died: 0 rollouts kept, 2 continued, 2 started again"
    await pool.restarting.wait()
    assert not pool._routing.is_up("w0"), "it is being restarted meanwhile, and gets no group"
    assert (await pool.run_group("h", TASK, SPEC)).history == ""
    pool.may_come_back.set()
    await asyncio.sleep(0.01)
    assert (pool._places["w0"].actor, pool._routing.is_up("w0")) == ("w0.1", True)
    assert not any(p.groups for p in pool._places.values())


async def test_without_another_worker_groups_wait_for_the_restart_and_new_ones_do_too() -> None:
    pool = Workers(1, {0: draft(0)})
    work = [asyncio.create_task(pool.run_group("g", TASK, SPEC))]
    await pool.restarting.wait()
    work.append(asyncio.create_task(pool.run_group("h", TASK, SPEC)))
    await asyncio.sleep(0.01)
    assert len(pool.jobs) == 1
    pool.may_come_back.set()
    await asyncio.gather(*work)
    assert sorted((actor, job.group_id, len(job.drafts)) for actor, job in pool.jobs[1:]) == [("w0.1", "g", 1), ("w0.1", "h", 0)]


async def test_drafts_that_are_too_old_to_train_start_again() -> None:
    pool = Workers(1, {0: draft(3), 1: draft(4)}, max_staleness=1)
    pool.latest = (5, None)
    pool.may_come_back.set()
    result = await pool.run_group("g", TASK, SPEC)
    assert list(pool.jobs[1][1].drafts) == [1]
    assert result.history == "worker w0 died: 0 rollouts kept, 1 continued, 3 started again"


async def test_what_an_earlier_life_left_is_taken_up_once() -> None:
    pool = Workers(1)
    pool.broken = set()
    pool._drafts = {"g": {0: draft(0)}}
    assert (await pool.run_group("g", TASK, SPEC)).history == "taken up: 0 rollouts kept, 1 continued, 3 started again"
    assert (await pool.run_group("g", TASK, SPEC)).history == ""


async def test_a_worker_that_never_comes_back_ends_the_run_with_a_sentence() -> None:
    pool = Workers(1)
    pool.may_come_back.set()
    pool.broken = {f"w0.{life}" for life in range(99)}
    with pytest.raises(PoolError):
        await pool.run_group("g", TASK, SPEC)


def test_the_least_busy_worker_that_is_up_takes_the_next_group() -> None:
    """Against the plain rule, over many random turns."""
    dice, names = random.Random(0), [f"w{i}" for i in range(5)]
    routing, busy, up, busiest = Routing(names), dict.fromkeys(names, 0), set(names), 0
    for _ in range(5000):
        match dice.choice(("take", "take", "give back", "give back", "down", "up")):
            case "take":
                worker = routing.take()
                assert (worker is None) == (not up) == (not routing.any_up())
                if worker is not None:
                    assert worker in up
                    assert busy[worker] == min(busy[w] for w in up)
                    busy[worker] += 1
                    busiest = max(busiest, busy[worker])
            case "give back" if having := [w for w in names if busy[w]]:
                worker = dice.choice(having)
                busy[worker] -= 1
                routing.give_back(worker)
            case "down":
                worker = dice.choice(names)
                up.discard(worker)
                routing.down(worker)
            case "up":
                worker = dice.choice(names)
                up.add(worker)
                routing.up(worker)
    assert busiest > 3
    with pytest.raises(ValueError, match="w0 has no group"):
        Routing(["w0"]).give_back("w0")
