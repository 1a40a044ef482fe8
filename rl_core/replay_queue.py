"""The replay queue: finished groups in the order in which they were started, with a window.

Holds metadata and references only. It knows of a group from its start, so that it can tell the oldest running one: a batch
takes the first ready groups, as long as fewer than `window` younger ones have been taken before the oldest one that stays behind.
So at most window - 1 groups ever overtake a straggler; the loop's staleness bound rests on this number.
"""

from __future__ import annotations

from rl_core.seams import GroupResult


class ReplayQueue:
    """Plain and synchronous; the composition root puts it into an actor."""

    def __init__(self, window: int) -> None:
        if window < 1:
            raise ValueError(f"window is {window}, wanted 1 (strict first in, first out) or more")
        self._window = window
        self._open: dict[int, GroupResult | None] = {}  # ticket -> result, None while it runs; in order of start
        self._overtakers: list[int] = []  # tickets taken that are younger than the oldest open one

    def start(self, ticket: int) -> None:
        """A group was started. Tickets rise."""
        if self._open and ticket <= next(reversed(self._open)):
            raise ValueError(f"ticket {ticket} after {next(reversed(self._open))}: tickets must rise")
        self._open[ticket] = None

    def put(self, ticket: int, result: GroupResult) -> None:
        """The group of `ticket` is ready to train. Putting it twice is an error: nothing is counted twice (invariant 4)."""
        if ticket not in self._open:
            raise ValueError(f"ticket {ticket} was never started, or has been taken already")
        if self._open[ticket] is not None:
            raise ValueError(f"ticket {ticket} was put twice")
        self._open[ticket] = result

    def drop(self, ticket: int) -> None:
        """The group of `ticket` will never train."""
        if self._open.pop(ticket, 0) is not None:
            raise ValueError(f"ticket {ticket} cannot be dropped: it is not running")

    def take(self, count: int) -> list[GroupResult]:
        """`count` groups, or none if that many are not ready within the window yet."""
        taken: list[int] = []
        overtakers = list(self._overtakers)
        while len(taken) < count:
            waiting = [t for t in self._open if t not in taken]
            ready = next((t for t in waiting if self._open[t] is not None), None)
            if ready is None:
                return []
            overtakers = [t for t in (*overtakers, ready) if t > waiting[0]]
            if len(overtakers) >= self._window:
                return []
            taken.append(ready)
        self._overtakers = overtakers
        return [result for t in taken if (result := self._open.pop(t)) is not None]

    def depth(self) -> tuple[int, int]:
        """(groups ready, groups still running)."""
        ready = sum(r is not None for r in self._open.values())
        return ready, len(self._open) - ready
