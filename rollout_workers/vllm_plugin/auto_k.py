"""How many tokens to draft, from what each number was measured to bring.

    schedule --> [AutoK.choose] --> step --> [AutoK.record] --> tokens/s of (batch size, k), slowly forgotten

Whether drafts pay depends on their acceptance, which moves with the policy, on the batch size and on the machine. None of it is
modelled here: tokens/s are measured, over steps that verify and propose up to k drafts, per power of two of sequences. The best k
runs; now and then another one runs for a stint of steps, as long as all such trials together cost no more than `REGRET` of the time.
They take turns. So where all others are far behind, the turns come seldom, and where they are close, often: one may overtake.

Upstream (vLLM 0.32) takes k from a table by batch size, fixed in its configuration. `install` puts an AutoK in the table's place.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any

AUTO_VARIABLE = "POLYRL_AUTO_K"
"""Environment variable: set to 1 in the process of an engine that chooses k."""

STINT = 32
"""Measured steps for which one k is kept."""
REGRET = 0.01
"""Share of the time that trials of other numbers may cost."""
MARGIN = 1.02
"""How much better than the present k another one must be to take its place."""
MEMORY = 400
"""Steps of the same k after which a measurement has faded to 1/e. A policy moves within some hundreds of steps at the earliest."""
OLD = 96
"""Steps that all earlier trials of a k together weigh when it is tried again."""
OUTLIER = 3.0
"""A step this many times as slow as usual says something of the machine, not of k: it counts as this many times the usual."""


@dataclass
class Rate:
    """Tokens/s of one k, the older measurements the fainter."""

    tokens: float = 0.0
    seconds: float = 0.0
    steps: float = 0.0

    def add(self, tokens: int, seconds: float) -> float:
        """Returns the seconds that were counted."""
        if self.steps > 4:
            seconds = min(seconds, OUTLIER * self.seconds / self.steps)
        fade = 1 - 1 / MEMORY
        self.tokens = fade * self.tokens + tokens
        self.seconds = fade * self.seconds + seconds
        self.steps = fade * self.steps + 1
        return seconds

    def age(self) -> None:
        """All that was measured so far weighs no more than `OLD` steps: a trial comes seldom, and the policy has moved since."""
        scale = min(1.0, OLD / self.steps) if self.steps else 1.0
        self.tokens, self.seconds, self.steps = scale * self.tokens, scale * self.seconds, scale * self.steps

    @property
    def value(self) -> float:
        return self.tokens / self.seconds

    @property
    def step_s(self) -> float:
        return self.seconds / self.steps


@dataclass
class Bucket:
    """What is known of one range of batch sizes. A stint that ends early, because the batch changes its size, goes on later."""

    rates: dict[int, Rate]
    best: int
    trial: int | None = None
    left: int = STINT
    credit_s: float = 0.0
    """Seconds that trials may still cost."""
    tried: dict[int, int] = field(default_factory=dict)  # k -> stint of its last trial
    stints: int = 0

    @property
    def k(self) -> int:
        return self.best if self.trial is None else self.trial

    def record(self, tokens: int, seconds: float) -> None:
        # The dearest trial's time is the most that is saved up: else a quiet hour would be spent on trials once they become dear.
        dearest = STINT * max(rate.step_s for rate in self.rates.values() if rate.steps) if self.stints else 0.0
        self.credit_s = min(self.credit_s + REGRET * self.rates[self.k].add(tokens, seconds), dearest)
        self.left -= 1
        if self.left == 0:
            self._end_stint()

    def _end_stint(self) -> None:
        self.stints += 1
        self.tried[self.k] = self.stints
        known = {k: rate.value for k, rate in self.rates.items() if rate.steps}
        if self.trial is not None and self.rates[self.best].steps:
            behind = 1 - known[self.trial] / known[self.best]
            self.credit_s -= max(behind, 0.0) * STINT * self.rates[self.trial].step_s
        leader = max(known, key=lambda k: known[k])
        if self.best not in known or known[leader] > MARGIN * known[self.best]:
            self.best = leader
        self.trial, self.left = self._next_trial(known), STINT
        if self.trial is not None:
            self.rates[self.trial].age()

    def _next_trial(self, known: dict[int, float]) -> int | None:
        """A k that was never measured; else the one whose last trial is longest ago, once the credit covers what it would cost."""
        if unknown := [k for k in self.rates if k not in known]:
            return unknown[0]
        k = min((k for k in self.rates if k != self.best), key=lambda k: self.tried[k])
        cost = max(1 - known[k] / known[self.best], 0.0) * STINT * self.rates[k].step_s
        return k if self.trial is None and self.credit_s >= cost else None


class AutoK:
    """The number of drafts for each batch size: 0 to `max_k`."""

    def __init__(self, max_k: int) -> None:
        # Each step costs a little more than the one before and brings a little less: 3 tells little that 2 and 4 do not.
        self.numbers = sorted({0, 1, 2, *range(4, max_k + 1, 2), max_k} & set(range(max_k + 1)))
        self._buckets: dict[int, Bucket] = {}

    def __getitem__(self, batch: int) -> int:
        """As vLLM asks its table."""
        return self.choose(batch)

    def choose(self, batch: int) -> int:
        return self._bucket(batch).k

    def record(self, batch: int, k: int, tokens: int, seconds: float) -> None:
        """One step of `batch` sequences that verified up to k drafts of each and proposed as many, and what it brought."""
        bucket = self._bucket(batch)
        if k == bucket.k and seconds > 0:
            bucket.record(tokens, seconds)

    def _bucket(self, batch: int) -> Bucket:
        """1, 2, 3 to 4, 5 to 8, ... A new one begins as the largest known below it does."""
        size = (batch - 1).bit_length()
        if size not in self._buckets:
            below = [s for s in self._buckets if s < size]
            start = self._buckets[max(below)].best if below else self.numbers[0]
            self._buckets[size] = Bucket(rates={k: Rate() for k in self.numbers}, best=start)
        return self._buckets[size]


def watch(scheduler: Any, chooser: AutoK) -> None:
    """Let `chooser` decide for one vLLM scheduler, and see what comes of it."""
    schedule, update = scheduler.schedule, scheduler.update_from_output
    began, before = 0.0, -1

    def timed_schedule(*args: Any, **kwargs: Any) -> Any:
        nonlocal began
        began = time.perf_counter()
        return schedule(*args, **kwargs)

    def watched_update(planned: Any, output: Any) -> Any:
        nonlocal before
        done = update(planned, output)
        k, batch = planned.num_spec_tokens_to_schedule, len(planned.num_scheduled_tokens)
        if k == before and batch and only_decodes(planned):
            tokens = sum(len(one.new_token_ids) for client in done.values() for one in client.outputs)
            chooser.record(batch, k, tokens, time.perf_counter() - began)
        before = k
        return done

    scheduler.schedule, scheduler.update_from_output = timed_schedule, watched_update
    scheduler.dynamic_sd_lookup = chooser


def only_decodes(planned: Any) -> bool:
    """Whether a step takes one token of each sequence and its drafts, and reads no prompt."""
    drafts = sum(map(len, planned.scheduled_spec_decode_tokens.values()))
    return bool(planned.total_num_scheduled_tokens == len(planned.num_scheduled_tokens) + drafts)


def install() -> None:
    """Watch the schedulers of engines whose process is told to choose."""
    from vllm.v1.core.sched.scheduler import Scheduler

    if hasattr(Scheduler, "polyrl_auto_k"):
        return
    stock = Scheduler.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        if self.num_spec_tokens and os.environ.get(AUTO_VARIABLE) == "1":  # asked now: a forked process inherits the patch
            watch(self, AutoK(self.num_spec_tokens))

    Scheduler.__init__ = __init__
    Scheduler.polyrl_auto_k = True
