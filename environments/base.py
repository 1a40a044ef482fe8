"""The contract: an environment is an ordinary Gymnasium environment over chat messages.

    class Echo(TextEnv):
        id = "echo"

        @classmethod
        def make_task(cls, rng, options):           # -> what the prompt is made of, and what only the verifier may see
            word = rng.choice(["sun", "sea", "sky"])
            return TaskDraft(public={"word": word}, private={"gold": word})

        def begin(self, task):                      # -> the first observation
            return Observation(messages=(Message(role="user", content=f"Say {task.public['word']}."),))

        def act(self, turn):                        # -> another observation, or a Verdict, which ends the episode
            right = turn.content.strip() == self.task.private["gold"]
            return Verdict(status=Status.OK, reward=float(right), components={"correct": float(right)})

        def oracle(self, observation, rng):         # -> what a perfect policy would say; for checks and demonstrations
            return Turn(content=self.task.private["gold"])

Authors write plain synchronous code; episodes run in threads of an EnvHost. Token ids never pass through here.
"""

from __future__ import annotations

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import gymnasium

from environments.examples import behind_system, examples
from environments.files import file_tasks
from environments.spaces import MessagesSpace, TurnSpace
from rl_core.seams import Observation
from rl_core.types import Message, Status, Task, Turn, Verdict

EVAL_BUCKETS = 16
"""One task in this many belongs to the eval split, decided by its content hash: no task can be in both splits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDraft:
    """What a generator draws; the base class adds key, split and seed."""

    public: Mapping[str, Any]
    private: Mapping[str, Any] = field(default_factory=dict)
    hint: Mapping[str, Any] = field(default_factory=dict)
    """Goes into the task's private part, but not into its key: one right answer of several, for the oracle."""
    difficulty: str = ""


