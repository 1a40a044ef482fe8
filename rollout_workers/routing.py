"""Which worker takes the next group: the one with the fewest under way, found in constant time however many workers there are."""

from __future__ import annotations

from collections.abc import Iterable


class Routing:
    """Workers that are up, in levels by their number of groups; among equals, the one that has been there longest."""

    def __init__(self, workers: Iterable[str]) -> None:
        """All are up, and none has a group."""
        self._levels: list[dict[str, None]] = [dict.fromkeys(workers)]
        self._busy = dict.fromkeys(self._levels[0], 0)
        self._lowest = 0  # no level below it has a worker
        self._up = set(self._busy)

    def take(self) -> str | None:
        """The least busy worker, now with one group more; None if none is up."""
        if not self._up:
            return None
        while not self._levels[self._lowest]:
            self._lowest += 1
        worker = next(iter(self._levels[self._lowest]))
        self._count(worker, +1)
        return worker

    def give_back(self, worker: str) -> None:
        """A group that `worker` took has ended."""
        if not self._busy[worker]:
            raise ValueError(f"worker {worker} has no group to give back")
        self._count(worker, -1)

    def down(self, worker: str) -> None:
        """It takes no groups until it is up again. Those under way stay counted."""
        self._up.discard(worker)
        self._levels[self._busy[worker]].pop(worker, None)

    def up(self, worker: str) -> None:
        self._up.add(worker)
        self._enter(worker)

    def is_up(self, worker: str) -> bool:
        return worker in self._up

    def any_up(self) -> bool:
        return bool(self._up)

    def _count(self, worker: str, change: int) -> None:
        self._levels[self._busy[worker]].pop(worker, None)
        self._busy[worker] += change
        if worker in self._up:
            self._enter(worker)

    def _enter(self, worker: str) -> None:
        level = self._busy[worker]
        while len(self._levels) <= level:
            self._levels.append({})
        self._levels[level][worker] = None
        self._lowest = min(self._lowest, level)
