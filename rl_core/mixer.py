"""Which environment goes next: the requested mixture is the trained mixture (invariant 6).

Shares are of trained groups. Before each draw the mixer counts, per environment, what was trained and what its running groups are
expected to yield, and draws the environment that is furthest behind its share. A slow environment is so neither starved
nor over-represented, and one whose groups often carry no signal is sampled more, within a limit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from rl_core.types import Task

MIN_YIELD = 0.25
"""An environment is sampled at most 1 / MIN_YIELD times its share. One that is solved, or hopeless, would otherwise take all
sampling for groups that cannot train; beyond the limit its trained share falls, and the curves show it."""

YIELD_MEMORY = 0.95
"""Weight of the past in the running share of groups that trained."""


@dataclass(slots=True)
class Stream:
    """One environment's place in the mixture."""

    tasks: Iterator[Task]
    share: float  # normalised over the mixture
    running: int = 0
    trained: int = 0
    filtered: int = 0
    yielded: float = 0.7  # running estimate of P(a started group trains); a guess until groups have come back
    _drawn: int = field(default=0)

    @property
    def expected(self) -> float:
        """Groups trained, plus what those in flight should add.

        Filtered groups count too, at MIN_YIELD, once they are more than that yield explains: this is the limit on oversampling.
        """
        credited = max(self.trained, MIN_YIELD * (self.trained + self.filtered))
        return credited + self.running * max(self.yielded, MIN_YIELD)


class Mixer:
    """Feedback over the environments' shares."""

    def __init__(self, tasks: Mapping[str, Iterator[Task]], shares: Mapping[str, float]) -> None:
        if set(tasks) != set(shares) or not tasks:
            raise ValueError(f"task sources {sorted(tasks)} and shares {sorted(shares)} must name the same environments, at least one")
        total = sum(shares.values())
        self.streams = {name: Stream(tasks=tasks[name], share=shares[name] / total) for name in tasks}

    def draw(self) -> Task:
        """The next task, under the environment's name in this run."""
        total = sum(s.expected for s in self.streams.values())
        name = max(self.streams, key=lambda n: self.streams[n].share * (total + 1) - self.streams[n].expected)
        stream = self.streams[name]
        stream.running += 1
        stream._drawn += 1
        return replace(next(stream.tasks), env=name)

    def trained(self, env: str) -> None:
        """A group of `env` was trained."""
        self._finished(env, 1.0)
        self.streams[env].trained += 1

    def filtered(self, env: str) -> None:
        """A group of `env` could not train."""
        self._finished(env, 0.0)
        self.streams[env].filtered += 1

    def _finished(self, env: str, trained: float) -> None:
        stream = self.streams[env]
        stream.running -= 1
        stream.yielded = YIELD_MEMORY * stream.yielded + (1 - YIELD_MEMORY) * trained

    def trained_share(self, env: str) -> float:
        """Share of trained groups so far; 0 before the first."""
        total = sum(s.trained for s in self.streams.values())
        return self.streams[env].trained / total if total else 0.0

    def positions(self) -> dict[str, int]:
        """Tasks drawn per environment: where its task source resumes."""
        return {name: s._drawn for name, s in self.streams.items()}
