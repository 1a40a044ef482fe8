"""Is this text the number that was asked for? Exact, in trusted code, on hostile input.

Two steps: `extract` takes the last `\\boxed{...}`, or else the whole text when it is short, so that an answer cannot hide
among guesses; `to_number` reads an integer, a decimal or a fraction as an exact Fraction. Nothing is evaluated.
A symbolic tier (math-verify, in a killable process) belongs behind `check_answer` once answers are more than numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

VERSION = "math_answer/1"
MAX_ANSWER_CHARS = 64
MAX_DIGITS = 40
"""Longest digit run that is read: int() of a million digits would hold the host for seconds."""
MAX_SCANNED_CHARS = 20_000
"""Only the end of a longer text is looked at for a boxed answer."""

_BOXED = re.compile(r"\\boxed\s*\{([^{}]{0,256})\}")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_DECIMAL = re.compile(r"[+-]?[0-9]*\.[0-9]+")
_FRACTION = re.compile(r"([+-]?[0-9]+)\s*/\s*([0-9]+)")
_LATEX_FRACTION = re.compile(r"([+-]?)\\[dt]?frac([0-9])([0-9])")
_GROUPED = re.compile(r"[+-]?[0-9]{1,3}(,[0-9]{3})+")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerCheck:
    """What a text was read as, and whether it is right."""

    correct: bool
    extracted: str | None
    """The answer part of the text; None if there is none."""
    is_number: bool
    """Whether the answer part could be read as a number: what a format score rests on."""
    tier: str = "exact"


def extract(text: str) -> str | None:
    """The answer in `text`: the last boxed part, or the whole stripped text if it has at most MAX_ANSWER_CHARS characters."""
    boxed = _BOXED.findall(text[-MAX_SCANNED_CHARS:])
    if boxed:
        answer = str(boxed[-1]).strip()
    elif len(text) > MAX_SCANNED_CHARS:
        return None
    else:
        answer = text.strip()
    return answer if 0 < len(answer) <= MAX_ANSWER_CHARS else None


def to_number(text: str) -> Fraction | None:
    """The exact value of "-12", "1,234", "3.50", "7/8" or "\\frac78"; None for anything else, however large."""
    text = text.strip().removeprefix("$").removesuffix("$").strip().replace("\u2212", "-")
    if latex := _LATEX_FRACTION.fullmatch(text):
        text = f"{latex[1]}{latex[2]}/{latex[3]}"
    if len(text) > MAX_ANSWER_CHARS or max((len(run) for run in re.findall(r"[0-9]+", text)), default=0) > MAX_DIGITS:
        return None
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "")
    if _INTEGER.fullmatch(text) or _DECIMAL.fullmatch(text):
        return Fraction(text)
    if fraction := _FRACTION.fullmatch(text):
        denominator = int(fraction[2])
        return Fraction(int(fraction[1]), denominator) if denominator else None
    return None


def check_answer(text: str, gold: str) -> AnswerCheck:
    """Compare the answer in `text` with `gold`, both read as exact numbers. Raises ValueError if `gold` is not a number."""
    wanted = to_number(gold)
    if wanted is None:
        raise ValueError(f"gold answer {gold[:80]!r} is not a number; wanted an integer, a decimal or a fraction")
    answer = extract(text)
    value = None if answer is None else to_number(answer)
    return AnswerCheck(correct=value == wanted, extracted=answer, is_number=value is not None)
