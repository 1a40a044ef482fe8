"""Environments of the real verifiers package, through their own rollouts and rubrics."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pytest

pytest.importorskip("verifiers", reason="pip install verifiers==0.1.14")

from environments.bridges.verifiers import VerifiersEnv
from environments.check import check_environment, play, play_oracle
from environments.host import EnvHost
from rl_core.types import Status, Task, ToolCall, Turn

HERE = "tests.unit.verifiers_package"


def options(function: str = "load_environment", **more: Any) -> dict[str, Any]:
    return {"env": f"{HERE}:{function}", **more}


def a_task(function: str = "load_environment") -> Task:
    return next(VerifiersEnv.tasks("train", 0, options(function)))


def word(task: Task) -> str:
    return str(task.private["row"]["info"]["word"])


def test_a_single_turn_package_passes_the_kit() -> None:
    results = check_environment(VerifiersEnv, options(), num_tasks=2, second_process=False)
    assert not [str(result) for result in results if not result.ok]


def test_prompt_and_rubric_are_the_packages_own() -> None:
    env, task = VerifiersEnv(**options()), a_task()
    messages = env.reset(options={"task": task})[1]["observation"].messages
    assert [(m.role, m.content) for m in messages] == [("system", "Answer with the word."), ("user", f"Reverse {word(task)}")]
    right = play_oracle(env, task)
    assert (right.reward, right.components["correct"], right.components["brief"]) == (1.0, 1.0, 1.0)
    assert right.components["num_turns"] == 1.0
    assert play(env, task, lambda _: Turn(content="a long answer", thought="")).components["brief"] == 0.0


def test_several_turns_show_only_what_is_new() -> None:
    env, task = VerifiersEnv(**options("two_turns")), a_task("two_turns")
    seen: list[list[str]] = []
    answers = iter([word(task)[::-1], word(task)])

    def policy(observation: Any) -> Turn:
        seen.append([m.content for m in observation.messages])
        return Turn(content=next(answers))

    assert play(env, task, policy).reward == 1.0
    assert seen == [[f"Reverse {word(task)}"], ["And forwards?"]]
    answers = iter(["no", word(task)])
    assert play(env, task, policy).reward == 0.5


def test_a_tool_of_the_package_is_shown_called_and_answered() -> None:
    env, task = VerifiersEnv(**options("with_tool")), a_task("with_tool")
    observation = env.reset(options={"task": task})[1]["observation"]
    assert [(t["name"], list(t["parameters"]["properties"])) for t in observation.tools] == [("reverse", ["word"])]
    answer = env.step(Turn(content="", tool_calls=(ToolCall(name="reverse", arguments={"word": word(task)}),)))[4]["observation"]
    assert [(m.role, m.content) for m in answer.messages] == [("tool", word(task)[::-1])]
    verdict = env.step(Turn(content=answer.messages[0].content))[4]["verdict"]
    assert (verdict.reward, verdict.components["correct"]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("function", "complaint"), [("broken_rubric", "'raises' raised ZeroDivisionError: the judge is away"), ("late_rubric", "within 1 s")]
)
def test_a_rubric_that_fails_or_hangs_is_a_verifier_error_and_no_zero(function: str, complaint: str) -> None:
    host, task = EnvHost(), a_task(function)
    host.open("s", "verifiers", options(function, timeout_s=1.0), task)
    ended = host.step("s", Turn(content="x")).verdict
    assert ended is not None
    assert (ended.status, ended.reward) == (Status.VERIFIER_ERROR, None)
    assert complaint in ended.evidence["error"]
    host.close("s")


def test_weighted_rewards_are_mapped_into_the_range_and_cut_off() -> None:
    task = a_task("generous")
    play_half = play(VerifiersEnv(**options("generous", high=4.0)), task, lambda _: Turn(content="no"))
    assert (play_half.reward, play_half.evidence["weighted"]) == (0.25, "1")
    assert play_oracle(VerifiersEnv(**options("generous", high=4.0)), task).reward == 1.0
    assert play_oracle(VerifiersEnv(**options("generous")), task).reward == 1.0


@pytest.mark.parametrize(
    ("chosen", "complaint"),
    [
        ({"env": ""}, "env is empty"),
        ({"env": "no-such-package"}, "loading 'no-such-package' raised"),
        ({"env": f"{HERE}:rows", "arguments": {"count": 3}}, "gave a Dataset"),
        ({"env": f"{HERE}:group_rubric"}, "scores whole groups"),
        ({"env": f"{HERE}:load_environment", "low": 1.0}, "low < high"),
    ],
)
def test_what_cannot_be_used_says_why(chosen: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        next(VerifiersEnv.tasks("train", 0, chosen))


def test_many_episodes_at_once_do_not_mix_and_an_abandoned_one_ends() -> None:
    tasks = list(islice(VerifiersEnv.tasks("train", 1, options("two_turns")), 32))

    def episode(task: Task) -> float | None:
        env = VerifiersEnv(**options("two_turns"))
        answers = iter([word(task)[::-1], word(task)])
        verdict = play(env, task, lambda _: Turn(content=next(answers)))
        env.close()
        return verdict.reward

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(episode, tasks)) == {1.0}
    env = VerifiersEnv(**options("two_turns"))
    env.reset(options={"task": tasks[0]})
    assert env._rollout is not None
    work = env._rollout._work
    env.close()
    deadline = time.monotonic() + 5
    while not work.done() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert work.done()
