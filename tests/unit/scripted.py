"""A whole run with a scripted policy in place of the engine and of the learner: everything between them is the real thing.

Mixer -> loop -> RolloutWorker -> run_episode -> ChatML ids -> EnvHost -> environment -> verdict -> GroupResult -> ledger, run store

scripted_run(folder, {"math": {...}}, honest(0.4, 0.9), steps=4)   ->   a folder as `polyrl run` leaves it
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from environments.base import TextEnv
from environments.host import EnvHost
from environments.registry import resolve
from infra.launch import episode_spec, explain, task_options
from rl_core.chat import ChatML, chat_format
from rl_core.config import RunConfig
from rl_core.config_files import parse_config, to_yaml
from rl_core.evaluation import evaluate
from rl_core.events import Event
from rl_core.ledger import Ledger
from rl_core.loop import Budget, train
from rl_core.mixer import Mixer
from rl_core.run_store import RunStore, StoredRun
from rl_core.seams import GroupResult, Observation, Ref, RolloutWorkers
from rl_core.types import Agreement, Completion, EpisodeSpec, Receipt, SamplingParams, StepStats, Task, Turn, VersionSpan
from rollout_workers.hosts import HostSet
from rollout_workers.rewards import RewardActors
from rollout_workers.worker import Job, RolloutWorker
from tests.unit.fakes import LocalQueue, probe

SEED_MODEL = Path(__file__).parents[2] / "configs" / "models" / "seed"

Policy = Callable[["Seat"], Turn]
"""Says something, seeing all that its seat shows."""


class Seat:
    """One episode as a scripted policy sees it: more than a model does, so that it can play a perfect or a cheating one."""

    def __init__(self, env: TextEnv, task: Task, version: int, progress: float, rng: random.Random) -> None:
        self.env, self.task, self.version, self.progress, self.rng = env, task, version, progress, rng
        self.shown: Observation = env.reset(options={"task": task})[1]["observation"]

    def spoke(self, turn: Turn) -> None:
        """Follow the episode in an environment of our own, so that the oracle knows where it is."""
        self.shown = self.env.step(turn)[4]["observation"]


def honest(first: float, last: float) -> Policy:
    """Solves a task with a chance that grows over the run from `first` to `last`; else it answers another task."""

    def say(seat: Seat) -> Turn:
        chance = first + (last - first) * seat.progress
        if seat.rng.random() < chance:
            return seat.env.oracle(seat.shown, seat.rng)
        other = type(seat.env)(**seat.env.options)
        task = other.task_at("train", seat.rng.randrange(10**6), 0, seat.env.options)
        return other.oracle(other.reset(options={"task": task})[1]["observation"], seat.rng)

    return say


def cheating(trick: Callable[[Seat], Turn], *, first: float = 0.2, last: float = 0.9) -> Policy:
    """Honest work of a weak model, and ever more often the trick."""
    weak = honest(0.3, 0.3)
    return lambda seat: trick(seat) if seat.rng.random() < first + (last - first) * seat.progress else weak(seat)


class ScriptedWorker(RolloutWorker):
    """The real worker, with a sampler that asks the policy."""

    def __init__(self, config: RunConfig, policy: Policy, host: EnvHost, rewards: RewardActors) -> None:
        super().__init__(
            "w0", life="w0-1", model_path=config.model.path, dtype="float32", rollout=config.rollout, seed=0,
            hosts=HostSet(shared=(LocalHost(host),)),
            run_dir=None, rewards=(config.environments, rewards),
        )  # fmt: skip
        self.sampler = ScriptedSampler(chat_format(config.model.path), policy, config)

    @property
    def engine(self) -> Any:
        return self.sampler


class ScriptedSampler:
    """Implements rl_core.seams.Sampler: the policy's turn, as ids."""

    def __init__(self, chat: ChatML, policy: Policy, config: RunConfig) -> None:
        self.chat, self.policy, self.config = chat, policy, config
        self.version = 0
        self.tasks: dict[str, Task] = {}
        self.seats: dict[str, Seat] = {}

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, *, request_id: str) -> Completion:
        rollout_id, _, number = request_id.rpartition("-")
        turn = await asyncio.to_thread(self._say, rollout_id, int(number))
        ids = self.chat.assistant(turn)[: params.max_tokens]
        return Completion(
            prompt_ids=np.array(prompt_ids, np.int32),
            token_ids=np.array(ids, np.int32),
            logprobs=np.full(len(ids), -0.1, np.float32),
            spans=(VersionSpan(start=0, stop=len(ids), version=self.version),),
            finish_reason="stop" if ids[-1] in self.chat.stop_ids else "length",
            engine_steps=len(ids),
        )

    def _say(self, rollout_id: str, number: int) -> Turn:
        if number == 0:
            # An honest policy knows the task as it was drawn; the gold of a honeypot is nowhere that it could look.
            task = self.tasks[rollout_id.rpartition("-")[0].removesuffix("-pot")]
            env = self.config.environments[task.env]
            options = {"sandbox": self.config.sandbox, **task_options(self.config, env)}
            progress = self.version / max(1, self.config.loop.steps - 1)
            rng = random.Random(f"{self.config.seed} {rollout_id}")
            self.seats[rollout_id] = Seat(resolve(env.id or task.env)(**options), task, self.version, progress, rng)
        seat = self.seats[rollout_id]
        turn = self.policy(seat)
        if self.config.environments[seat.task.env].max_turns > 1:
            seat.spoke(turn)
        return turn


