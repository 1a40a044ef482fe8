"""Broken markup, hostile arguments, and floods of calls to the tools environment: an error or a zero, and the shop as it was."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from environments.base import Observation
from environments.check import check_environment
from environments.host import EnvHost
from environments.tools import ToolsEnv
from environments.tools.env import MAX_CALLS_PER_TURN, MAX_ERRORS
from environments.tools.world import TOOLS, Shop, ToolError
from rl_core.types import Status, Turn
from tests.unit.shop import DONE, begin, perfect, play, replies_to, tasks, using


def test_broken_markup_ends_the_episode_as_invalid_output() -> None:
    for task in tasks(20):
        turns = perfect(task)
        broken = Turn(content=turns[-1].content, malformed="tool call is not JSON")
        verdict = play(task, [*turns[:-1], broken])
        assert (verdict.status, verdict.reward) == (Status.INVALID_OUTPUT, 0.0)
        assert "not JSON" in verdict.evidence["reason"]


HOSTILE_ARGUMENTS: list[Any] = [
    {},
    {"nmae": "Ana"},
    {"name": 1},
    {"name": None},
    {"name": ["Ana"]},
    {"name": "Ana", "extra": 1},
    {"name": "Ana' OR '1'='1"},
    {"name": "x'; DROP TABLE customers; --"},
    {"name": "\ud800"},
    {"name": "\x00"},
    {"name": "A" * 1_000_000},
    {"name": {"name": {"name": {}}}},
    {"name": float("nan")},
    {"name": "Ana\n"},
    None,
    "Ana",
    ["Ana"],
    4821,
]


@pytest.mark.parametrize("arguments", HOSTILE_ARGUMENTS, ids=lambda a: repr(a)[:30])
def test_arguments_off_the_schema_come_back_as_a_short_error_and_change_nothing(arguments: Any) -> None:
    task = tasks(1, kinds=["refund"])[0]
    for name in TOOLS:
        shop = Shop(task.public["world"])
        before = shop.state()
        with pytest.raises(ToolError) as error:
            shop.call(name, arguments)
        assert len(str(error.value)) < 80
        assert shop.state() == before


@pytest.mark.parametrize("order", [True, "7310", 7310.5, 10**30, -1, 0, 999, float("nan"), float("inf"), 1e308, [7310], None])
def test_an_order_id_of_another_type_or_range_is_refused(order: Any) -> None:
    shop = Shop(tasks(1)[0].public["world"])
    before = shop.state()
    with pytest.raises(ToolError):
        shop.call("refund", {"order": order})
    assert shop.state() == before


@pytest.mark.parametrize("name", ["", "Find", "find ", "drop table", "__class__", "call", "f" * 10**6, None, 3, ("find",), ["find"], {}])
def test_an_unknown_tool_is_refused_by_the_exact_name_table(name: Any) -> None:
    with pytest.raises(ToolError, match="no such tool"):
        Shop(tasks(1)[0].public["world"]).call(name, {"name": "Ana"})


def test_values_are_bound_and_never_become_sql() -> None:
    shop = Shop(tasks(1)[0].public["world"])
    before = shop.state()
    for text in ("x' OR '1'='1", "x'; DELETE FROM orders; --", '" OR ""="', "Robert'); DROP TABLE customers;--"):
        with pytest.raises(ToolError):
            TOOLS["find"].run(shop._db, {"name": text})  # past the schema, on purpose
    assert shop.state() == before


def test_a_tool_that_is_not_offered_cannot_be_called() -> None:
    task = tasks(1, kinds=["stock"])[0]
    customer = task.public["world"]["customers"][0][0]
    env, observation = begin(task, distractors=0)
    assert "delete" not in {tool["name"] for tool in observation.tools}
    result = env.act(using(("delete", {"customer": customer})))
    assert isinstance(result, Observation)
    assert result.messages[0].content == "error: no such tool"
    assert env.act(Turn(content=task.private["answer"])).reward == 1  # type: ignore[union-attr]


def test_an_error_is_data_and_the_episode_can_still_be_won() -> None:
    for task in tasks(30):
        bad = using(("refund", {"order": "7310"}), ("nothing", {}), ("find", {"name": "Zoe"}))
        replies = replies_to(task, bad)
        assert [m.role for m in replies] == ["tool"] * 3
        assert [m.content for m in replies] == ["error: wanted refund(order:integer)", "error: no such tool", "error: no customer Zoe"]
        assert play(task, [bad, *perfect(task)]).reward == 1


def test_too_many_refused_calls_end_the_episode() -> None:
    task = tasks(1)[0]
    verdict = play(task, [using(("refund", {"order": 1000}))] * (MAX_ERRORS + 1) + perfect(task))
    assert (verdict.status, verdict.reward) == (Status.INVALID_OUTPUT, 0.0)


def test_a_flood_of_calls_in_one_turn_is_not_served() -> None:
    task = tasks(1, kinds=["refund"])[0]
    every_order = using(*(("refund", {"order": row[0]}) for row in task.public["world"]["orders"]))
    assert len(every_order.tool_calls) > MAX_CALLS_PER_TURN
    verdict = play(task, [every_order])
    assert (verdict.status, verdict.reward) == (Status.INVALID_OUTPUT, 0.0)


def test_calls_and_answer_in_one_turn_count_as_calls_only() -> None:
    task = tasks(1, kinds=["stock"])[0]
    env, _ = begin(task)
    turn = Turn(content=task.private["answer"], tool_calls=perfect(task)[0].tool_calls)
    assert isinstance(env.act(turn), Observation)


def test_a_budget_that_runs_out_scores_zero_even_when_the_state_is_right() -> None:
    task = tasks(1, kinds=["move"])[0]
    env, _ = begin(task)
    for turn in perfect(task)[:-1]:
        env.act(turn)
    verdict = env.on_truncated()
    assert (verdict.status, verdict.reward) == (Status.INVALID_OUTPUT, 0.0)


def test_the_conformance_kit_passes() -> None:
    assert [result.name for result in check_environment(ToolsEnv, {}) if not result.ok] == []


def test_many_episodes_in_the_threads_of_one_host_keep_apart() -> None:
    host, drawn = EnvHost(), tasks(24)

    def episode(number: int) -> float | None:
        task = drawn[number % len(drawn)]
        host.open(f"s{number}", "tools", {"failure_rate": 0.0}, task)
        with ThreadPoolExecutor(1) as other:  # a session's calls come from whichever thread is free
            for turn in perfect(task) if number < 24 else [DONE]:
                transition = other.submit(host.step, f"s{number}", turn).result()
        host.close(f"s{number}")
        assert transition.verdict is not None
        return transition.verdict.reward

    with ThreadPoolExecutor(8) as pool:
        rewards = list(pool.map(episode, range(48)))
    assert rewards == [1.0] * 24 + [0.0] * 24
    assert host.ping() == 0
