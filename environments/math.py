"""Arithmetic with exact answers: long addition and subtraction, multiplication, chains, equations, word problems.

    4837+2915      ->  <think>7+5+0=12 3+1+1=05 8+9+0=17 4+2+1=07</think>7752

The working goes column by column from the right. After each `=` stand the carry (for a subtraction, the borrow) and the
digit, so that every step is one look-up of single digits; the answer collects the digits, last step first.

Beside these six kinds, which are drawn where a config names none, there are those of `math_algebra`, whose answers are fractions,
expressions, sets and intervals: `kinds: [fraction, factor, roots]`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar

from environments import files
from environments.base import Message, Observation, Status, Task, TaskDraft, TextEnv, Turn, Verdict, as_honeypot, unguessable
from environments.knobs import check_choices, check_range, read_knobs, shows_working
from environments.math_algebra import KINDS as ALGEBRA
from environments.math_algebra import draw_exercise
from reward_models import math_answer
from reward_models.killable import ServiceFailed
from reward_models.math_answer import DEMANDS, AnswerSpec
from rl_core.seams import BadTask

KINDS = ("add", "sub", "mul", "chain", "equation", "word")
KNOBS: dict[str, Any] = {"digits": 4, "terms": 6, "kinds": list(KINDS), "system": "", **files.KNOBS}
"""kinds: of KINDS and ALGEBRA. digits: of the numbers in `add` and `sub`; the other kinds have one fewer. terms: single digits in a
chain. system: a system message."""

MAX_READ = 10_000
"""Characters at the end of an answer that the second opinion reads."""

NAMES = ("Ann", "Bob", "Eve", "Tom")
THINGS = ("nuts", "pens", "cups", "eggs")
GAIN = "{name} has {a} {thing} and gets {b}. Total?"
LOSS = "{name} has {a} {thing} and gives {b}. Left?"


class MathEnv(TextEnv):
    """One question, one answer; reward 1 for exactly the right one, in the form that the question asks for."""

    id: ClassVar[str] = "math"
    version: ClassVar[str] = "2"
    components: ClassVar[tuple[str, ...]] = ("correct", "format")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.knobs = checked_knobs(options)

    @classmethod
    def make_task(cls, rng: random.Random, options: Mapping[str, Any]) -> TaskDraft:
        knobs = checked_knobs(options)
        kind = rng.choice(knobs["kinds"])
        public: dict[str, Any]
        if kind in ALGEBRA:
            drawn = draw_exercise(kind, rng, knobs["digits"])
            private = {"answer": drawn.answer, "working": drawn.working} | drawn.demands
            return TaskDraft(public={"kind": kind, "question": drawn.question}, private=private, difficulty=kind)
        short = max(1, knobs["digits"] - 1)
        if kind == "chain":
            steps, total = draw_chain(rng, knobs["terms"])
            public, answer = {"steps": steps}, total
        elif kind == "mul":
            a, b = rng.randint(2, 9), draw_number(rng, short)
            public, answer = {"a": a, "b": b, "operator": "*"}, a * b
        else:
            digits = knobs["digits"] if kind in ("add", "sub") else short
            operator = {"add": "+", "sub": "-"}.get(kind) or rng.choice("+-")
            a, b = draw_number(rng, digits), draw_number(rng, digits)
            if operator == "-":
                a, b = max(a, b), min(a, b)
            public, answer = {"a": a, "b": b, "operator": operator}, a + b if operator == "+" else a - b
        question = ask(kind, public, rng)
        return TaskDraft(public={"kind": kind, "question": question} | public, private={"answer": str(answer)}, difficulty=kind)

    file_columns: ClassVar[Mapping[str, bool]] = {
        "question": True, "answer": True, "shape": False, "form": False, "unit": False, "tolerance": False, "difficulty": False,
    }  # fmt: skip

    @classmethod
    def row_draft(cls, row: Mapping[str, Any]) -> TaskDraft:
        """`shape`, `form`, `unit` and `tolerance` are what AnswerSpec calls so."""
        public = {"kind": "file", "question": str(row["question"])}
        private = {name: str(value) for name, value in row.items() if name not in ("question", "difficulty")}
        return TaskDraft(public=public, private=private, difficulty=str(row.get("difficulty", "file")))

    def begin(self, task: Task) -> Observation:
        try:  # an unusable gold ends the episode here, before a token is sampled
            math_answer.read_gold(AnswerSpec.from_task(task.private))
        except ServiceFailed as failure:
            raise BadTask(f"its gold answer cannot be looked at now: {failure}") from failure
        system = (Message(role="system", content=self.knobs["system"]),) if self.knobs["system"] else ()
        return Observation(messages=(*system, Message(role="user", content=task.public["question"])))

    def act(self, turn: Turn) -> Verdict:
        assert self.task is not None
        if turn.malformed or turn.tool_calls:
            return self._verdict(Status.INVALID_OUTPUT, False, False, {"reason": turn.malformed or "a tool call where there are no tools"})
        try:
            check = math_answer.check_answer(turn.content, AnswerSpec.from_task(self.task.private))
        except ServiceFailed as failure:
            return Verdict(status=Status.VERIFIER_ERROR, reward=None, evidence={"error": str(failure)})
        evidence = {"answer": (check.extracted or turn.content.strip())[:80], "wanted": self.task.private["answer"], "tier": check.tier}
        status = Status.TIMEOUT_MODEL if check.late else Status.OK if check.readable else Status.INVALID_OUTPUT
        return self._verdict(status, check.correct, check.readable, evidence | ({"reason": check.reason} if check.reason else {}))

    def oracle(self, observation: Observation, rng: random.Random) -> Turn:
        assert self.task is not None
        thought = ""
        if shows_working(self.knobs, rng):
            thought = self.task.private.get("working") or working(self.task.public)
        return Turn(thought=thought, content=self.task.private["answer"])

    def second_opinion(self, turns: Sequence[Turn]) -> bool | None:
        """Where a whole number is wanted, and no formula was written: the last number of the answer is it."""
        assert self.task is not None
        wanted = str(self.task.private["answer"])
        text = turns[-1].content[-MAX_READ:] if turns else ""
        if not re.fullmatch(r"-?[0-9]+", wanted) or "\\" in text.replace("\\boxed", ""):
            return None
        numbers = re.findall(r"[-\u2212]?[0-9]+(?:\.[0-9]+)?(?: ?/ ?[0-9]+)?", text.replace(",", ""))
        if not numbers or len(numbers[-1]) > 2 * len(wanted) + 8:
            return False
        top, _, bottom = numbers[-1].replace(" ", "").replace("\u2212", "-").partition("/")
        return Fraction(top) == int(wanted) * int(bottom or 1)

    @classmethod
    def honeypot(cls, task: Task, rng: random.Random) -> Task:
        kept = {name: value for name, value in task.private.items() if name not in DEMANDS}  # its answer is a number, whatever was asked
        return as_honeypot(task, {**kept, "answer": str(unguessable(rng))})

    def _verdict(self, status: Status, correct: bool, readable: bool, evidence: dict[str, str]) -> Verdict:
        return Verdict(
            status=status,
            reward=float(correct),
            components={"correct": float(correct), "format": float(readable)},
            evidence=evidence,
            verifier_version=f"{self.id}/{self.version}+{math_answer.VERSION}",
        )


def checked_knobs(options: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs that `options` set, in range. Raises ValueError."""
    knobs = read_knobs(MathEnv.id, KNOBS, options)
    check_range(MathEnv.id, "digits", knobs["digits"], 1, 30)
    check_range(MathEnv.id, "terms", knobs["terms"], 2, 100)
    check_choices(MathEnv.id, "kinds", knobs["kinds"], (*KINDS, *ALGEBRA))
    return knobs


