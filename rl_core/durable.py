"""Parts of a run that may die, made to go on: the replay queue and the learner.

    DurableQueue     keeps what the queue knows; a new queue starts from it
    DurableLearner   checkpoint + the batches trained since = the weights: a new learner does those steps again

Both wrap whatever the composition root starts (actors in a run, fakes in a simulation), and know its deaths by their class.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from rl_core.seams import GroupResult, Ref
from rl_core.types import Agreement, Completion, StepStats

T = TypeVar("T")
log = logging.getLogger(__name__)

Deaths = tuple[type[BaseException], ...]

MAX_DEATHS_IN_A_ROW = 5
"""Deaths of one part without a step in between, after which the run ends: the part dies of what it is asked to do."""


class RawQueue(Protocol):
    """A `ReplayQueue`, wherever it runs. Calls reach it in the order in which they are made, whether or not they are awaited."""

    def restore(self, groups: Mapping[int, GroupResult | None], overtakers: Sequence[int]) -> asyncio.Future[None]: ...
    def start(self, ticket: int) -> asyncio.Future[None]: ...
    def put(self, ticket: int, result: GroupResult) -> asyncio.Future[None]: ...
    def drop(self, ticket: int) -> asyncio.Future[None]: ...
    def take(self, count: int) -> asyncio.Future[list[GroupResult]]: ...


class DurableQueue:
    """A replay queue that survives its actor. References to groups are held here, so they survive it too.

    A change is noted, then sent, without a pause in between: a queue that is made anew from the notes holds all that was sent to
    the old one. So nobody waits until a change has arrived; only `take` waits for an answer, which stands on all changes before it.
    """

    def __init__(
        self,
        make: Callable[[], RawQueue],
        deaths: Deaths,
        groups: Mapping[int, GroupResult | None] | None = None,
        overtakers: Sequence[int] = (),
    ) -> None:
        self._make, self._deaths = make, deaths
        groups = groups or {}
        self._running = OrderedDict.fromkeys(sorted(t for t, result in groups.items() if result is None))  # in order of start
        self._ready = {result.group_id: (ticket, result) for ticket, result in groups.items() if result is not None}
        self._overtakers = list(overtakers)
        self._queue = make()
        self._failure: BaseException | None = None
        self.restarts = 0

    async def open(self) -> None:
        """Hand on what the queue starts with."""
        self._tell("restore", self._groups(), list(self._overtakers))

    async def start(self, ticket: int) -> None:
        self._running[ticket] = None
        self._tell("start", ticket)

    async def put(self, ticket: int, result: GroupResult) -> None:
        del self._running[ticket]
        self._ready[result.group_id] = (ticket, result)
        self._tell("put", ticket, result)

    async def drop(self, ticket: int) -> None:
        del self._running[ticket]
        self._tell("drop", ticket)

    async def take(self, count: int) -> list[GroupResult]:
        taken = None
        while taken is None:
            taken = await self._ask(count)
        mine = [self._ready.pop(result.group_id)[0] for result in taken]
        oldest = next(iter(self._running), None)
        self._overtakers = [] if oldest is None else [t for t in (*self._overtakers, *mine) if t > oldest]
        return taken

    def _groups(self) -> dict[int, GroupResult | None]:
        """By ticket; None: it runs."""
        return {**dict.fromkeys(self._running), **dict(self._ready.values())}

    async def _ask(self, count: int) -> list[GroupResult] | None:
        """The queue's answer, or None if it died meanwhile: a new one must be asked."""
        queue = self._queue
        try:
            taken = await queue.take(count)
        except self._deaths as death:
            self._died(queue, death)
            return None
        finally:
            self._raise_failure()
        self.restarts = 0
        return taken

    def _tell(self, method: str, *arguments: Any) -> None:
        self._raise_failure()
        queue = self._queue
        getattr(queue, method)(*arguments).add_done_callback(partial(self._heard, queue))

    def _heard(self, queue: RawQueue, answer: asyncio.Future[None]) -> None:
        if answer.cancelled() or (error := answer.exception()) is None:
            return
        if isinstance(error, self._deaths):
            self._died(queue, error)
        else:
            self._failure = error

    def _died(self, queue: RawQueue, death: BaseException) -> None:
        """A new queue in the place of `queue`, unless there is one already."""
        if self._queue is not queue or self._failure is not None:
            return
        self.restarts += 1
        if self.restarts > MAX_DEATHS_IN_A_ROW:
            self._failure = RuntimeError(f"the replay queue died {self.restarts} times in a row; the last time: {death}")
            self._failure.__cause__ = death
            return
        log.warning("the replay queue died (%s); a new one goes on with %d groups", death, len(self._running) + len(self._ready))
        self._queue = self._make()
        self._tell("restore", self._groups(), list(self._overtakers))

    def _raise_failure(self) -> None:
        """What a change that nobody waited for came to."""
        if self._failure is not None:
            raise self._failure


