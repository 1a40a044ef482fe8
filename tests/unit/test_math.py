"""The math environment: exact verifier, honest working, knobs that mean what they say."""

from __future__ import annotations

import operator
import random
import re
from collections import Counter
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from environments.host import EnvHost, TaskUnusable
from environments.math import ALGEBRA, KINDS, MathEnv, column_working, multiply_working
from reward_models import math_answer
from reward_models.killable import ServiceFailed
from rl_core.seams import BadTask
from rl_core.types import Status, Task, ToolCall, Turn, Verdict


def episode(task: Task, turn: Turn) -> Verdict:
    env = MathEnv()
    env.reset(options={"task": task})
    verdict = env.step(turn)[4]["verdict"]
    assert isinstance(verdict, Verdict)
    return verdict


def tasks(count: int, **options: Any) -> list[Task]:
    return list(islice(MathEnv.tasks("train", 0, options), count))


# --- tasks and oracle -------------------------------------------------------------------------------------------------------

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def solve(question: str) -> int:
    """An independent reading of the question, from its text alone."""
    numbers = [int(n) for n in re.findall(r"[0-9]+", question)]
    if found := re.fullmatch(r"x([+-])(\d+)=(\d+), x\?", question):
        return int(found[3]) - int(found[2]) if found[1] == "+" else int(found[3]) + int(found[2])
    if question.endswith("Total?"):
        return sum(numbers)
    if question.endswith("Left?"):
        return numbers[0] - numbers[1]
    total = numbers[0]
    for sign, number in zip(re.findall(r"[-+*]", question), numbers[1:], strict=True):
        total = OPERATORS[sign](total, number)
    return total


def test_the_gold_answer_is_what_the_question_asks() -> None:
    for task in tasks(300) + tasks(100, digits=1) + tasks(100, digits=9, terms=12):
        assert task.private["answer"] == str(solve(task.public["question"])), task.public["question"]


def test_every_kind_is_drawn_and_is_the_difficulty() -> None:
    drawn = Counter(task.difficulty for task in tasks(300))
    assert set(drawn) == set(KINDS)
    assert min(drawn.values()) > 20
    assert {task.difficulty for task in tasks(20, kinds=["mul"])} == {"mul"}


