"""How many tokens to draft, from what each number was measured to bring.

    value of k  =  tokens per sequence and step with k  /  seconds of a step with k

Whether drafts pay depends on their acceptance, which moves with the policy, on the batch size and on the machine. None of it is
modelled here; both parts are measured, each where it is steadiest:

    tokens     of all batch sizes together: whether a draft stands does not depend on who else is in the batch, and that of a j-th draft
               hardly on how many more there are, so that steps with one k tell something of another
    seconds    per power of two of sequences, relative to the best k just before: others share the machine, and its speed may double from
               one moment to the next

Nearly every step of a large batch also reads somebody's prompt. What a prompt token costs is estimated along the way and taken off.

A trial is a single step among those of the best k. Such speeds wander on all scales of time, from steps to minutes, so eight steps in a
row tell hardly more of a k than one does, and eight single ones much more. A k is tried as long as its value, with the doubt that is
left, reaches the best one's: where two are far apart that is settled at once, and where they are close, trying costs little. The others
go by turns, as long as all together cost no more than `REGRET` of the time: the policy and the machine change.

What is done here after a step delays the next, which with a small model takes five milliseconds: so little is, and the rest every few
steps.

Upstream (vLLM 0.32) takes k from a table by batch size, fixed in its configuration. `install` puts an AutoK in the table's place.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

AUTO_VARIABLE = "POLYRL_AUTO_K"
"""Environment variable: set to 1 in the process of an engine that chooses k, or to the name of another way of choosing (`CHOOSERS`)."""

BETWEEN = 6
"""Measured steps of the best k, at least, between two trials; a trial is compared with their median."""
TRIALS = 64
"""Trials of a k that count, by their median."""
FEW = 6
"""Trials of a k below which nothing is concluded: one may have fallen into a slow moment."""
DOUBT = 0.4
"""By which share the seconds of a single trial may be off; those of n by the root of n less."""
DRAFT_DOUBT = 0.4
"""The same for the tokens of a single step."""
REGRET = 0.002
"""Share of the time that may go to trials of a k that does not look worth one."""
SWITCH = 2
"""Steps that a trial costs beside its own: one before it still verifies the other number, and one after it."""
MARGIN = 1.01
"""How much better than the present k another one must be to take its place."""
OTHERS = 50
"""Steps that what steps with other numbers say of a k weighs as much as. Where runs are long, more drafts begin at hard places."""
MEMORY = 200
"""Steps of the same k after which a number of tokens has faded to 1/e. A policy moves within some hundreds of steps at the earliest."""
FORGOTTEN = 5000
"""Steps of whatever k after which a count has faded to 1/e: what was seen long ago is in doubt again, and soon outweighed."""
ENOUGH = 8
"""Steps that say whether drafts so far ahead stand at all; before, they are taken to stand as often as those before them."""


@dataclass
class Mean:
    """Of the last `MEMORY` values or so, all alike until there are so many; fewer where the rest is forgotten."""

    value: float = 0.0
    count: float = 0.0

    def add(self, value: float) -> None:
        self.count = min(self.count + 1, MEMORY)
        self.value += (value - self.value) / self.count

    def fade(self, steps: int) -> None:
        """So many steps of whatever k later."""
        self.count *= (1 - 1 / FORGOTTEN) ** steps


@dataclass
class Trials:
    """What a step of some k took, in one bucket's own unit: that of the k it began with."""

    last: deque[float] = field(default_factory=lambda: deque(maxlen=TRIALS))
    value: float = 1.0
    """Their median."""

    def add(self, times: float) -> None:
        self.last.append(times)
        self.value = median(self.last)

    @property
    def are_few(self) -> bool:
        return len(self.last) < FEW


class PromptCost:
    """Seconds that a prompt token adds to a step: the slope of what a step took beyond the usual, over the tokens read. With an intercept,
    since a mean step takes more than a median one, with or without a prompt; the first steps could not tell it from the slope, so it begins
    as if there had been some without either."""

    def __init__(self) -> None:
        self._tokens, self._beyond, self._square, self._product = (Mean(count=20.0) for _ in range(4))
        self.slope = 0.0

    def add(self, tokens: int, beyond: float) -> None:
        self._tokens.add(tokens)
        self._beyond.add(beyond)
        self._square.add(tokens * tokens)
        self._product.add(tokens * beyond)
        spread = self._square.value - self._tokens.value**2
        common = self._product.value - self._tokens.value * self._beyond.value
        self.slope = max(common / spread, 0.0) if spread > 1 else 0.0


@dataclass
class Bucket:
    """The seconds of one range of batch sizes. What ends early, because the batch changes its size, goes on later."""

    size: int  # up to 2^size sequences
    best: int
    steps: deque[float] = field(default_factory=lambda: deque(maxlen=BETWEEN))
    """Seconds of the last steps with the best k, prompts taken off. Their median counts: one slow step says something of the machine."""
    relative: dict[int, Trials] = field(default_factory=dict)
    trial: int | None = None
    left: int = BETWEEN
    """Steps of the best k before the next trial."""
    credit_s: float = 0.0
    """Seconds that trials may still cost."""
    price_s: float = 0.0
    """What the trial under way costs of them."""
    turns: dict[int, int] = field(default_factory=dict)
    """{k: how many trials there had been with its last}."""
    count: int = 0

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
        return self.seconds * self.times(k) if k in self.relative else 0.0

    def prefer(self, k: int) -> None:
        self.steps = deque([seconds * self.times(k) for seconds in self.steps], BETWEEN)
        self.best = k


