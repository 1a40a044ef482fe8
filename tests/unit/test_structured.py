"""The structured environment: right form and right content, both exactly, and never slow."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from environments.structured import COMPUTED, StructuredEnv, sentence, signature
from rl_core.types import Status, Task, Turn, Verdict

RICH: dict[str, Any] = {
    "types": ["int", "str", "bool", "enum", "strings", "ints", "object"], "min_fields": 4, "max_fields": 10, "depth": 3, "items": 5,
    "changes": 2, "extras": 2, "computed": 2,
}  # fmt: skip


def tasks(count: int = 40, **options: Any) -> list[Task]:
    return list(islice(StructuredEnv.tasks("train", 0, options), count))


def judged(task: Task, content: str | Turn, **options: Any) -> Verdict:
    env = StructuredEnv(**options)
    env.reset(options={"task": task})
    verdict = env.step(content if isinstance(content, Turn) else Turn(content=content))[4]["verdict"]
    assert isinstance(verdict, Verdict)
    return verdict


def solve(task: Task) -> dict[str, Any]:
    """An independent solver: reads the facts and the schema alone."""
    said: dict[str, str] = {}
    for fact in task.public["facts"]:
        path, _, value = fact.partition("=")
        said[path.removesuffix(" now")] = value
    phrases = dict(COMPUTED.values())

    def build(schema: dict[str, Any], prefix: str) -> Any:
        kind = schema.get("type")
        if kind == "object":
            return {name: build(inner, f"{prefix}.{name}" if prefix else name) for name, inner in schema["properties"].items()}
        text = said[prefix]
        for phrase, compute in phrases.items():
            if text.startswith(phrase + " "):
                return compute([int(x) for x in said[text.removeprefix(phrase + " ")].split(",")])
        if kind == "array":
            return [int(x) if schema["items"]["type"] == "integer" else x for x in text.split(",")]
        return {"integer": int, "boolean": lambda t: t == "true"}.get(str(kind), str)(text)

    found = build(task.public["schema"], "")
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("options", [{}, RICH, {"min_fields": 2, "max_fields": 2, "types": ["int"]}])
def test_a_solver_that_reads_only_facts_and_schema_earns_everything(options: dict[str, Any]) -> None:
    for task in tasks(**options):
        answer = solve(task)
        assert not list(Draft202012Validator(task.public["schema"]).iter_errors(answer))
        assert judged(task, json.dumps(answer), **options).reward == 1.0


Spoil = Callable[[dict[str, Any], str, Any], Any]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda gold, name, value: {**gold, name: value + 1},
        lambda gold, name, value: {**gold, name: float(value)},
        lambda gold, name, value: {**gold, name: str(value)},
        lambda gold, name, value: {**gold, "more": 1},
        lambda gold, name, value: {k: v for k, v in gold.items() if k != name},
        lambda gold, name, value: [gold],
        lambda gold, name, value: None,
        lambda gold, name, value: "text",
    ],
)
def test_almost_right_is_not_paid(spoil: Spoil) -> None:
    for task in tasks(10):
        gold = task.private["gold"]
        name = next(k for k, v in gold.items() if type(v) is int)
        verdict = judged(task, json.dumps(spoil(gold, name, gold[name])))
        assert (verdict.status, verdict.reward) == (Status.OK, 0.0)
        assert verdict.components["fields"] < 1.0


@pytest.mark.parametrize(
    "wrap",
    ["Here it is: {}", "{} {}", "{}\n{}", "```json\n{}\n```\n```json\n{}\n```", "[{}", "{},", "x{}", "'{}'"],
)
def test_json_with_something_around_it_is_no_answer(wrap: str) -> None:
    task = tasks(1)[0]
    assert judged(task, wrap.replace("{}", json.dumps(task.private["gold"]))).status is Status.INVALID_OUTPUT


def test_one_fence_spaces_and_any_order_of_keys_are_allowed() -> None:
    task = tasks(1)[0]
    turned = dict(reversed(task.private["gold"].items()))
    assert judged(task, json.dumps(turned, indent=2)).reward == 1.0
    assert judged(task, f"```json\n{json.dumps(turned)}\n```").reward == 1.0


def test_keys_twice_and_numbers_that_are_none_are_no_json() -> None:
    task = tasks(1)[0]
    gold = json.dumps(task.private["gold"])
    name = next(iter(task.private["gold"]))
    for text in (
        gold[:-1] + f', "{name}": 1}}',
        re.sub(r"\d{4}", "NaN", gold),
        re.sub(r"\d{4}", "Infinity", gold),
        re.sub(r"\d{4}", "9" * 6000, gold),
    ):
        assert judged(task, text).status is Status.INVALID_OUTPUT


def test_what_is_spelled_is_what_is_meant() -> None:
    assert sentence("order.city now=Oslo") == "The city of the order is now Oslo."
    schema = tasks(1, types=["enum"], min_fields=2, max_fields=2)[0].public["schema"]
    assert signature(schema).startswith("{")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"types": ["object"]}, "nothing but object"),
        ({"computed": 1}, "needs ints"),
        ({"min_fields": 1}, "min_fields is 1"),
        ({"style": "x"}, "style"),
    ],
)
def test_knobs_out_of_range_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        StructuredEnv(**options)
