"""How long a completion takes in an engine that decodes many at once.

Every running sequence gets one token per engine step, and a step over n sequences takes base_s + n * per_sequence_s: with few of them
the weights' way through memory is what counts, with many the arithmetic. So all running sequences advance together, and one number, how
far a sequence that started at time zero would be, says when each of them ends: no event per token.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools

LITTLE = 1e-6
"""Tokens; less than this is rounding."""


class Engine:
    """Continuous batching, first come first served, at most `max_sequences` at a time."""

    def __init__(self, *, max_sequences: int, base_s: float, per_sequence_s: float) -> None:
        self._places = asyncio.Semaphore(max_sequences)
        self._base_s, self._per_sequence_s = base_s, per_sequence_s
        self._running: list[tuple[float, int, asyncio.Future[None]]] = []  # heap by the position at which each ends
        self._order = itertools.count()
        self._position = self._at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._versions: list[tuple[float, int]] = []  # (position at which it went live, version)
        self.busy_s = 0.0  # seconds with at least one sequence
        self.sequence_s = 0.0  # the sum over sequences

    def load(self, version: int) -> None:
        """From here on tokens are sampled from `version`; running sequences go on."""
        self._advance()
        self._versions.append((self._position, version))

    async def decode(self, tokens: float) -> dict[int, float]:
        """Sample that many tokens; returns {version: how many of them it sampled}."""
        async with self._places:
            self._advance()
            start = self._position
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._running, (start + tokens, next(self._order), done))
            self._set_timer()
            await done
            return self._sampled(start, start + tokens)

    def look(self) -> None:
        """Bring `busy_s` and `sequence_s` up to now."""
        self._advance()

    def _sampled(self, start: float, end: float) -> dict[int, float]:
        counts: dict[int, float] = {}
        for live_at, version in reversed(self._versions):
            if end > live_at:
                counts[version] = counts.get(version, 0.0) + end - max(start, live_at)
                end = live_at
            if live_at <= start:
                break
        return counts

    @property
    def _step_s(self) -> float:
        return self._base_s + len(self._running) * self._per_sequence_s

    def _advance(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._running:
            self._position += (now - self._at) / self._step_s
            self.busy_s += now - self._at
            self.sequence_s += (now - self._at) * len(self._running)
        self._at = now

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._running:
            seconds = max(0.0, self._running[0][0] - self._position) * self._step_s
            self._timer = asyncio.get_running_loop().call_later(seconds, self._end_some)

    def _end_some(self) -> None:
        self._advance()
        while self._running and self._running[0][0] <= self._position + LITTLE:
            _, _, done = heapq.heappop(self._running)
            if not done.done():
                done.set_result(None)
        self._set_timer()
