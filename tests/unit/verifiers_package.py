"""Environments written with the real `verifiers` API, as its packages are: one turn, several turns, tools, and faulty ones."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import verifiers as vf
from datasets import Dataset


def rows(count: int) -> Dataset:
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghij") for _ in range(6)) for _ in range(count)]
    return Dataset.from_list([{"question": f"Reverse {w}", "answer": w[::-1], "info": {"word": w}} for w in words])


async def correct(completion: Any, answer: str) -> float:
    await asyncio.sleep(0)
    return float(completion[-1].content == answer)


def brief(completion: Any) -> float:
    return float(len(completion[-1].content) < 10)


def load_environment(count: int = 400) -> vf.Environment:
    """Single turn, a rubric of two functions, one of them only a metric."""
    return vf.SingleTurnEnv(dataset=rows(count), system_prompt="Answer with the word.", rubric=vf.Rubric([correct, brief], [1.0, 0.0]))


class Twice(vf.MultiTurnEnv):
    """Asks for the word backwards, then forwards."""

    async def env_response(self, messages: Any, state: Any, **kwargs: Any) -> Any:
        state["first"] = messages[-1].content
        return [{"role": "user", "content": "And forwards?"}]


def both(completion: Any, answer: str, info: dict[str, Any]) -> float:
    said = [m.content for m in completion if m.role == "assistant"]
    return (float(said[:1] == [answer]) + float(said[1:] == [info["word"]])) / 2


def two_turns() -> vf.Environment:
    return Twice(dataset=rows(50), max_turns=2, rubric=vf.Rubric([both]))


def reverse(word: str) -> str:
    """Reverse a word.

    Args:
        word: What to reverse.
    """
    return word[::-1]


def with_tool() -> vf.Environment:
    return vf.ToolEnv(dataset=rows(50), tools=[reverse], rubric=vf.Rubric([correct]))


def raises(completion: Any) -> float:
    raise ZeroDivisionError("the judge is away")


async def sleeps(completion: Any) -> float:
    await asyncio.sleep(60)
    return 1.0


def ranked(completions: Any) -> list[float]:
    return [1.0 for _ in completions]


def broken_rubric() -> vf.Environment:
    return vf.SingleTurnEnv(dataset=rows(50), rubric=vf.Rubric([correct, raises]))


def late_rubric() -> vf.Environment:
    return vf.SingleTurnEnv(dataset=rows(50), rubric=vf.Rubric([sleeps]))


def group_rubric() -> vf.Environment:
    return vf.SingleTurnEnv(dataset=rows(50), rubric=vf.Rubric([ranked]))


def generous() -> vf.Environment:
    return vf.SingleTurnEnv(dataset=rows(50), rubric=vf.Rubric([correct, brief], [3.0, 1.0]))
