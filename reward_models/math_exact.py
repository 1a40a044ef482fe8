r"""The exact tier: number literals as exact fractions, in microseconds, nothing evaluated.

    -14/16    \frac{-7}{8}    1\frac{1}{2}    1,234.50    12.5\%    0.\overline{3}    3 \times 10^{4}    5 \text{ cm}    \$7

What is not a literal is no number: `6*7`, `5!`, `\sqrt{49}` and `1e5` are None, however easily they could be worked out. To work
them out was the task.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 40
"""Longest run of digits that is read: int() of a million digits would hold the host for seconds."""
MAX_CHARS = 128
MAX_POWER = 40  # of ten, in scientific notation

_SIGN = r"(?P<sign>[+-]?)\s*"
_COUNT = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_UNIT = re.compile(r"[A-Za-z\u20ac\u00a3]+(?:\^(?:[23]|\{[23]\}))?(?:\s*/\s*[A-Za-z]+(?:\^(?:[23]|\{[23]\}))?)?")
_CURRENCY = re.compile(r"([+-]?)\s*(\\\$|\$|\u20ac|\u00a3)\s*(?=[0-9.])")
_STYLES = {
    "integer": re.compile(_SIGN + rf"(?P<whole>{_COUNT})"),
    "decimal": re.compile(_SIGN + rf"(?P<whole>{_COUNT}?)\.(?P<decimals>[0-9]+)"),
    "repeating": re.compile(_SIGN + r"(?P<whole>[0-9]+)\.(?P<decimals>[0-9]*)\\overline\{(?P<period>[0-9]+)\}"),
    "fraction": re.compile(_SIGN + r"(?P<top>[0-9]+)\s*/\s*(?P<bottom>[0-9]+)"),
    "frac": re.compile(_SIGN + r"\\frac\s*\{\s*(?P<top>[+-]?[0-9]+)\s*\}\s*\{\s*(?P<bottom>[+-]?[0-9]+)\s*\}"),
    "short frac": re.compile(_SIGN + r"\\frac\s*(?P<top>[0-9])\s*(?P<bottom>[0-9])"),
    "mixed": re.compile(
        _SIGN + r"(?P<whole>[0-9]+)(?:\s+(?P<a>[0-9]+)\s*/\s*(?P<b>[0-9]+)"
        r"|\s*\\frac\s*(?:\{(?P<c>[0-9]+)\}\{(?P<d>[0-9]+)\}|(?P<e>[0-9])(?P<f>[0-9])))"
    ),
    "scientific": re.compile(
        _SIGN + r"(?P<whole>[1-9])(?:\.(?P<decimals>[0-9]+))?\s*(?:\\times|\\cdot|\*)\s*10"
        r"\s*\^\s*(?:\{\s*(?P<power>-?[0-9]+)\s*\}|(?P<digit>[0-9]))"
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """A literal that was read."""

    value: Fraction
    lowest: bool
    """Whether it is an integer or a fraction in lowest terms, as "simplify" asks for; decimals and percentages are neither."""
    unit: str = ""


def read_number(text: str) -> Number | None:
    """`text` (tidied) as a literal, a percent sign or unit behind it included; None for anything else, however large."""
    text = text.strip()
    if len(text) > MAX_CHARS or max((len(run) for run in re.findall(r"[0-9]+", text)), default=0) > MAX_DIGITS:
        return None
    text, unit = _split_unit(text)
    for style, pattern in _STYLES.items():
        if found := pattern.fullmatch(text):
            return _number(style, {k: v or "" for k, v in found.groupdict().items()}, unit)
    return None


def same_unit(got: str, wanted: str) -> bool:
    """Units by their name; a plural is the same word, and an answer without a unit means the one that was asked for."""
    return got in ("", wanted) or got.removesuffix("s") == wanted.removesuffix("s") != ""


def without_unit(text: str, unit: str) -> str:
    r"""`5\sqrt{2} \text{ cm}` without its unit, if it is this one."""
    plain = re.sub(r"\\(?:text|mathrm|textrm)\s*\{([^{}]*)\}", r" \1", text)
    end = {"%": "\\%", "deg": "^{\\circ}"}.get(unit, unit)
    return plain.removesuffix(end).rstrip() if plain.endswith(end) else text


def _split_unit(text: str) -> tuple[str, str]:
    r"""("12", "cm^2") of "12\text{ cm}^2"; the unit is "" where there is none."""
    if currency := _CURRENCY.match(text):
        return currency[1] + text[currency.end() :], {"\\$": "$"}.get(currency[2], currency[2])
    plain = re.sub(r"\\(?:text|mathrm|textrm)\s*\{([^{}]*)\}", r" \1", text)
    for sign, unit in ((r"\%", "%"), ("%", "%"), ("percent", "%"), (r"^{\circ}", "deg"), (r"^\circ", "deg"), ("degrees", "deg")):
        if plain.endswith(sign):
            return plain.removesuffix(sign).rstrip(), unit
    start = re.search(r"(?<=[0-9}\s])\s*(?=[A-Za-z\u20ac\u00a3])", plain)
    if start and _UNIT.fullmatch(plain[start.end() :].strip()):
        return plain[: start.start()].rstrip(), re.sub(r"[{}\s]", "", plain[start.end() :])
    return text, ""


def _number(style: str, part: dict[str, str], unit: str) -> Number | None:
    value, lowest = _value(style, part)
    if value is None:
        return None
    return Number(value=-value if part["sign"] == "-" else value, lowest=lowest, unit=unit)


def _value(style: str, part: dict[str, str]) -> tuple[Fraction | None, bool]:
    """(value without its sign, whether it is written in lowest terms); a zero below gives None."""
    if style in ("fraction", "frac", "short frac"):
        top, bottom = int(part["top"]), int(part["bottom"])
        value = Fraction(top, bottom) if bottom else None
        return value, value is not None and value.denominator == bottom != 1
    whole = int(part["whole"].replace(",", "") or "0")
    if style == "integer":
        return Fraction(whole), True
    if style == "mixed":
        top, bottom = int(part["a"] or part["c"] or part["e"]), int(part["b"] or part["d"] or part["f"])
        if bottom == 0:
            return None, False
        return whole + Fraction(top, bottom), Fraction(top, bottom).denominator == bottom > top > 0
    decimals = part["decimals"]
    value = whole + Fraction(int(decimals or "0"), 10 ** len(decimals))
    if style == "repeating":
        period = part["period"]
        value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(decimals))
    if style == "scientific":
        power = int(part["power"] or part["digit"])
        return (value * Fraction(10) ** power, False) if abs(power) <= MAX_POWER else (None, False)
    return value, False
