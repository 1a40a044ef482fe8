"""Levels of difficulty in one stream: task i is drawn with the options of level i modulo the number of levels.

    levels: [{digits: 2}, {digits: 4}, {digits: 8}]     ->     digits=2, digits=4, digits=8, digits=2, ...

The level is the task's difficulty, and so a curriculum's pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from environments.base import TextEnv
from rl_core.types import Task


def leveled_tasks(
    env_class: type[TextEnv], split: str, seed: int, options: Mapping[str, Any], levels: Sequence[Mapping[str, Any]], *, start: int = 0
) -> Iterator[Task]:
    """Without end, the same for the same arguments; `start` resumes at a position."""
    for index in count(start):
        level = levels[index % len(levels)]
        yield replace(env_class.task_at(split, seed, index, {**options, **level}), difficulty=level_name(level))


def level_name(level: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in level.items())