class TextEnv(gymnasium.Env[dict[str, Any], Any], ABC):
    """Subclass this: `make_task`, `begin`, `act`, `oracle`, and an `id`."""

    id: ClassVar[str]
    version: ClassVar[str] = "1"
    """Stored in every verdict; raise it when the same answer may score differently."""
    components: ClassVar[tuple[str, ...]] = ()
    """Names of the components that its verdicts have, so that a config that names another is refused at once; () if it does not say."""
    needs_sandbox: ClassVar[bool] = False
    """Its verifier runs programs that the policy wrote: no run starts where nothing can isolate them."""
    file_columns: ClassVar[Mapping[str, bool]] = {}
    """Columns that `row_draft` reads, and whether each row must have them. Empty: this environment reads no files."""
    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}  # type: ignore[misc]

    def __init__(self, **options: Any) -> None:
        self.options = options
        self._examples = examples(type(self), options)
        self.observation_space = MessagesSpace()
        self.action_space = TurnSpace()
        self.task: Task | None = None  # type: ignore[assignment]
        self._done = True

    # --- what authors write ---------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def make_task(cls, rng: random.Random, options: Mapping[str, Any]) -> TaskDraft:
        """Draw one task. Everything random comes from `rng`; `options` are the config's difficulty knobs."""

    @classmethod
    def row_draft(cls, row: Mapping[str, Any]) -> TaskDraft:
        """A row of a file as a task; `row` has the columns of `file_columns`. Raises ValueError for what makes no task."""
        raise ValueError(f"environment {cls.id!r} reads no files")

    @abstractmethod
    def begin(self, task: Task) -> Observation:
        """Start an episode of `task`: the first messages and the tools, each time the same. Must forget everything of earlier episodes."""

    @abstractmethod
    def act(self, turn: Turn) -> Observation | Verdict:
        """Answer the policy's turn: more messages, or the verdict that ends the episode."""

    def oracle(self, observation: Observation, rng: random.Random) -> Turn:
        """What a perfect policy would answer now. `rng` may choose among right ways to answer."""
        raise NotImplementedError(f"environment {self.id!r} has no oracle: it can be trained, but not checked or demonstrated")

    def on_truncated(self) -> Verdict:
        """The verdict when a budget (turns, tokens) ended the episode before the environment did."""
        return Verdict(status=Status.INVALID_OUTPUT, reward=0.0, evidence={"reason": "a budget ended the episode before an answer"})

    # --- what an audit may ask --------------------------------------------------------------------------------------

    def second_opinion(self, turns: Sequence[Turn]) -> bool | None:
        """Whether a finished episode of `self.task` earned full reward, by another way than `act` judges; None if there is none.

        Never trained on: a policy that learns to please one verifier does not know this one.
        """
        return None

    @classmethod
    def honeypot(cls, task: Task, rng: random.Random) -> Task | None:
        """`task` in the same words, with gold that no honest work reaches: what it pays is a leak or a hole. None if there is none."""
        return None

    # --- tasks ------------------------------------------------------------------------------------------------------

    @classmethod
    def tasks(cls, split: str, seed: int, options: Mapping[str, Any] | None = None, *, start: int = 0) -> Iterator[Task]:
        """Tasks of `split` without end, the same for the same arguments on every machine; `start` resumes at a position.

        Which split a task belongs to is decided by the hash of its content, so train and eval share none, whatever the seeds.
        """
        options = dict(options or {})
        index = start
        while True:
            yield cls.task_at(split, seed, index, options)
            index += 1

    @classmethod
    def task_at(cls, split: str, seed: int, index: int, options: Mapping[str, Any]) -> Task:
        """The task at one position of the stream."""
        if split not in ("train", "eval"):
            raise ValueError(f"split {split!r}, wanted 'train' or 'eval'")
        if options.get("file"):
            return file_tasks(cls, options).task_at(split, seed, index)
        for attempt in range(10_000):
            item_seed = hash_int(cls.id, split, seed, index, attempt)
            draft = cls.make_task(random.Random(item_seed), options)
            key = hashlib.sha256(json.dumps([cls.id, draft.public, draft.private], sort_keys=True).encode()).hexdigest()[:16]
            if (int(key, 16) % EVAL_BUCKETS == 0) == (split == "eval"):
                private = {**draft.private, **draft.hint}
                return Task(
                    env=cls.id, key=key, split=split, seed=item_seed, public=draft.public, private=private, difficulty=draft.difficulty
                )  # fmt: skip
        raise RuntimeError(f"{cls.id}: 10,000 draws gave no {split} task; the generator has too few distinct tasks")

    # --- Gymnasium --------------------------------------------------------------------------------------------------

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:  # type: ignore[override]
        """`options["task"]` is the task; without it, one is drawn from `seed`."""
        super().reset(seed=seed)
        task = (options or {}).get("task")
        if task is None:
            draw = int(self.np_random.integers(2**31)) if seed is None else seed
            task = self.task_at("train", draw, 0, self.options)
        self.task, self._done = task, False
        observation = self.begin(task)
        if self._examples:
            observation = behind_system(self._examples, task, observation)
        return to_gym(observation), {"task_key": task.key, "observation": observation}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Gymnasium's five values; `info["verdict"]` is there exactly when the episode ended."""
        if self._done:
            raise RuntimeError(f"{self.id}: step() after the end of the episode; call reset() first")
        result = self.act(action if isinstance(action, Turn) else TurnSpace.to_turn(action))
        if isinstance(result, Observation):
            return to_gym(result), 0.0, False, False, {"observation": result}
        return self._end(result, truncated=False)

    def truncate(self) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """End the episode because a budget ran out."""
        return self._end(self.on_truncated(), truncated=True)

    def _end(self, verdict: Verdict, *, truncated: bool) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self._done = True
        empty = Observation(messages=())
        return to_gym(empty), verdict.reward or 0.0, not truncated, truncated, {"verdict": verdict, "observation": empty}


def to_gym(observation: Observation) -> dict[str, Any]:
    """An Observation as a member of MessagesSpace."""
    return {
        "messages": tuple({"role": m.role, "content": m.content} for m in observation.messages),
        "tools": json.dumps(observation.tools),
    }


def as_honeypot(task: Task, private: Mapping[str, Any]) -> Task:
    """`task` with another private part, under a key of its own. For `TextEnv.honeypot`."""
    key = hashlib.sha256(json.dumps([task.key, private], sort_keys=True).encode()).hexdigest()[:16]
    return replace(task, key=key, private=private)


def unguessable(rng: random.Random) -> int:
    """A whole number of 18 digits."""
    return rng.randrange(10**17, 10**18)


def hash_int(*parts: Any) -> int:
    """64 bits of everything random, from what identifies it: the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


__all__ = [
    "Message", "Observation", "Status", "Task", "TaskDraft", "TextEnv", "Turn", "Verdict", "as_honeypot", "hash_int", "to_gym",
    "unguessable",
]  # fmt: skip
