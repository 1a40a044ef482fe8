"""Shared by the sandbox tests: both backends for real, and one attempt at a task inside them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from environments.sandbox import Limits, Sandbox, SandboxJob, SandboxResult, SandboxUnavailable, choose_sandbox
from reward_models.code_cases import CaseScore, grade_cases

BACKENDS = ["bubblewrap", pytest.param("docker", marks=pytest.mark.docker)]
SHORT = Limits(wall_s=8.0, case_wall_s=2.0, cpu_s=1)
"""So that programs that never end do not hold the tests."""


def open_backend(name: str) -> Sandbox:
    """The backend, or a skip that says why; bubblewrap has to work wherever the tests run."""
    try:
        return choose_sandbox(name)
    except SandboxUnavailable as error:
        if name == "bubblewrap":
            raise
        pytest.skip(str(error))


@dataclass(frozen=True, kw_only=True)
class Attempt:
    result: SandboxResult
    score: CaseScore

    @property
    def paid(self) -> bool:
        """As the environment decides it."""
        return self.result.kind in ("finished", "oom") and self.score.correct


def attempt(
    sandbox: Sandbox,
    program: str,
    *,
    inputs: tuple[Any, ...] = (20, 21),
    expected: tuple[Any, ...] = (40, 42),
    mode: str = "function",
    limits: Limits = SHORT,
) -> Attempt:
    """Let a program try "times 2"."""
    result = sandbox.run(SandboxJob(program=program, mode=mode, inputs=inputs, limits=limits))
    return Attempt(result=result, score=grade_cases(result.stdout, expected, text=mode == "stdin"))


HONEST = "def f(x):\n return x*2"


def soon(condition: Callable[[], bool]) -> bool:
    """Whether it comes true within some seconds: what was killed takes a moment to go."""
    for _ in range(100):
        if condition():
            return True
        time.sleep(0.1)
    return False
