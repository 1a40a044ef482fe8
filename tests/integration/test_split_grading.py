"""Split grading where it counts: HumanEval's references are paid and fakes are not; inputs that a program could know do not help it.

POLYRL_ALL_FAKES=1 tries every fake on every problem instead of one (minutes); `polyrl verify humaneval` does the same and counts.
"""

from __future__ import annotations

import itertools
import os
import random
from collections import Counter
from dataclasses import replace

import pytest

from environments import humaneval_cases
from environments.code import CodeEnv
from environments.humaneval import HumanEvalEnv, task_of
from environments.humaneval_cases import cases_of, problems
from environments.humaneval_fakes import FAKES, attempt, attempt_all
from environments.sandbox import choose_sandbox
from reward_models.code_cases import same
from rl_core.seams import BadTask
from rl_core.types import Status, Task, Turn

BACKEND = "bubblewrap"


def test_every_reference_solution_of_humaneval_is_paid() -> None:
    assert len(problems()) == 164
    unpaid = [t for t in attempt_all([(name, "reference") for name in problems()], BACKEND) if t.verdict.reward != 1.0]
    assert not unpaid, unpaid


def test_no_fake_is_paid_for_any_problem() -> None:
    """Each problem meets one fake, each fake nine problems or more; all meet all where POLYRL_ALL_FAKES is set."""
    pairs = list(itertools.product(problems(), FAKES))
    if not os.environ.get("POLYRL_ALL_FAKES"):
        pairs = list(zip(problems(), itertools.cycle(FAKES), strict=False))
    tried = list(attempt_all(pairs, BACKEND))
    assert len(tried) == len(pairs)
    assert [t for t in tried if t.verdict.reward != 0.0 or not t.verdict.status.trains] == []
    assert min(Counter(t.program for t in tried).values()) >= 9


def test_a_fake_would_be_paid_if_expected_values_were_where_it_looks() -> None:
    """The fakes are no straw men: the one that reads frames finds what a frame above it holds."""
    space: dict[str, object] = {}
    exec(FAKES["read the expected value from the callers' frames"].replace("NAME", "f"), space)

    def grader() -> object:
        expected = [1, 2, 3]
        return space["f"](expected is None)  # type: ignore[operator]

    assert grader() == [1, 2, 3]


def test_cases_are_the_same_whenever_they_are_made_and_cross_no_border() -> None:
    for name in ("HumanEval/32", "HumanEval/38", "HumanEval/87", "HumanEval/95"):  # random inputs, helpers, tuples, dicts with any key
        first = cases_of(name, BACKEND)
        cases_of.cache_clear()
        assert cases_of(name, BACKEND) == first
        assert len(first.inputs) == len(first.expected) > 1
        task = task_of(name, BACKEND)
        shown = HumanEvalEnv(sandbox=BACKEND).begin(task).messages[0].content
        assert problems()[name].prompt in shown
        assert problems()[name].solution not in shown


def test_the_order_of_a_dict_and_the_last_bit_of_a_float_do_not_matter_and_types_do() -> None:
    name = "HumanEval/4"  # mean absolute deviation
    entry = problems()[name].entry
    env = HumanEvalEnv(sandbox=BACKEND)

    def reward(body: str) -> float | None:
        env.reset(options={"task": task_of(name, BACKEND)})
        verdict = env.step(Turn(content=f"def {entry}(xs):\n m = sum(xs) / len(xs)\n return {body}"))[4]["verdict"]
        assert verdict.status is Status.OK
        reward: float | None = verdict.reward
        return reward

    assert reward("sum(abs(x - m) / len(xs) for x in xs)") == 1.0  # another order of the same sum
    assert reward("sum(abs(x - m) for x in xs) / len(xs) + 1e-3") == 0.0
    assert reward("str(sum(abs(x - m) for x in xs) / len(xs))") == 0.0
    assert same({"dict": [[1, 2.0]]}, {"dict": [[1, 2]]}, 1e-6)
    assert not same([True], [1], 1e-6)
    assert not same(10**400, 1.0, 1e-6)
    assert not same(2.0, 2)


def test_a_program_without_the_function_or_with_a_wrong_one_is_not_paid() -> None:
    env = HumanEvalEnv(sandbox=BACKEND)
    for answer in ("x = 1", "def other(*args):\n return 1", "", "def f(:"):
        env.reset(options={"task": task_of("HumanEval/0", BACKEND)})
        assert env.step(Turn(content=answer))[4]["verdict"].reward == 0.0


def test_a_problem_whose_reference_fails_is_a_bad_task(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(problems()["HumanEval/0"], name="HumanEval/broken", solution="    return 7\n")
    monkeypatch.setitem(problems(), "HumanEval/broken", broken)
    with pytest.raises(BadTask, match="does not pass its own test"):
        humaneval_cases.cases_of("HumanEval/broken", BACKEND)


def test_the_splits_share_no_problem_and_each_goes_through_all_of_its_own() -> None:
    seen: dict[str, set[str]] = {}
    for split in ("train", "eval"):
        names = [name for name, problem in problems().items() if problem.split == split]
        drawn = [HumanEvalEnv.task_at(split, 3, index, {"sandbox": BACKEND}) for index in range(len(names))]
        seen[split] = {task.public["name"] for task in drawn}
        assert seen[split] == set(names)
        assert all(task.split == split for task in drawn)
    assert not seen["train"] & seen["eval"]
    assert len(seen["train"] | seen["eval"]) == 164


def test_a_table_of_the_hidden_inputs_is_paid_only_without_fresh_ones() -> None:
    """As if an earlier attempt had leaked every stored input: inputs drawn from the program itself find it out."""
    choose_sandbox(BACKEND)
    for kind, program in (("ints", "def f(x):\n return {table}.get(x)"), ("stdin", "print({table}.get(input()))")):
        task = CodeEnv.task_at("train", 7, 0, {"kinds": [kind]})
        table = dict(zip(task.private["inputs"], task.private["expected"], strict=True))
        assert code_reward(task, program.format(table=table), fresh=0) == 1.0
        assert code_reward(task, program.format(table=table), fresh=4) == 0.0
        assert attempt_oracle(task) == 1.0


def code_reward(task: Task, program: str, *, fresh: int) -> float | None:
    env = CodeEnv(sandbox=BACKEND, fresh=fresh)
    env.reset(options={"task": task})
    reward: float | None = env.step(Turn(content=program))[4]["verdict"].reward
    return reward


def attempt_oracle(task: Task) -> float | None:
    env = CodeEnv(sandbox=BACKEND)
    _, info = env.reset(options={"task": task})
    reward: float | None = env.step(env.oracle(info["observation"], random.Random(0)))[4]["verdict"].reward
    return reward


def test_one_attempt_says_which_problem_and_program_it_was() -> None:
    tried = attempt("HumanEval/3", "leave with exit code 0", BACKEND)
    assert (tried.problem, tried.program, tried.verdict.reward) == ("HumanEval/3", "leave with exit code 0", 0.0)
