"""reasoning-gym, guarded: the real package over several families, and the attacks that its scorers fall to."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("reasoning_gym", reason="pip install reasoning-gym")

import reasoning_gym

from environments.bridges.process import LineProcess
from environments.bridges.reasoning_gym import SCORERS, ReasoningGymEnv
from environments.bridges.reasoning_gym_scorer import EVALUATED, fits
from environments.check import check_environment, play
from rl_core.types import Status, Task, Turn, Verdict

FAMILIES = ["chain_sum", "gcd", "base_conversion", "spiral_matrix", "number_sorting"]
"""Of different kinds of scorer; `countdown`, whose generator is slow, has tests of its own below."""
EXECUTING = [*EVALUATED, "spiral_matrix", "string_insertion", "binary_matrix", "n_queens"]
"""Families of 0.1.25 whose scorer executes the answer."""


@pytest.fixture(scope="module", autouse=True)
def _scorer() -> Iterator[None]:
    yield
    SCORERS.close()


def a_task(family: str, seed: int = 0, **options: Any) -> Task:
    return next(ReasoningGymEnv.tasks("train", seed, {"families": [family], **options}))


def score(task: Task, answer: str, **options: Any) -> Verdict:
    return play(ReasoningGymEnv(families=[task.public["family"]], **options), task, lambda _: Turn(content=answer))


def test_several_families_pass_the_kit() -> None:
    results = check_environment(ReasoningGymEnv, {"families": FAMILIES}, num_tasks=4)
    assert not [str(result) for result in results if not result.ok]


@pytest.mark.parametrize("family", EXECUTING)
def test_an_answer_that_is_code_is_not_started(family: str, tmp_path: Path) -> None:
    """The marker would be written by any of them; the plain library writes it, which the test looks at first."""
    task = a_task(family)
    marker = tmp_path / "started"
    code = f"__import__('pathlib').Path({str(marker)!r}).write_text('x')"
    item = reasoning_gym.create_dataset(family, seed=1, size=1)
    item.score_answer(code, item[0])
    assert marker.exists(), "the library has changed: this attack does nothing any more"
    marker.unlink()
    verdict = score(task, code)
    assert (verdict.status, verdict.reward) == (Status.OK, 0.0)
    assert verdict.evidence["refused"]
    assert not marker.exists()


def test_an_answer_that_differs_from_the_stored_one_and_is_right_is_paid() -> None:
    task = a_task("countdown")
    answer = task.private["entry"]["answer"]
    other = f"({answer})"
    assert score(task, other).evidence["tier"] == "scorer"
    assert score(task, other).reward == 1.0
    assert score(task, f"{answer} + 1").reward == 0.0
    matrix = a_task("spiral_matrix")
    assert score(matrix, matrix.private["entry"]["answer"]).reward == 1.0


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("3*(4+5)", True), ("x**2 + 3*x + sin(x)/2 + C", True), ("2.5*x**(-3)", True), ("9**9**9", False), ("9**(9**9)", False),
        ("9**99**99", False), ("9**999", False), ("x.__class__", False), ("lambda: 0", False), ("open('x')", False),
        ("factorial(99999)", False), ("1e999", False), ("x**y", False), ("[1]", False),
    ],
)  # fmt: skip
def test_what_is_evaluated_says_arithmetic_and_nothing_else(text: str, good: bool) -> None:
    assert fits("simple_integration", text) is good
    assert not fits("countdown", "x")


def test_a_scorer_that_takes_too_long_is_killed_and_the_answer_earns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("environments.bridges.reasoning_gym.SCORE_S", 1.0)
    task = a_task("polynomial_multiplication")
    began = time.monotonic()
    slow = score(task, "(((((9**99)**99)**99)**99)**99)*x")
    assert (slow.status, slow.reward) == (Status.TIMEOUT_MODEL, 0.0)
    assert time.monotonic() - began < 60
    monkeypatch.undo()
    assert score(a_task("countdown", 5), a_task("countdown", 5).private["entry"]["answer"] + " ").reward == 1.0


def test_streams_do_not_repeat_themselves_and_splits_share_nothing() -> None:
    """The library's own stream of this family has 499 different items of 2,000, and its seeds 1 and 2 share 99 of 100."""

    def keys(split: str, seed: int) -> set[str]:
        return {t.key for t in islice(ReasoningGymEnv.tasks(split, seed, {"families": ["chain_sum"]}), 400)}

    first, second, held_out = keys("train", 1), keys("train", 2), keys("eval", 1)
    assert len(first) > 395
    assert len(first & second) < 5
    assert not (first | second) & held_out


def test_the_same_item_drawn_twice_is_one_task() -> None:
    tasks = list(islice(ReasoningGymEnv.tasks("train", 0, {"families": ["gcd"], "arguments": {"gcd": {"max_value": 6}}}), 300))
    by_question: dict[str, set[str]] = {}
    for task in tasks:
        by_question.setdefault(task.public["question"], set()).add(task.key)
    assert len(by_question) < 300
    assert all(len(found) == 1 for found in by_question.values())


def test_partial_scores_pay_only_where_the_config_asks_for_them() -> None:
    task = a_task("countdown")
    wrong = "+".join(map(str, task.private["entry"]["metadata"]["numbers"]))
    assert score(task, wrong).components["score"] < 0.1
    assert score(task, wrong).reward == 0.0
    assert score(task, wrong, floor=0.01).reward == score(task, wrong).components["score"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"families": ["coin_flip"]}, "pays '0' for 95 %"),
        ({"families": ["chain_sums"]}, "wanted some of"),
        ({"families": []}, "is empty"),
        ({"floor": 2.0}, "wanted 0"),
        ({"arguments": {"lcm": {}}}, "wanted some of chain_sum, gcd"),
    ],
)
def test_wrong_options_say_what_is_wrong(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        next(ReasoningGymEnv.tasks("train", 0, options))


def test_a_scorer_that_dies_is_our_failure_and_the_next_answer_finds_a_new_one() -> None:
    task = a_task("countdown", 7)
    answer = f" ({task.private['entry']['answer']})"
    assert score(task, answer).reward == 1.0
    process = SCORERS._process
    assert isinstance(process, LineProcess)
    process._process.kill()
    process._process.wait()
    assert score(task, answer).reward == 1.0
