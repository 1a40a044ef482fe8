"""Grade what a program computed, outside the sandbox, against values that were never inside it.

    grade_cases(b'{"case": 0, "state": "value", "out": "[1, 2]"}\\n', [[1, 2]], text=False)   ->   correct

The bytes are hostile: the program may have written, repeated or bent any line. So the reader is strict and bounded, types are
compared as strictly as values (True is not 1, 1.0 is not 1), and anything odd is a failed case. No printed word decides.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

MAX_LINE_BYTES = 500_000
MAX_DEPTH = 32
MAX_DIGITS = 1000
"""Longest number literal: int() of a million digits would hold the host for seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseScore:
    """How one program did over all hidden cases."""

    right: int
    total: int
    ran: bool  # at least one case gave a value, right or wrong
    timed_out: bool  # some case ran out of its time
    failure: str  # the first failing case in words, for people; "" if none failed

    @property
    def correct(self) -> bool:
        return self.right == self.total > 0

    @property
    def fraction(self) -> float:
        return self.right / self.total if self.total else 0.0


def grade_cases(stdout: bytes, expected: Sequence[Any], *, text: bool, tolerance: float | None = None) -> CaseScore:
    """`stdout` holds one JSON object per case: {"case", "state", "out"}. With `text`, outputs are compared as lines of text.

    With a `tolerance` (relative and absolute), 2 is 2.0 and floats may differ by that much; True is still no number.
    """
    lines = stdout.split(b"\n", len(expected) + 1)
    failure = "" if lines[-1] == b"" and len(lines) == len(expected) + 1 else f"{len(lines) - 1} result lines for {len(expected)} cases"
    right, ran, timed_out = 0, False, False
    for case, (line, wanted) in enumerate(zip(lines, expected, strict=False)):
        try:
            state, out = _read_line(line, case)
        except ValueError as error:
            failure = failure or f"case {case}: {error}"
            continue
        ran = ran or state == "value"
        timed_out = timed_out or state == "timeout"
        problem = _compare(out, wanted, text=text, tolerance=tolerance) if state == "value" else f"ended with {state}"
        right += not problem
        failure = failure or (f"case {case}: {problem}" if problem else "")
    # Lines beyond the cases, or a last one without its end, are a runner that was tampered with: no case counts.
    tampered = len(lines) > len(expected) + 1 or lines[-1] != b""
    return CaseScore(right=0 if tampered else right, total=len(expected), ran=ran, timed_out=timed_out, failure=failure)


def read_json(data: str | bytes) -> Any:
    """One JSON value, strictly: no NaN or Infinity, no duplicate keys, no depth beyond MAX_DEPTH, no number beyond MAX_DIGITS.

    Raises ValueError, and nothing else, for everything that is not that.
    """
    if len(data) > MAX_LINE_BYTES:
        raise ValueError(f"{len(data)} bytes, more than {MAX_LINE_BYTES}")
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    _check_depth(text)
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_int=_int, parse_float=_float)


def same(got: Any, wanted: Any, tolerance: float | None = None) -> bool:
    """Equal in value and in type, all the way down; between numbers, a `tolerance` is as `grade_cases` says."""
    if tolerance is not None and {type(got), type(wanted)} <= {int, float} and float in (type(got), type(wanted)):
        return _close(got, wanted, tolerance)
    if type(got) is not type(wanted):
        return False
    if isinstance(wanted, list):
        return len(got) == len(wanted) and all(same(g, w, tolerance) for g, w in zip(got, wanted, strict=True))
    if isinstance(wanted, dict):
        return got.keys() == wanted.keys() and all(same(got[k], wanted[k], tolerance) for k in wanted)
    return bool(got == wanted)


def _read_line(line: bytes, case: int) -> tuple[str, str]:
    value = read_json(line)
    if not isinstance(value, dict) or value.keys() != {"case", "state", "out"}:
        raise ValueError("not a result line")
    if type(value["case"]) is not int or value["case"] != case or type(value["state"]) is not str or type(value["out"]) is not str:
        raise ValueError("a result line with wrong fields")
    return value["state"][:40], value["out"]


def _close(got: float, wanted: float, tolerance: float) -> bool:
    try:
        return math.isclose(got, wanted, rel_tol=tolerance, abs_tol=tolerance)
    except OverflowError:  # an integer that no float can hold
        return False


def _compare(out: str, wanted: Any, *, text: bool, tolerance: float | None) -> str:
    """What is wrong with an output, "" if nothing is."""
    if text:
        got_lines, wanted_lines = [[line.rstrip() for line in t.rstrip().split("\n")] for t in (out, str(wanted))]
        return "" if got_lines == wanted_lines else f"printed {out[:80]!r}"
    try:
        got = read_json(out)
    except ValueError as error:
        return f"returned no JSON value ({str(error)[:80]})"
    return "" if same(got, wanted, tolerance) else f"returned {out[:80]}"


def _check_depth(text: str) -> None:
    # Before parsing: the parser recurses, and its RecursionError would come from our own stack.
    depth, in_string, escaped = 0, False, False
    for char in text:
        if in_string:
            escaped, in_string = char == "\\" and not escaped, escaped or char != '"'
        elif char == '"':
            in_string = True
        elif char in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"nested deeper than {MAX_DEPTH}")
        elif char in "]}":
            depth -= 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key twice in one object")
    return value


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _int(literal: str) -> int:
    return int(_short(literal))


def _float(literal: str) -> float:
    value = float(_short(literal))
    if value in (float("inf"), float("-inf")):
        raise ValueError("a number out of range")
    return value


def _short(literal: str) -> str:
    if len(literal) > MAX_DIGITS:
        raise ValueError(f"a number of {len(literal)} digits, more than {MAX_DIGITS}")
    return literal
