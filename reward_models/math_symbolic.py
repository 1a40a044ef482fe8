r"""The symbolic tier, as it runs in a killable worker: are two scalars equal, and is the answer in the form that was asked for?

    {"pairs": [["5\\sqrt{2}", "\\sqrt{50}"]], "form": "any"}       ->   {"equal": [true], "readable": [true]}
    {"pairs": [["5\\sqrt{2}", "\\sqrt{50}"]], "form": "reduced"}   ->   {"equal": [false], "readable": [true]}

math-verify parses and compares; decimals are made exact first, so that 1.41421356 is not the root of two. Whatever sympy makes of an
input, it makes here: this module is imported nowhere else.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from math import gcd, prod
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Add, Basic, Float, Integer, Mul, Number, Pow, Rational

DIGITS = 60
"""Decimal digits to which differences are worked out: far more than an answer has room for."""

_FRACTIONS = re.compile(r"\\frac\{([0-9]+)\}\{([0-9]+)\}|\\frac([0-9])([0-9])|([0-9]+)\s*/\s*([0-9]+)")

_CONFIG = [
    LatexExtractionConfig(
        try_extract_without_anchor=False,
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last", equations=False
        ),
    )
]


def warm_up() -> None:
    """Everything that costs on first use: grammars, simplifiers, caches. Children of this process find it done."""
    logging.disable(logging.CRITICAL)
    for form, gold, answer in (
        ("any", "x^2+2x+1", "(x+1)(x+1)"),
        ("factored", "(x+1)(x-2)", "(x-2)(x+1)"),
        ("expanded", "2x^2-\\frac{3}{4}x", "2x^2-0.75x"),
        ("reduced", "5\\sqrt{2}", "\\sqrt{50}"),
        ("any", "\\frac{\\pi}{3}+\\ln 2-\\sin(x)", "\\frac13\\pi+\\ln 2-\\sin(x)"),
        ("any", "y=2x+1", "y-2x=1"),
    ):
        handle({"pairs": [[gold, answer]], "form": form})


def handle(request: dict[str, Any]) -> dict[str, Any]:
    """Compare each [gold, answer] of `pairs`. Raises ValueError if a gold cannot be read."""
    trees: dict[str, Basic | None] = {text: read(text) for pair in request["pairs"] for text in pair}
    equal, readable = [], []
    for gold, answer in request["pairs"]:
        wanted, got = trees[gold], trees[answer]
        if wanted is None:
            raise ValueError(f"gold answer {gold[:80]!r} cannot be read as a formula")
        readable.append(got is not None)
        equal.append(got is not None and same(wanted, got) and FORMS[request["form"]](got, answer))
    return {"equal": equal, "readable": readable}


def read(text: str) -> Basic | None:
    """`text` as sympy's tree of it, not evaluated; None if it is not one formula."""
    found = parse(f"\\boxed{{{text}}}", _CONFIG, fallback_mode="no_fallback", parsing_timeout=None)
    tree = found[0] if len(found) == 1 else None
    if isinstance(tree, sympy.MatrixBase):
        tree = sympy.ImmutableMatrix(tree)
    return tree if isinstance(tree, Basic) and not tree.has(sympy.nan, sympy.zoo) else None


def same(gold: Basic, answer: Basic) -> bool:
    """Equal, exactly. A rational number is never equal to one that is not, however many digits it has."""
    gold, answer = exact(gold), exact(answer)
    relations = [isinstance(tree, sympy.core.relational.Relational) for tree in (gold, answer)]
    if relations[0] != relations[1]:
        return False
    if not any(relations) and not gold.free_symbols and not answer.free_symbols:
        values = [sympy.simplify(tree) for tree in (gold, answer)]
        if isinstance(values[0], Rational) or isinstance(values[1], Rational):
            return bool(values[0] == values[1])
    if differ_at_a_point(gold, answer):
        return False
    return bool(verify(gold, answer, numeric_precision=DIGITS, strict=True, timeout_seconds=None))