@given(st.integers(0, 10**12), st.integers(0, 10**12))
def test_each_step_of_the_columns_is_true_and_the_digits_make_the_answer(a: int, b: int) -> None:
    a, b = max(a, b), min(a, b)
    for sign, wanted in (("+", a + b), ("-", a - b)):
        carry, digits = 0, ""
        for step in column_working(a, b, sign).split():
            x, y, c, following, digit = (int(n) for n in re.findall(r"[0-9]", step))
            assert c == carry
            value = x + y + c if sign == "+" else x - y - c
            assert (value // 10) % 2 == following
            assert value % 10 == digit
            carry, digits = following, f"{digit}{digits}"
        assert int(f"{carry}{digits}") == wanted


@given(st.integers(2, 9), st.integers(1, 10**12))
def test_each_step_of_a_multiplication_is_true(a: int, b: int) -> None:
    carry, digits = 0, ""
    for step in multiply_working(a, b).split():
        left, right = step.split("=")
        factors, c = left.split("+")
        assert int(c) == carry
        assert eval_product(factors) + carry == int(right)
        carry, digits = int(right) // 10, f"{int(right) % 10}{digits}"
    assert int(f"{carry}{digits}") == a * b


def eval_product(text: str) -> int:
    x, y = text.split("*")
    return int(x) * int(y)


def test_prompts_and_demonstrations_are_short() -> None:
    for task in tasks(300):
        env = MathEnv(oracle_working=1.0)
        _, info = env.reset(options={"task": task})
        turn = env.oracle(info["observation"], random.Random(0))
        assert len(task.public["question"]) <= 40
        assert turn.thought
        assert len(turn.thought) + len(turn.content) <= 56  # most characters are a token of their own
        env.options["oracle_working"] = env.knobs["oracle_working"] = 0.0
        assert env.oracle(info["observation"], random.Random(0)) == Turn(content=task.private["answer"])


# --- the environment --------------------------------------------------------------------------------------------------------


def test_right_wrong_and_unreadable_answers_get_their_scores() -> None:
    task = tasks(1)[0]
    gold = task.private["answer"]
    right = episode(task, Turn(content=gold, thought="whatever"))
    assert (right.status, right.reward, dict(right.components)) == (Status.OK, 1.0, {"correct": 1.0, "format": 1.0})
    wrong = episode(task, Turn(content=str(int(gold) + 1)))
    assert (wrong.status, wrong.reward, dict(wrong.components)) == (Status.OK, 0.0, {"correct": 0.0, "format": 1.0})
    silent = episode(task, Turn(content="", thought=gold))
    assert (silent.status, silent.reward, dict(silent.components)) == (Status.INVALID_OUTPUT, 0.0, {"correct": 0.0, "format": 0.0})


@pytest.mark.parametrize("kind", ALGEBRA)
def test_algebra_pays_its_oracle_and_neither_the_question_nor_another_form(kind: str) -> None:
    env = MathEnv(kinds=[kind])
    for task in tasks(3, kinds=[kind]):
        _, info = env.reset(options={"task": task})
        assert env.step(env.oracle(info["observation"], random.Random(1)))[4]["verdict"].reward == 1.0, task
        asked = re.sub(r"^(Factor|Expand|Simplify|What is|Write in lowest terms:) |[.?]$", "", task.public["question"])
        for answer in (task.public["question"], asked, "0", "x", task.private["answer"] + "0"):
            assert episode(task, Turn(content=f"\\boxed{{{answer}}}")).reward == 0.0, (task, answer)


@pytest.mark.parametrize("kind", ALGEBRA)
def test_a_honeypot_of_algebra_can_be_opened_and_pays_nothing_but_its_secret(kind: str) -> None:
    (task,) = tasks(1, kinds=[kind])
    honeypot = MathEnv.honeypot(task, random.Random(1))
    assert episode(honeypot, Turn(content=task.private["answer"])).reward == 0.0
    assert episode(honeypot, Turn(content=honeypot.private["answer"])).reward == 1.0


def test_a_verifier_that_cannot_answer_masks_the_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    (task,) = tasks(1, kinds=["factor"])
    env = MathEnv()
    env.reset(options={"task": task})

    def away(*_: object) -> None:
        raise ServiceFailed("the server died twice")

    monkeypatch.setattr(math_answer.killable.KillableService, "call", away)
    verdict = env.step(Turn(content=task.private["answer"]))[4]["verdict"]
    assert (verdict.status, verdict.reward) == (Status.VERIFIER_ERROR, None)
    math_answer.read_gold.cache_clear()
    with pytest.raises(BadTask, match="cannot be looked at now: the server died twice"):
        env.reset(options={"task": task})


def test_a_gold_that_cannot_be_read_is_refused_when_the_episode_opens() -> None:
    task = replace(tasks(1)[0], private={"answer": "\\frac{1}{"})
    with pytest.raises(BadTask, match="cannot be read"):
        MathEnv().reset(options={"task": task})
    with pytest.raises(TaskUnusable, match="cannot be read"):
        EnvHost().open("s", "math", {}, task)


def test_broken_markup_and_tool_calls_are_invalid_even_with_the_right_answer() -> None:
    task = tasks(1)[0]
    for turn in (
        Turn(content=task.private["answer"], malformed="unclosed <think>"),
        Turn(content=task.private["answer"], tool_calls=(ToolCall(name="answer", arguments={}),)),
    ):
        assert (episode(task, turn).status, episode(task, turn).reward) == (Status.INVALID_OUTPUT, 0.0)


def test_a_system_message_comes_first_when_it_is_wanted() -> None:
    observation = MathEnv(system="Answer with a number.").begin(tasks(1)[0])
    assert [m.role for m in observation.messages] == ["system", "user"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"digit": 3}, "did you mean 'digits'"),
        ({"digits": "3"}, "wanted a int"),
        ({"digits": 0}, "wanted 1 to 30"),
        ({"terms": 1}, "wanted 2 to 100"),
        ({"kinds": ["add", "div"]}, "'div'"),
        ({"kinds": []}, "is empty"),
    ],
)
def test_a_wrong_knob_is_refused_with_what_was_wanted(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        MathEnv(**options)
    with pytest.raises(ValueError, match=complaint):
        tasks(1, **options)
