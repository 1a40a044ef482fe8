"""Demonstrations: episodes that an environment's own oracle plays, as token ids with a loss mask.

    <|im_start|>user\\n58+67<|im_end|>\\n<|im_start|>assistant\\n  <think>8+7+0=15 5+6+1=12</think>125<|im_end|>
    0 ...                                                    0  1 ...                                     1

Each oracle answers in one of two styles, working or direct, chosen by the environment's option `oracle_working`. The
share of working demonstrations decides how often the seed policy works things out, and thus how much is left for RL to find.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from environments.base import Observation, TextEnv, Verdict
from rl_core.chat import ChatML, with_tools
from rl_core.tool_formats import write_call
from rl_core.types import Ids, Message, Task, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What the seed model is taught of one environment."""

    env: str  # registered id, or module:Class
    share: float  # of demonstrations, relative to the other courses
    working: float  # probability of the working style
    options: Mapping[str, Any] = field(default_factory=dict)
    max_turns: int = 1
    follow_ups: int = 0
    """More questions about the same task, at most, asked after its end: for environments that have `other_questions`."""


class Transcriber(Protocol):
    """What `play` writes an episode with: a ChatML, or a collector of its texts."""

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]: ...
    def extend(self, ids: Sequence[int], messages: Sequence[Message]) -> list[int]: ...
    def assistant(self, turn: Turn) -> list[int]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """One episode as the learner sees it. Arrays have length L."""

    env: str
    token_ids: Ids  # [L]
    loss_mask: NDArray[np.bool_]  # [L] True on the oracle's tokens, <|im_end|> included
    working: bool

    def __len__(self) -> int:
        return len(self.token_ids)


def play(env: TextEnv, task: Task, chat: Transcriber, rng: random.Random, *, max_turns: int, follow_ups: int = 0) -> Demonstration:
    """Let the oracle play one episode. The last of `max_turns` turns is not acted out: no program needs to run to be imitated.

    `follow_ups` more questions are then asked in the same conversation, in random order, as far as the environment has them.

    Raises ValueError if the oracle did not earn the full reward: what is imitated must be right.
    """
    _, info = env.reset(options={"task": task})
    observation: Observation = info["observation"]
    ids = chat.prompt(observation.messages, observation.tools)
    sampled: list[tuple[int, int]] = []
    working = False
    for turn_number in range(max_turns):
        turn = env.oracle(observation, rng)
        working = working or bool(turn.thought)
        answer = chat.assistant(turn)
        sampled.append((len(ids), len(ids) + len(answer)))
        ids += answer
        if turn_number == max_turns - 1:
            break
        result = env.act(turn)
        if isinstance(result, Verdict):
            if result.reward != 1.0:
                raise ValueError(f"the oracle of {env.id!r} earned {result.reward} on task {task.key}: {dict(result.evidence)}")
            break
        observation = result
        ids = chat.extend(ids, observation.messages)
    if follow_ups:
        others = env.other_questions()  # type: ignore[attr-defined]
        for question, turn in rng.sample(others, min(follow_ups, len(others))):
            ids = chat.extend(ids, [Message(role="user", content=question)])
            answer = chat.assistant(turn)
            sampled.append((len(ids), len(ids) + len(answer)))
            ids += answer
    mask = np.zeros(len(ids), bool)
    for start, stop in sampled:
        mask[start:stop] = True
    return Demonstration(env=env.id, token_ids=np.asarray(ids, np.int32), loss_mask=mask, working=working)


def demonstrations(
    course: Course, cls: type[TextEnv], chat: ChatML, *, split: str, seed: int, working: float | None = None
) -> Iterator[Demonstration]:
    """Demonstrations of one course without end. `working` overrides the course's share of the working style."""
    options = {**course.options, "oracle_working": course.working if working is None else working}
    env = cls(**options)
    try:
        for task in cls.tasks(split, seed, options):
            yield play(env, task, chat, random.Random(f"{seed} {task.key}"), max_turns=course.max_turns, follow_ups=course.follow_ups)
    finally:
        env.close()


def texts(course: Course, cls: type[TextEnv], *, count: int, seed: int) -> list[str]:
    """What `count` demonstrations are written in, without markup: what the tokenizer learns its merges from."""
    options = {**course.options, "oracle_working": 0.5}
    collector = _Texts()
    env = cls(**options)
    try:
        for _, task in zip(range(count), cls.tasks("train", seed, options), strict=False):
            play(env, task, collector, random.Random(f"{seed} {task.key}"), max_turns=course.max_turns)
    finally:
        env.close()
    return collector.found


class _Texts:
    """A Transcriber that keeps the texts and makes no ids."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        self.found += [f"{m.role}\n{m.content}" for m in with_tools(messages, tools)]
        return []

    def extend(self, ids: Sequence[int], messages: Sequence[Message]) -> list[int]:
        self.found += [f"{m.role}\n{m.content}" for m in messages]
        return []

    def assistant(self, turn: Turn) -> list[int]:
        self.found += ["assistant\n", turn.thought, turn.content, *(write_call(call) for call in turn.tool_calls)]
        return []
