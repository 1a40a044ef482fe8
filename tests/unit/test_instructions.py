"""The instructions environment: each rule holds where it should and breaks where it should, and only texts are read."""

from __future__ import annotations

import random
from itertools import islice
from typing import Any

import pytest

from environments.instructions import RULES, InstructionsEnv, ask, check_rule, draw_rules, draw_text
from rl_core.types import Status, Task, Turn, Verdict

KINDS = sorted(RULES)
EXAMPLES: dict[str, tuple[list[Any], list[str], list[str]]] = {
    "words": ([3], ["oak sun sea", "oak, sun - sea."], ["oak sun", "oak sun sea sky"]),
    "first": (["oak"], ["oak sun"], ["sun oak", "oaks sun", "Oak sun"]),
    "last": (["oak"], ["sun oak!"], ["oak sun", "sun oaks"]),
    "place": ([2, "oak"], ["sun oak sea"], ["oak sun sea", "sun"]),
    "use": (["oak", 2], ["oak sun oak"], ["oak sun", "oak oak oak"]),
    "before": (["oak", "sun"], ["oak sea sun"], ["sun oak", "oak oak sun", "oak"]),
    "initials": (["oss"], ["oak sun sea", "Oak, Sun, Sea"], ["oak sun", "sun sea oak"]),
    "avoid": (["e"], ["oak sun"], ["sea", "SEA"]),
    "count": (["a", 2], ["oak sea", "OAK sea"], ["oak", "banana"]),
    "lower": ([], ["oak sun!"], ["Oak"]),
    "upper": ([], ["OAK SUN!"], ["OAK sun"]),
    "longest": ([5], ["stone sun"], ["sun", "stones"]),
    "different": ([], ["oak sun"], ["oak Oak"]),
    "sorted": ([], ["ant bee cow", "Ant bee bee"], ["cow ant"]),
    "commas": ([1], ["oak, sun"], ["oak sun", "a,b,c"]),
    "end": (["!"], ["oak!"], ["oak", "oak!."]),
    "lines": ([2], ["oak\nsun"], ["oak sun", "a\nb\nc"]),
    "bullets": ([], ["- oak\n- sun"], ["- oak\nsun", "-oak"]),
    "per_line": ([2], ["oak sun\nsea sky"], ["oak sun\nsea"]),
}


def judged(rules: list[list[Any]], text: str | Turn) -> Verdict:
    env = InstructionsEnv()
    task = Task(env="instructions", key="k", split="train", seed=0, public={"rules": rules, "style": "brief"}, private={"text": ""})
    env.reset(options={"task": task})
    verdict = env.step(text if isinstance(text, Turn) else Turn(content=text))[4]["verdict"]
    assert isinstance(verdict, Verdict)
    return verdict


@pytest.mark.parametrize("name", KINDS)
def test_each_rule_holds_where_it_should_and_breaks_where_it_should(name: str) -> None:
    arguments, good, bad = EXAMPLES[name]
    check_rule([name, *arguments])
    for text in good:
        assert judged([[name, *arguments]], text).reward == 1.0, text
    for text in bad:
        verdict = judged([[name, *arguments]], text)
        assert (verdict.status, verdict.reward) == (Status.OK, 0.0), text
        assert verdict.evidence["broken"] == ask([[name, *arguments]], "brief")


def test_what_a_rule_finds_in_a_text_holds_for_it() -> None:
    rng = random.Random(0)
    knobs = {"min_words": 2, "max_words": 40, "max_lines": 2}
    found = set()
    for _ in range(1500):
        text = draw_text(rng, knobs)
        for name, rule in RULES.items():
            arguments = rule.find(rng, text)
            if arguments is not None:
                found.add(name)
                assert rule.holds(text, *arguments), (name, arguments, text)
    assert found == set(RULES)


def test_all_rules_must_hold_and_the_fraction_says_how_many_did() -> None:
    verdict = judged([["words", 2], ["first", "oak"], ["lower"], ["end", "!"]], "oak Sun")
    assert verdict.reward == 0.0
    assert verdict.components == {"correct": 0.0, "fraction": 0.5}


@pytest.mark.parametrize(
    "text", ["oak 2", "oak\u200b sun", "\u043eak sun", "oak\tsun", "", "oak\n\nsun", "a" * 30_000, "oak_sun", "<b>oak</b>"]
)
def test_what_is_no_text_is_not_judged(text: str) -> None:
    assert judged([["lower"]], text).status is Status.INVALID_OUTPUT


def test_the_instruction_itself_is_never_an_answer() -> None:
    for style in ("brief", "full"):
        env = InstructionsEnv(style=style)
        for task in islice(InstructionsEnv.tasks("train", 0, {"style": style}), 100):
            prompt = env.begin(task).messages[0].content
            env.reset(options={"task": task})
            assert env.step(Turn(content=prompt))[4]["verdict"].reward == 0.0


def test_every_task_names_a_word_and_answers_are_worth_nothing_elsewhere() -> None:
    drawn = list(islice(InstructionsEnv.tasks("train", 0, {}), 60))
    assert all(any(RULES[name].names_a_word for name, *_ in task.public["rules"]) for task in drawn)
    env = InstructionsEnv()
    paid = 0
    for task in drawn:
        for other in drawn:
            if other.key != task.key:
                env.reset(options={"task": task})
                paid += env.step(Turn(content=other.private["text"]))[4]["verdict"].reward == 1.0
    assert paid <= 3  # of 3,540


def test_the_number_of_rules_is_the_difficulty() -> None:
    rng = random.Random(0)
    text = "oak sun sea sky"
    rules = draw_rules(rng, text, {"kinds": KINDS, "min_rules": 5, "max_rules": 5})
    assert len(rules) == 6
    assert rules[0] == ["words", 4]
    tasks = islice(InstructionsEnv.tasks("train", 0, {"min_rules": 2, "max_rules": 4, "max_words": 20}), 40)
    assert {t.difficulty for t in tasks} == {"3 rules", "4 rules", "5 rules"}


def test_kinds_without_a_word_are_refused() -> None:
    with pytest.raises(ValueError, match="one answer would do for many tasks"):
        InstructionsEnv(kinds=["lower", "lines"])
