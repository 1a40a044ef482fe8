"""An environment's oracle in the place of a policy: what a benchmark and a test drive real episodes with.

chat, env = ChatML(model), resolve("tools")
policy = OracleEpisode(session, env(**options), task, chat)
rollout = await run_episode(task, spec, policy, policy, chat, "r0")          ->  rollout.verdict.reward == 1.0
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from environments.base import TextEnv
from environments.host_actor import HostActor
from rl_core.chat import ChatML
from rl_core.seams import EnvSession, Observation, Transition
from rl_core.types import Completion, SamplingParams, Task, Turn, VersionSpan


class OracleEpisode:
    """One episode's Sampler, and the EnvSession through which it sees what it answers to."""

    def __init__(
        self, session: EnvSession, env: TextEnv, task: Task, chat: ChatML, *, seed: int = 0, think_s: Callable[[], float] | None = None
    ) -> None:
        """`env` is the oracle's own copy of the environment. `think_s` gives the seconds that the policy takes over a turn."""
        self._session, self._env, self._chat, self._think_s = session, env, chat, think_s
        self._rng = random.Random(seed)
        self._seen: Observation = env.reset(options={"task": task})[1]["observation"]

    async def reset(self) -> Observation:
        self._seen = await self._session.reset()
        return self._seen

    async def step(self, turn: Turn) -> Transition:
        transition = await self._session.step(turn)
        self._seen = transition.observation
        return transition

    async def truncate(self) -> Transition:
        return await self._session.truncate()

    async def close(self) -> None:
        self._env.close()
        await self._session.close()

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, *, request_id: str) -> Completion:
        if self._think_s is not None:
            await asyncio.sleep(self._think_s())
        ids = np.asarray(self._chat.assistant(self._env.oracle(self._seen, self._rng)), np.int32)
        return Completion(
            prompt_ids=np.asarray(prompt_ids, np.int32),
            token_ids=ids,
            logprobs=np.zeros(len(ids), np.float32),
            spans=(VersionSpan(start=0, stop=len(ids), version=0),),
            finish_reason="stop",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSession:
    """An EnvSession in a HostActor of this process."""

    host: HostActor
    id: str
    env_id: str
    options: Mapping[str, Any]
    task: Task

    async def reset(self) -> Observation:
        return await self.host.open(self.id, self.env_id, dict(self.options), self.task)

    async def step(self, turn: Turn) -> Transition:
        return await self.host.step(self.id, turn)

    async def truncate(self) -> Transition:
        return await self.host.truncate(self.id)

    async def close(self) -> None:
        await self.host.close(self.id)