class RawLearner(Protocol):
    """A learner that may die; see `rl_core.seams.Learner`."""

    version: int

    async def accumulate(self, groups: Sequence[Ref]) -> dict[str, float]: ...
    async def agreement(self, completions: Sequence[Completion]) -> Agreement: ...
    async def apply(self, *, again: bool = False) -> tuple[StepStats, Ref]: ...
    async def adopt(self, version: int) -> None: ...
    async def snapshot(self) -> tuple[int, Ref]: ...
    async def save(self) -> str: ...
    async def aclose(self) -> None: ...


class DurableLearner:
    """Implements `rl_core.seams.Learner`. No step is trained twice: the steps done again rebuild what died with the old process.

    Done again, a step gives the same weights, to the bit where the arithmetic is deterministic (one CPU thread), else to rounding.
    Skipped steps made no version, so they are not done again; a rollback is the newest checkpoint under a new version, saved at once.
    """

    def __init__(
        self,
        launch: Callable[[], Awaitable[RawLearner]],
        batch: Callable[[int], Awaitable[Sequence[Ref]]],
        deaths: Deaths,
        *,
        on_saved: Callable[[int], None] = lambda version: None,
        rollbacks: Callable[[], Sequence[int]] = tuple,
    ) -> None:
        """`launch` starts a learner from the newest checkpoint. `batch` gives the groups that made a version; `rollbacks` the versions
        that none made."""
        self._launch, self._batch, self._deaths, self._on_saved, self._rollbacks = launch, batch, deaths, on_saved, rollbacks
        self._learner: RawLearner | None = None
        self._pending: Sequence[Ref] | None = None  # accumulated, not applied
        self.version = 0
        self.restarts = 0  # over the whole run
        self._in_a_row = 0

    async def open(self, version: int) -> list[StepStats]:
        """Start, and do again what the newest checkpoint lacks of `version`; returns what those steps reported."""
        self.version = version
        try:
            return await self._start()
        except self._deaths as death:
            return await self._recover(death)

    async def accumulate(self, groups: Sequence[Ref]) -> dict[str, float]:
        metrics: dict[str, float] = await self._ask(lambda learner: learner.accumulate(groups))
        self._pending = list(groups)
        return metrics

    async def agreement(self, completions: Sequence[Completion]) -> Agreement:
        return await self._ask(lambda learner: learner.agreement(completions))

    async def apply(self) -> tuple[StepStats, Ref]:
        stats, weights = await self._ask(lambda learner: learner.apply())
        self.version, self._pending, self._in_a_row = stats.version, None, 0
        return stats, weights

    async def roll_back(self, version: int) -> tuple[StepStats, Ref]:
        """The newest checkpoint again, as `version`, which is in `rollbacks` by now: a new learner starts from it."""
        await self.aclose()
        self.version, self._pending = version, None
        await self.open(version)
        self._on_saved(version)
        return rolled_back(version), (await self.snapshot())[1]

    async def snapshot(self) -> tuple[int, Ref]:
        return await self._ask(lambda learner: learner.snapshot())

    async def save(self) -> str:
        folder = await self._ask(lambda learner: learner.save())
        self._on_saved(self.version)
        return folder

    async def aclose(self) -> None:
        if self._learner is not None:
            await self._learner.aclose()
            self._learner = None

    async def _ask(self, call: Callable[[RawLearner], Awaitable[T]]) -> T:
        while True:
            assert self._learner is not None, "DurableLearner.open() was not awaited"
            try:
                return await call(self._learner)
            except self._deaths as death:
                await self._recover(death)

    async def _recover(self, death: BaseException) -> list[StepStats]:
        """A new learner in the state in which the old one died; returns what the steps that it did again reported."""
        while True:
            self.restarts += 1
            self._in_a_row += 1
            if self._in_a_row > MAX_DEATHS_IN_A_ROW:
                raise RuntimeError(f"the learner died {self._in_a_row} times in a row; the last time: {death}") from death
            log.warning("the learner died (%s); it starts again from its newest checkpoint", death)
            try:
                await self.aclose()
                done = await self._start()
                if self._pending is not None:
                    await self._learner.accumulate(self._pending)  # type: ignore[union-attr]
                return done
            except self._deaths as again:
                death = again

    async def _start(self) -> list[StepStats]:
        learner = self._learner = await self._launch()
        done = []
        if learner.version > self.version:
            raise RuntimeError(
                f"the newest checkpoint is of version {learner.version}, the ledger ends at {self.version}: they are not of one run"
            )
        returned = max(self._rollbacks(), default=0)
        if learner.version < returned:  # the checkpoint is the one that it goes back to: steps in between are undone, not done again
            await learner.adopt(returned)
        for version in range(learner.version + 1, self.version + 1):
            await learner.accumulate(await self._batch(version))
            stats, _ = await learner.apply(again=True)
            if stats.skipped:
                raise RuntimeError(f"step {version} was taken once, and now {stats.skipped}: the machine computes wrongly")
            assert stats.version == version, f"step {version} was done again and made version {stats.version}"
            done.append(stats)
        return done


def rolled_back(version: int) -> StepStats:
    """What a rollback that made `version` reports."""
    return StepStats(version=version, metrics={"learner/rolled_back": 1.0})
