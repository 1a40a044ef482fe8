"""Math answers and their verdicts: the corpus, tier by tier, and golds that nobody can read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from reward_models.killable import KillableService
from reward_models.math_answer import SYMBOLIC, AnswerSpec, BadGold, check_answer, read_gold
from reward_models.math_exact import read_number
from reward_models.math_extract import extract, tidy

CORPUS: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parents[1] / "data" / "math_answers.yaml").read_text(encoding="utf-8"))
VERDICTS = ("right", "wrong", "unreadable", "late")


def spec_of(entry: dict[str, Any]) -> AnswerSpec:
    return AnswerSpec(**{k: v for k, v in entry.items() if k not in ("about", *VERDICTS)})


def pairs() -> Iterator[tuple[dict[str, Any], str, str]]:
    """(entry, text, expected verdict)."""
    for entry in CORPUS:
        for verdict in VERDICTS:
            for text in entry.get(verdict, ()):
                yield entry, text, verdict


def judged(spec: AnswerSpec, text: str) -> str:
    check = check_answer(text, spec)
    if check.correct:
        return "right"
    return "late" if check.late else "wrong" if check.readable else "unreadable"


@pytest.mark.parametrize("entry", CORPUS, ids=[entry["about"] for entry in CORPUS])
def test_every_answer_of_the_corpus_gets_its_verdict(entry: dict[str, Any]) -> None:
    spec = spec_of(entry)
    differ = {
        text: f"{got}, wanted {verdict}: {check_answer(text, spec)}"
        for e, text, verdict in pairs()
        if e is entry and (got := judged(spec, text)) != verdict
    }
    assert not differ, "\n".join(f"{text!r}: {what}" for text, what in differ.items())


def test_the_corpus_is_large_and_has_every_kind_of_verdict() -> None:
    counts = Counter(verdict for _, _, verdict in pairs())
    assert counts.total() >= 300
    assert min(counts[v] for v in ("right", "wrong", "unreadable")) >= 100
    assert len({(e["about"], text) for e, text, _ in pairs()}) == counts.total(), "an answer stands twice"


@given(st.text(max_size=200))
def test_no_text_makes_the_exact_tier_raise(text: str) -> None:
    check = check_answer(text, "123456789")
    number = read_number(extract(text) or "")
    assert not check.correct or (number is not None and number.value == 123456789)


@given(st.text(alphabet="0123456789+-*/^_={}()[]\\,.|!<>&% abxyfracsqrtpi", max_size=80))
def test_no_formula_makes_the_tiers_raise(text: str) -> None:
    """Against golds that need no worker: what is not refused is compared as text and numbers."""
    for gold in ("3", "\\{1,2\\}", "(1,2)", "[0,\\infty)", "A"):
        assert not check_answer(f"\\boxed{{{text}}}", gold).late


def test_tidying_twice_is_tidying_once() -> None:
    for _, text, _ in pairs():
        assert tidy(tidy(text)) == tidy(text), text


def test_a_long_text_is_read_from_its_end_only() -> None:
    assert extract("\\boxed{5}" + "x" * 30_000) is None
    assert extract("x" * 30_000 + "\\boxed{5}") == "5"
    assert extract("\\boxed{" + "1" * 300 + "}") is None
    assert extract("5" * 65) is None
    assert extract("\\boxed{" * 100_000) is None


def test_good_answers_are_judged_while_real_bombs_come_in() -> None:
    """Bombs as they would arrive if nothing were refused beforehand: each ends in time, and every good answer gets its verdict."""
    service = KillableService(SYMBOLIC, width=2, cpu_s=0.5)
    bombs = ["9^{9^{9^{9}}}", "10^{10^{9}}", "99999999!", "\\sum_{i=1}^{99999999} i^{i}"]
    good = [["x^2+2x+1", "(x+1)^2"], ["\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}"], ["2x", "3x"]] * 4
    with ThreadPoolExecutor(16) as pool:
        hostile = [pool.submit(service.call, {"pairs": [["7", bomb]], "form": "any"}) for bomb in bombs]
        honest = [pool.submit(service.call, {"pairs": [pair], "form": "any"}) for pair in good]
        assert [h.result().value["equal"] for h in honest] == [[True], [True], [False]] * 4
        for bomb, outcome in zip(bombs, (h.result() for h in hostile), strict=True):
            assert outcome.state == "late" or outcome.value["equal"] == [False], bomb
            assert outcome.cpu_s < 1.5, f"{bomb} held a worker for {outcome.cpu_s} s of processor time"
    service.close()


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        (AnswerSpec(gold="", shape="number"), "cannot be read as number"),
        (AnswerSpec(gold="forty-two", shape="number"), "is not a number"),
        (AnswerSpec(gold="\\frac{1}{"), "cannot be read as expression"),
        (AnswerSpec(gold="x^2+", form="expanded"), "cannot be read"),
        (AnswerSpec(gold="(x+1)(x+2)", form="expanded"), "is not expanded"),
        (AnswerSpec(gold="x^2+3x+2", form="factored"), "is not factored"),
        (AnswerSpec(gold="\\sqrt{50}", form="reduced"), "is not reduced"),
        (AnswerSpec(gold="6/8", form="reduced"), "not in lowest terms"),
        (AnswerSpec(gold="7", form="factored"), "cannot be factored"),
        (AnswerSpec(gold="7", form="simple"), "wanted one of any"),
        (AnswerSpec(gold="x+1", tolerance="0.1"), "must be numbers"),
        (AnswerSpec(gold="[1,2", shape="interval"), "cannot be read as interval"),
        (AnswerSpec(gold="9^{9^{9^{9}}}"), "cannot be read"),
    ],
)
def test_a_gold_that_nobody_can_read_is_the_tasks_error_and_no_zero(spec: AnswerSpec, complaint: str) -> None:
    with pytest.raises(BadGold, match=complaint):
        read_gold(spec)
    with pytest.raises(BadGold, match=complaint):
        check_answer("\\boxed{7}", spec)
