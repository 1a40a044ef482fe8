"""The long_context environment: lengths, order, answers, and what must not be paid."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from environments.long_context import FILLER, KINDS, NONE, WORDS, LongContextEnv, count_lines, token_counter
from rl_core.types import Status, Task, Turn, Verdict

SEED_MODEL = Path(__file__).parents[2] / "configs" / "models" / "seed"


def tasks(count: int, **options: Any) -> list[Task]:
    return list(islice(LongContextEnv.tasks("train", 0, options), count))


def prompt(task: Task, **options: Any) -> str:
    return LongContextEnv(**options).begin(task).messages[-1].content


def score(task: Task, turn: Turn) -> Verdict:
    env = LongContextEnv()
    env.reset(options={"task": task})
    verdict = env.step(turn)[4]["verdict"]
    assert isinstance(verdict, Verdict)
    return verdict


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    """A real tokenizer: one token per word, digit and sign."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def look_up(document: str) -> str:
    """An independent solver that reads the prompt alone."""
    *lines, question = document.split("\n")
    answers = []
    for key in re.findall(r"([a-z-]+)\?", question):
        while alias := next((line.split("->")[1] for line in lines if line.startswith(f"{key}->")), None):
            key = alias
        values = [line.split("=")[1] for line in lines if re.fullmatch(f"{key}( now)?=[0-9]+", line)]
        answers.append(values[-1] if values else NONE)
    return " ".join(answers)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"min_tokens": 64, "max_tokens": 512},
        {"questions": 3},
        {"hops": 4, "updates": 3, "records": 60, "key_words": 2},
        {"min_tokens": 32, "max_tokens": 64, "records": 0},
    ],
)
def test_a_solver_that_reads_only_the_prompt_finds_the_gold_answer(options: dict[str, Any]) -> None:
    for task in tasks(60, **options):
        assert look_up(prompt(task, **options)) == " ".join(task.private["answers"]), task.public


def test_the_thought_of_the_oracle_quotes_lines_of_the_prompt() -> None:
    for task in tasks(60):
        env = LongContextEnv(oracle_working=1.0)
        _, info = env.reset(options={"task": task})
        turn = env.oracle(info["observation"], random.Random(0))
        lines = info["observation"].messages[-1].content.split("\n")
        if task.difficulty != "absent":
            assert set(turn.thought.split("\n")) <= set(lines)
            assert turn.thought.endswith(turn.content)
        assert len(turn.thought) + len(turn.content) <= 60


def test_every_kind_is_drawn_and_about_a_tenth_is_absent() -> None:
    drawn = Counter(task.difficulty for task in tasks(600))
    assert set(drawn) == set(KINDS)
    assert 30 <= drawn["absent"] <= 100


def test_prompts_have_the_wanted_number_of_tokens_by_the_given_tokenizer(tokenizer_folder: Path) -> None:
    options = {"min_tokens": 300, "max_tokens": 900, "tokenizer": str(tokenizer_folder)}
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    for task in tasks(40, **options):
        assert task.public["tokens"] - 12 <= len(tokenizer.encode(prompt(task, **options)).ids) <= task.public["tokens"]
        assert 300 <= task.public["tokens"] <= 900


def test_most_prompts_are_short_and_some_are_long() -> None:
    lengths = sorted(task.public["tokens"] for task in tasks(300))
    assert lengths[0] >= 1024
    assert lengths[150] < 1800
    assert lengths[-1] > 3500


def test_without_a_tokenizer_the_length_is_an_estimate_of_three_characters_per_token() -> None:
    for task in tasks(20):
        assert 0.9 < len(prompt(task)) / 3 / task.public["tokens"] < 1.1


def test_keys_are_settled_by_their_first_letters_and_are_no_filler() -> None:
    assert len({word[:2] for word in WORDS}) == len(WORDS)
    assert not set(WORDS) & set(re.findall(r"[a-z]+", " ".join(FILLER).lower()))


