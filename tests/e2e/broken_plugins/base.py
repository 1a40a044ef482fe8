"""What the broken ones share: a task, a prompt, and a verdict by the parity of the answer's length, so that a group can have a signal."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from environments.base import Message, Observation, Status, Task, TaskDraft, TextEnv, Turn, Verdict


class Parity(TextEnv):
    @classmethod
    def make_task(cls, rng: random.Random, options: Mapping[str, Any]) -> TaskDraft:
        return TaskDraft(public={"question": f"{rng.randrange(100, 1000)}+{rng.randrange(100, 1000)}"})

    def begin(self, task: Task) -> Observation:
        return Observation(messages=(Message(role="user", content=task.public["question"]),))

    def act(self, turn: Turn) -> Observation | Verdict:
        return Verdict(status=Status.OK, reward=float(len(turn.content) % 2))