class LocalHost:
    """An EnvHost in this process, called as an actor is."""

    def __init__(self, host: EnvHost) -> None:
        self._host = host

    def __getattr__(self, name: str) -> Any:
        return Remote(getattr(self._host, name) if name != "line" else lambda: "")  # no line: calls come as Ray's would


class Remote:
    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    def remote(self, *args: Any) -> Awaitable[Any]:
        return asyncio.to_thread(self._method, *args)


class LocalWorkers:
    """Implements rl_core.seams.RolloutWorkers over one scripted worker."""

    def __init__(self, worker: ScriptedWorker, config: RunConfig) -> None:
        self.worker, self.config = worker, config

    async def run_group(self, group_id: str, task: Task, spec: EpisodeSpec) -> GroupResult:
        self.worker.sampler.tasks[group_id] = task
        env = self.config.environments[task.env]
        job = Job(group_id=group_id, task=task, spec=spec, env_id=env.id or task.env, options=task_options(self.config, env))
        group, result = await self.worker.run_group(job)
        return replace(result, ref=group)

    async def load_weights(self, version: int, weights: Ref) -> Sequence[Receipt]:
        self.worker.sampler.version = version
        return [Receipt(worker="w0", version=version, pause_s=0.0, num_bytes=1, probe=(probe(version),))]

    def revived(self) -> Sequence[Receipt]:
        return ()


class CountingLearner:
    """Learns nothing; the script's progress follows its version."""

    def __init__(self) -> None:
        self.version = 0
        self.trained: list[str] = []

    async def accumulate(self, groups: Sequence[Ref]) -> dict[str, float]:
        await asyncio.sleep(0)
        self.trained += [r.id for g in groups for r in g.rollouts]
        return {}

    async def agreement(self, completions: Sequence[Completion]) -> Agreement:
        return Agreement(mean=0.0, max=0.0, num_tokens=2)

    async def apply(self) -> tuple[StepStats, Ref]:
        await asyncio.sleep(0.001)
        self.version += 1
        return StepStats(version=self.version, metrics={}), None

    async def roll_back(self, version: int) -> tuple[StepStats, Ref]:
        raise AssertionError("nothing here is ever a bad step")

    async def save(self) -> str:
        return ""


class Keeper:
    """Implements rl_core.loop.Record over the real run store; ends the run after `most` rollouts."""

    def __init__(self, store: RunStore, stop: asyncio.Event, most: int) -> None:
        self.store, self.stop, self.left = store, stop, most

    async def group(self, result: GroupResult) -> None:
        self.keep(result, "train")

    def keep(self, result: GroupResult, label: str) -> None:
        if label in ("train", "honeypot"):
            if self.left < len(result.ref.rollouts):
                self.stop.set()
                return
            self.left -= len(result.ref.rollouts)
        self.store.add_groups([result.ref], label)

    def note(self, text: str) -> None:
        self.store.emit(Event(kind="note", data={"text": text}))

    async def step(self, step: int, version: int, metrics: dict[str, float]) -> None:
        self.store.emit(Event(kind="step", data={"version": version, "metrics": metrics}))


