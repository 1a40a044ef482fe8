"""Write a program: the policy's code really runs, in a sandbox, on inputs that it never saw.

    Write f(x): add 34, then times 3, then minus 17.

    working   <think>+34 *3 -17</think>def f(x):       direct   def f(x):
                                        x=x+34                   return 3*x+85
                                        x=x*3
                                        x=x-17
                                        return x

A task is a pipeline of steps. The direct way folds the whole pipeline into one expression, which takes arithmetic on its
constants; the working way writes one assignment per step. Both are right when done right.

Grading is split: the sandbox computes outputs from inputs, and the comparison with what our own reference computed happens
here, outside. No expected value ever enters the sandbox.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from environments import files
from environments.base import TaskDraft, TextEnv, as_honeypot, unguessable
from environments.code_pipelines import KINDS, Pipeline, Step, draw_input, draw_inputs, draw_pipeline
from environments.knobs import check_choices, check_range, read_knobs, shows_working
from rl_core.seams import Observation
from rl_core.types import Message, Status, Task, Turn, Verdict

if TYPE_CHECKING:
    from environments.sandbox import SandboxResult
    from reward_models.code_cases import CaseScore

KNOBS = {"kinds": list(KINDS), "num_steps": 3, "digits": 2, "cases": 8, "fresh": 4, **files.KNOBS}
MAX_PROGRAM_CHARS = 20_000
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


class CodeEnv(TextEnv):
    """Write a program; reward 1 if it is right on every hidden input. Options, with their defaults in brackets:

    kinds           which of ints, steps, lists, strings, stdin [all]
    num_steps       steps of a pipeline [3]; 2 is easier, 8 is hard
    digits          digits of a step's constant [2]
    cases           hidden inputs per task [8]
    fresh           further hidden inputs per rollout, drawn when its program is known [4]
    file, columns   tasks from a file instead: see environments/files.py
    """

    id: ClassVar[str] = "code"
    version: ClassVar[str] = "2"
    components: ClassVar[tuple[str, ...]] = ("correct", "fraction", "ran")
    needs_sandbox: ClassVar[bool] = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.knobs = checked_knobs(options)

    @classmethod
    def make_task(cls, rng: random.Random, options: Mapping[str, Any]) -> TaskDraft:
        knobs = checked_knobs(options)
        pipeline = draw_pipeline(rng, rng.choice(knobs["kinds"]), num_steps=knobs["num_steps"], digits=knobs["digits"])
        public = {
            "kind": pipeline.kind,
            "steps": [list(s) for s in pipeline.steps],
            "order": list(pipeline.order),
            "cases": knobs["cases"],
        }
        # The inputs come from the content and not from `rng`, so that one prompt has one key and cannot sit in both splits.
        content = hashlib.sha256(json.dumps(["code inputs", public], sort_keys=True).encode()).digest()
        inputs = draw_inputs(random.Random(int.from_bytes(content[:8], "big")), pipeline, public["cases"])
        private = {"inputs": inputs, "expected": [pipeline.compute(value) for value in inputs]}
        return TaskDraft(public=public, private=private, difficulty=pipeline.kind)

    file_columns: ClassVar[Mapping[str, bool]] = {
        "prompt": True, "inputs": True, "expected": True, "mode": False, "entry": False, "solution": False, "difficulty": False,
    }  # fmt: skip

    @classmethod
    def row_draft(cls, row: Mapping[str, Any]) -> TaskDraft:
        """`inputs` and `expected` are lists, one element per case: what the function `entry` gets and returns, or standard input and
        output as text where `mode` is stdin."""
        inputs, expected = files.json_list(row["inputs"], "inputs"), files.json_list(row["expected"], "expected")
        mode = str(row.get("mode", "function"))
        if len(inputs) != len(expected):
            raise ValueError(f"{len(inputs)} inputs and {len(expected)} expected outputs, wanted as many")
        if mode not in ("function", "stdin"):
            raise ValueError(f"mode is {mode!r}, wanted function or stdin")
        if mode == "stdin" and not all(isinstance(x, str) for x in (*inputs, *expected)):
            raise ValueError("mode is stdin, so inputs and expected must be texts")
        return TaskDraft(
            public={"prompt": str(row["prompt"]), "mode": mode, "entry": str(row.get("entry", "f"))},
            private={"inputs": inputs, "expected": expected},
            hint={"solution": str(row["solution"])} if "solution" in row else {},
            difficulty=str(row.get("difficulty", "file")),
        )

    def begin(self, task: Task) -> Observation:
        prompt = task.public.get("prompt") or pipeline_of(task).prompt()
        return Observation(messages=(Message(role="user", content=prompt),))

    def act(self, turn: Turn) -> Verdict:
        assert self.task is not None
        program = extract_program(turn.content)
        if reason := usable_program(turn, program):
            return self._unusable(reason)
        more, outputs = self._fresh_cases(program)
        return self._grade(program, [*self.task.private["inputs"], *more], [*self.task.private["expected"], *outputs])

    def _fresh_cases(self, program: str) -> tuple[list[Any], list[Any]]:
        """(inputs, expected) beside the stored ones, where there is a reference that agrees with those: rows of files have none, and what a
        honeypot expects is nobody's output."""
        assert self.task is not None
        if "prompt" in self.task.public:
            return [], []
        pipeline, private = pipeline_of(self.task), self.task.private
        if [pipeline.compute(value) for value in private["inputs"]] != private["expected"]:
            return [], []
        inputs = fresh_inputs(self.task, pipeline, program, self.knobs["fresh"])
        return inputs, [pipeline.compute(value) for value in inputs]

    def second_opinion(self, turns: Sequence[Turn]) -> bool | None:
        """The program is right on inputs that were not graded: one that knows the cases, or fakes their results, is not."""
        assert self.task is not None
        if "prompt" in self.task.public:
            return None  # a row of a file: nobody can make more cases
        pipeline, graded = pipeline_of(self.task), self.task.private["inputs"]
        inputs = draw_inputs(random.Random(f"second opinion {self.task.key}"), pipeline, len(graded))
        fresh = [value for value in inputs if value not in graded]
        if not turns or not fresh:
            return None
        verdict = self._grade(extract_program(turns[-1].content), fresh, [pipeline.compute(value) for value in fresh])
        return verdict.reward == 1.0 if verdict.status is Status.OK else None

    @classmethod
    def honeypot(cls, task: Task, rng: random.Random) -> Task:
        return as_honeypot(task, {**task.private, "expected": [str(unguessable(rng)) for _ in task.private["expected"]]})

    def oracle(self, observation: Observation, rng: random.Random) -> Turn:
        assert self.task is not None
        if "prompt" in self.task.public:
            return Turn(content=self.task.private["solution"]) if "solution" in self.task.private else super().oracle(observation, rng)
        pipeline = pipeline_of(self.task)
        if shows_working(self.knobs, rng):
            return Turn(thought=pipeline.plan(), content=pipeline.stepwise())
        return Turn(content=pipeline.folded())

    def _grade(self, program: str, inputs: Sequence[Any], expected: Sequence[Any]) -> Verdict:
        # Imported here, so that generating tasks and demonstrations needs no sandbox.
        from environments.sandbox import SandboxJob, choose_sandbox
        from reward_models.code_cases import grade_cases

        assert self.task is not None
        public = self.task.public
        mode = public["mode"] if "prompt" in public else pipeline_of(self.task).mode
        sandbox = choose_sandbox(self.knobs["sandbox"])
        result = sandbox.run(SandboxJob(program=program, mode=mode, inputs=tuple(inputs), entry=public.get("entry", "f")))
        evidence = {"program": program[:2000], "sandbox": result.kind, "stderr": result.stderr_tail[-500:]}
        score = grade_cases(result.stdout, expected, text=mode == "stdin")
        status, reward = judged(result, score)
        return Verdict(
            status=status,
            reward=reward,
            components={} if reward is None else {"correct": reward, "fraction": score.fraction, "ran": float(score.ran)},
            evidence={**evidence, "failure": score.failure},
            verifier_version=self.version,
        )

    def _unusable(self, reason: str) -> Verdict:
        components = {"correct": 0.0, "fraction": 0.0, "ran": 0.0}
        evidence = {"failure": reason[:500]}
        return Verdict(status=Status.INVALID_OUTPUT, reward=0.0, components=components, evidence=evidence, verifier_version=self.version)


