"""Worked examples before a task: right answers, the same in every episode, never the task itself, and only where they fit."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest

from environments.base import Observation, TextEnv
from environments.check import check_environment
from environments.registry import resolve
from rl_core.types import Message, Task, Turn

MATH = {"kinds": ["chain"], "terms": 3, "system": "Compute."}


def first(name: str, options: dict[str, Any], task: Task) -> tuple[Message, ...]:
    observation: Observation = resolve(name)(**options).reset(options={"task": task})[1]["observation"]
    return observation.messages


def tasks(name: str, options: dict[str, Any], count: int) -> list[Task]:
    return list(islice(resolve(name).tasks("train", 3, options), count))


@pytest.mark.parametrize(
    ("name", "options"),
    [("math", MATH), ("instructions", {"min_words": 2}), ("structured", {}), ("long_context", {"min_tokens": 64, "max_tokens": 96})],
)
def test_examples_are_questions_with_answers_that_earn_full_reward(name: str, options: dict[str, Any]) -> None:
    asked = tasks(name, options, 4)
    seen = [first(name, options | {"examples": 3}, task) for task in asked]
    plain = [first(name, options, task) for task in asked]
    num_system = sum(m.role == "system" for m in plain[0])
    shown = seen[0][num_system : num_system + 6]
    for messages, without in zip(seen, plain, strict=True):
        assert messages == (*without[:num_system], *shown, *without[num_system:])  # behind the system message, the same for all
    assert [m.role for m in shown] == ["user", "assistant"] * 3

    env: TextEnv = resolve(name)(**options)
    by_question = {first(name, options, t)[-1]: t for t in islice(resolve(name).tasks("train", 0x5EED, options), 12)}
    for question, answer in zip(shown[::2], shown[1::2], strict=True):
        env.reset(options={"task": by_question[question]})
        assert env.step(Turn(content=answer.content))[4]["verdict"].reward == 1.0
    assert len(set(shown[::2])) == 3


def test_a_task_is_never_its_own_example() -> None:
    options = {"kinds": ["chain"], "terms": 2}  # few tasks, so that some are drawn again
    shown = {m.content for m in first("math", options | {"examples": 8}, tasks("math", options, 1)[0])[:-1:2]}
    twice = next(t for t in resolve("math").tasks("train", 9, options) if t.public["question"] in shown)
    messages = first("math", options | {"examples": 8}, twice)
    assert len(messages) == 2 * 7 + 1
    assert [m.content for m in messages].count(twice.public["question"]) == 1


def test_the_option_changes_no_task_and_no_verdict() -> None:
    assert tasks("math", MATH, 20) == tasks("math", MATH | {"examples": 2}, 20)
    assert all(result.ok for result in check_environment(resolve("math"), MATH | {"examples": 2}, num_tasks=4, second_process=False))


@pytest.mark.parametrize(
    ("name", "examples", "message"),
    [
        ("math", "two", "wanted a number"),
        ("math", 33, "wanted 0 to 32"),
        ("math", -1, "wanted 0 to 32"),
        ("tools", 1, "one question and one answer"),
    ],
)
def test_what_cannot_be_shown_is_refused_with_a_sentence(name: str, examples: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        first(name, {"examples": examples}, tasks(name, {}, 1)[0])