Wrap = Callable[[RolloutWorkers, RunConfig, Keeper], RolloutWorkers]


def scripted_config(folder: Path, environments: Mapping[str, Mapping[str, Any]], **sections: Any) -> RunConfig:
    """A small run of these environments."""
    defaults = {"group_size": 4, "max_tokens": 512, "max_total_tokens": 1024}
    tree = {
        "name": "scripted", "runs_dir": str(folder), "sandbox": "bubblewrap", "model": {"path": str(SEED_MODEL)},
        "environments": {name: {**defaults, **env} for name, env in environments.items()},
        "loop": {"groups_per_step": 4, "steps": 12}, "eval": {"tasks": 24},
    }  # fmt: skip
    return parse_config({**tree, **{k: {**tree.get(k, {}), **v} if isinstance(v, dict) else v for k, v in sections.items()}})


def scripted_run(
    config: RunConfig,
    policy: Policy,
    *,
    most: int = 200,
    wrap: Wrap = lambda workers, config, keeper: workers,
    rewards: RewardActors | None = None,
) -> StoredRun:
    """Run to the end, or until `most` rollouts are stored. What raises is the run's outcome, as in `polyrl run`."""
    run_dir = Path(config.runs_dir) / f"{config.name}-{next(_NUMBERS)}"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    store = RunStore(run_dir)
    try:
        asyncio.run(_main(config, policy, store, run_dir, most, wrap, rewards or RewardActors()))
    finally:
        store.close()
    return StoredRun(run_dir)


_NUMBERS = count()


async def _main(config: RunConfig, policy: Policy, store: RunStore, run_dir: Path, most: int, wrap: Wrap, rewards: RewardActors) -> None:
    environments = config.environments
    store.emit(
        Event(
            kind="run_started",
            data={"run": run_dir.name, "steps": config.loop.steps, "environments": {n: e.share for n, e in environments.items()}},
        )
    )
    worker = ScriptedWorker(config, policy, EnvHost(config.sandbox), rewards)
    keeper = Keeper(store, asyncio.Event(), most)
    plain = LocalWorkers(worker, config)
    specs = {name: episode_spec(env) for name, env in environments.items()}
    ledger = Ledger(run_dir / "ledger.sqlite")
    mixer = Mixer(
        {n: partial(_tasks, config, n, "train", config.seed) for n in environments}, {n: e.share for n, e in environments.items()}
    )
    outcome, reason = "finished", ""
    try:
        await _evaluate(plain, config, specs, keeper, store, "before", 0)
        version = await train(
            config.loop, mixer=mixer, specs=specs, workers=wrap(plain, config, keeper), queue=LocalQueue(Budget.of(config.loop).window),
            learner=CountingLearner(), ledger=ledger, record=keeper, weights=None, version=0, stop=keeper.stop,
        )  # fmt: skip
        await _evaluate(plain, config, specs, keeper, store, "after", version)
    except BaseExceptionGroup as several:
        outcome, reason = "failed", explain(several)
    finally:
        ledger.close()
    store.emit(Event(kind="run_finished", data={"outcome": outcome, "reason": reason, "seconds": 1.0}))


async def _evaluate(
    workers: RolloutWorkers, config: RunConfig, specs: Mapping[str, EpisodeSpec], keeper: Keeper, store: RunStore, label: str, version: int
) -> None:
    sources = {n: _tasks(config, n, "eval", config.eval.seed) for n in config.environments}

    async def keep(result: GroupResult) -> None:
        keeper.keep(result, label)

    results = await evaluate(workers, tasks=sources, specs=specs, count=config.eval.tasks, seed=1, label=label, record=keep)
    store.emit(Event(kind="eval", data={"version": version, "label": label, "environments": {n: r.to_json() for n, r in results.items()}}))


def _tasks(config: RunConfig, name: str, split: str, seed: int, start: int = 0) -> Iterator[Task]:
    env = config.environments[name]
    return resolve(env.id or name).tasks(split, seed, task_options(config, env), start=start)
