"""The tools environment pays for what the shop looks like at the end, and for nothing else."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest

from environments.base import Observation
from environments.tools import ToolsEnv
from environments.tools.asks import KINDS
from environments.tools.env import BUSY, MAX_ERRORS, extract_number
from environments.tools.world import TOOLS, Shop
from rl_core.types import Message, Status, Task, Turn, Verdict
from tests.unit.shop import ACTING, ASKING, DONE, begin, perfect, play, replies_to, tasks, using


def play_oracle(env: ToolsEnv, task: Task, rng: random.Random) -> tuple[Verdict, list[Turn], list[Message]]:
    seen: list[Message] = []
    turns: list[Turn] = []
    observation = env.begin(task)
    for _ in range(6):
        seen += observation.messages
        turns.append(env.oracle(observation, rng))
        result = env.act(turns[-1])
        if isinstance(result, Verdict):
            return result, turns, seen
        observation = result
    raise AssertionError(f"the oracle took more than 6 turns: {turns}")


# --- the oracle ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("working", [0.0, 1.0])
@pytest.mark.parametrize("failure_rate", [0.0, 0.3, 1.0])
def test_both_oracle_styles_are_always_right(working: float, failure_rate: float) -> None:
    env, rng = ToolsEnv(oracle_working=working, failure_rate=failure_rate), random.Random(1)
    for task in tasks(210):
        verdict, turns, _ = play_oracle(env, task, rng)
        assert (verdict.status, verdict.reward) == (Status.OK, 1.0), (task.public, turns, verdict)


def test_the_working_oracle_uses_no_id_that_it_has_not_read() -> None:
    env, rng = ToolsEnv(oracle_working=1.0, failure_rate=0.2), random.Random(1)
    for task in tasks(200):
        observation, read = env.begin(task), ""
        while True:
            read += " ".join(m.content for m in observation.messages) + " "
            turn = env.oracle(observation, rng)
            said = [str(v) for call in turn.tool_calls for v in call.arguments.values()] + ([turn.content] if not turn.tool_calls else [])
            assert all(word in read or word == "done" for word in said), (task.public, said, read)
            result = env.act(turn)
            if isinstance(result, Verdict):
                break
            observation = result


def test_the_style_is_chosen_once_per_episode_with_the_given_chance() -> None:
    env, rng, working = ToolsEnv(oracle_working=0.3, failure_rate=0.0), random.Random(3), 0
    for task in tasks(300):
        _, turns, _ = play_oracle(env, task, rng)
        styles = {bool(turn.thought) for turn in turns if turn.content != "done"}
        assert len(styles) == 1, turns
        working += styles.pop()
    assert 60 <= working <= 120


def test_most_asks_need_two_calls_or_more() -> None:
    assert sum(len(task.private["plan"]) >= 2 for task in tasks(200)) > 120


def test_every_kind_is_drawn_and_changes_the_shop_or_has_an_answer() -> None:
    drawn = tasks(300)
    assert {task.difficulty for task in drawn} == set(KINDS)
    for task in drawn:
        assert bool(task.private["goal"]) != (task.private["answer"] is not None)


# --- what scores nothing --------------------------------------------------------------------------------------------------


def test_doing_nothing_scores_zero() -> None:
    for content in ("", "done", "ok", "0", "none", "the stock is unknown"):
        assert all(play(task, [Turn(content=content)]).reward == 0 for task in tasks(60))


def test_looking_everything_up_without_acting_scores_zero() -> None:
    for task in tasks(60, kinds=ACTING):
        assert play(task, [*perfect(task)[:-2], DONE]).reward == 0


def test_acting_on_another_id_scores_zero() -> None:
    for task in tasks(100, kinds=ACTING):
        act = task.private["goal"][0]
        key = next(iter(act["arguments"]))
        rows = {"customer": "customers", "item": "items", "order": "orders"}[key]
        other = next(row[0] for row in task.public["world"][rows] if row[0] != act["arguments"][key])
        assert play(task, [using((act["name"], {**act["arguments"], key: other})), DONE]).reward == 0


def test_one_more_destructive_call_scores_zero() -> None:
    for task in tasks(100):
        target = task.private["goal"][0]["arguments"].get("order") if task.private["goal"] else None
        order = next(row[0] for row in task.public["world"]["orders"] if row[0] != target)
        customer = task.public["world"]["customers"][0][0]
        for extra in (("refund", {"order": order}), ("cancel", {"order": order}), ("delete", {"customer": customer})):
            verdict = play(task, [*perfect(task)[:-1], using(extra), perfect(task)[-1]])
            assert (verdict.status, verdict.reward) == (Status.OK, 0.0)
            assert verdict.components["state"] == 0


def test_a_destructive_act_stays_in_the_state_when_its_rows_are_gone() -> None:
    task = tasks(1)[0]
    customer = task.public["world"]["customers"][0][0]
    order = next(row[0] for row in task.public["world"]["orders"] if row[1] == customer)
    once, twice = Shop(task.public["world"]), Shop(task.public["world"])
    twice.call("refund", {"order": order})
    for shop in (once, twice):
        shop.call("delete", {"customer": customer})
    assert once.state() != twice.state()


def test_the_order_of_the_calls_and_repeated_reads_do_not_matter() -> None:
    for task in tasks(60):
        reads = using(("find", {"name": "Ana"}), ("item", {"name": "lamp"}))
        turns = perfect(task)
        errors = sum("error" in m.content for m in replies_to(task, reads))
        assert errors > MAX_ERRORS or play(task, [reads, *turns]).reward == 1


def test_a_wrong_change_that_can_be_undone_may_be_corrected() -> None:
    for task in tasks(30, kinds=["move", "restock"]):
        act = task.private["goal"][0]
        key = "city" if act["name"] == "move" else "stock"
        wrong = {**act["arguments"], key: "Paris" if key == "city" else 7}
        assert play(task, [using((act["name"], wrong)), DONE]).reward == 0
        assert play(task, [using((act["name"], wrong)), using((act["name"], act["arguments"])), DONE]).reward == 1


def test_the_calls_of_another_task_score_zero() -> None:
    some = tasks(80)
    for task, other in itertools.pairwise(some):
        env, _ = begin(task)
        for turn in perfect(other):
            result = env.act(turn)
            if isinstance(result, Verdict):
                break
        assert isinstance(result, Verdict)
        assert result.reward == 0


def test_the_right_answer_after_a_destructive_call_scores_zero_and_a_wrong_answer_does_too() -> None:
    for task in tasks(60, kinds=ASKING):
        answer = task.private["answer"]
        order = task.public["world"]["orders"][0][0]
        assert play(task, [Turn(content=answer)]).reward == 1
        assert play(task, [using(("refund", {"order": order})), Turn(content=answer)]).reward == 0
        for wrong in (str(int(answer) + 1), f"-{answer}", f"{answer}.5", f"{answer}0", f"{answer} or 5", f"1{answer}", f"{answer}e1"):
            assert play(task, [Turn(content=wrong)]).reward == 0, wrong


def test_naming_every_value_scores_zero() -> None:
    shotgun = " ".join(str(n) for n in range(1000))
    for task in tasks(30, kinds=ASKING):
        assert play(task, [Turn(content=shotgun)]).reward == 0
        assert play(task, [Turn(content=task.private["answer"] + " " * 1_000_000)]).reward == 0
        assert play(task, [Turn(content="", thought=task.private["answer"])]).reward == 0


@pytest.mark.parametrize(
    ("content", "number"),
    [
        ("307", "307"),
        (" 307\n", "307"),
        ("The stock is 307.", "307"),
        ("3 0 7", None),
        ("", None),
        ("٣٠٧", None),
        ("-307", "-307"),
        ("307" * 40, None),
    ],
)
def test_an_answer_is_the_only_number_of_a_short_text(content: str, number: str | None) -> None:
    assert extract_number(content) == number


# --- determinism, isolation, options --------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_task_world_and_failures() -> None:
    for one, two in zip(tasks(50), tasks(50), strict=True):
        assert one == two
        assert json.loads(json.dumps([one.public, one.private])) == [one.public, one.private]
        replies = []
        for _ in range(2):
            env, first = begin(one, failure_rate=0.5)
            seen = [first]
            for turn in perfect(one)[:-1]:
                result = env.act(turn)
                assert isinstance(result, Observation)
                seen.append(result)
            replies.append(seen)
        assert replies[0] == replies[1]


def test_train_and_eval_share_no_task() -> None:
    def keys(split: str, seed: int) -> set[str]:
        return {ToolsEnv.task_at(split, seed, i, {}).key for i in range(100)}

    train, held_out = keys("train", 1) | keys("train", 2), keys("eval", 1) | keys("eval", 3)
    assert not train & held_out
    assert len(train) == 200
    assert len(held_out) == 200


def test_sessions_do_not_leak_into_each_other() -> None:
    first, second = tasks(2, kinds=["refund"])
    env_a, _ = begin(first)
    env_b, _ = begin(first)
    for turn in perfect(first)[:-1]:
        env_a.act(turn)
    assert env_b.act(DONE).reward == 0  # type: ignore[union-attr]
    assert env_a.act(DONE).reward == 1  # type: ignore[union-attr]
    env_a.begin(second)
    assert env_a.act(DONE).reward == 0  # type: ignore[union-attr]
    env_a.begin(first)  # the same instance again: nothing is refunded any more
    assert env_a.act(DONE).reward == 0  # type: ignore[union-attr]


def test_nothing_that_must_be_looked_up_is_in_the_first_observation() -> None:
    for task in tasks(100):
        _, observation = begin(task)
        shown = json.dumps([m.content for m in observation.messages])
        ids = [str(row[0]) for rows in task.public["world"].values() for row in rows]
        assert not any(ident in shown for ident in ids)
        assert task.private["answer"] is None or task.private["answer"] not in shown


def test_a_busy_tool_changes_nothing_and_is_busy_once() -> None:
    task = tasks(1, kinds=["refund"])[0]
    env, _ = begin(task, failure_rate=1.0)
    turns = perfect(task)
    result = env.act(turns[0])
    assert isinstance(result, Observation)
    assert result.messages[0].content == BUSY
    for turn in turns[:-1]:
        result = env.act(turn)
        assert isinstance(result, Observation)
        assert result.messages[0].content != BUSY
    assert env.act(DONE).reward == 1  # type: ignore[union-attr]


def test_a_busy_episode_that_goes_on_as_if_nothing_had_happened_scores_zero() -> None:
    for task in tasks(30, kinds=["move"]):
        act = perfect(task)[-2]
        assert play(task, [act, DONE], failure_rate=1.0).reward == 0
        assert play(task, [act, DONE], failure_rate=0.0).reward == 1


def test_at_least_eight_typed_tools_are_offered_and_some_are_destructive() -> None:
    _, observation = begin(tasks(1)[0])
    assert len(observation.tools) >= 8
    assert sum(TOOLS[tool["name"]].destructive for tool in observation.tools) >= 2
    for tool in observation.tools:
        assert tool["parameters"]["additionalProperties"] is False
        assert set(tool["parameters"]["required"]) == set(tool["parameters"]["properties"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ["refnd"]}, "wanted some of .*refund"),
        ({"failure_rate": 2}, "wanted 0 to 1"),
        ({"distractors": 9}, "wanted 0 to 4"),
        ({"kind": ["move"]}, "did you mean 'kinds'"),
    ],
)
def test_an_option_out_of_range_is_one_clear_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ToolsEnv(**options)


def test_kinds_can_be_narrowed() -> None:
    assert {task.difficulty for task in tasks(40, kinds=["move", "stock"])} == {"move", "stock"}
