r"""The form of an answer: what shape the gold demands, how a text is taken apart into scalars, and which scalars may reach sympy.

    \{1, \sqrt{2}\}        set of 2         [0, \infty)    interval "[)"       (1, 2)    tuple of 2
    x^2+2x+1               expression       y = 2x+1       equation            B         choice

Shapes are read here, by a scanner of ours, so that sympy only ever compares scalars and "3 or 4" is never one. `refuse` lets a scalar
pass only if it is short, shallow and made of what the gold is made of: an answer in letters, functions or operators that the
gold does not have (an integral, a limit, a binomial, a factorial) is the question again, or a bomb.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from reward_models.math_exact import read_number

MAX_ITEMS = 6
"""Items of a set whose members are no numbers: each is compared with each."""
MAX_DEPTH = 12
MAX_POWERS = 12
MAX_EXPONENT = 64
MAX_COMMANDS = 32
MAX_DIGITS = 40

BASIC = frozenset({"frac", "sqrt", "cdot", "times", "pi"})
"""Commands that any answer may use; every other must stand in the gold too."""

_CHARS = re.compile(r"[A-Za-z0-9+\-*/^_=<>()\[\]{}|,.!%&\\\s]*")
_COMMAND = re.compile(r"\\([A-Za-z]+|[^A-Za-z])")
_NAME = re.compile(r"\s*([A-Za-z](?:_\{?[A-Za-z0-9]+\}?)?(?:\([A-Za-z]\))?)\s*(?:=|\\in(?![A-Za-z]))\s*")
_WORDS = re.compile(r"\s*(?:\\(?:text|mathrm)\s*\{\s*(?:or|and)\s*\}|\\lor(?![A-Za-z])|\b(?:or|and)\b|;)\s*")
_RELATION = re.compile(r"(\\le(?![A-Za-z])|\\ge(?![A-Za-z])|<=|>=|<|>)")
_PLAIN = ((re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"), (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])"), r"\\pi "))


class Shape(StrEnum):
    """What a gold answer is, and so what an answer must be."""

    NUMBER = "number"  # a rational literal: only the exact tier decides
    EXPRESSION = "expression"
    EQUATION = "equation"
    SET = "set"
    TUPLE = "tuple"
    INTERVAL = "interval"  # or a union of intervals
    CHOICE = "choice"  # a letter
    WORD = "word"


SCALARS = (Shape.NUMBER, Shape.EXPRESSION, Shape.EQUATION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A text taken apart."""

    scalars: tuple[str, ...]
    brackets: str = ""
    """Of intervals, in order: "[)(]" for two. Compared as it stands."""


def shape_of(gold: str) -> Shape:
    r"""The shape of a gold answer. "(1,2)" is a tuple here: where an open interval is meant, the task says so."""
    if re.fullmatch(r"[A-H]", gold):
        return Shape.CHOICE
    if read_number(strip_name(gold)[1]) is not None:
        return Shape.NUMBER
    if gold.startswith("\\{") or gold == "\\emptyset" or "\\pm" in gold:
        return Shape.SET
    if (
        "\\cup" in gold
        or _RELATION.search(gold)
        or (gold[:1] in "[(" and gold[-1:] in ")]" and ("\\infty" in gold or gold[0] + gold[-1] != "()"))
    ):
        return Shape.INTERVAL
    if gold.startswith("(") and gold.endswith(")") and len(split(gold[1:-1], ",")) > 1:
        return Shape.TUPLE
    if len(split(gold, ",")) > 1:
        return Shape.SET
    name, value = strip_name(gold)
    return Shape.EQUATION if "=" in value or (name and _letters(value)) else Shape.EXPRESSION


def take_apart(text: str, shape: Shape) -> Parts | None:
    """`text` as `shape`; None if it is not one."""
    if shape is Shape.SET:
        return _set(text)
    if shape is Shape.TUPLE:
        inner = text[1:-1]
        items = split(inner, ",")
        whole = text.startswith("(") and text.endswith(")") and len(items) > 1 and balanced(inner)
        return Parts(scalars=items) if whole else None
    if shape is Shape.INTERVAL:
        return _inequality(text) if _RELATION.search(text) else _intervals(text)
    if shape is Shape.EQUATION and text.count("=") != 1:
        return None
    return Parts(scalars=(text,)) if text else None


def strip_name(text: str) -> tuple[str, str]:
    """("x", "3") of "x = 3", and ("", text) where no single name is given its value; the value of a chain is no scalar."""
    found = _NAME.match(text)
    return (found[1], text[found.end() :].strip()) if found and "=" not in text[found.end() :] else ("", text.strip())


def split(text: str, at: str) -> tuple[str, ...]:
    """`text` at every `at` (one character) outside of brackets; a comma between groups of three digits counts too."""
    pieces, depth, start, index = [], 0, 0, 0
    while index < len(text):
        char = text[index]
        if char == "\\" and text[index + 1 : index + 2] not in "{}":
            index += 1
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == at and depth == 0:
            pieces.append(text[start:index].strip())
            start = index + 1
        index += 1
    return (*pieces, text[start:].strip())


def balanced(text: str) -> bool:
    """Whether brackets never close what they did not open; kinds of brackets may mix, as in [0,1)."""
    depth = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            return False
    return depth == 0