held: int | None = None
"""The number of drafts to stay at, in this process: `Engine.hold_drafts`."""


class AutoK:
    """The number of drafts for each batch size: 0 to `max_k`."""

    def __init__(self, max_k: int) -> None:
        # Each step costs a little more than the one before and brings a little less: 3 tells little that 2 and 4 do not.
        self.numbers = sorted({0, 1, 2, *range(4, max_k + 1, 2), max_k} & set(range(max_k + 1)))
        self._stand = [Mean() for _ in range(max_k)]
        """Share of sequences of which j + 1 drafts or more stood, of steps that may have had so many."""
        self._brought = {k: Mean() for k in self.numbers}
        """Tokens per sequence and step, of steps with this k alone."""
        self.prompt = PromptCost()
        self._unfaded = 0
        """Steps since counts were last faded."""
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
        self._unfaded += 1
        self._brought[k].add(sum(brought) / len(brought))
        for j in range(k):
            self._stand[j].add(sum(tokens > j + 1 for tokens in brought) / len(brought))
        usual = bucket.usual(k)
        slope = self.prompt.slope
        if usual:
            self.prompt.add(prompt, min(seconds - usual, 2 * usual + slope * prompt))
        if usual := usual or bucket.seconds:  # by division: a machine that is slow for a moment is slow in reading, too
            seconds *= usual / (usual + slope * prompt)
        if bucket.trial is None:
            bucket.steps.append(seconds)
        else:
            self._end_trial(bucket, seconds)
        bucket.credit_s += REGRET * seconds
        bucket.left -= 1
        if bucket.left <= 0:
            self._go_on(bucket)

    def _end_trial(self, bucket: Bucket, seconds: float) -> None:
        k, bucket.trial = bucket.k, None
        times = seconds / bucket.seconds * bucket.relative[bucket.best].value
        bucket.relative.setdefault(k, Trials()).add(times)
        bucket.count += 1
        bucket.turns[k] = bucket.count
        bucket.credit_s -= bucket.price_s
        bucket.left = BETWEEN + 1  # this step is counted, too

    def _go_on(self, bucket: Bucket) -> None:
        """With a better k if there is one; else with a trial if one is due."""
        for mean in (*self._stand, *self._brought.values()):
            mean.fade(self._unfaded)
        self._unfaded = 0
        # The dearest trial is the most that is saved up for: else a quiet hour would be spent on trials once they become dear.
        bucket.credit_s = min(bucket.credit_s, (1 + SWITCH) * max(map(bucket.usual, bucket.relative)))
        bucket.left = BETWEEN
        known = [k for k, trials in bucket.relative.items() if k == bucket.best or not trials.are_few]
        leader = max(known, key=lambda k: self._value(bucket, k))
        if self._value(bucket, leader) > MARGIN * self._value(bucket, bucket.best):
            bucket.prefer(leader)
        else:
            bucket.trial = self._next_trial(bucket)

    def _next_trial(self, bucket: Bucket) -> int | None:
        """The most hopeful k if it may be the best; else, of those whose trial the credit covers, the one whose last is longest ago."""
        best, others = self._value(bucket, bucket.best), [k for k in self.numbers if k != bucket.best]
        bucket.price_s = 0.0
        hopes = {k: self._hope(bucket, k) for k in others}
        hopeful = max(others, key=lambda k: hopes[k])
        if hopes[hopeful] > best:
            return hopeful
        for k in sorted(set(others) & bucket.relative.keys(), key=lambda k: bucket.turns.get(k, 0)):
            price = (1 + SWITCH) * bucket.usual(k) * max(1 - self._value(bucket, k) / best, 0.0)
            if bucket.credit_s >= price:
                bucket.price_s = price
                return k
        return None

    def tokens(self, k: int) -> float:
        """Per sequence and step. Where a draft was never tried, what the one before it brings is the most that it can."""
        total, share = 1.0, 1.0
        for stand in self._stand[:k]:
            share = stand.value if stand.count >= ENOUGH else share
            total += share
        own = self._brought[k]
        return (own.count * own.value + OTHERS * total) / (own.count + OTHERS)

    def _value(self, bucket: Bucket, k: int) -> float:
        return self.tokens(k) / bucket.times(k)

    def _hope(self, bucket: Bucket, k: int) -> float:
        """The most that k may be worth, by trials; before the first, since more drafts take no less time than fewer, and in a larger batch
        no less of it."""
        steps = min((stand.count for stand in self._stand[:k]), default=math.inf)
        doubt = DRAFT_DOUBT / (steps + 1) ** 0.5
        if k in bucket.relative:
            trials = bucket.relative[k]
            return math.inf if trials.are_few else self._value(bucket, k) * (1 + doubt + DOUBT / len(trials.last) ** 0.5)
        ratios = [bucket.times(j) for j in bucket.relative if j < k]
        for other in self._buckets.values():
            if other.size < bucket.size and k > bucket.best and {k, bucket.best} <= other.relative.keys():
                ratios.append(other.times(k) / other.times(bucket.best))
        return self.tokens(k) * (1 + doubt) / max(ratios) if ratios else math.inf

    def _bucket(self, batch: int) -> Bucket:
        """1, 2, 3 to 4, 5 to 8, ... A new one begins as the nearest known one does, the first in the middle."""
        size = (batch - 1).bit_length()
        if size not in self._buckets:
            near = min(self._buckets, key=lambda s: abs(s - size), default=None)
            start = self.numbers[len(self.numbers) // 2] if near is None else self._buckets[near].best
            self._buckets[size] = Bucket(size, start, relative={start: Trials()})
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