# --- drawing and wording ------------------------------------------------------------------------------------------------


def draw_number(rng: random.Random, digits: int) -> int:
    """A number of exactly `digits` digits: fixed widths let a small model find the columns."""
    return rng.randrange(10 ** (digits - 1), 10**digits)


def draw_chain(rng: random.Random, terms: int) -> tuple[list[int], int]:
    """Signed single digits whose running totals never fall below zero, and their sum."""
    steps = [rng.randint(1, 9)]
    for _ in range(terms - 1):
        digit = rng.randint(1, 9)
        steps.append(-digit if digit <= sum(steps) and rng.random() < 0.5 else digit)
    return steps, sum(steps)


def ask(kind: str, public: Mapping[str, Any], rng: random.Random) -> str:
    """The question as the policy reads it."""
    if kind == "chain":
        return "".join(f"{step:+d}" for step in public["steps"]).removeprefix("+")
    a, b, operator = public["a"], public["b"], public["operator"]
    if kind == "equation":  # a and b are what must be computed, so x - b = a is the addition a + b, and x + b = a the subtraction a - b
        return f"x{'-' if operator == '+' else '+'}{b}={a}, x?"
    if kind == "word":
        return (GAIN if operator == "+" else LOSS).format(name=rng.choice(NAMES), thing=rng.choice(THINGS), a=a, b=b)
    return f"{a}{operator}{b}"


# --- the working of the oracle ------------------------------------------------------------------------------------------


def working(public: Mapping[str, Any]) -> str:
    """A derivation in which each next token follows from a few earlier ones by a look-up of single digits."""
    if public["kind"] == "file":
        return ""
    if public["kind"] == "chain":
        return chain_working(public["steps"])
    a, b, operator = public["a"], public["b"], public["operator"]
    columns = multiply_working(a, b) if operator == "*" else column_working(a, b, operator)
    restated = f"{a}{operator}{b} " if public["kind"] in ("equation", "word") else ""
    return restated + columns


def column_working(a: int, b: int, operator: str) -> str:
    """47+85 -> "7+5+0=12 4+8+1=13"; 52-37 -> "2-7-0=15 5-3-1=01" (borrow 1, digit 5; no borrow, digit 1). Needs a >= b to subtract."""
    width = max(len(str(a)), len(str(b)))
    carry, steps = 0, []
    for x, y in zip(reversed(f"{a:0{width}d}"), reversed(f"{b:0{width}d}"), strict=True):
        value = int(x) + int(y) + carry if operator == "+" else int(x) - int(y) - carry
        following = int(value > 9 or value < 0)
        steps.append(f"{x}{operator}{y}{operator}{carry}={following}{value % 10}")
        carry = following
    return " ".join(steps)


def multiply_working(a: int, b: int) -> str:
    """7*486 -> "7*6+0=42 7*8+4=60 7*4+6=34"; `a` has one digit."""
    carry, steps = 0, []
    for digit in reversed(str(b)):
        value = a * int(digit) + carry
        steps.append(f"{a}*{digit}+{carry}={value:02d}")
        carry = value // 10
    return " ".join(steps)


def chain_working(steps: list[int]) -> str:
    """7+8-3 -> "7+8=15-3=12": the running total after each term."""
    total, text = steps[0], str(steps[0])
    for step in steps[1:]:
        total += step
        text += f"{step:+d}={total}"
    return text
