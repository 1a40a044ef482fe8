"""Grading outside the sandbox: strict about types, bounded on hostile bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_models.code_cases import grade_cases, read_json, same


def lines(*outs: str, state: str = "value") -> bytes:
    return b"".join(json.dumps({"case": i, "state": state, "out": out}).encode() + b"\n" for i, out in enumerate(outs))


def test_all_right_outputs_are_correct() -> None:
    score = grade_cases(lines("1", "[2, 3]"), [1, [2, 3]], text=False)
    assert score.correct
    assert score.ran
    assert score.failure == ""


def test_one_wrong_output_is_not_correct_and_is_named() -> None:
    score = grade_cases(lines("1", "4"), [1, 3], text=False)
    assert not score.correct
    assert score.fraction == 0.5
    assert score.failure == "case 1: returned 4"


@pytest.mark.parametrize(
    ("got", "wanted"),
    [
        ("true", 1),
        ("1", True),
        ("1.0", 1),
        ("1", 1.0),
        ('"1"', 1),
        ("null", 0),
        ("[1]", [True]),
        ('{"a": 1}', {"a": 1.0}),
        ("[]", {}),
        ("0", False),
    ],
)
def test_a_value_of_another_type_is_wrong(got: str, wanted: Any) -> None:
    assert not grade_cases(lines(got), [wanted], text=False).correct


@pytest.mark.parametrize(
    "out",
    ["NaN", "Infinity", "-Infinity", "1e999", '{"a": 1, "a": 1}', "[" * 100_000, "9" * 5000, "", "1 2", "nul", "[1", "\ud800"],
    ids=["NaN", "Infinity", "-Infinity", "overflow", "twice", "deep", "long", "empty", "two", "cut word", "cut list", "surrogate"],
)
def test_what_is_not_one_plain_json_value_is_wrong_and_raises_nothing(out: str) -> None:
    assert not grade_cases(lines(out), [1], text=False).correct


@pytest.mark.parametrize(
    "stdout",
    [
        b"",
        b"PASS\n",
        lines("1")[:-1],
        lines("1") * 2,
        lines("1") + b"extra",
        lines("1").replace(b'"case": 0', b'"case": false'),
        lines("1").replace(b'"case": 0', b'"case": 1'),
        lines("1").replace(b'"value"', b'"value", "verdict": "pass"'),
        lines("1").replace(b'"case"', b'"case": 0, "case"'),
        b"\xff" + lines("1"),
        b"\0" * 100_000,
        b"[" * 1_000_000,
    ],
)
def test_tampered_result_lines_score_zero(stdout: bytes) -> None:
    score = grade_cases(stdout, [1], text=False)
    assert score.right == 0
    assert score.failure


def test_the_claimed_state_decides_nothing_but_failure() -> None:
    assert not grade_cases(lines("1", state="error"), [1], text=False).correct
    assert grade_cases(lines("1", state="timeout"), [1], text=False).timed_out


@pytest.mark.parametrize(
    ("printed", "right"), [("7", True), ("7\n", True), ("7  \n\n", True), (" 7", False), ("7 7", False), ("", False), ("07", False)]
)
def test_text_is_compared_line_by_line_without_trailing_blanks(printed: str, right: bool) -> None:
    assert grade_cases(lines(printed), ["7"], text=True).correct is right


def test_no_cases_are_not_a_pass() -> None:
    assert not grade_cases(b"", [], text=False).correct


# vLLM's libraries, which other tests load into this process, flush subnormal numbers to zero.
FLOATS = st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | FLOATS | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_every_plain_value_survives_the_way_through_json(value: Any) -> None:
    assert same(read_json(json.dumps(value)), value)


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_the_reader_raises_only_value_errors(data: bytes | str) -> None:
    try:
        read_json(data)
    except ValueError:
        return
