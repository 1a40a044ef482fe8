r"""Where an answer may stand in a text, and how it is tidied before anybody reads it. Linear scans of hostile text; nothing is evaluated.

    <think>\boxed{7}?</think> So $x = \boxed{ \dfrac{1}{2} }$.   ->   \frac{1}{2}

One place counts: the last box after the thought, or, where there is no box, the whole text if it is short. An answer can so not
hide among guesses, and a box that never closes is no answer, whatever stood in an earlier one.
"""

from __future__ import annotations

import re

MAX_BOX_CHARS = 256
MAX_BARE_CHARS = 64
"""Longest text that counts as an answer without a box."""
MAX_SCANNED_CHARS = 20_000
"""Only the end of a longer text is looked at for a box."""

BOX = "\\boxed"
_END_OF_THOUGHT, _THOUGHT = "</think>", "<think>"
_UNICODE = str.maketrans(
    {
        "\u2212": "-", "\u2013": "-", "\u00d7": "\\times ", "\u00b7": "\\cdot ", "\u22c5": "\\cdot ", "\u00f7": "/", "\u03c0": "\\pi ",
        "\u221e": "\\infty ", "\u2264": "\\le ", "\u2265": "\\ge ", "\u222a": "\\cup ", "\u2208": "\\in ", "\u00b1": "\\pm ",
        "\u00b0": "^{\\circ}", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2205": "\\emptyset ",
    }
)  # fmt: skip
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|displaystyle|mathstrut|bigl?|bigr?|Bigl?|Bigr?)(?![A-Za-z])", ""),
        (r"(?<=[0-9])\\,(?=[0-9]{3})", ","),
        (r"(?<!\\)\\[,!;: ]|\\q?quad(?![A-Za-z])", " "),
        (r"\\[dt]frac(?![A-Za-z])", r"\\frac"),
        (r"\\leqs?lant(?![A-Za-z])|\\leq(?![A-Za-z])", r"\\le"),
        (r"\\geqs?lant(?![A-Za-z])|\\geq(?![A-Za-z])", r"\\ge"),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (r"\{,\}", ","),
    )
)
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))


def extract(text: str) -> str | None:
    """The answer in `text`, tidied: at most MAX_BOX_CHARS from the last box, or the whole of a text of at most MAX_BARE_CHARS."""
    after = after_thought(text)
    if after is None:
        return None
    boxed, content = last_box(after[-MAX_SCANNED_CHARS:])
    if boxed:
        answer, limit = content, MAX_BOX_CHARS
    else:
        answer, limit = after.strip(), MAX_BARE_CHARS
    if answer is None or len(answer) > limit:
        return None
    return tidy(answer) or None


def after_thought(text: str) -> str | None:
    """What follows the last end of a thought; None if a thought never ends."""
    start = text.rfind(_END_OF_THOUGHT)
    rest = text[start + len(_END_OF_THOUGHT) :] if start >= 0 else text
    return None if _THOUGHT in rest else rest


def last_box(text: str) -> tuple[bool, str | None]:
    r"""(whether there is a box, what is in the last one). A box within a box is part of the outer one; one that never closes holds None."""
    found, content, at = False, None, text.find(BOX)
    while at >= 0:
        opening = at + len(BOX)
        while text[opening : opening + 1].isspace():
            opening += 1
        if text[opening : opening + 1] != "{":
            at = text.find(BOX, opening)
            continue
        closing = matching_brace(text, opening)
        found, content = True, None if closing is None else text[opening + 1 : closing]
        at = -1 if closing is None else text.find(BOX, closing)
    return found, content


def matching_brace(text: str, opening: int) -> int | None:
    """The index of the brace that closes the one at `opening`; escaped braces do not count. None if there is none."""
    depth, index = 0, opening
    while index < len(text):
        char = text[index]
        if char == "\\":
            index += 1
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return index
        index += 1
    return None


def tidy(answer: str) -> str:
    """`answer` without what only changes its looks: delimiters, redundant braces, spacing commands, Unicode signs, a full stop."""
    text = answer.translate(_UNICODE).strip()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip()
    for _ in range(8):
        bare = _unwrap(text).strip()
        if bare.endswith(".") and not bare.endswith(".."):
            bare = bare[:-1].rstrip()
        if bare == text:
            break
        text = bare
    return text


def _unwrap(text: str) -> str:
    """One layer less of delimiters, of braces or of a box, if one encloses everything."""
    for left, right in _DELIMITERS:
        inner = text[len(left) : -len(right)]
        if len(text) >= len(left) + len(right) and text.startswith(left) and text.endswith(right) and left not in inner:
            return inner
    start = 0
    for wrapper in (BOX, "\\text", "\\mathrm", "\\mathbf", "\\textbf", "\\ensuremath"):
        if text.startswith(wrapper + "{"):
            start = len(wrapper)
    if text[start : start + 1] == "{" and matching_brace(text, start) == len(text) - 1:
        return text[start + 1 : -1]
    return text
