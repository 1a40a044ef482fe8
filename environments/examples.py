"""Worked examples before the task, for policies that were never taught an environment's form (few-shot prompting, Brown et al. 2020).

    options: {examples: 3}     ->     [system] user: 4+9-2   assistant: 11   user: 6-1+8   assistant: 13   ...   user: 7+2-3

They are tasks of the train split with the oracle's answers, the same in every episode: a policy that never earns a reward has nothing to
learn from, and one example of the form is often all that it lacks.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from environments.knobs import check_range
from rl_core.seams import Observation
from rl_core.types import Message, Task, Verdict

if TYPE_CHECKING:
    from environments.base import TextEnv

MOST = 32
SEED = 0x5EED
"""Of the stream of tasks that they are taken from."""

Example = tuple[str, tuple[Message, ...]]
"""(key of the task, its question and its answer)"""


def examples(env_class: type[TextEnv], options: Mapping[str, Any]) -> Sequence[Example]:
    """As many as `options["examples"]` says. Raises ValueError for what is no such number, and where a task takes more than one answer."""
    count = options.get("examples", 0)
    if not isinstance(count, int) or isinstance(count, bool):
        raise ValueError(f"environment {env_class.id!r}: option examples is {count!r}, wanted a number of worked examples, 0 to {MOST}")
    check_range(env_class.id, "examples", count, 0, MOST)
    plain = {name: value for name, value in options.items() if name != "examples"}
    return _solved(env_class, count, json.dumps(plain, sort_keys=True)) if count else ()


def behind_system(shown: Sequence[Example], task: Task, observation: Observation) -> Observation:
    """The first observation of an episode with the worked examples behind its system messages; never the task itself among them."""
    turns = [message for key, messages in shown if key != task.key for message in messages]
    system = [m for m in observation.messages if m.role == "system"]
    asked = [m for m in observation.messages if m.role != "system"]
    return replace(observation, messages=(*system, *turns, *asked))


@lru_cache(maxsize=16)
def _solved(env_class: type[TextEnv], count: int, options: str) -> Sequence[Example]:
    plain = json.loads(options)
    env = env_class(**plain)
    found: dict[str, tuple[Message, ...]] = {}
    try:
        for index in range(4 * count):  # a small space of tasks repeats itself
            task = env_class.task_at("train", SEED, index, plain)
            if len(found) < count and task.key not in found:
                found[task.key] = _solve(env, task)
    finally:
        env.close()
    return list(found.items())


def _solve(env: TextEnv, task: Task) -> tuple[Message, ...]:
    observation: Observation = env.reset(options={"task": task})[1]["observation"]
    turn = env.oracle(observation, random.Random(task.seed))
    if observation.tools or turn.tool_calls or not isinstance(env.act(turn), Verdict):
        raise ValueError(f"environment {env.id!r}: option examples serves tasks of one question and one answer, and it has turns or tools")
    asked = [m for m in observation.messages if m.role != "system"]
    return (*asked, Message(role="assistant", content=turn.content))
