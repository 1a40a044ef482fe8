"""The Protocols at which the packages meet. Each is small enough to fake in ten lines.

`learner` and `rollout_workers` never import each other; the loop knows both only through this page. A `ref` is whatever
the composition root uses to hand a payload on without copying it (a Ray object reference in a run, the object itself in a
unit test).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from rl_core.types import (
    Agreement,
    Completion,
    EpisodeSpec,
    Group,
    Message,
    Receipt,
    SamplingParams,
    StepStats,
    Task,
    Turn,
    Verdict,
    add_positions,
    to_json,
)

Ref = Any

MAX_FAILURE = 200
"""Characters of a cause that travel with a group's result."""


class BadTask(ValueError):
    """A task that cannot be graded, whoever answers it: its episode ends as a verifier error, never as a zero."""


class Sampler(Protocol):
    """One engine, as an episode sees it."""

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, *, request_id: str) -> Completion: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What an environment shows: messages to append, and at the start the tools that may be called."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()  # JSON schemas, OpenAI style: {"name", "description", "parameters"}

    @property
    def digest(self) -> str:
        """The same for what is the same as JSON, on both sides of a line (environments/line.py)."""
        said = to_json([[[m.role, m.content] for m in self.messages], self.tools])
        return hashlib.blake2b(said, digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """One step of an environment session. `verdict` is set exactly when the episode ended."""

    observation: Observation
    terminated: bool
    truncated: bool
    verdict: Verdict | None
    began: str = ""
    """Digest of what the environment had shown first, if its session was opened with this step."""


class EnvSession(Protocol):
    """One episode of one environment, wherever it runs (a HostActor in a run)."""

    async def reset(self) -> Observation: ...
    async def step(self, turn: Turn) -> Transition: ...
    async def truncate(self) -> Transition:
        """End the episode because a budget ran out; the transition has a verdict."""
        ...

    async def close(self) -> None: ...


class ChatFormat(Protocol):
    """Messages to ids and back, never tokenizing the same text twice."""

    stop_ids: tuple[int, ...]
    think_ids: tuple[int, int] | None
    """The markers that open and close a thought; None where they are not one id each."""

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]: ...
    def extend(self, ids: Sequence[int], messages: Sequence[Message]) -> list[int]: ...
    def parse(self, token_ids: Sequence[int], tools: Sequence[dict[str, Any]] = ()) -> Turn: ...


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
    components: Mapping[str, float]  # mean over the trainable rollouts that have it, unweighted
    statuses: tuple[str, ...]  # of all rollouts
    sampled_tokens: int
    prompt_tokens: int
    drafted: int
    accepted: int
    engine_steps: int
    seconds: float
    thinking_tokens: int = 0  # of the sampled ones, within thoughts
    thoughts_closed: int = 0  # by us, at their budget
    state_age_sum: int = 0  # over sampled tokens, policy versions; see Completion
    state_age_max: int = 0
    attempts: int = 1
    """Workers that it was given to, in this life of the run."""
    kept: int = 0  # rollouts that an earlier attempt had finished
    continued: int = 0  # rollouts that went on from an earlier attempt's tokens
    positions: tuple[tuple[int, int], ...] = ()
    """(drafted, accepted) of first drafts, of second ones, ..."""
    uses: int = 0
    """Steps that it has trained in so far."""
    failure: str = ""
    """What the first rollout that does not count says of its end."""
    history: str = ""
    """Why there was more than one attempt, and what became of the earlier ones' rollouts."""

    @property
    def success(self) -> float | None:
        """Mean reward of the rollouts that count; None if there is none."""
        return sum(self.rewards) / len(self.rewards) if self.rewards else None

    @staticmethod
    def of(group: Group, seconds: float, ref: Ref = None) -> GroupResult:
        """What is to be known of `group`; whoever owns its reference fills that in."""
        completions = [c for r in group.rollouts for c in r.completions]
        return GroupResult(
            ref=ref,
            group_id=group.id,
            env=group.task.env,
            task_key=group.task.key,
            num_trainable=len(group.trainable),
            has_signal=group.has_signal,
            min_version=group.min_version,
            max_version=group.max_version,
            rewards=tuple(float(r.verdict.reward) for r in group.trainable if r.verdict.reward is not None),
            components=mean_components(group),
            statuses=tuple(r.verdict.status.value for r in group.rollouts),
            sampled_tokens=sum(r.num_sampled for r in group.rollouts),
            prompt_tokens=sum(r.num_prompt for r in group.rollouts),
            drafted=sum(c.drafted for c in completions),
            accepted=sum(c.accepted for c in completions),
            engine_steps=sum(c.engine_steps for c in completions),
            positions=add_positions([c.positions for c in completions]),
            seconds=seconds,
            thinking_tokens=sum(r.thinking_tokens for r in group.rollouts),
            thoughts_closed=sum(r.thoughts_closed for r in group.rollouts),
            state_age_sum=sum(c.state_age_sum for c in completions),
            state_age_max=max((c.state_age_max for c in completions), default=0),
            failure=next((first_evidence(r.verdict) for r in group.rollouts if not r.verdict.status.trains), ""),
        )

    def treated(self, group: Group, ref: Ref) -> GroupResult:
        """The same group with other verdicts; how it came to be stays."""
        new = GroupResult.of(group, self.seconds, ref)
        return replace(
            self, ref=ref, num_trainable=new.num_trainable, has_signal=new.has_signal, rewards=new.rewards, statuses=new.statuses
        )


