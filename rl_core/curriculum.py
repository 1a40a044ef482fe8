"""Which tasks of an environment are worth a group now: those that are solved sometimes.

    task at a position --> its success rate p: its own if it was seen before, else its pool's --> admitted with probability

        w(p) = max(FLOOR, 4 p (1 - p)),  relative to the best pool

The weight is the variance of a 0-or-1 reward, which is what a group can learn from ("learnability", Foster et al., 2025, arXiv:2502.12272).
A pool is a difficulty bucket. What is always or never solved is still drawn at FLOOR, so that a pool which has become easy, or
possible, is noticed. A task that is passed over is recorded as such: the stream has no holes, and a run resumes from a position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from rl_core.types import Task

MEMORY = 0.9
"""Weight of the past in a pool's running rate: it follows the policy within some ten groups."""
OWN_MEMORY = 0.5
"""The same for one task, which comes back once per epoch."""
UNKNOWN = 0.5
"""A pool's rate before its first group: what nobody has tried yet is worth trying."""


@dataclass(slots=True)
class Curriculum:
    """Of one environment. Deterministic: the same scores admit the same positions."""

    seed: int
    floor: float = 0.1
    pools: dict[str, float] = field(default_factory=dict)
    """Running success rate by difficulty."""
    own: dict[str, float] = field(default_factory=dict)
    """The same by task key."""
    passed: dict[str, int] = field(default_factory=dict)
    """Tasks passed over, by difficulty."""

    def admits(self, task: Task, position: int) -> bool:
        """Whether the task at `position` is drawn."""
        digest = hashlib.sha256(f"{self.seed} {task.key} {position}".encode()).digest()
        admitted = int.from_bytes(digest[:8], "big") < self.chance(task) * 2**64
        self.pools.setdefault(task.difficulty, UNKNOWN)
        if not admitted:
            self.passed[task.difficulty] = self.passed.get(task.difficulty, 0) + 1
        return admitted

    def chance(self, task: Task) -> float:
        """That it is drawn."""
        return min(1.0, self.weight(self.rate(task)) / max(map(self.weight, self.pools.values()), default=1.0))

    def rate(self, task: Task) -> float:
        """How often it is solved, as far as is known."""
        return self.own.get(task.key, self.pools.get(task.difficulty, UNKNOWN))

    def weight(self, rate: float) -> float:
        return max(self.floor, 4 * rate * (1 - rate))

    def scored(self, difficulty: str, key: str, rate: float) -> None:
        """A group of this task earned `rate` on average."""
        rate = min(1.0, max(0.0, rate))
        self.pools[difficulty] = MEMORY * self.pools.get(difficulty, UNKNOWN) + (1 - MEMORY) * rate
        self.own[key] = OWN_MEMORY * self.own[key] + (1 - OWN_MEMORY) * rate if key in self.own else rate

    def restore(self, scores: Iterable[tuple[str, str, float]]) -> None:
        """(difficulty, key, rate) of an earlier process of the same run, in order."""
        for difficulty, key, rate in scores:
            self.scored(difficulty, key, rate)

    def reason(self, task: Task) -> str:
        """Why a task was passed over."""
        return "curriculum: solved too often" if self.rate(task) > 0.5 else "curriculum: solved too rarely"

    def figures(self) -> dict[str, float]:
        """For the metrics: rate and weight of each pool, and how many of its tasks were passed over."""
        found: dict[str, float] = {}
        for pool, rate in self.pools.items():
            name = f"curriculum/{pool or 'all'}"
            found |= {f"{name}/solved": rate, f"{name}/weight": self.weight(rate), f"{name}/passed": float(self.passed.get(pool, 0))}
        return found
