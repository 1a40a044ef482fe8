"""What a judge is shown, and what is believed of its reply.

The policy's text is data that was written to be believed. So it stands quoted between fences that carry a number drawn for this one call,
whatever could pass for the judge's own format is broken up, and a reply counts only with another number in it, once, as its last line:

    VERDICT 5f3a9c0d {"score_1": 4, "score_2": 2, "ranking": 2}

A text that was written before these were drawn cannot contain them. Against a judge that obeys what it reads, framing does not
help; calibration does (reward_models/calibration.py).
"""

from __future__ import annotations

import re
import secrets
import unicodedata
from collections.abc import Mapping

from reward_models.code_cases import read_json

WORD = "VERDICT"
MAX_QUOTED_CHARS = 8000
"""Of a question or an answer; the middle of a longer text is cut out."""
MAX_REPLY_CHARS = 100_000

_FORMAT = re.compile(r"verdict|score_?[12]?\b|ranking|<\||\|>|\[\[|\]\]|</?answer|</?question|\[/?inst\]|<</?sys>>", re.IGNORECASE)
_MARKUP = re.compile(
    r"verdict\s+[0-9a-f]{4,}|[\"']?score_[12][\"']?\s*:|[\"']ranking[\"']\s*:|<\|[a-z_]+\|>|\[\[[^\]]{1,12}\]\]|\[/?inst\]"
    r"|(ignore|disregard|forget)\s+(all\s+|any\s+)?(of\s+)?(the\s+|your\s+)?(previous|above|prior|earlier)\s+(instruction|prompt|text|message)"
    r"|</?(answer|question)[-_ ][0-9a-f]+>",
    re.IGNORECASE,
)


class Malformed(ValueError):
    """A judge's reply is not the one allowed form. Says what is wrong, never quotes it."""


def new_code() -> str:
    """Drawn for one call; 64 bits."""
    return secrets.token_hex(8)


def quote(name: str, text: str, fence: str) -> str:
    """`text` between fences, each line behind a bar."""
    lines = "\n".join(f"| {line}" for line in neutral(text).split("\n"))
    return f"<{name}-{fence}>\n{lines}\n</{name}-{fence}>"


def neutral(text: str) -> str:
    """`text` without what could pass for markup: control and invisible characters are replaced, words of the format broken up."""
    if len(text) > MAX_QUOTED_CHARS:
        half = MAX_QUOTED_CHARS // 2
        text = f"{text[:half]}\n[{len(text) - 2 * half} characters left out here]\n{text[-half:]}"
    text = unicodedata.normalize("NFKC", text)  # full-width letters spell the format, too
    visible = "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn") else "\ufffd" for c in text)
    return _FORMAT.sub(lambda found: "·".join(found[0]), visible)


def count_markup(text: str) -> int:
    """How often a text carries a judge's markup or orders: a trace of policies that write to their judge."""
    return sum(1 for _ in _MARKUP.finditer(text[: 4 * MAX_QUOTED_CHARS]))


def read_verdict(reply: str, code: str, wanted: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """The whole numbers of the verdict line, {"score": (1, 5)} being the names and ranges `wanted`. Raises Malformed."""
    if len(reply) > MAX_REPLY_CHARS:
        raise Malformed(f"a reply of {len(reply)} characters")
    lines = [line.strip() for line in reply.strip().splitlines() if line.strip()]
    marked = [line for line in lines if code in line]
    if len(marked) != 1 or marked[0] != lines[-1]:
        raise Malformed(f"{len(marked)} lines with this call's code; wanted one, at the end")
    head = f"{WORD} {code} "
    if not marked[0].startswith(head):
        raise Malformed(f"the last line does not start with {WORD} and the code")
    try:
        value = read_json(marked[0].removeprefix(head))
    except ValueError as error:
        raise Malformed(f"the verdict is not JSON: {error}") from None
    if not isinstance(value, dict) or value.keys() != wanted.keys():
        raise Malformed(f"the verdict does not hold exactly {', '.join(wanted)}")
    for name, (low, high) in wanted.items():
        if type(value[name]) is not int or not low <= value[name] <= high:
            raise Malformed(f"{name} is not a whole number from {low} to {high}")
    return value
