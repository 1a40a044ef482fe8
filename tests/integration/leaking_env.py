"""An environment that keeps what it should let go. In a module of its own, since environment hosts import it by name."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from typing import Any, ClassVar

from environments.base import TaskDraft, TextEnv
from rl_core.seams import Observation
from rl_core.types import Message, Status, Task, Turn, Verdict

MIB = 1 << 20


class LeakingEnv(TextEnv):
    """Says the id of its process, and keeps 200 MiB of every episode."""

    id = "leaking"
    kept: ClassVar[list[bytes]] = []

    @classmethod
    def make_task(cls, rng: random.Random, options: Mapping[str, Any]) -> TaskDraft:
        return TaskDraft(public={"n": rng.randrange(10**6)})

    def begin(self, task: Task) -> Observation:
        self.kept.append(os.urandom(MIB) * 200)
        return Observation(messages=(Message(role="user", content=str(os.getpid())),))

    def act(self, turn: Turn) -> Verdict:
        return Verdict(status=Status.OK, reward=1.0)
