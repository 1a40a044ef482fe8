"""The code environment: its tasks, its oracle and what it makes of an answer before any program runs."""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any

import pytest

from environments.code import CodeEnv, checked_knobs, extract_program, pipeline_of
from environments.code_pipelines import KINDS, Pipeline, Step, draw_inputs, draw_pipeline
from rl_core.types import Status, Task, Turn


def run_trusted(program: str, pipeline: Pipeline, value: Any) -> Any:
    """Run a program that our own oracle wrote."""
    if pipeline.mode == "stdin":
        out = io.StringIO()
        with redirect_stdout(out):
            exec(program, {"input": lambda: value})
        return out.getvalue().strip()
    space: dict[str, Any] = {}
    exec(program, space)
    return space["f"](value)


def pipelines(count: int, **shape: int) -> Iterator[Pipeline]:
    rng = random.Random(5)
    for index in range(count):
        yield draw_pipeline(rng, KINDS[index % len(KINDS)], **{"num_steps": 3, "digits": 2, **shape})


@pytest.mark.parametrize("shape", [{}, {"num_steps": 2, "digits": 1}, {"num_steps": 6, "digits": 3}])
def test_both_styles_of_the_oracle_compute_what_the_reference_computes(shape: dict[str, int]) -> None:
    for pipeline in pipelines(300, **shape):
        for value in draw_inputs(random.Random(1), pipeline, 6):
            wanted = pipeline.compute(value)
            assert run_trusted(pipeline.stepwise(), pipeline, value) == wanted, pipeline
            assert run_trusted(pipeline.folded(), pipeline, value) == wanted, pipeline


def test_a_filter_after_a_scale_folds_to_the_right_threshold() -> None:
    pipeline = Pipeline(kind="lists", steps=(Step("add", 5), Step("times", 3), Step("keep", 10), Step("list", 0)))
    assert pipeline.folded() == "def f(xs):\n return [3*x+15 for x in xs if x>-2]"
    assert pipeline.compute([-3, -2, -1]) == [12]


def test_shuffled_steps_are_planned_in_the_order_of_execution() -> None:
    pipeline = Pipeline(kind="steps", steps=(Step("add", 34), Step("times", 3)), order=(1, 0))
    assert pipeline.prompt() == "Write f(x): step 2 is times 3, step 1 is add 34."
    assert pipeline.plan() == "+34 *3"


def test_no_constant_program_can_pass_any_task() -> None:
    for task in itertools.islice(CodeEnv.tasks("train", 0), 200):
        assert len({repr(value) for value in task.private["expected"]}) * 2 >= len(task.private["expected"])


def test_one_prompt_has_one_key_so_it_cannot_sit_in_both_splits() -> None:
    options = {"kinds": ["ints"], "num_steps": 2, "digits": 1}
    keys: dict[str, str] = {}
    for split in ("train", "eval"):
        for task in itertools.islice(CodeEnv.tasks(split, 3, options), 150):
            prompt = pipeline_of(task).prompt()
            assert keys.setdefault(prompt, task.key) == task.key
            assert task.split == split


def test_the_prompt_shows_no_expected_output_and_no_hidden_input() -> None:
    env = CodeEnv()
    for task in itertools.islice(CodeEnv.tasks("train", 0, {"kinds": ["strings", "lists"]}), 50):
        _, info = env.reset(options={"task": task})
        text = "".join(m.content for m in info["observation"].messages)
        assert not any(str(value) in text for value in [*task.private["inputs"], *task.private["expected"]] if len(str(value)) > 3)


@pytest.mark.parametrize(
    ("content", "program"),
    [
        ("def f(x):\n return x", "def f(x):\n return x"),
        ("First\n```python\nbad\n```\nbetter:\n```python\ndef f(x):\n return 1\n```\nDone.", "def f(x):\n return 1\n"),
        ("```\nx=1\n```", "x=1\n"),
        ("```python\nnever closed", "```python\nnever closed"),
    ],
)
def test_the_program_is_the_last_fenced_block_or_everything(content: str, program: str) -> None:
    assert extract_program(content) == program


@pytest.mark.parametrize(
    "turn",
    [
        Turn(content=""),
        Turn(content=" \n\n"),
        Turn(content="def f(x):\n return x", malformed="unclosed <think>"),
        Turn(content="#" * 30_000),
        Turn(content="x\0"),
        Turn(content="", thought="def f(x):\n return x"),
    ],
    ids=["empty", "blank", "broken markup", "huge", "NUL", "only thought"],
)
def test_an_answer_without_a_usable_program_scores_zero_and_runs_nothing(turn: Turn) -> None:
    env = CodeEnv(sandbox="docker")  # nothing is asked of it
    env.reset(options={"task": first_task()})
    *_, info = env.step(turn)
    assert info["verdict"].status is Status.INVALID_OUTPUT
    assert info["verdict"].reward == 0.0


@pytest.mark.parametrize(
    "options", [{"kinds": []}, {"kinds": ["float"]}, {"kind": ["ints"]}, {"cases": 1}, {"digits": 0}, {"num_steps": 1}, {"cases": "8"}]
)
def test_a_knob_that_is_wrong_is_refused_with_its_name(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        checked_knobs(options)


def first_task() -> Task:
    return CodeEnv.task_at("train", 0, 0, {})
