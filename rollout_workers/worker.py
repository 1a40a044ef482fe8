"""RolloutWorker: the Ray actor that turns a task into a scored group.

run_group:  task, drafts --> G episodes beside each other (engine here, environments in HostActors) --> Group
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reward_models.learned import reward_group
from rl_core.chat import chat_format
from rl_core.config import EnvironmentConfig, RolloutConfig
from rl_core.drafts import Draft, DraftFile, Drafts
from rl_core.faults import Retries
from rl_core.seams import GroupResult
from rl_core.types import EpisodeSpec, Group, Receipt, Rollout, Task
from rollout_workers.continuing import SNAPSHOT_S, Continuing, Diverged
from rollout_workers.engine import Engine, EngineError, WeightsMismatch
from rollout_workers.episode import run_episode
from rollout_workers.hosts import Beginning, Hosts, HostSet
from rollout_workers.rewards import RewardActors, recipes

EPISODES_PER_SEQUENCE = 1.5
"""Episodes under way for each sequence that the engine decodes at a time: some are always waiting for an environment."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One group to roll out."""

    group_id: str
    task: Task
    spec: EpisodeSpec
    env_id: str
    options: Mapping[str, Any]
    drafts: Drafts = field(default_factory=dict)
    """What an earlier attempt left, on a worker that is gone or in an earlier life of the run."""


