"""HumanEval as a task source: 164 functions to write from their docstrings, graded on typed cases (see `humaneval_cases`).

    environments:
      humaneval: {max_tokens: 512, max_total_tokens: 2048}

A quarter of the problems is the eval split; the stream of a split goes through all of its problems before any comes again. No expected
value enters the sandbox, and no assert of the original tests decides anything.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, ClassVar

from environments.base import Message, Observation, Status, Task, TaskDraft, TextEnv, Turn, Verdict, hash_int
from environments.code import extract_program, usable_program
from environments.humaneval_cases import ENTRY, TOLERANCE, Problem, cases_of, data_version, problems
from environments.knobs import read_knobs
from reward_models.code_cases import grade_cases

KNOBS: dict[str, Any] = {"ask": "Complete this function. Answer with the whole function in one Python block.\n\n```python\n{prompt}```"}
"""ask: how a problem is put to the policy; {prompt} stands for its signature and docstring."""


class HumanEvalEnv(TextEnv):
    """Write the function that a docstring describes; reward 1 if every hidden case is right."""

    id: ClassVar[str] = "humaneval"
    version: ClassVar[str] = "1"
    components: ClassVar[tuple[str, ...]] = ("correct", "fraction", "ran")
    needs_sandbox: ClassVar[bool] = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.knobs = read_knobs(self.id, KNOBS, options)

    @classmethod
    def task_at(cls, split: str, seed: int, index: int, options: Mapping[str, Any]) -> Task:
        """The problem at one position of a split's stream, with its cases."""
        if split not in ("train", "eval"):
            raise ValueError(f"split {split!r}, wanted 'train' or 'eval'")
        names = [name for name, problem in problems().items() if problem.split == split]
        random.Random(hash_int(cls.id, split, seed, index // len(names))).shuffle(names)
        return task_of(names[index % len(names)], str(read_knobs(cls.id, KNOBS, options)["sandbox"]))

    @classmethod
    def make_task(cls, rng: random.Random, options: Mapping[str, Any]) -> TaskDraft:
        task = cls.task_at("train", rng.getrandbits(32), 0, options)
        return TaskDraft(public=task.public, private=task.private)

    def begin(self, task: Task) -> Observation:
        return Observation(messages=(Message(role="user", content=self.knobs["ask"].replace("{prompt}", task.public["prompt"])),))

    def act(self, turn: Turn) -> Verdict:
        assert self.task is not None
        answer = extract_program(turn.content)
        if reason := usable_program(turn, answer):
            return self._verdict(Status.INVALID_OUTPUT, dict.fromkeys(self.components, 0.0), {"failure": reason})
        # Imported here, as in the code environment.
        from environments.sandbox import SandboxJob, choose_sandbox

        problem, private = self._problem(), self.task.private
        job = SandboxJob(program=problem.program(answer), mode="function", inputs=tuple(private["inputs"]), entry=ENTRY)
        result = choose_sandbox(self.knobs["sandbox"]).run(job)
        evidence = {"program": answer[:2000], "sandbox": result.kind, "stderr": result.stderr_tail[-500:]}
        if result.kind == "infra_error":
            return Verdict(status=Status.INFRA_ERROR, reward=None, evidence=evidence)
        score = grade_cases(result.stdout, private["expected"], text=False, tolerance=TOLERANCE)
        correct = float(score.correct and result.kind in ("finished", "oom"))
        status = Status.TIMEOUT_MODEL if score.timed_out or result.kind == "timeout" else Status.OK
        components = {"correct": correct, "fraction": score.fraction, "ran": float(score.ran)}
        return self._verdict(status, components, {**evidence, "failure": score.failure})

    def oracle(self, observation: Observation, rng: random.Random) -> Turn:
        return Turn(content=self._problem().reference)

    def _problem(self) -> Problem:
        assert self.task is not None
        return problems()[self.task.public["name"]]

    def _verdict(self, status: Status, components: dict[str, float], evidence: dict[str, str]) -> Verdict:
        version = f"{self.id}/{self.version}+{data_version()}"
        return Verdict(status=status, reward=components["correct"], components=components, evidence=evidence, verifier_version=version)


def task_of(name: str, sandbox: str = "auto") -> Task:
    """The task of one problem. Its cases are private; its key is the hash of its name and version of the data."""
    problem, cases = problems()[name], cases_of(name, sandbox)
    seed = hash_int("humaneval", name, data_version())
    return Task(
        env=HumanEvalEnv.id, key=f"{seed:016x}", split=problem.split, seed=seed,
        public={"name": name, "prompt": problem.prompt},
        private={"inputs": list(cases.inputs), "expected": list(cases.expected)},
        difficulty="long" if problem.solution.count("\n") > 8 else "short",
    )  # fmt: skip
