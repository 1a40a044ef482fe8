"""Playing the tools environment turn by turn, for its tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from environments.base import Observation
from environments.tools import ToolsEnv
from rl_core.types import Message, Task, ToolCall, Turn, Verdict

ACTING = ["move", "restock", "refund", "cancel"]
ASKING = ["stock", "points", "order"]
DONE = Turn(content="done")


def tasks(count: int, **options: Any) -> list[Task]:
    return [ToolsEnv.task_at("train", 7, index, options) for index in range(count)]


def using(*calls: tuple[str, dict[str, Any]]) -> Turn:
    return Turn(content="", tool_calls=tuple(ToolCall(name=name, arguments=arguments) for name, arguments in calls))


def perfect(task: Task) -> list[Turn]:
    """Turns that solve `task`, each call known beforehand."""
    turns = [using((c["name"], c["arguments"])) for c in task.private["plan"]]
    return [*turns, Turn(content=task.private["answer"] or "done")]


def begin(task: Task, **options: Any) -> tuple[ToolsEnv, Observation]:
    env = ToolsEnv(**{"failure_rate": 0.0, **options})
    return env, env.begin(task)


def play(task: Task, turns: Sequence[Turn], **options: Any) -> Verdict:
    """The verdict after `turns`; the last of them must end the episode."""
    env, _ = begin(task, **options)
    for turn in turns:
        result = env.act(turn)
        if isinstance(result, Verdict):
            return result
    raise AssertionError("the turns did not end the episode")


def replies_to(task: Task, turn: Turn) -> tuple[Message, ...]:
    env, _ = begin(task)
    result = env.act(turn)
    assert isinstance(result, Observation)
    return result.messages
