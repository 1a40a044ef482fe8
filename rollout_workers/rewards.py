"""Learned rewards in a run: the models' own actors, and what a worker asks them about a finished group.

    RewardActors.start(config)     one actor for each reward model, one engine for each judge of ours
    recipes(...)                   in the worker: config -> reward_models.learned.Recipe, by environment

An actor that dies is started anew by Ray; calls that were lost with it are failures of ours: they mask rollouts, they never score them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray

from reward_models.calibration import PAIRS, Calibration, read_pairs
from reward_models.chat_models import ChatFailed, ChatModel, EngineChat, HttpChat
from reward_models.classifier import Classifier
from reward_models.judges import CRITERIA, Asking, Judge, PairwiseJudge
from reward_models.learned import Answer, Component, Failure, Part, Recipe, Scores
from reward_models.length_control import LengthControl
from rl_core.chat import chat_format
from rl_core.config import EnvironmentConfig, RewardConfig, RunConfig
from rl_core.process_env import cpu_environment
from rl_core.rewards import RewardRule
from rl_core.types import Message
from rollout_workers.engine import Engine

log = logging.getLogger(__name__)

START_TIMEOUT_S = 600.0
MAX_REASON_CHARS = 200


class ClassifierActor:
    """Hosts one reward model. What arrives while a batch is scored makes the next batch."""

    def __init__(self, path: str) -> None:
        self._model = Classifier.load(path)
        self._waiting: list[tuple[Sequence[Answer], asyncio.Future[list[float]]]] = []
        self._work: asyncio.Task[None] | None = None

    async def version(self) -> str:
        return self._model.version

    async def score(self, answers: Sequence[Answer]) -> list[float]:
        future: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self._waiting.append((answers, future))
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            flat = [answer for answers, _ in batch for answer in answers]
            try:
                scores = await asyncio.to_thread(self._model.score, flat)
            except Exception as error:  # noqa: BLE001 -- handed to every caller of this batch
                for _, future in batch:
                    if not future.done():
                        future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))
                continue
            for answers, future in batch:
                mine, scores = scores[: len(answers)], scores[len(answers) :]
                if not future.done():  # its caller may have given up
                    future.set_result(mine)


class JudgeActor:
    """Hosts an engine of ours that judges: a checkpoint of its own, which no publication of the run touches."""

    def __init__(self, path: str, config: RunConfig) -> None:
        self._path, self._config = path, config
        self._chat: EngineChat | None = None

    async def start(self) -> str:
        chat = chat_format(self._path)
        rollout = replace(self._config.rollout, speculative_tokens=0)
        engine = await Engine.start(
            name="judge", model_path=self._path, dtype=self._config.model.dtype, rollout=rollout, stop_ids=chat.stop_ids
        )
        self._chat = EngineChat(engine, chat, name=Path(self._path).name)
        return self._chat.name

    async def complete(self, messages: Sequence[Message], max_tokens: int, temperature: float) -> str:
        if self._chat is None:  # Ray has started this actor anew
            await self.start()
        assert self._chat is not None
        return await self._chat.complete(messages, max_tokens=max_tokens, temperature=temperature)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteClassifier:
    """A ClassifierActor as a component. Implements reward_models.learned.Component."""

    actor: Any
    version: str
    timeout_s: float

    async def score(self, answers: Sequence[Answer]) -> Scores:
        try:
            scores: list[float] = await asyncio.wait_for(self._call(answers), self.timeout_s)
        except TimeoutError:
            return [Failure(reason=f"the reward model gave no score within {self.timeout_s:g} s")] * len(answers)
        except Exception as error:  # noqa: BLE001 -- whatever broke there is a failure of ours, and data
            text = " ".join(str(error).split())[:MAX_REASON_CHARS]
            return [Failure(reason=f"the reward model failed: {type(error).__name__}: {text}")] * len(answers)
        return scores

    async def _call(self, answers: Sequence[Answer]) -> list[float]:
        scores: list[float] = await self.actor.score.remote(list(answers))
        return scores


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteChat:
    """A JudgeActor as a chat model."""

    actor: Any
    name: str
    timeout_s: float

    async def complete(self, messages: Sequence[Message], *, max_tokens: int, temperature: float) -> str:
        async def call() -> str:
            text: str = await self.actor.complete.remote(list(messages), max_tokens, temperature)
            return text

        try:
            return await asyncio.wait_for(call(), self.timeout_s)
        except TimeoutError:
            raise ChatFailed(f"{self.name} did not answer within {self.timeout_s:g} s") from None
        except Exception as error:  # noqa: BLE001 -- as above
            raise ChatFailed(f"{self.name}: {type(error).__name__}: {' '.join(str(error).split())[:MAX_REASON_CHARS]}") from None


@dataclass(slots=True, kw_only=True)
class RewardActors:
    """The actors of a run's reward models and judges, by checkpoint. Travels to the workers, who make their recipes from it."""

    classifiers: dict[str, tuple[Any, str]] = field(default_factory=dict)  # path -> (actor, version)
    judges: dict[str, tuple[Any, str]] = field(default_factory=dict)  # path -> (actor, name)

    @staticmethod
    async def start(config: RunConfig) -> RewardActors:
        """Start what the config asks for; returns when all of it answers. What has started is ended if one of it fails."""
        started = RewardActors()
        wanted = [r for env in config.environments.values() for r in env.rewards.values()]
        env_vars = cpu_environment(config.rollout.num_threads)
        try:
            for path in dict.fromkeys(r.model for r in wanted if r.kind == "classifier"):
                actor = _actor(ClassifierActor, env_vars).remote(path)
                started.classifiers[path] = (actor, "")
                started.classifiers[path] = (actor, await asyncio.wait_for(_value(actor.version.remote()), START_TIMEOUT_S))
            for path in dict.fromkeys(r.model for r in wanted if r.kind in ("judge", "pairwise") and not r.url):
                actor = _actor(JudgeActor, env_vars).remote(path, config)
                started.judges[path] = (actor, "")
                started.judges[path] = (actor, await asyncio.wait_for(_value(actor.start.remote()), START_TIMEOUT_S))
        except BaseException:
            started.close()
            raise
        return started

    def close(self) -> None:
        for actor, _ in [*self.classifiers.values(), *self.judges.values()]:
            ray.kill(actor)
        self.classifiers, self.judges = {}, {}


