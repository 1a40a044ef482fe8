"""A task source that cannot end a run: where an environment fails to draw a task, a placeholder takes its place in the stream.

    make_task raises at position 7   ->   tasks 0 .. 6, undrawn(7), task 8, ...

The host refuses a placeholder as the environment's failure, so that it goes the way of every other one: a group filtered with the cause,
and after three in a row the environment's circuit opens. Positions stay what they are, and a resumed run draws the same placeholder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from rl_core.types import Task

UNDRAWN = "undrawn"
"""Key of a placeholder's private part; its value is the cause."""

MAX_CAUSE = 300  # characters

log = logging.getLogger(__name__)


def guarded(source: Callable[[int], Iterator[Task]], env: str, split: str, start: int = 0) -> Iterator[Task]:
    """The tasks of `source` from `start` on, without end; `source(position)` gives those from a position on."""
    position, tasks = start, source(start)
    while True:
        try:
            task = next(tasks)
        except Exception as error:
            log.warning("environment %s could not draw %s task %d", env, split, position, exc_info=True)
            said = f"{type(error).__name__}: {error}"[:MAX_CAUSE]
            cause = "its task source ended" if isinstance(error, StopIteration) else said
            task = Task(
                env=env, key=f"{UNDRAWN}-{split}-{position}", split=split, seed=0, public={},
                private={UNDRAWN: f"drawing {split} task {position}: {cause}"},
            )  # fmt: skip
            tasks = source(position + 1)
        yield task
        position += 1
