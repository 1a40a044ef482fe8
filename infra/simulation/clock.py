"""An event loop whose time jumps to the next timer: hours pass in milliseconds, in one order for one seed."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

CLEAN_UP_ROUNDS = 100
"""Tasks that end by raising SystemExit interrupt the clean-up; it goes on, but not for ever."""


class Killed(SystemExit):
    """The driver's process is gone. asyncio lets SystemExit through at once, as a SIGKILL would be."""


class Deadlock(RuntimeError):
    """Everybody waits, and nothing is left that could wake anybody."""


class _NoFiles(selectors.SelectSelector):
    """Never waits: no file, socket or thread speaks to a virtual clock."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return []


class VirtualClock(asyncio.SelectorEventLoop):
    """Nothing waits: when no callback is ready, the clock jumps."""

    def __init__(self) -> None:
        super().__init__(_NoFiles())
        self._now = 0.0

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        if not self._ready and not self._stopping:  # type: ignore[attr-defined]
            if not self._scheduled:  # type: ignore[attr-defined]
                raise Deadlock("everybody waits, and no timer is set")
            self._now = max(self._now, self._scheduled[0]._when)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def simulate(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a virtual clock. Whatever it leaves behind is cancelled, however it ended."""
    loop = VirtualClock()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.set_exception_handler(lambda _loop, _context: None)  # tasks of a dead process
        for _ in range(CLEAN_UP_ROUNDS):
            try:
                loop.run_until_complete(_end_all_others())
                break
            except SystemExit:
                continue
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def _end_all_others() -> None:
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
