r"""Algebra with answers that are more than a number: what to ask, the gold answer, the form it must have, and a short derivation.

    factor    Factor x^2-2x-15.      (x-5)(x+3)      form factored        -5*3=-15 -5+3=-2
    surd      Simplify sqrt(72).     6\sqrt{2}       form reduced         72=36*2

The questions say in words which form is wanted; the verifier holds an answer to it, so that the question is never its own answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Exercise:
    """One question and everything that is known about it."""

    question: str
    answer: str
    working: str
    demands: dict[str, str]
    """Further fields of `reward_models.math_answer.AnswerSpec`."""


def draw_exercise(kind: str, rng: random.Random, digits: int) -> Exercise:
    """`digits` bounds the numbers that are drawn; the algebra stays the same."""
    return _DRAW[kind](rng, 10 ** min(digits, 4))


def _fraction(rng: random.Random, size: int) -> Exercise:
    a, b, c, d = (rng.randint(2, max(9, size // 10)) for _ in range(4))
    sign = rng.choice((1, -1))
    left, right = Fraction(a, b), Fraction(c, d)
    if sign < 0:
        left, right = max(left, right), min(left, right)
    total = left + sign * right
    operator = "+" if sign > 0 else "-"
    below = left.denominator * right.denominator
    above = (left.numerator * right.denominator, right.numerator * left.denominator)
    return Exercise(
        question=f"Write in lowest terms: {left}{operator}{right}",
        answer=str(total),
        working=f"({above[0]}{operator}{above[1]})/{below}={above[0] + sign * above[1]}/{below}",
        demands={"form": "reduced"},
    )


def _percent(rng: random.Random, size: int) -> Exercise:
    rate, base = 5 * rng.randint(1, 19), 20 * rng.randint(1, max(9, size // 10))
    return Exercise(
        question=f"What is {rate}% of {base}?",
        answer=str(rate * base // 100),
        working=f"{base}/100*{rate}={rate * base}/100",
        demands={"form": "any"},
    )


def _two_roots(rng: random.Random, size: int) -> tuple[int, int]:
    bound = max(9, size // 10)
    numbers = [n for n in range(-bound, bound + 1) if n]
    first = rng.choice(numbers)
    return first, rng.choice([n for n in numbers if n not in (first, -first)])


def _expand(rng: random.Random, size: int) -> Exercise:
    a, b = _two_roots(rng, size)
    return Exercise(
        question=f"Expand (x{a:+d})(x{b:+d}).",
        answer=_quadratic(a + b, a * b),
        working=f"{a}{b:+d}={a + b} {a}*{b}={a * b}",
        demands={"form": "expanded"},
    )


def _factor(rng: random.Random, size: int) -> Exercise:
    a, b = sorted(_two_roots(rng, size))
    return Exercise(
        question=f"Factor {_quadratic(a + b, a * b)}.",
        answer=f"(x{a:+d})(x{b:+d})",
        working=f"{a}*{b}={a * b} {a}{b:+d}={a + b}",
        demands={"form": "factored"},
    )


def _roots(rng: random.Random, size: int) -> Exercise:
    a, b = sorted(_two_roots(rng, size))
    return Exercise(
        question=f"Solve {_quadratic(-a - b, a * b)}=0 for x; give the set of solutions.",
        answer=f"\\{{{a},{b}\\}}",
        working=f"(x{-a:+d})(x{-b:+d})=0",
        demands={"shape": "set"},
    )


def _surd(rng: random.Random, size: int) -> Exercise:
    outside, inside = rng.randint(2, max(9, size // 10)), rng.choice((2, 3, 5, 6, 7, 10, 11, 13))
    square = outside * outside
    return Exercise(
        question=f"Simplify sqrt({square * inside}).",
        answer=f"{outside}\\sqrt{{{inside}}}",
        working=f"{square * inside}={square}*{inside}",
        demands={"form": "reduced"},
    )


def _bounds(rng: random.Random, size: int) -> Exercise:
    middle, radius = rng.randint(-size, size), rng.randint(1, size)
    closed = rng.random() < 0.5
    low, high = middle - radius, middle + radius
    return Exercise(
        question=f"Solve |x{-middle:+d}|{'<=' if closed else '<'}{radius}; give an interval.",
        answer=f"[{low},{high}]" if closed else f"({low},{high})",
        working=f"{middle}-{radius}={low} {middle}+{radius}={high}",
        demands={"shape": "interval"},
    )


def _quadratic(linear: int, constant: int) -> str:
    """x^2 + linear x + constant as people write it."""
    middle = "" if linear == 0 else {1: "+x", -1: "-x"}.get(linear, f"{linear:+d}x")
    return f"x^2{middle}{constant:+d}"


_DRAW: dict[str, Callable[[random.Random, int], Exercise]] = {
    "fraction": _fraction,
    "percent": _percent,
    "expand": _expand,
    "factor": _factor,
    "roots": _roots,
    "surd": _surd,
    "bounds": _bounds,
}
KINDS = tuple(_DRAW)