class RolloutWorker:
    """One engine and the episodes that use it. Made an actor by the pool; its methods are called concurrently."""

    def __init__(
        self, name: str, *, life: str, model_path: str, dtype: str, rollout: RolloutConfig, seed: int, hosts: HostSet,
        run_dir: Path | None, rewards: tuple[Mapping[str, EnvironmentConfig], RewardActors] | None = None, tool_format: str = "auto",
    ) -> None:  # fmt: skip
        """`life` names this worker until it dies: sessions on hosts carry it. Without a run folder, no log and no drafts are kept."""
        if run_dir is not None:
            to_file(run_dir / "logs" / f"{name}.log")
        self.name = name
        self._drafts = DraftFile(run_dir / "drafts", name) if run_dir is not None else None
        self._under_way: set[Continuing] = set()
        self._start: dict[str, Any] = {"model_path": model_path, "dtype": dtype, "rollout": rollout, "seed": seed}
        self._chat = chat_format(model_path, tool_format)
        self._hosts = Hosts(hosts, owner=life)
        self._room = asyncio.Semaphore(max(1, int(rollout.max_num_seqs * EPISODES_PER_SEQUENCE)))
        self._caps: dict[str, asyncio.Semaphore] = {}
        self._recipes = recipes(*rewards, lambda text: len(self._chat.encode(text))) if rewards else {}
        self._engine: Engine | None = None

    async def start(self) -> None:
        """Load the checkpoint as version 0 and warm up."""
        self._engine = await Engine.start(name=self.name, stop_ids=self._chat.stop_ids, **self._start)
        settle_memory()
        if self._drafts is not None:
            self._snapshots = asyncio.create_task(self._write_snapshots(self._drafts))

    async def run_group(self, job: Job) -> tuple[Group, GroupResult]:
        """G episodes of one task. The result's `ref` is filled in by the pool, which owns the group's object reference."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        retries, continued, begun = Retries(job.spec.group_size), set[int](), Beginning()
        try:
            async with asyncio.TaskGroup() as episodes:
                running = [episodes.create_task(self._rollout(job, i, retries, continued, begun)) for i in range(job.spec.group_size)]
        except* (EngineError, WeightsMismatch) as several:
            raise several.exceptions[0] from None  # one cause, of a class that the pool knows
        group = Group(id=job.group_id, task=job.task, rollouts=tuple(r.result() for r in running))
        if self._drafts is not None:
            self._drafts.forget(job.group_id)
        if job.task.env in self._recipes:
            group = await reward_group(group, self._recipes[job.task.env])
        kept = sum(draft.rollout(job.task) is not None for draft in job.drafts.values())
        return group, replace(GroupResult.of(group, loop.time() - began), kept=kept, continued=len(continued))

    async def load_weights(self, version: int, blob: NDArray[np.uint8]) -> Receipt:
        return await self.engine.load_weights(version, blob)

    async def shutdown(self) -> None:
        self._hosts.hang_up()
        if self._engine is not None:
            await self._engine.aclose()
            self._engine = None

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "RolloutWorker.start() was not awaited"
        return self._engine

    async def _rollout(self, job: Job, index: int, retries: Retries, continued: set[int], begun: Beginning) -> Rollout:
        """One rollout: the one that an earlier attempt finished, the rest of one that it did not, or a new one."""
        draft = job.drafts.get(index)
        if draft is not None and (finished := draft.rollout(job.task)) is not None:
            return finished
        async with self._cap(job.task.env, job.spec), self._room:
            if draft is not None:
                try:
                    rollout = await self._episode(job, index, f"{job.group_id}-{index}", begun, draft)
                    continued.add(index)
                except Diverged as reason:
                    log.warning("rollout %s-%d starts from nothing: %s", job.group_id, index, reason)
                    draft = None
            if draft is None:
                rollout = await self._episode(job, index, f"{job.group_id}-{index}", begun)
            tries = 1
            while (pause := retries.pause(index, rollout.verdict.status)) is not None:
                log.warning("rollout %s is tried again in %g s: %s", rollout.id, pause, dict(rollout.verdict.evidence))
                await asyncio.sleep(pause)
                rollout = await self._episode(job, index, f"{job.group_id}-{index}r{tries}", None)  # what was begun may be what failed
                tries += 1
        return rollout

    def _cap(self, env: str, spec: EpisodeSpec) -> AbstractAsyncContextManager[Any]:
        """An environment's own room. Waiting for it takes nobody else's, and no time of the episode."""
        if not spec.concurrency:
            return nullcontext()
        return self._caps.setdefault(env, asyncio.Semaphore(spec.concurrency))

    async def _episode(self, job: Job, index: int, rollout_id: str, begun: Beginning | None, draft: Draft | None = None) -> Rollout:
        spec, trains = seeded(job.spec, index), job.spec.sampling.seed is None  # fixed dice give the same again without a draft
        session = self._hosts.session(job.env_id, job.options, job.task, begun)
        sampler = Continuing(self.engine, self._drafts if trains else None, job.group_id, index, draft)
        self._under_way.add(sampler)
        try:
            rollout = await run_episode(job.task, spec, sampler, session, self._chat, rollout_id, worker=self.name)
        finally:
            self._under_way.discard(sampler)
        if trains and self._drafts is not None and rollout.verdict.status.trains:
            self._drafts.end(job.group_id, index, rollout)
        return rollout

    async def _write_snapshots(self, drafts: DraftFile) -> None:
        """The tokens of turns under way go to the draft file, every now and then."""
        while True:
            await asyncio.sleep(SNAPSHOT_S)
            waiting = {s.request_id: s for s in self._under_way if s.request_id}
            for request_id, part in self.engine.under_way({name: s.seen for name, s in waiting.items()}).items():
                waiting[request_id].snapshot(part)
            try:
                drafts.flush()
            except OSError as error:  # a full disk stops the run elsewhere; drafts alone are no reason to
                log.error("drafts are kept no longer, so rollouts that are interrupted start again: %s", error)
                return


def seeded(spec: EpisodeSpec, index: int) -> EpisodeSpec:
    """The spec of one rollout of a group: with fixed dice, each has its own."""
    if spec.sampling.seed is None:
        return spec
    return replace(spec, sampling=replace(spec.sampling, seed=(spec.sampling.seed + 104_729 * index) % 2**31))


def settle_memory() -> None:
    """What is loaded stays, so the garbage collector need not look at it again: no episode moves while it does."""
    gc.collect()
    gc.freeze()


def to_file(path: Path) -> None:
    """This process's log goes to the run folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
