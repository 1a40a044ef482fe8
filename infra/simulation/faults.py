"""What may go wrong in a run, by name, and the dice that decide when it does.

Each simulated run switches a random half of the faults on (swarm testing, Groce et al. 2012, ISSTA): with all of them on at once the
common ones would end a life before the rare ones get their turn, and some bugs show only when a fault is absent.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection
from enum import StrEnum


class Fault(StrEnum):
    """One kind of misfortune."""

    WORKER_DEATH = "worker_death"  # an engine's process ends in the middle of its groups
    WORKER_DEATH_IN_SYNC = "worker_death_in_sync"  # ... while it loads weights
    LOST_ANSWER = "lost_answer"  # ... when a group is done, before anybody hears of it
    LATE_ANSWER = "late_answer"  # a finished group is heard of a minute later
    SLOW_LINK = "slow_link"  # weights take half a minute to one engine
    HUNG_ENVIRONMENT = "hung_environment"  # an episode never answers; its time limit ends it
    BROKEN_ENVIRONMENT = "broken_environment"  # one environment fails for a while: the breaker's case
    LEARNER_DEATH = "learner_death"  # in its gradients, before a step, or in a probe
    LEARNER_DEATH_AFTER_STEP = "learner_death_after_step"  # the step is done, its answer is lost
    LEARNER_DEATH_IN_SAVE = "learner_death_in_save"  # a partial checkpoint
    BAD_STEP = "bad_step"  # the loss is not finite: the step is skipped; several in a row go back to a checkpoint
    QUEUE_DEATH = "queue_death"  # the call does not arrive
    QUEUE_DEATH_AFTER_CALL = "queue_death_after_call"  # the call took effect, the answer is lost
    SLOW_QUEUE = "slow_queue"  # calls arrive late, in their order
    DUPLICATE_DELIVERY = "duplicate_delivery"  # a call to the queue arrives twice
    DRIVER_DEATH = "driver_death"  # at any moment
    DRIVER_DEATH_AT_LEDGER = "driver_death_at_ledger"  # right before or right after a write of the ledger
    TORN_JOURNAL = "torn_journal"  # the driver dies in the middle of a write of the journal
    POWER_CUT = "power_cut"  # the machine dies too: the ledger loses all that was not flushed to its disk
    CLOCK_JUMP = "clock_jump"  # the wall clock is set back or forward by up to a day


RATES: dict[Fault, float] = {
    Fault.WORKER_DEATH: 0.02,
    Fault.WORKER_DEATH_IN_SYNC: 0.05,
    Fault.LOST_ANSWER: 0.02,
    Fault.LATE_ANSWER: 0.05,
    Fault.SLOW_LINK: 0.1,
    Fault.HUNG_ENVIRONMENT: 0.03,
    Fault.BROKEN_ENVIRONMENT: 0.5,
    Fault.LEARNER_DEATH: 0.03,
    Fault.LEARNER_DEATH_AFTER_STEP: 0.1,
    Fault.LEARNER_DEATH_IN_SAVE: 0.05,
    Fault.BAD_STEP: 0.15,
    Fault.QUEUE_DEATH: 0.01,
    Fault.QUEUE_DEATH_AFTER_CALL: 0.01,
    Fault.SLOW_QUEUE: 0.2,
    Fault.DUPLICATE_DELIVERY: 0.1,
    Fault.DRIVER_DEATH: 0.5,
    Fault.DRIVER_DEATH_AT_LEDGER: 0.004,
    Fault.TORN_JOURNAL: 0.02,
    Fault.POWER_CUT: 0.5,
    Fault.CLOCK_JUMP: 0.1,
}
"""Probability at each opportunity: a call, a write, a group, a life, or (power_cut) a death of the driver."""


class Faults:
    """The dice of one run."""

    def __init__(self, rng: random.Random, *, intensity: float = 1.0, only: Collection[Fault] = ()) -> None:
        """`intensity` scales every rate; 0 is a calm run. `only`: these faults instead of a random half of all."""
        self._rng = rng
        on = [fault for fault in Fault if rng.random() < 0.5]
        on = list(only) or on
        self._rates = {fault: min(0.9, RATES[fault] * intensity) for fault in on}
        self.struck: Counter[str] = Counter()

    def strike(self, fault: Fault) -> bool:
        """Whether `fault` happens now."""
        if self._rng.random() >= self._rates.get(fault, 0.0):
            return False
        self.struck[fault.value] += 1
        return True