def recipes(environments: Mapping[str, EnvironmentConfig], actors: RewardActors, count_tokens: Callable[[str], int]) -> dict[str, Recipe]:
    """How the reward of each environment that has learned parts is made."""
    return {name: recipe(env, actors, count_tokens) for name, env in environments.items() if env.rewards}


def recipe(env: EnvironmentConfig, actors: RewardActors, count_tokens: Callable[[str], int]) -> Recipe:
    parts, components = [], []
    verified, length = RewardConfig(kind="verified"), None
    if any(reward.kind == "component" for reward in env.rewards.values()):
        verified = RewardConfig(kind="verified", role="metric")  # what is named makes the reward
    for name, reward in env.rewards.items():
        if reward.kind == "component":
            components.append(
                RewardRule(name=name, role=reward.role, weight=reward.weight, at_least=reward.at_least, normalise=reward.normalise)
            )
        elif reward.kind == "verified":
            verified = reward
        elif reward.kind == "length":
            length = LengthControl(think=reward.weight, answer=reward.weight, bonus_think=reward.bonus, bonus_answer=reward.bonus)
        else:
            needs_group = reward.kind == "pairwise"
            component = _component(reward, actors)
            parts.append(Part(
                name=name, component=component, role=reward.role, weight=reward.weight, at_least=reward.at_least,  # type: ignore[arg-type]
                normalise=reward.normalise, needs_group=needs_group,
            ))  # fmt: skip
    return Recipe(
        parts=tuple(parts), components=tuple(components), verified_role=verified.role, verified_weight=verified.weight,  # type: ignore[arg-type]
        length=length, timeout_s=env.timeout_s, count_tokens=count_tokens,
    )  # fmt: skip


def _component(reward: RewardConfig, actors: RewardActors) -> Component:
    if reward.kind == "classifier":
        actor, version = actors.classifiers[reward.model]
        return RemoteClassifier(actor=actor, version=version, timeout_s=reward.timeout_s)
    chat: ChatModel
    if reward.url:
        chat = HttpChat(url=reward.url, model=reward.model, timeout_s=reward.timeout_s, api_key_env=reward.api_key_env)
    else:
        actor, name = actors.judges[reward.model]
        chat = RemoteChat(actor=actor, name=name, timeout_s=reward.timeout_s)
    asking = Asking(chat=chat, criteria=reward.criteria or CRITERIA, retries=reward.retries)
    calibration = Calibration(read_pairs(Path(reward.calibration)) if reward.calibration else PAIRS)
    if reward.kind == "judge":
        return Judge(asking=asking, calibration=calibration)
    return PairwiseJudge(asking=asking, calibration=calibration, opponents=reward.opponents)


def _actor(cls: type, env_vars: Mapping[str, str]) -> Any:
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    return ray.remote(cls).options(
        num_cpus=0, num_gpus=gpus, max_restarts=-1, max_concurrency=1024, runtime_env={"env_vars": dict(env_vars)}
    )  # type: ignore[attr-defined]


async def _value(ref: Any) -> Any:
    return await ref
