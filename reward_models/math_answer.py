r"""Is this text the answer that was asked for? Exact, on hostile input, in tiers.

    text --extract--> answer --take apart--> scalars --exact tier--> right or wrong
                                                |
                                                +-- refuse --> symbolic tier: math-verify in a killable worker --> right or wrong

The gold decides everything: what shape an answer must have, which tier compares, and which letters and operators it may use. Rational
golds never reach sympy. A gold that nobody can read is a BadGold, when the task is opened: never a zero for the policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import lru_cache
from typing import Any

from reward_models import killable
from reward_models.math_exact import Number, read_number, same_unit, without_unit
from reward_models.math_extract import extract, tidy
from reward_models.math_forms import MAX_ITEMS, SCALARS, Parts, Shape, refuse, shape_of, spell, strip_name, take_apart
from rl_core.seams import BadTask

VERSION = "math_answer/2"
SYMBOLIC = "reward_models.math_symbolic"
FORMS = ("any", "reduced", "expanded", "factored")
INFINITIES = {"\\infty": "\\infty", "+\\infty": "\\infty", "-\\infty": "-\\infty"}


class BadGold(BadTask):
    """The task's gold answer cannot be used. The message is one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSpec:
    """What a task asks for. Only `gold` is needed."""

    gold: str
    shape: str = ""
    """A Shape, where the gold does not show it: "interval" for an open one, "word", "choice"; "" reads it from the gold."""
    form: str = "any"
    """reduced (lowest terms, simplified roots), expanded or factored: an answer in another form is not yet an answer."""
    unit: str = ""
    """The unit that the question names ("cm", "%", "$"): it may stand behind the number or not; any other is wrong."""
    tolerance: str = ""
    """Largest difference that still counts, for questions that ask to round; "" is exact."""

    @staticmethod
    def from_task(private: Mapping[str, Any]) -> AnswerSpec:
        """From a task's private part: its `answer`, and whichever other field it has."""
        return AnswerSpec(gold=str(private["answer"]), **{k: str(v) for k, v in private.items() if k in DEMANDS})


