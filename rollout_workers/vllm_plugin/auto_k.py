"""How many tokens to draft, from what each number was measured to bring.

    value of k  =  tokens per sequence and step with k  /  seconds of a step with k

Whether drafts pay depends on their acceptance, which moves with the policy, on the batch size and on the machine. None of it is
modelled here; both parts are measured, each where it is steadiest:

    tokens     of all batch sizes together: whether a draft stands does not depend on who else is in the batch, and that of a j-th draft
               hardly on how many more there are, so that steps with one k tell something of another
    seconds    per power of two of sequences, relative to the best k just before: the machine itself may be faster or slower tomorrow

Nearly every step of a large batch also reads somebody's prompt. What a prompt token costs is estimated along the way and taken off.
Each k has a trial of `STINT` steps, unless even its most hopeful value, from what is known of its neighbours, is below the best one's,
and a second one where the first may only have been disturbed; later trials go by turns, as long as all together cost no more than
`REGRET` of the time. So where all others are far behind they come seldom, and where they are close, often: one may overtake.

Upstream (vLLM 0.32) takes k from a table by batch size, fixed in its configuration. `install` puts an AutoK in the table's place.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median, median_low
from typing import Any

AUTO_VARIABLE = "POLYRL_AUTO_K"
"""Environment variable: set to 1 in the process of an engine that chooses k, or to the name of another way of choosing (`CHOOSERS`)."""

STINT = 8
"""Measured steps of a trial, and at least that many of the best k between two."""
REGRET = 0.01
"""Share of the time that trials may cost once each k has had one."""
MARGIN = 1.02
"""How much better than the present k another one must be to take its place."""
OTHERS = 50
"""Steps that what steps with other numbers say of a k weighs as much as. Where runs are long, more drafts begin at hard places."""
MEMORY = 200
"""Steps of the same k after which a number of tokens has faded to 1/e. A policy moves within some hundreds of steps at the earliest."""
RECENT = 16
"""Steps of the best k that say how fast the machine is now."""
TRIALS = 5
"""Trials of a k that count, by their median; the machine and the lengths of sequences move."""
DOUBT = 0.2
"""By which share the value of a k may be underrated; half of it after two trials, a third after three."""
BURST = 0.7
"""The same after one trial: it is over within a tenth of a second, in all of which others may have had part of the processor."""


@dataclass
class Mean:
    """Of the last `span` values or so, all alike until there are so many."""

    span: float
    value: float = 0.0
    count: float = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        self.count = min(self.count + weight, self.span)
        self.value += (value - self.value) * weight / self.count


@dataclass
class Trials:
    """What the last trials of a k gave; of two the shorter one, since what disturbs a trial makes it longer."""

    last: deque[float]

    def add(self, value: float) -> None:
        self.last.append(value)

    @property
    def value(self) -> float:
        return median_low(self.last)


@dataclass
class PromptCost:
    """Seconds that a prompt token adds to a step: the slope of what a step took beyond what it takes without a prompt."""

    slope: float = 0.0
    _product: float = 0.0
    _square: float = 0.0

    def add(self, tokens: int, beyond: float) -> None:
        fade = 1 - 1 / MEMORY
        self._product, self._square = fade * self._product + tokens * beyond, fade * self._square + tokens * tokens
        self.slope = max(self._product / self._square, 0.0)


@dataclass
class Bucket:
    """The seconds of one range of batch sizes. A stint that ends early, because the batch changes its size, goes on later."""

    size: int  # up to 2^size sequences
    best: int
    steps: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    """Seconds of the last steps with the best k, prompts taken off. Their median counts: one slow step says something of the machine."""
    relative: dict[int, Trials] = field(default_factory=dict)
    """{k: seconds in a unit of this bucket's own}; a trial measures them over those of the best k just before it."""
    trial: int | None = None
    trial_steps: list[float] = field(default_factory=list)
    left: int = STINT
    credit_s: float = 0.0
    """Seconds that trials may still cost."""
    turns: dict[int, int] = field(default_factory=dict)  # k -> how many stints had ended when its last trial did
    trials: dict[int, int] = field(default_factory=dict)  # k -> how many it had
    stints: int = 0

    @property
    def k(self) -> int:
        return self.best if self.trial is None else self.trial

    def times(self, k: int) -> float:
        """Seconds with k over those with the best one, where it is known."""
        return self.relative[k].value / self.relative[self.best].value

    @property
    def seconds(self) -> float:
        """Of a step with the best k; 0 if there was none."""
        return median(self.steps) if self.steps else 0.0

    def usual(self, k: int) -> float:
        """Seconds to expect of a step with k; 0 if nothing is known."""
        if k in self.relative:
            return self.seconds * self.times(k)
        return median(self.trial_steps) if self.trial_steps else 0.0

    def prefer(self, k: int) -> None:
        self.steps = deque([seconds * self.times(k) for seconds in self.steps], RECENT)
        self.best = k


held: int | None = None
"""The number of drafts to stay at, in this process: `Engine.hold_drafts`."""


class AutoK:
    """The number of drafts for each batch size: 0 to `max_k`."""

    def __init__(self, max_k: int) -> None:
        # Each step costs a little more than the one before and brings a little less: 3 tells little that 2 and 4 do not.
        self.numbers = sorted({0, 1, 2, *range(4, max_k + 1, 2), max_k} & set(range(max_k + 1)))
        self._stand = [Mean(MEMORY) for _ in range(max_k)]
        """Share of sequences of which j + 1 drafts or more stood, of steps that may have had so many."""
        self._brought = {k: Mean(MEMORY) for k in self.numbers}
        """Tokens per sequence and step, of steps with this k alone."""
        self.prompt = PromptCost()
        self._buckets: dict[int, Bucket] = {}

    def __getitem__(self, batch: int) -> int:
        """As vLLM asks its table."""
        return self.choose(batch) if held is None else held

    def choose(self, batch: int) -> int:
        return self._bucket(batch).k

    def record(self, batch: int, k: int, brought: Sequence[int], seconds: float, *, prompt: int = 0) -> None:
        """One step of `batch` sequences that verified up to k drafts of each and proposed as many. `brought`: tokens of each sequence that
        went on; `prompt`: tokens that were read of the others."""
        bucket = self._bucket(batch)
        if k != bucket.k or seconds <= 0:
            return
        self._brought[k].add(sum(brought) / len(brought))
        for j in range(k):
            self._stand[j].add(sum(tokens > j + 1 for tokens in brought) / len(brought))
        usual = bucket.usual(k)
        if prompt and usual:
            self.prompt.add(prompt, min(seconds - usual, 2 * usual + self.prompt.slope * prompt))
        seconds = max(seconds - self.prompt.slope * prompt, seconds / 4)
        (bucket.steps if bucket.trial is None else bucket.trial_steps).append(seconds)
        # The dearest trial is the most that is saved up for: else a quiet hour would be spent on trials once they become dear.
        dearest = STINT * max(map(bucket.usual, bucket.relative))
        bucket.credit_s = min(bucket.credit_s + REGRET * seconds, dearest)
        bucket.left -= 1
        if bucket.left == 0:
            self._end_stint(bucket)

    def _end_stint(self, bucket: Bucket) -> None:
        bucket.stints, bucket.left = bucket.stints + 1, STINT
        k, bucket.trial = bucket.trial, None
        if k is not None:
            bucket.turns[k], bucket.trials[k] = bucket.stints, bucket.trials.get(k, 0) + 1
            times = median(bucket.trial_steps) / bucket.seconds
            bucket.relative.setdefault(k, Trials(deque(maxlen=TRIALS))).add(times * bucket.relative[bucket.best].value)
            if bucket.trials[k] > 1:
                bucket.credit_s -= self._cost(bucket, k)
            if self._value(bucket, k) > MARGIN * self._value(bucket, bucket.best):
                bucket.prefer(k)
            return  # the best one first, so that the next trial has something to compare with
        leader = max(bucket.relative, key=lambda k: self._value(bucket, k))
        if self._value(bucket, leader) > MARGIN * self._value(bucket, bucket.best):  # its drafts got better meanwhile
            bucket.prefer(leader)
            return
        bucket.trial, bucket.trial_steps = self._next_trial(bucket), []

    def _next_trial(self, bucket: Bucket) -> int | None:
        """A k that was never tried and may be the best; else, of those whose cost the credit covers, the one whose trial is longest ago."""
        best = self._value(bucket, bucket.best)
        hopes = {k: self._hope(bucket, k) for k in self.numbers if k not in bucket.relative}
        if hopes and (hope := max(hopes.values())) > best:
            return next(k for k in hopes if hopes[k] == hope)
        tried = sorted(set(bucket.relative) - {bucket.best}, key=lambda k: bucket.turns.get(k, 0))
        return next((k for k in tried if bucket.credit_s >= self._cost(bucket, k)), None)

    def tokens(self, k: int) -> float:
        """Per sequence and step. Where a draft was never tried, what the one before it brings is the most that it can."""
        total, share = 1.0, 1.0
        for stand in self._stand[:k]:
            share = stand.value if stand.count >= STINT else share
            total += share
        own = self._brought[k]
        return (own.count * own.value + OTHERS * total) / (own.count + OTHERS)

    def _value(self, bucket: Bucket, k: int) -> float:
        return self.tokens(k) / bucket.times(k)

    def _cost(self, bucket: Bucket, k: int) -> float:
        """Seconds that a trial of k loses against the best one, with the benefit of the doubt."""
        trials = bucket.trials.get(k, 0)
        hope = self._value(bucket, k) * (1 + (DOUBT / trials if trials > 1 else BURST))
        return max(1 - hope / self._value(bucket, bucket.best), 0.0) * STINT * bucket.usual(k)

    def _hope(self, bucket: Bucket, k: int) -> float:
        """The most that k may be worth: more drafts take no less time than fewer, and in a larger batch no less of it."""
        ratios = [bucket.times(j) for j in bucket.relative if j < k]
        for other in self._buckets.values():
            if other.size < bucket.size and k > bucket.best and {k, bucket.best} <= other.relative.keys():
                ratios.append(other.times(k) / other.times(bucket.best))
        return self.tokens(k) / max(ratios) if ratios else math.inf

    def _bucket(self, batch: int) -> Bucket:
        """1, 2, 3 to 4, 5 to 8, ... A new one begins as the nearest known one does, the first in the middle."""
        size = (batch - 1).bit_length()
        if size not in self._buckets:
            near = min(self._buckets, key=lambda s: abs(s - size), default=None)
            start = self.numbers[len(self.numbers) // 2] if near is None else self._buckets[near].best
            self._buckets[size] = Bucket(size, start, relative={start: Trials(deque([1.0], TRIALS))})
        return self._buckets[size]


class Turns(AutoK):
    """0, 1, 2, 4, 0, ... each for a few steps, whatever it brings: for tests, since what AutoK tries depends on how fast its machine is."""

    each = 3
    steps = 0

    def choose(self, batch: int) -> int:
        return self.numbers[self.steps // self.each % len(self.numbers)]

    def record(self, batch: int, k: int, brought: Sequence[int], seconds: float, *, prompt: int = 0) -> None:
        self.steps += 1
        super().record(batch, k, brought, seconds, prompt=prompt)


CHOOSERS = {"1": AutoK, "turns": Turns}


MOST_PROMPT = 512
"""Prompt tokens beyond which a step is not counted: reading a long document is another kind of work."""

IDLE_S = 0.005
"""Between two steps; after more, the engine had nothing to do."""


def watch(scheduler: Any, chooser: AutoK) -> None:
    """Let `chooser` decide for one vLLM scheduler, and see what comes of it."""
    schedule, update = scheduler.schedule, scheduler.update_from_output
    began, ended, before = 0.0, 0.0, -1

    def timed_schedule(*args: Any, **kwargs: Any) -> Any:
        nonlocal began
        now = time.perf_counter()
        began = ended if now - ended < IDLE_S else now  # what the engine does between two steps belongs to a step
        return schedule(*args, **kwargs)

    def watched_update(planned: Any, output: Any) -> Any:
        nonlocal before, ended
        done = update(planned, output)
        ended = time.perf_counter()
        k, (decoding, prompt) = planned.num_spec_tokens_to_schedule, split(planned)
        if k == before and prompt <= MOST_PROMPT and 2 * len(decoding) >= len(planned.num_scheduled_tokens) > 0:
            outputs = [one for client in done.values() for one in client.outputs]
            brought = [len(one.new_token_ids) for one in outputs if one.request_id in decoding]
            if brought and held is None:
                chooser.record(len(planned.num_scheduled_tokens), k, brought, ended - began, prompt=prompt)
        before = k
        return done

    scheduler.schedule, scheduler.update_from_output = timed_schedule, watched_update
    scheduler.dynamic_sd_lookup = chooser


def split(planned: Any) -> tuple[set[str], int]:
    """The sequences of which a step takes one token and its drafts, and how many prompt tokens it reads of the others."""
    drafts = planned.scheduled_spec_decode_tokens
    scheduled = planned.num_scheduled_tokens
    decoding = {name for name, count in scheduled.items() if count == 1 + len(drafts.get(name, ()))}
    return decoding, sum(count for name, count in scheduled.items() if name not in decoding)


def install() -> None:
    """Watch the schedulers of engines whose process is told to choose."""
    from vllm.v1.core.sched.scheduler import Scheduler

    if hasattr(Scheduler, "polyrl_auto_k"):
        return
    stock = Scheduler.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        chooser = CHOOSERS.get(os.environ.get(AUTO_VARIABLE, "0"))  # asked now: a forked process inherits the patch
        if self.num_spec_tokens and chooser is not None:
            watch(self, chooser(self.num_spec_tokens))

    Scheduler.__init__ = __init__
    Scheduler.polyrl_auto_k = True