def refuse(text: str, gold: str) -> str:
    """Why the scalar `text` may not reach sympy where the scalar `gold` is wanted; "" if it may."""
    if not _CHARS.fullmatch(text):
        return "characters that no formula needs"
    if not balanced(text) or _depth(text) > MAX_DEPTH:
        return "brackets that do not match, or too deep"
    if any(len(run) > MAX_DIGITS for run in re.findall(r"[0-9]+", text)):
        return f"a number of more than {MAX_DIGITS} digits"
    commands = _COMMAND.findall(text)
    if strange := set(commands) - BASIC - set(_COMMAND.findall(gold)):
        return f"\\{min(strange)} where the answer has none"
    if len(commands) > MAX_COMMANDS:
        return f"more than {MAX_COMMANDS} commands"
    if strange := {c for c in "!|&%=<>," if c in text and c not in gold}:
        return f"{min(strange)!r} where the answer has none"
    if strange := set(_letters(text)) - set(_letters(gold)):
        return f"the letter {min(strange)!r}, which the answer does not have"
    return _refuse_powers(text, gold)


def spell(text: str) -> str:
    """A scalar as LaTeX: `sqrt(2)` and `pi` as people type them."""
    for pattern, replacement in _PLAIN:
        text = pattern.sub(replacement, text)
    return text.replace("**", "^").strip()


# --- shapes ----------------------------------------------------------------------------------------------------------------


def _set(text: str) -> Parts | None:
    _, text = strip_name(text)
    if text in ("\\emptyset", "\\{\\}", "\\{ \\}"):
        return Parts(scalars=())
    if text.startswith("\\{") and text.endswith("\\}"):
        text = text[2:-2]
    pieces = [piece for part in _WORDS.split(text) for piece in split(part, ",")]
    items: list[str] = []
    for piece in pieces:
        value = strip_name(piece)[1]
        head, sign, tail = value.partition("\\pm")
        items += [f"{head}+{tail}" if head.strip() else tail, f"{head}-{tail}"] if sign else [value]
    items = [item.strip() for item in items]
    return Parts(scalars=tuple(items)) if all(items) else None


def _intervals(text: str) -> Parts | None:
    scalars: list[str] = []
    brackets = ""
    for piece in re.split(r"\\cup(?![A-Za-z])", strip_name(text)[1]):
        piece = piece.strip()
        ends = split(piece[1:-1], ",")
        if piece[:1] not in ("[", "(") or piece[-1:] not in ("]", ")") or len(ends) != 2 or not all(ends):
            return None
        scalars += ends
        brackets += piece[0] + piece[-1]
    return Parts(scalars=tuple(scalars), brackets=brackets)


def _inequality(text: str) -> Parts | None:
    """One name between, left or right of numbers: 1 < x \\le 3, x > 2, 2 < x."""
    pieces = [piece.strip() for piece in _RELATION.split(text)]
    signs = [{"\\le": "<=", "\\ge": ">="}.get(sign, sign) for sign in pieces[1::2]]
    values = pieces[0::2]
    at = next((i for i, value in enumerate(values) if re.fullmatch(r"[A-Za-z]", value)), None)
    if at is None or len({sign[0] for sign in signs}) != 1 or not all(values):
        return None
    if signs[0][0] == ">":  # read it from the other side
        values, signs, at = values[::-1], [sign.replace(">", "<") for sign in signs[::-1]], len(values) - 1 - at
    left = (values[0], "[" if signs[0] == "<=" else "(") if at == 1 else ("-\\infty", "(")
    right = (values[-1], "]" if signs[-1] == "<=" else ")") if at == len(values) - 2 else ("\\infty", ")")
    if len(values) != (at == 1) + 1 + (at == len(values) - 2):
        return None
    return Parts(scalars=(left[0], right[0]), brackets=left[1] + right[1])


# --- scalars ---------------------------------------------------------------------------------------------------------------


def _letters(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]", _COMMAND.sub(" ", text))


def _depth(text: str) -> int:
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _refuse_powers(text: str, gold: str) -> str:
    powers = [m.end() for m in re.finditer(r"\^", text)]
    if len(powers) > MAX_POWERS:
        return f"more than {MAX_POWERS} powers"
    allowed = max(MAX_EXPONENT, *(int(run) for run in re.findall(r"[0-9]+", gold)), 0)
    for at in powers:
        exponent = _group(text, at)
        if "^" in exponent:
            return "a power of a power"
        largest = max((int(run) for run in re.findall(r"[0-9]+", exponent)), default=0)
        if largest > allowed:
            return f"an exponent above {allowed}"
        if re.match(r"\s*\^", text[at + len(exponent) :]):
            return "a power of a power"
    return ""


def _group(text: str, at: int) -> str:
    """The brace or bracket group that starts at `at`, or the run of digits or the one character there."""
    if text[at : at + 1] in ("{", "("):
        depth = 0
        for index in range(at, len(text)):
            depth += (text[index] in "([{") - (text[index] in ")]}")
            if depth == 0:
                return text[at : index + 1]
    found = re.match(r"\s*-?(?:[0-9]+|\\[A-Za-z]+|.)?", text[at:])
    return found[0] if found else ""