def judged(result: SandboxResult, score: CaseScore) -> tuple[Status, float | None]:
    """Status and reward of one run: what the host knows about it, and how its cases did."""
    if result.kind == "infra_error":
        return Status.INFRA_ERROR, None
    # Memory that ran out shows as cases that failed; where none did, every answer came out in time and is right.
    reward = float(score.correct and result.kind in ("finished", "oom"))
    late = score.timed_out or result.kind == "timeout"
    return (Status.TIMEOUT_MODEL if late else Status.OK), reward


def checked_knobs(options: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs that `options` set, in range. Raises ValueError."""
    knobs = read_knobs(CodeEnv.id, KNOBS, options)
    check_choices(CodeEnv.id, "kinds", knobs["kinds"], KINDS)
    check_range(CodeEnv.id, "num_steps", knobs["num_steps"], 2, 20)
    check_range(CodeEnv.id, "digits", knobs["digits"], 1, 4)
    check_range(CodeEnv.id, "cases", knobs["cases"], 4, 64)
    check_range(CodeEnv.id, "fresh", knobs["fresh"], 0, 64)
    return knobs


def fresh_inputs(task: Task, pipeline: Pipeline, program: str, count: int) -> list[Any]:
    """Inputs that nobody could know before the program was written: drawn from the hash of the task's seed and the program itself.

    A stored rollout so scores the same again, while what one attempt at a task may have learned about its inputs helps no other.
    """
    digest = hashlib.sha256(f"{task.key}/{task.seed}/{program}".encode("utf-8", "replace")).digest()
    rng = random.Random(int.from_bytes(digest[:8], "big"))
    return [draw_input(rng, pipeline) for _ in range(count)]


def pipeline_of(task: Task) -> Pipeline:
    """The pipeline that a task is about, from its public part."""
    steps: Sequence[Sequence[Any]] = task.public["steps"]
    return Pipeline(kind=task.public["kind"], steps=tuple(Step(str(w), int(n)) for w, n in steps), order=tuple(task.public["order"]))


def usable_program(turn: Turn, program: str) -> str:
    """Why the program of a turn is not run at all; "" if it is."""
    if turn.malformed:
        return f"broken markup: {turn.malformed}"
    if not program.strip():
        return "no program"
    if len(program) > MAX_PROGRAM_CHARS or "\0" in program:
        return f"a program of {len(program)} characters, or one with NUL bytes"
    return ""


def extract_program(content: str) -> str:
    """The last fenced block, or everything if there is none."""
    blocks: list[str] = _FENCE.findall(content)
    return blocks[-1] if blocks else content.strip("\n")
