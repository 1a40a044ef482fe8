"""Fake engines and a fake learner on a virtual clock, for tests of the protocol. Everything else in those tests is the real thing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from infra.simulation.clock import simulate
from infra.simulation.parts import tasks
from rl_core.replay_queue import ReplayQueue
from rl_core.seams import GroupResult, Ref
from rl_core.types import Agreement, Completion, EpisodeSpec, Receipt, SamplingParams, StepStats, Task, VersionSpan

SPEC = EpisodeSpec(group_size=4, sampling=SamplingParams(max_tokens=8), max_turns=1, max_total_tokens=64, timeout_s=60.0)


def group_result(**changes: Any) -> GroupResult:
    """A group that can train."""
    values: dict[str, Any] = {
        "ref": None, "group_id": "g0", "env": "math", "task_key": "k", "num_trainable": 4, "has_signal": True, "min_version": 0,
        "max_version": 0, "rewards": (0.0, 1.0, 0.0, 1.0), "statuses": ("ok",) * 4, "sampled_tokens": 40, "prompt_tokens": 40,
        "drafted": 40, "accepted": 20, "engine_steps": 20, "seconds": 1.0, "components": {"correct": 0.5},
    }  # fmt: skip
    return GroupResult(**(values | changes))


def probe(version: int) -> Completion:
    ids = np.array([1, 2], np.int32)
    return Completion(
        prompt_ids=ids,
        token_ids=ids,
        logprobs=np.zeros(2, np.float32),
        spans=(VersionSpan(start=0, stop=2, version=version),),
        finish_reason="stop",
    )


class FakeWorkers:
    """Groups take random times; each is stamped with the version that was live when it started."""

    def __init__(self, rng: random.Random, *, signal: float = 1.0, straggler: float = 0.0) -> None:
        self.rng, self.signal, self.straggler = rng, signal, straggler
        self.version = -1
        self.running = self.most_running = 0
        self.live_at: dict[int, float] = {}
        self.back: list[Receipt] = []
        """Of workers that were started again."""

    async def run_group(self, group_id: str, task: Task, spec: EpisodeSpec) -> GroupResult:
        version = max(self.version, 0)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.rng.uniform(20, 60) if self.rng.random() < self.straggler else self.rng.uniform(0.5, 2))
        finally:
            self.running -= 1
        signal = self.rng.random() < self.signal
        return group_result(
            ref=group_id,
            group_id=group_id,
            env=task.env,
            task_key=task.key,
            min_version=version,
            max_version=self.version,
            has_signal=signal,
        )

    async def load_weights(self, version: int, weights: Ref) -> Sequence[Receipt]:
        await asyncio.sleep(self.rng.uniform(0.01, 1.0))
        assert version == weights, "version and weights must belong together"
        assert version == self.version + 1, f"version {version} published after {self.version}"
        self.version = version
        return [Receipt(worker="w0", version=version, pause_s=0.01, num_bytes=10, probe=(probe(version),))]

    def revived(self) -> Sequence[Receipt]:
        receipts, self.back = self.back, []
        return receipts


class FakeLearner:
    """Counts; its logprobs agree by `error` nats."""

    def __init__(self, rng: random.Random, *, error: float = 0.0) -> None:
        self.rng, self.error, self.version = rng, error, 0
        self.trained: list[str] = []
        self.staleness: list[int] = []
        self.proved: list[int] = []
        self.saved: list[int] = []
        self.bad: list[str] = []
        """What is wrong with the next steps, one each; "" for a good one."""
        self.returns: list[int] = []

    async def accumulate(self, groups: Sequence[Ref]) -> dict[str, float]:
        await asyncio.sleep(self.rng.uniform(0.5, 3))
        self.trained += groups
        return {}

    async def agreement(self, completions: Sequence[Completion]) -> Agreement:
        await asyncio.sleep(0.01)
        for completion in completions:
            assert all(s.version == self.version for s in completion.spans), (
                "a probe was scored under other weights than it was sampled from"
            )
            self.proved.append(self.version)
        return Agreement(mean=self.error, max=self.error, num_tokens=2)

    async def apply(self) -> tuple[StepStats, Ref]:
        await asyncio.sleep(0.1)
        assert self.version in self.proved, f"version {self.version} was replaced before an engine proved that it had arrived"
        if self.bad and (reason := self.bad.pop(0)):
            return StepStats(version=self.version, metrics={}, skipped=reason), None
        self.version += 1
        return StepStats(version=self.version, metrics={"learner/loss": 0.0}), self.version

    async def roll_back(self, version: int) -> tuple[StepStats, Ref]:
        self.returns.append(version)
        self.version = version
        return StepStats(version=version, metrics={"learner/rolled_back": 1.0}), version

    async def save(self) -> str:
        self.saved.append(self.version)
        return f"step-{self.version}"


class LocalQueue:
    """The real replay queue, with the actor's awaits."""

    def __init__(self, window: int) -> None:
        self.queue = ReplayQueue(window)

    async def start(self, ticket: int) -> None:
        self.queue.start(ticket)

    async def put(self, ticket: int, result: GroupResult) -> None:
        await asyncio.sleep(0)
        self.queue.put(ticket, result)

    async def drop(self, ticket: int) -> None:
        await asyncio.sleep(0)
        self.queue.drop(ticket)

    async def take(self, count: int) -> list[GroupResult]:
        await asyncio.sleep(0)
        return self.queue.take(count)


class Recorder:
    """Remembers what the loop said."""

    def __init__(self) -> None:
        self.groups: list[GroupResult] = []
        self.steps: list[dict[str, float]] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    async def group(self, result: GroupResult) -> None:
        self.groups.append(result)

    async def step(self, step: int, version: int, metrics: dict[str, float]) -> None:
        self.steps.append(metrics)


__all__ = ["SPEC", "FakeLearner", "FakeWorkers", "LocalQueue", "Recorder", "group_result", "probe", "simulate", "tasks"]