def differ_at_a_point(gold: Basic, answer: Basic) -> bool:
    """Whether two rational functions have different values where their variables are small primes, which proves that they differ.

    A few sums and products; to simplify the difference of (a+b+c)^20 and (a+b+c)^19 expands hundreds of terms.
    """
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    trees = (gold, answer)
    if not symbols or not all(isinstance(tree, sympy.Expr) and tree.is_rational_function(*symbols) for tree in trees):
        return False
    point = {symbol: Integer(sympy.prime(5 + i)) for i, symbol in enumerate(symbols)}
    values = [tree.xreplace(point) for tree in trees]
    return all(isinstance(value, Rational) for value in values) and values[0] != values[1]


def exact(tree: Basic) -> Basic:
    """Decimals as the fractions that they are written as."""
    return tree.xreplace({number: Rational(str(number)) for number in tree.atoms(Float)})


# --- forms: of the tree as it was written, and of its text where the parser has worked something out ------------------------------


def reduced(tree: Basic, text: str) -> bool:
    """Nothing left to work out among its numbers: roots without square factors and not below a line, fractions in lowest terms."""
    if any(gcd(int(a), int(b)) != 1 or int(b) == 1 for pair in _FRACTIONS.findall(text) for a, b in [[p for p in pair if p]]):
        return False
    return all(_reduced_node(node) for node in sympy.preorder_traversal(tree))


def _reduced_node(node: Basic) -> bool:
    if isinstance(node, Pow) and not node.free_symbols and node.exp != -1:
        root = isinstance(node.base, Integer) and isinstance(node.exp, Rational) and not node.exp.is_Integer and node.exp > 0
        return not isinstance(node.base, Number) or (root and Pow(node.base, node.exp) == Pow(node.base, node.exp, evaluate=False))
    if isinstance(node, Pow) and node.exp == -1:
        return not any(isinstance(p.exp, Rational) and not p.exp.is_Integer for p in node.base.atoms(Pow))
    if isinstance(node, Mul):
        factors = _factors(node)
        above = [f for f in factors if isinstance(f, Number) and abs(f) != 1]
        below = [f.base for f in factors if isinstance(f, Pow) and f.exp == -1 and isinstance(f.base, Integer)]
        fractions = [Rational(f) for f in above] + [Rational(1, f) for f in below if f]
        return len(above) <= 1 and len(below) <= 1 and gcd(prod(f.p for f in fractions), prod(f.q for f in fractions)) == 1
    if isinstance(node, Add):
        return sum(isinstance(sympy.simplify(a), Rational) for a in node.args if not a.free_symbols) <= 1
    return True


def expanded(tree: Basic, text: str) -> bool:
    """A sum of products, like terms collected."""
    for node in sympy.preorder_traversal(tree):
        if isinstance(node, Mul) and any(isinstance(a, Add) for a in node.args):
            return False
        if isinstance(node, Pow) and isinstance(node.base, Add) and isinstance(node.exp, Integer) and node.exp > 0:
            return False
    return len(Add.make_args(tree)) <= len(Add.make_args(sympy.expand(tree.doit())))


def factored(tree: Basic, text: str) -> bool:
    """A product of factors that are irreducible over the rationals; numbers may stand before it."""
    factors = [f.base if isinstance(f, Pow) and isinstance(f.exp, Integer) and f.exp > 0 else f for f in _factors(tree)]
    return all(not f.free_symbols or sympy.Poly(sympy.expand(f.doit())).is_irreducible for f in factors)


def _factors(tree: Basic) -> list[Basic]:
    return [f for a in tree.args for f in _factors(a)] if isinstance(tree, Mul) else [tree]


FORMS: dict[str, Callable[[Basic, str], bool]] = {
    "any": lambda tree, text: True,
    "reduced": reduced,
    "expanded": expanded,
    "factored": factored,
}