def test_only_the_exact_latest_value_is_paid() -> None:
    task = next(t for t in tasks(100) if t.difficulty == "overwritten")
    gold = task.private["answers"][0]
    stale = next(g for g in task.public["groups"] if g[-1].endswith("=" + gold))[0].split("=")[1]
    for content in (gold, f" {gold}.", f"\\boxed{{{gold}}}"):
        assert score(task, Turn(content=content)).reward == 1.0, content
    for content in (stale, f"{stale} {gold}", f"{gold} {gold}", gold + "0", gold[:3], NONE, f"it is {gold}", ""):
        assert score(task, Turn(content=content)).reward == 0.0, content
    assert score(task, Turn(content=stale)).status is Status.OK
    assert score(task, Turn(content="", thought=gold)).status is Status.INVALID_OUTPUT
    assert score(task, Turn(content=gold, malformed="unclosed <think>")).reward == 0.0


def test_several_questions_are_answered_in_order_and_all_must_be_right() -> None:
    task = tasks(1, questions=3)[0]
    a, b, c = task.private["answers"]
    assert score(task, Turn(content=f"{a} {b} {c}")).reward == 1.0
    partly = score(task, Turn(content=f"{a} {b} 1"))
    assert partly.reward == 0.0
    assert partly.components["fraction"] == pytest.approx(2 / 3)
    assert score(task, Turn(content=f"{a} {b}")).status is Status.INVALID_OUTPUT


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"min_token": 3}, "did you mean 'min_tokens'"),
        ({"min_tokens": 2000, "max_tokens": 1000}, "max_tokens is 1000"),
        ({"kinds": ["needles"]}, "needles"),
        ({"records": 500}, "raise key_words"),
        ({"absent_share": 2}, "absent_share is 2"),
    ],
)
def test_a_wrong_knob_is_refused_with_what_was_wanted(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        LongContextEnv(**options)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        token_counter(str(tmp_path))


@pytest.mark.parametrize("folder", ["seed", "words", ""])
def test_many_lines_count_what_each_of_them_counts(folder: str, tokenizer_folder: Path) -> None:
    """For a byte-level BPE, whose pieces add up, for a tokenizer in which a line break is nothing, and for the estimate."""
    count = token_counter({"seed": str(SEED_MODEL), "words": str(tokenizer_folder), "": ""}[folder])
    (task,) = tasks(1, min_tokens=32_768, max_tokens=32_768, records=1000, key_words=3, updates=3)
    lines = [line for group in task.public["groups"] for line in group]
    assert len(lines) > 1000
    assert count_lines(lines, count) == sum(count(line + "\n") for line in lines)
    assert count_lines(lines[:50], count) == sum(count(line + "\n") for line in lines[:50])


def test_a_document_of_32k_tokens_has_that_length_by_the_policys_tokenizer() -> None:
    for records, key_words in ((24, 1), (1000, 3)):
        options = {"min_tokens": 32_768, "max_tokens": 32_768, "records": records, "key_words": key_words, "tokenizer": str(SEED_MODEL)}
        (task,) = tasks(1, **options)
        length = len(Tokenizer.from_file(str(SEED_MODEL / "tokenizer.json")).encode(prompt(task, **options), add_special_tokens=False).ids)
        assert 32_768 - 32 <= length <= 32_768


@pytest.mark.parametrize("kind", KINDS)
def test_other_questions_have_the_answers_that_stand_in_the_document(kind: str) -> None:
    options = {"kinds": [kind], "min_tokens": 256, "max_tokens": 512, "records": 6, "absent_share": 0.0}
    for task in tasks(10, **options):
        env = LongContextEnv(**options)
        document = env.begin(task).messages[-1].content
        env.reset(options={"task": task})
        lines, asked = document.rsplit("\n", 1)
        others = env.other_questions()
        assert len(others) >= 4
        for question, turn in others:
            assert question not in asked.split()
            assert turn.content == look_up(f"{lines}\n{question}")
            assert all(quote in lines.split("\n") for quote in turn.thought.split("\n"))
