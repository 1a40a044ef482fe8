"""An environment that hangs as its options say. In a module of its own, since environment hosts import it by name."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from environments.base import TaskDraft, TextEnv
from rl_core.seams import Observation
from rl_core.types import Message, Status, Task, Turn, Verdict


class HangingEnv(TextEnv):
    """Says hello. Then, once for the file `options["flag"]`, it sleeps for an hour and holds the interpreter's lock meanwhile."""

    id = "hanging"

    @classmethod
    def make_task(cls, rng: random.Random, options: Mapping[str, Any]) -> TaskDraft:
        return TaskDraft(public={"n": rng.randrange(10**6)})

    def begin(self, task: Task) -> Observation:
        return Observation(messages=(Message(role="user", content="hello"),))

    def act(self, turn: Turn) -> Verdict:
        flag = Path(self.options["flag"])
        if flag.exists():
            flag.unlink()
            ctypes.PyDLL(None).sleep(3600)
        return Verdict(status=Status.OK, reward=1.0)
