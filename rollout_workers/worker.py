"""RolloutWorker: the Ray actor that turns a task into a scored group.

run_group:  task --> G episodes beside each other (engine here, environments in EnvHost actors) --> Group
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl_core.chat import chat_format
from rl_core.config import RolloutConfig
from rl_core.seams import GroupResult, Observation, Transition
from rl_core.types import EpisodeSpec, Group, Receipt, Rollout, Status, Task, Turn
from rollout_workers.engine import Engine, EngineError
from rollout_workers.episode import run_episode

EPISODES_PER_SEQUENCE = 1.5
"""Episodes under way for each sequence that the engine decodes at a time: some are always waiting for an environment."""

RETRIED = (Status.INFRA_ERROR, Status.VERIFIER_ERROR)
"""Ends of an episode that say nothing about the policy; such an episode is tried once more."""

log = logging.getLogger(__name__)


class RolloutWorker:
    """One engine and the episodes that use it. Made an actor by the pool; its methods are called concurrently."""

    def __init__(
        self, name: str, *, model_path: str, dtype: str, rollout: RolloutConfig, seed: int, hosts: Sequence[Any], log_path: str = ""
    ) -> None:
        if log_path:
            to_file(log_path)
        self.name = name
        self._start: dict[str, Any] = {"model_path": model_path, "dtype": dtype, "rollout": rollout, "seed": seed}
        self._chat = chat_format(model_path)
        self._hosts = list(hosts)
        self._turn_of = itertools.count()
        self._room = asyncio.Semaphore(max(1, int(rollout.max_num_seqs * EPISODES_PER_SEQUENCE)))
        self._caps: dict[str, asyncio.Semaphore] = {}
        self._engine: Engine | None = None

    async def start(self) -> None:
        """Load the checkpoint as version 0 and warm up."""
        self._engine = await Engine.start(name=self.name, stop_ids=self._chat.stop_ids, **self._start)

    async def run_group(
        self, group_id: str, task: Task, spec: EpisodeSpec, env_id: str, options: Mapping[str, Any]
    ) -> tuple[Group, GroupResult]:
        """G episodes of `task`. The result's `ref` is filled in by the pool, which owns the group's object reference."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.TaskGroup() as episodes:
                running = [
                    episodes.create_task(self._attempt(f"{group_id}-{index}", task, seeded(spec, index), env_id, options))
                    for index in range(spec.group_size)
                ]
        except* EngineError as several:
            raise several.exceptions[0] from None  # one cause, of a class that the pool knows
        group = Group(id=group_id, task=task, rollouts=tuple(r.result() for r in running))
        return group, GroupResult.of(group, loop.time() - began)

    async def load_weights(self, version: int, blob: NDArray[np.uint8]) -> Receipt:
        return await self.engine.load_weights(version, blob)

    async def shutdown(self) -> None:
        if self._engine is not None:
            await asyncio.to_thread(self._engine.shutdown)
            self._engine = None

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "RolloutWorker.start() was not awaited"
        return self._engine

    async def _attempt(self, rollout_id: str, task: Task, spec: EpisodeSpec, env_id: str, options: Mapping[str, Any]) -> Rollout:
        """One rollout; a failure of ours is tried once more, on the next host."""
        async with self._cap(task.env, spec), self._room:
            rollout = await self._episode(rollout_id, task, spec, env_id, options)
            if rollout.verdict.status in RETRIED:
                log.warning("rollout %s: %s; trying once more", rollout_id, dict(rollout.verdict.evidence))
                rollout = await self._episode(rollout_id + "r", task, spec, env_id, options)
            return rollout

    def _cap(self, env: str, spec: EpisodeSpec) -> AbstractAsyncContextManager[Any]:
        """An environment's own room. Waiting for it takes nobody else's, and no time of the episode."""
        if not spec.concurrency:
            return nullcontext()
        return self._caps.setdefault(env, asyncio.Semaphore(spec.concurrency))

    async def _episode(self, rollout_id: str, task: Task, spec: EpisodeSpec, env_id: str, options: Mapping[str, Any]) -> Rollout:
        host = self._hosts[next(self._turn_of) % len(self._hosts)]
        session = RemoteSession(host=host, id=rollout_id, env_id=env_id, options=options, task=task)
        return await run_episode(task, spec, self.engine, session, self._chat, rollout_id, worker=self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteSession:
    """An EnvSession in an EnvHost actor."""

    host: Any
    id: str
    env_id: str
    options: Mapping[str, Any]
    task: Task

    async def reset(self) -> Observation:
        shown: Observation = await self.host.open.remote(self.id, self.env_id, dict(self.options), self.task)
        return shown

    async def step(self, turn: Turn) -> Transition:
        transition: Transition = await self.host.step.remote(self.id, turn)
        return transition

    async def truncate(self) -> Transition:
        transition: Transition = await self.host.truncate.remote(self.id)
        return transition

    async def close(self) -> None:
        await self.host.close.remote(self.id)


def seeded(spec: EpisodeSpec, index: int) -> EpisodeSpec:
    """The spec of one rollout of a group: with fixed dice, each has its own."""
    if spec.sampling.seed is None:
        return spec
    return replace(spec, sampling=replace(spec.sampling, seed=(spec.sampling.seed + 104_729 * index) % 2**31))


def to_file(path: str) -> None:
    """This process's log goes to the run folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
