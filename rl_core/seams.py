"""The Protocols at which the packages meet. Each is small enough to fake in ten lines.

`learner` and `rollout_workers` never import each other; the loop knows both only through this page. A `ref` is whatever
the composition root uses to hand a payload on without copying it (a Ray object reference in a run, the object itself in a
unit test).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rl_core.types import Agreement, Completion, EpisodeSpec, Message, Receipt, SamplingParams, StepStats, Task, Turn, Verdict

Ref = Any


class Sampler(Protocol):
    """One engine, as an episode sees it."""

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, *, request_id: str) -> Completion: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What an environment shows: messages to append, and at the start the tools that may be called."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()  # JSON schemas, OpenAI style: {"name", "description", "parameters"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """One step of an environment session. `verdict` is set exactly when the episode ended."""

    observation: Observation
    terminated: bool
    truncated: bool
    verdict: Verdict | None


class EnvSession(Protocol):
    """One episode of one environment, wherever it runs (an EnvHost actor in a run)."""

    async def reset(self) -> Observation: ...
    async def step(self, turn: Turn) -> Transition: ...
    async def truncate(self) -> Transition:
        """End the episode because a budget ran out; the transition has a verdict."""
        ...

    async def close(self) -> None: ...


class ChatFormat(Protocol):
    """Messages to ids and back, never tokenizing the same text twice."""

    stop_ids: tuple[int, ...]

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]: ...
    def extend(self, ids: Sequence[int], messages: Sequence[Message]) -> list[int]: ...
    def parse(self, token_ids: Sequence[int]) -> Turn: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupResult:
    """What the loop learns of a finished group; the payload stays behind `ref`."""

    ref: Ref  # -> Group
    group_id: str
    env: str
    task_key: str
    num_trainable: int
    has_signal: bool
    min_version: int | None
    max_version: int | None
    rewards: tuple[float, ...]  # of the trainable rollouts
    statuses: tuple[str, ...]  # of all rollouts
    sampled_tokens: int
    prompt_tokens: int
    drafted: int
    accepted: int
    engine_steps: int
    seconds: float


class RolloutWorkers(Protocol):
    """All engines of the run."""

    async def run_group(self, group_id: str, task: Task, spec: EpisodeSpec) -> GroupResult: ...
    async def load_weights(self, version: int, weights: Ref) -> Sequence[Receipt]:
        """Return once every engine samples from `version`."""
        ...


class Learner(Protocol):
    """Owns the trained weights and the optimizer. A step has two halves, so that publication overlaps the gradients."""

    async def accumulate(self, groups: Sequence[Ref]) -> dict[str, float]:
        """Gradients of the loss over `groups` under the current weights, which stay as they are."""
        ...

    async def agreement(self, completions: Sequence[Completion]) -> Agreement:
        """Recompute logprobs under the current weights and compare."""
        ...

    async def apply(self) -> tuple[StepStats, Ref]:
        """The optimizer step: new weights under a new version, and a reference to them for publication."""
        ...

    async def save(self) -> str:
        """Write a checkpoint of the current version; returns its folder."""
        ...
