"""Which environment goes next: the requested mixture is the trained mixture (invariant 6).

Shares are of trained groups. Before each draw the mixer counts, per environment, what was trained and what its running groups are
expected to yield, and draws the environment that is furthest behind its share. A slow environment is so neither starved
nor over-represented, and one whose groups often carry no signal is sampled more, within a limit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from rl_core.curriculum import Curriculum
from rl_core.seams import GroupResult
from rl_core.types import Task

Source = Callable[[int], Iterator[Task]]
"""An environment's tasks from a position on, without end, the same whenever it is asked."""

PassOver = Callable[[Task, int, str], object]

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
    curriculum: Curriculum | None = None  # None: every task is drawn
    position: int = 0  # of the next task in the environment's source
    running: int = 0
    trained: int = 0
    filtered: int = 0
    yielded: float = 0.7  # running estimate of P(a started group trains); a guess until groups have come back

    @property
    def expected(self) -> float:
        """Groups trained, plus what those in flight should add.

        Filtered groups count too, at MIN_YIELD, once they are more than that yield explains: this is the limit on oversampling.
        """
        credited = max(self.trained, MIN_YIELD * (self.trained + self.filtered))
        return credited + self.running * max(self.yielded, MIN_YIELD)


class Mixer:
    """Feedback over the environments' shares."""

    def __init__(
        self, sources: Mapping[str, Source], shares: Mapping[str, float], curricula: Mapping[str, Curriculum] | None = None
    ) -> None:
        if set(sources) != set(shares) or not sources:
            raise ValueError(f"task sources {sorted(sources)} and shares {sorted(shares)} must name the same environments, at least one")
        total = sum(shares.values())
        self._sources = dict(sources)
        curricula = curricula or {}
        self.streams = {
            name: Stream(tasks=sources[name](0), share=shares[name] / total, curriculum=curricula.get(name)) for name in sources
        }

    def resume(self, env: str, *, position: int, running: int, trained: int, filtered: int) -> None:
        """Go on where an earlier process of the same run stopped."""
        stream = self.streams[env]
        stream.tasks, stream.position = self._sources[env](position), position
        stream.running, stream.trained, stream.filtered = running, trained, filtered
        if trained + filtered:
            stream.yielded = trained / (trained + filtered)

    def task_at(self, env: str, position: int) -> Task:
        """A task that was drawn before."""
        return replace(next(self._sources[env](position)), env=env)

    def draw(self, among: Collection[str] | None = None, pass_over: PassOver = lambda task, position, reason: None) -> tuple[Task, int]:
        """The next task, under the environment's name in this run, and its position there. `among`: only these environments.

        `pass_over` is told of each task before it that a curriculum leaves out, and why.
        """
        total = sum(s.expected for s in self.streams.values())
        names = [n for n in self.streams if among is None or n in among]
        name = max(names, key=lambda n: self.streams[n].share * (total + 1) - self.streams[n].expected)
        stream = self.streams[name]
        stream.running += 1
        while True:
            task, position = replace(next(stream.tasks), env=name), stream.position
            stream.position += 1
            if stream.curriculum is None or stream.curriculum.admits(task, position):
                return task, position
            pass_over(task, position, stream.curriculum.reason(task))

    def scored(self, task: Task, result: GroupResult) -> None:
        """A group of `task` came back: a curriculum learns from it."""
        curriculum = self.streams[task.env].curriculum
        if curriculum is not None and result.success is not None:
            curriculum.scored(task.difficulty, task.key, result.success)

    def trained(self, env: str) -> None:
        """A group of `env` was trained."""
        self._finished(env, 1.0)
        self.streams[env].trained += 1

    def reused(self, env: str) -> None:
        """A group of `env` was trained once more: it counts in the mixture like any."""
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
