"""The replay queue: finished groups in the order in which they were started, with a window.

Holds metadata and references only. It knows of a group from its start, so that it can tell the oldest running one: a batch
takes the first ready groups, as long as fewer than `window` younger ones have been taken before the oldest one that stays behind.
So at most window - 1 groups ever overtake a straggler; the loop's staleness bound rests on this number.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from rl_core.seams import GroupResult


class ReplayQueue:
    """Plain and synchronous; the composition root puts it into an actor."""

    def __init__(self, window: int) -> None:
        if window < 1:
            raise ValueError(f"window is {window}, wanted 1 (strict first in, first out) or more")
        self._window = window
        self._running: OrderedDict[int, None] = OrderedDict()  # tickets in order of start
        self._ready: list[int] = []  # tickets, sorted
        self._results: dict[int, GroupResult] = {}  # of the ready tickets
        self._overtakers: list[int] = []  # tickets taken that are younger than the oldest running one; fewer than `window`
        self._last = -1

    def start(self, ticket: int) -> None:
        """A group was started. Tickets rise."""
        if ticket <= self._last:
            raise ValueError(f"ticket {ticket} after {self._last}: tickets must rise")
        self._running[ticket] = None
        self._last = ticket

    def restore(self, groups: Mapping[int, GroupResult | None], overtakers: Sequence[int]) -> None:
        """Go on where another queue stopped: `groups` that run (None) or are ready, and what overtook the oldest running one."""
        for ticket in sorted(groups):
            self.start(ticket)
            result = groups[ticket]
            if result is not None:
                self.put(ticket, result)
        self._overtakers = list(overtakers)

    def put(self, ticket: int, result: GroupResult) -> None:
        """The group of `ticket` is ready to train. Putting it twice is an error: nothing is counted twice (invariant 4)."""
        if ticket in self._results:
            raise ValueError(f"ticket {ticket} was put twice")
        if ticket not in self._running:
            raise ValueError(f"ticket {ticket} was never started, or has been taken already")
        del self._running[ticket]
        insort(self._ready, ticket)
        self._results[ticket] = result

    def drop(self, ticket: int) -> None:
        """The group of `ticket` will never train."""
        if ticket not in self._running:
            raise ValueError(f"ticket {ticket} cannot be dropped: it is not running")
        del self._running[ticket]

    def take(self, count: int) -> list[GroupResult]:
        """The `count` oldest ready groups, or none if that many are not ready within the window yet."""
        if len(self._ready) < count:
            return []
        taken = self._ready[:count]
        overtakers: list[int] = []
        if self._running:
            oldest = next(iter(self._running))
            overtakers = [t for t in (*self._overtakers, *taken) if t > oldest]
            if len(overtakers) >= self._window:
                return []
        self._overtakers = overtakers
        del self._ready[:count]
        return [self._results.pop(t) for t in taken]

    def depth(self) -> tuple[int, int]:
        """(groups ready, groups still running)."""
        return len(self._ready), len(self._running)
