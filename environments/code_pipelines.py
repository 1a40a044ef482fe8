"""Pipelines of steps, the tasks of the code environment: how they are said, computed, and written as programs.

    Pipeline(kind="ints", steps=(Step("add", 34), Step("times", 3), Step("minus", 17)))

    prompt()     Write f(x): add 34, then times 3, then minus 17.
    compute(2)   91
    plan()       +34 *3 -17
    stepwise()   one assignment per step
    folded()     def f(x):\n return 3*x+85

Everything that can be true of a program is decided by `compute`, which is plain Python over plain values and reads no text.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

KINDS = ("ints", "steps", "lists", "strings", "stdin")
_REDUCE: dict[str, Callable[[list[int]], Any]] = {"sum": sum, "max": max, "min": min, "len": len, "sorted": sorted, "list": list}
REDUCERS = tuple(_REDUCE)


class Step(NamedTuple):
    """One step; `number` is 0 where the word takes none."""

    word: str
    number: int


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    kind: str
    steps: tuple[Step, ...]  # in the order of execution
    order: tuple[int, ...] = ()
    """In which order the prompt names the steps; () is the order of execution. Only the kind "steps" shuffles."""

    @property
    def mode(self) -> str:
        """How the program is called: "function" (JSON in, JSON out) or "stdin" (text in, text out)."""
        return "stdin" if self.kind == "stdin" else "function"

    @property
    def variable(self) -> str:
        return {"lists": "xs", "strings": "s", "stdin": "n"}.get(self.kind, "x")

    # --- what is asked ----------------------------------------------------------------------------------------------

    def prompt(self) -> str:
        said = [_SAID[s.word].format(s.number) for s in self.steps]
        if self.kind == "steps":
            listed = ", ".join(f"step {i + 1} is {said[i]}" for i in self.order)
            return f"Write f(x): {listed}."
        listed = ", then ".join(said)
        if self.kind == "stdin":
            return f"Write a program: read n, {listed}, then print n."
        return f"Write f({self.variable}): {listed}."

    # --- what is right ------------------------------------------------------------------------------------------------

    def compute(self, value: Any) -> Any:
        """The right output for one input. For the kind "stdin", both are text."""
        if self.kind == "stdin":
            return str(self._run(int(value)))
        return self._run(value)

    def _run(self, value: Any) -> Any:
        for step in self.steps:
            if isinstance(value, list):
                value = _on_list(step, value)
            elif isinstance(value, str):
                value = _on_text(step, value)
            else:
                value = _on_int(step, value)
        return value

    # --- two ways to write it -----------------------------------------------------------------------------------------

    def plan(self) -> str:
        """The steps in the order of execution, in symbols: what to copy into the program."""
        return " ".join(_SYMBOL[s.word].format(s.number) for s in self.steps)

    def stepwise(self) -> str:
        """A program of one assignment per step."""
        v = self.variable
        lines = [f"{v}={_assigned(s, v)}" for s in self.steps if s.word not in REDUCERS]
        if self.kind == "stdin":
            return "\n".join(["n=int(input())", *lines, "print(n)"])
        last = self.steps[-1]
        result = f"{last.word}({v})" if last.word in REDUCERS and last.word != "list" else v
        return "\n".join([f"def f({v}):", *(f" {line}" for line in lines), f" return {result}"])

    def folded(self) -> str:
        """A program of one expression, its constants worked out."""
        if self.kind == "stdin":
            return f"print({_affine(*self._fold_ints(), 'int(input())')})"
        if self.kind == "lists":
            return f"def f(xs):\n return {self._fold_list()}"
        if self.kind == "strings":
            return f"def f(s):\n return {self._fold_text()}"
        return f"def f(x):\n return {_affine(*self._fold_ints(), 'x')}"

    def _fold_ints(self) -> tuple[int, int]:
        scale, offset = 1, 0
        for step in self.steps:
            scale, offset = _compose(step, scale, offset)
        return scale, offset

    def _fold_list(self) -> str:
        # After some steps an item holds scale * x + offset with scale > 0, so "over k" means x > floor((k - offset) / scale).
        scale, offset, floor = 1, 0, None
        for step in self.steps:
            if step.word == "keep":
                threshold = (step.number - offset) // scale
                floor = threshold if floor is None else max(floor, threshold)
            elif step.word not in REDUCERS:
                scale, offset = _compose(step, scale, offset)
        items = f"[{_affine(scale, offset, 'x')} for x in xs" + (f" if x>{floor}]" if floor is not None else "]")
        reducer = self.steps[-1].word
        return items if reducer == "list" else f"{reducer}({items})"

    def _fold_text(self) -> str:
        # Reversing first and dropping k from the front is the same as dropping k from the end and reversing later.
        drop = {"first": 0, "last": 0}
        backwards, case, repeat = False, "", 1
        for step in self.steps:
            if step.word in drop:
                end = step.word if not backwards else {"first": "last", "last": "first"}[step.word]
                drop[end] += step.number
            elif step.word == "reverse":
                backwards = not backwards
            elif step.word == "repeat":
                repeat *= step.number
            else:
                case = f".{step.word}()"
        cut = f"[{drop['first'] or ''}:{-drop['last'] or ''}]" if any(drop.values()) else ""
        return f"s{cut}" + ("[::-1]" if backwards else "") + case + (f"*{repeat}" if repeat > 1 else "")


_SAID = {
    "add": "add {}", "minus": "minus {}", "times": "times {}", "keep": "keep over {}",
    "sum": "return the sum", "max": "return the max", "min": "return the min", "len": "return the len",
    "sorted": "return it sorted", "list": "return the list",
    "first": "drop the first {}", "last": "drop the last {}", "reverse": "reverse", "upper": "upper case", "lower": "lower case",
    "repeat": "repeat {} times",
}  # fmt: skip
_SYMBOL = {
    "add": "+{}", "minus": "-{}", "times": "*{}", "keep": ">{}",
    "sum": "sum", "max": "max", "min": "min", "len": "len", "sorted": "sorted", "list": "list",
    "first": "[{}:]", "last": "[:-{}]", "reverse": "[::-1]", "upper": "upper", "lower": "lower", "repeat": "*{}",
}  # fmt: skip


def _assigned(step: Step, v: str) -> str:
    symbol = _SYMBOL[step.word].format(step.number)
    if step.word in ("upper", "lower"):
        return f"{v}.{step.word}()"
    if v != "xs":
        return f"{v}{symbol}"
    return f"[x for x in xs if x{symbol}]" if step.word == "keep" else f"[x{symbol} for x in xs]"


def _on_int(step: Step, x: int) -> int:
    return {"add": x + step.number, "minus": x - step.number, "times": x * step.number}[step.word]


def _on_list(step: Step, xs: list[int]) -> Any:
    reduce = _REDUCE.get(step.word)
    if reduce is not None:
        return reduce(xs)
    if step.word == "keep":
        return [x for x in xs if x > step.number]
    return [_on_int(step, x) for x in xs]


def _on_text(step: Step, s: str) -> str:
    match step.word:
        case "first":
            return s[step.number :]
        case "last":
            return s[: -step.number]
        case "reverse":
            return s[::-1]
        case "repeat":
            return s * step.number
        case _:
            return s.upper() if step.word == "upper" else s.lower()


def _compose(step: Step, scale: int, offset: int) -> tuple[int, int]:
    """scale * x + offset, then one more step on it."""
    if step.word == "times":
        return scale * step.number, offset * step.number
    return scale, offset + (step.number if step.word == "add" else -step.number)


def _affine(scale: int, offset: int, x: str) -> str:
    return (f"{scale}*{x}" if scale != 1 else x) + (f"{offset:+d}" if offset else "")


# --- drawing ----------------------------------------------------------------------------------------------------------


def draw_pipeline(rng: random.Random, kind: str, *, num_steps: int, digits: int) -> Pipeline:
    """A random pipeline of `num_steps` steps (a list's reduction not counted), constants of `digits` digits."""
    if num_steps < 2 or digits < 1:
        raise ValueError(f"code: num_steps={num_steps}, digits={digits}; wanted at least 2 steps and at least 1 digit")
    constants = range(10 ** (digits - 1), 10**digits)
    if kind == "lists":
        steps = _draw_list_steps(rng, num_steps, constants)
    elif kind == "strings":
        steps = _draw_text_steps(rng, num_steps, digits)
    else:
        steps = _draw_int_steps(rng, num_steps, constants)
    order: list[int] = []
    if kind == "steps":
        order = list(range(num_steps))
        while order == list(range(num_steps)):
            rng.shuffle(order)
    return Pipeline(kind=kind, steps=tuple(steps), order=tuple(order))


def _draw_int_steps(rng: random.Random, num_steps: int, constants: range) -> list[Step]:
    # The first step never multiplies: folding what follows then takes real arithmetic.
    steps = [_draw_shift(rng, constants)]
    steps += [Step("times", rng.randint(2, 9)) if rng.random() < 0.4 else _draw_shift(rng, constants) for _ in range(num_steps - 1)]
    return steps


def _draw_shift(rng: random.Random, constants: range) -> Step:
    return Step(rng.choice(("add", "minus")), rng.choice(constants))


def _draw_list_steps(rng: random.Random, num_steps: int, constants: range) -> list[Step]:
    steps = _draw_int_steps(rng, num_steps, constants)
    filtered = rng.random() < 0.5
    if filtered:
        steps[rng.randrange(1, num_steps)] = Step("keep", rng.choice(constants))
    return [*steps, Step(rng.choice(("sum", "len", "sorted", "list") if filtered else ("sum", "max", "min", "sorted", "list")), 0)]


def _draw_text_steps(rng: random.Random, num_steps: int, digits: int) -> list[Step]:
    if rng.random() < 0.3:
        return [Step("repeat", rng.randint(2, 9)) for _ in range(min(num_steps, 3))]
    cuts = range(10 ** (digits - 1), 3 * 10 ** (digits - 1))
    steps = [Step(rng.choice(("first", "last")), rng.choice(cuts)) for _ in range(num_steps)]
    if rng.random() < 0.5:
        steps[rng.randrange(num_steps)] = Step(rng.choice(("reverse", "upper", "lower")), 0)
    return steps


def draw_inputs(rng: random.Random, pipeline: Pipeline, count: int) -> list[Any]:
    """`count` inputs, at least half of whose right outputs are distinct: no constant program can pass."""
    if not 4 <= count <= 64:
        raise ValueError(f"code: cases={count}, wanted 4 to 64")
    for _ in range(100):
        inputs = [draw_input(rng, pipeline) for _ in range(count)]
        if len({repr(pipeline.compute(value)) for value in inputs}) * 2 >= count:
            return inputs
    raise RuntimeError(f"code: 100 draws gave no telling inputs for {pipeline}")


def draw_input(rng: random.Random, pipeline: Pipeline) -> Any:
    """One input of the kind that the pipeline takes."""
    largest = max(s.number for s in pipeline.steps)
    if pipeline.kind == "lists":
        # Wide enough that a filter keeps some items and drops others, wherever the steps before it have moved them.
        return [rng.randint(-3 * largest, 4 * largest) for _ in range(rng.randint(1, 9))]
    if pipeline.kind == "strings":
        cut = sum(s.number for s in pipeline.steps if s.word in ("first", "last"))
        return "".join(rng.choice("abcdefghijkLMNOPQRST0123456789 ") for _ in range(cut + rng.randint(1, 20)))
    value = rng.choice((rng.randint(-99, 99), rng.randint(-99, 99), rng.randint(-(10**9), 10**9)))
    return str(value) if pipeline.kind == "stdin" else value