def first_evidence(verdict: Verdict) -> str:
    """What a verdict says of itself, in one line; of a long one the beginning and, since causes stand there, more of the end."""
    text = next((" ".join(text.split()) for text in verdict.evidence.values() if text.strip()), "")
    return text if len(text) <= MAX_FAILURE else f"{text[: MAX_FAILURE // 4]} ... {text[-3 * MAX_FAILURE // 4 :]}"


def mean_components(group: Group) -> dict[str, float]:
    """Each named component's mean over the trainable rollouts that have it."""
    values: dict[str, list[float]] = {}
    for rollout in group.trainable:
        for name, value in rollout.verdict.components.items():
            values.setdefault(name, []).append(float(value))
    return {name: sum(found) / len(found) for name, found in values.items()}


class RolloutWorkers(Protocol):
    """All engines of the run."""

    async def run_group(self, group_id: str, task: Task, spec: EpisodeSpec) -> GroupResult: ...
    async def load_weights(self, version: int, weights: Ref) -> Sequence[Receipt]:
        """Return once every engine samples from `version`."""
        ...

    def revived(self) -> Sequence[Receipt]:
        """Of engines that were started again, and have loaded the newest weights, since the last call."""
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
        """The optimizer step: new weights under a new version, and a reference to them for publication. Or a bad step, skipped."""
        ...

    async def roll_back(self, version: int) -> tuple[StepStats, Ref]:
        """Weights and optimizer of the newest checkpoint again, as `version`, and a checkpoint of that."""
        ...

    async def save(self) -> str:
        """Write a checkpoint of the current version; returns its folder."""
        ...


class Queue(Protocol):
    """The replay queue, in this process or in an actor."""

    async def start(self, ticket: int) -> None: ...
    async def put(self, ticket: int, result: GroupResult) -> None: ...
    async def drop(self, ticket: int) -> None: ...
    async def take(self, count: int) -> list[GroupResult]: ...


class Record(Protocol):
    """Keeps what happened."""

    async def group(self, result: GroupResult) -> None:
        """A group finished. It is durable when this returns."""
        ...

    def note(self, text: str) -> None:
        """Something that a person should see once."""
        ...

    async def step(self, step: int, version: int, metrics: dict[str, float]) -> None: ...