DEMANDS = frozenset(f.name for f in fields(AnswerSpec)) - {"gold"}
"""What a task may say of its answer beside the answer itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gold:
    """A spec that was read."""

    spec: AnswerSpec
    shape: Shape
    name: str  # of the variable that the gold gives a value, "" if none
    parts: Parts
    unit: str
    tolerance: Fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerCheck:
    """What a text was read as, and whether it is right."""

    correct: bool
    extracted: str | None
    """The answer part of the text, tidied; None if there is none."""
    readable: bool
    """Whether the answer part has the shape that was asked for: what a format score rests on."""
    tier: str = "exact"  # or "symbolic"
    reason: str = ""
    """Why an answer is not readable, or why it is wrong although it may be equal; for people."""
    late: bool = False
    """The symbolic tier ran out of its processor time on it."""


@lru_cache(maxsize=4096)
def read_gold(spec: AnswerSpec) -> Gold:
    """Raises BadGold; killable.ServiceFailed where the symbolic tier is needed and cannot run."""
    text = tidy(spec.gold)
    if spec.form not in FORMS or spec.shape not in ("", *Shape):
        raise BadGold(f"form {spec.form!r}, shape {spec.shape!r}; wanted one of {', '.join(FORMS)} and one of {', '.join(Shape)}")
    shape = Shape(spec.shape) if spec.shape else shape_of(text)
    name, value = strip_name(text) if shape in (Shape.NUMBER, Shape.EXPRESSION) else ("", text)
    parts = take_apart(value, shape)
    if parts is None:
        raise BadGold(f"gold answer {spec.gold[:80]!r} cannot be read as {shape.value}")
    number = read_number(value) if shape is Shape.NUMBER else None
    if shape is Shape.NUMBER and number is None:
        raise BadGold(f"gold answer {spec.gold[:80]!r} is not a number; wanted an integer, a decimal or a fraction")
    if spec.tolerance and (number is None or read_number(spec.tolerance) is None):
        raise BadGold(f"tolerance {spec.tolerance!r} for the gold answer {spec.gold[:80]!r}: both must be numbers")
    tolerance = read_number(spec.tolerance) if spec.tolerance else None
    gold = Gold(
        spec=spec, shape=shape, name=name, parts=parts, unit=spec.unit or (number.unit if number else ""),
        tolerance=tolerance.value if tolerance else Fraction(0),
    )  # fmt: skip
    _check_symbolic(gold)
    return gold


def check_answer(text: str, gold: str | AnswerSpec) -> AnswerCheck:
    """Compare the answer in `text` with `gold`. Raises BadGold, and killable.ServiceFailed when a failure of ours prevents a verdict."""
    wanted = read_gold(AnswerSpec(gold=gold) if isinstance(gold, str) else gold)
    answer = extract(text)
    if answer is None:
        return AnswerCheck(correct=False, extracted=None, readable=False, reason="no answer where one may stand")
    if wanted.shape in (Shape.CHOICE, Shape.WORD):
        return _check_word(answer, wanted)
    value = answer
    if wanted.shape in (Shape.NUMBER, Shape.EXPRESSION):
        name, value = strip_name(answer)
        if name and wanted.name and name != wanted.name:
            return AnswerCheck(correct=False, extracted=answer, readable=False, reason=f"a value of {name}, wanted one of {wanted.name}")
    if wanted.shape is Shape.EXPRESSION and wanted.unit:
        value = without_unit(value, wanted.unit)
    parts = take_apart(value, wanted.shape)
    if parts is None:
        return AnswerCheck(correct=False, extracted=answer, readable=False, reason=f"not of the shape {wanted.shape.value}")
    if wanted.shape is Shape.NUMBER:
        return _check_number(value, answer, wanted)
    return _check_parts(parts, answer, wanted)


# --- the exact tier --------------------------------------------------------------------------------------------------------


def _check_word(answer: str, gold: Gold) -> AnswerCheck:
    wanted = tidy(gold.spec.gold)
    if gold.shape is Shape.CHOICE:
        letter = answer.strip("() ")
        return AnswerCheck(correct=letter == wanted, extracted=answer, readable=len(letter) == 1 and letter.isascii() and letter.isupper())
    return AnswerCheck(correct=" ".join(answer.casefold().split()) == wanted.casefold(), extracted=answer, readable=True)


def _check_number(value: str, answer: str, gold: Gold) -> AnswerCheck:
    got, wanted = read_number(value), read_number(gold.parts.scalars[0])
    assert wanted is not None
    if got is None:
        return AnswerCheck(correct=False, extracted=answer, readable=False, reason="not a number as people write one")
    if not gold.unit and got.unit == "%":  # nobody asked for percent: then it is the number that it stands for
        got = Number(value=got.value / 100, lowest=False)
    if not same_unit(got.unit, gold.unit):
        return AnswerCheck(correct=False, extracted=answer, readable=False, reason=f"in {got.unit}, asked for in {gold.unit or 'no unit'}")
    if gold.spec.form == "reduced" and not got.lowest:
        return AnswerCheck(correct=False, extracted=answer, readable=True, reason="not in lowest terms")
    return AnswerCheck(correct=abs(got.value - wanted.value) <= gold.tolerance, extracted=answer, readable=True)


def _exactly(gold: str, answer: str) -> bool | None:
    """Whether two scalars are equal; None if the exact tier cannot say."""
    if gold in INFINITIES or answer in INFINITIES:
        return INFINITIES.get(gold) == INFINITIES.get(answer)
    wanted, got = read_number(gold), read_number(answer)
    if wanted is None:
        return True if gold == answer else None
    return got is not None and not got.unit and got.value == wanted.value  # a rational number is written as one


# --- scalars, pair by pair ---------------------------------------------------------------------------------------------------


def _pairs(gold: Gold, answers: tuple[str, ...]) -> list[tuple[int, int]]:
    """Which scalars of the gold to compare with which of the answer: in order, or each with each of a set."""
    count = len(gold.parts.scalars)
    if gold.shape is not Shape.SET:
        return [(i, i) for i in range(count)]
    return [(i, j) for i in range(count) for j in range(len(answers))]


def _check_parts(parts: Parts, answer: str, gold: Gold) -> AnswerCheck:
    wanted, got = gold.parts, parts
    if reason := next(filter(None, (_refused(scalar, wanted.scalars) for scalar in got.scalars)), ""):
        return AnswerCheck(correct=False, extracted=answer, readable=False, reason=reason)
    if len(wanted.scalars) != len(got.scalars) or wanted.brackets != got.brackets:
        return AnswerCheck(correct=False, extracted=answer, readable=True, reason="other members, ends or brackets")
    equal: dict[tuple[int, int], bool] = {}
    unsure: dict[tuple[int, int], list[str]] = {}
    for i, j in _pairs(gold, got.scalars):
        verdict = _exactly(wanted.scalars[i], got.scalars[j])
        if verdict is None or gold.spec.form != "any":
            unsure[i, j] = [spell(wanted.scalars[i]), spell(got.scalars[j])]
        else:
            equal[i, j] = verdict
    tier = "symbolic" if unsure else "exact"
    asked = {pair: texts for pair, texts in unsure.items() if not refuse(texts[1], texts[0])}
    equal |= dict.fromkeys(unsure.keys() - asked.keys(), False)
    readable = True
    if asked:
        outcome = killable.service(SYMBOLIC).call({"pairs": list(asked.values()), "form": gold.spec.form})
        if outcome.state == "late":
            return AnswerCheck(correct=False, extracted=answer, readable=False, tier=tier, reason=str(outcome.value), late=True)
        if outcome.state == "failed":
            return AnswerCheck(correct=False, extracted=answer, readable=False, tier=tier, reason=str(outcome.value)[:200])
        equal |= dict(zip(asked, outcome.value["equal"], strict=True))
        readable = all(outcome.value["readable"])
    return AnswerCheck(correct=_matched(equal, gold), extracted=answer, readable=readable, tier=tier)


def _refused(scalar: str, wanted: Sequence[str]) -> str:
    """Why `scalar` cannot stand for any of `wanted`; "" if it can."""
    if scalar in INFINITIES or not wanted:
        return ""
    reasons = [refuse(spell(scalar), spell(other)) for other in wanted]
    return "" if "" in reasons else reasons[0]


def _matched(equal: Mapping[tuple[int, int], bool], gold: Gold) -> bool:
    """Every scalar of the gold has one of its own in the answer."""
    free = set(range(len(gold.parts.scalars)))
    for i in range(len(gold.parts.scalars)):
        partner = next((j for j in sorted(free) if equal.get((i, j), False)), None)
        if partner is None:
            return False
        free.remove(partner)
    return True


def _check_symbolic(gold: Gold) -> None:
    """The symbolic tier must be able to read what only it can compare, and the gold must have the form that it asks for."""
    scalars = gold.parts.scalars
    if gold.shape in (Shape.CHOICE, Shape.WORD, Shape.NUMBER):
        number = read_number(scalars[0]) if gold.shape is Shape.NUMBER else None
        if number is not None and gold.spec.form not in ("any", "reduced"):
            raise BadGold(f"gold answer {gold.spec.gold[:80]!r} is a number, which cannot be {gold.spec.form}")
        if number is not None and gold.spec.form == "reduced" and not number.lowest:
            raise BadGold(f"gold answer {gold.spec.gold[:80]!r} is not in lowest terms itself")
        return
    unread = [spell(s) for s in scalars if s not in INFINITIES and (read_number(s) is None or gold.spec.form != "any")]
    if gold.shape not in SCALARS and gold.shape is Shape.SET and unread and len(scalars) > MAX_ITEMS:
        raise BadGold(f"gold answer {gold.spec.gold[:80]!r} has {len(scalars)} members, wanted at most {MAX_ITEMS} that are no numbers")
    if not unread:
        return
    outcome = killable.service(SYMBOLIC).call({"pairs": [[s, s] for s in unread], "form": gold.spec.form})
    if outcome.state != "done" or not all(outcome.value["equal"]):
        why = f" ({outcome.value})" if outcome.state != "done" else f" or is not {gold.spec.form}" if gold.spec.form != "any" else ""
        raise BadGold(f"gold answer {gold.spec.gold[:80]!r} cannot be read as {gold.shape.value}{why}")
