"""Whose fault it was that an episode did not end well, and how often it is tried again.

    policy           it wrote nonsense, or a program that runs too long    a reward like any other: trains, is never tried again
    infrastructure   a process, host, sandbox or deadline of ours          passes, as a rule: tried again, with pauses that grow
    environment      its code raised, or broke its contract                a bug: once more tells a bug from an accident
    verifier         it failed, or its gold answer is unusable             as above

A group spends at most as many retries as it has rollouts, so that a dead sandbox costs one group's time and not four. A group
that is left with too few good rollouts is filtered with the fault as its reason; several in a row open the environment's circuit
(rl_core/breaker.py). The fault of an engine is no episode's: the group is taken up elsewhere, from its drafts (rl_core/drafts.py).
"""

from __future__ import annotations

from collections import Counter
from enum import StrEnum

from rl_core.seams import GroupResult
from rl_core.types import Status

MIN_TRAINABLE = 2
"""Good rollouts that a group needs for a baseline."""


class Fault(StrEnum):
    """Whose."""

    POLICY = "policy"
    INFRASTRUCTURE = "infrastructure"
    ENVIRONMENT = "environment"
    VERIFIER = "verifier"


FAULTS = {
    Status.INVALID_OUTPUT: Fault.POLICY,
    Status.TIMEOUT_MODEL: Fault.POLICY,
    Status.HACK_SUSPECTED: Fault.POLICY,
    Status.INFRA_ERROR: Fault.INFRASTRUCTURE,
    Status.ENV_ERROR: Fault.ENVIRONMENT,
    Status.VERIFIER_ERROR: Fault.VERIFIER,
}
"""Every status but `ok`."""

RETRIES = {Fault.POLICY: 0, Fault.INFRASTRUCTURE: 3, Fault.ENVIRONMENT: 1, Fault.VERIFIER: 1}
"""Of one rollout."""

FIRST_PAUSE_S = 1.0
"""Before the first retry after an infrastructure fault, and three times as long before each one more: a host is back within these 13 s."""


class Retries:
    """One group's budget."""

    def __init__(self, group_size: int) -> None:
        self._left = group_size
        self._spent: Counter[tuple[int, Fault]] = Counter()

    def pause(self, index: int, status: Status) -> float | None:
        """Seconds after which rollout `index`, which ended with `status`, is tried again; None if it is not."""
        fault = FAULTS.get(status)
        if fault is None or self._left <= 0 or self._spent[index, fault] >= RETRIES[fault]:
            return None
        self._left -= 1
        self._spent[index, fault] += 1
        return FIRST_PAUSE_S * 3 ** (self._spent[index, fault] - 1) if fault is Fault.INFRASTRUCTURE else 0.0


def broken(result: GroupResult) -> str:
    """How a group broke that says nothing about the policy, or "" if it did not break."""
    if result.num_trainable >= MIN_TRAINABLE:
        return ""
    statuses = ", ".join(sorted({s for s in result.statuses if not Status(s).trains}))
    return f"only {result.num_trainable} good rollouts ({statuses}{f': {result.failure}' if result.failure else ''})"


def unusable(result: GroupResult) -> str:
    """Why a group cannot train, or "" if it can."""
    if reason := broken(result):
        return reason
    if not result.has_signal:
        solved = result.rewards[0] > 0
        return "no signal: all rewards are equal" + (" (solved)" if solved else " (unsolved)")
    return ""
