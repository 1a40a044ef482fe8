"""Policy rules of the desk: some asks must be refused, with proof that somebody looked."""

from __future__ import annotations

from itertools import islice

import pytest

from environments.check import play, play_oracle
from environments.tools import ToolsEnv
from environments.tools.rules import RULES, is_refusal
from rl_core.types import Task, ToolCall, Turn

OPTIONS = {"rules": 2, "kinds": sorted(RULES), "failure_rate": 0.0}


def tasks(count: int = 60) -> list[Task]:
    return list(islice(ToolsEnv.tasks("train", 3, OPTIONS), count))


def forbidden(task: Task) -> bool:
    return is_refusal(task.private["answer"] or "")


def played(task: Task, calls: list[dict[str, object]], answer: str) -> float | None:
    turns = iter(
        [*(Turn(content="", tool_calls=(ToolCall(name=c["name"], arguments=c["arguments"]),)) for c in calls), Turn(content=answer)]
    )  # type: ignore[arg-type]
    return play(ToolsEnv(**OPTIONS), task, lambda _: next(turns)).reward


def test_about_half_of_the_governed_asks_are_forbidden_and_the_oracle_serves_both() -> None:
    drawn = tasks(120)
    assert 0.35 < sum(map(forbidden, drawn)) / len(drawn) < 0.65
    for working in (0.0, 1.0):
        env = ToolsEnv(**OPTIONS, oracle_working=working)
        assert all(play_oracle(env, task).reward == 1.0 for task in drawn[:24])


def test_a_refusal_counts_only_where_a_rule_forbids_and_only_with_the_right_id() -> None:
    for task in tasks():
        if forbidden(task):
            right = task.private["answer"]
            assert played(task, [], right.upper() + ".") == 1.0
            for wrong in ("refused", "done", "refused 1", f"{right} or {int(right.split()[1]) + 1}", right.split()[1], f"not {right}"):
                assert played(task, [], wrong) == 0.0, wrong
        else:
            look = task.private["plan"][0]
            assert played(task, [look], "refused 1234") == 0.0


def test_obeying_blindly_is_not_paid() -> None:
    plain = {(t.public["ask"], str(t.public["world"])): t for t in islice(ToolsEnv.tasks("train", 3, OPTIONS | {"rules": 0}), 5)}
    assert plain  # without rules nothing is refused
    assert not any(forbidden(t) for t in plain.values())
    for task in (t for t in tasks(200) if forbidden(t) and "stock" in t.public["ask"]):
        item = int(task.private["answer"].split()[1])
        new = int(task.public["ask"].rstrip(".").split()[-1])
        act = {"name": "restock", "arguments": {"item": item, "stock": new}}
        assert played(task, [act], "done") == 0.0
        assert played(task, [act], task.private["answer"]) == 0.0  # refused in words, done in fact


def test_the_rule_that_decides_stands_in_the_prompt_and_its_facts_have_to_be_looked_up() -> None:
    for task in tasks(20):
        shown = ToolsEnv(**OPTIONS).begin(task).messages[0].content
        assert all(rule in shown for rule in task.public["rules"])
        assert len(task.public["rules"]) == 2
        if forbidden(task):
            assert task.private["answer"].split()[1] not in shown + task.public["ask"]
            assert task.private["plan"]


def test_too_many_rules_are_refused() -> None:
    with pytest.raises(ValueError, match="option rules is 9"):
        ToolsEnv(rules=9)
