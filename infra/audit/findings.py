"""What an audit says: findings, each with its evidence, and the suspects ranked by them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from typing import Any

MAX_NAMED = 5
"""Rollouts that a finding names for a person to look at."""


class Severity(StrEnum):
    """An alarm says that reward was not earned, or that the audit's own promise is broken. A note is worth a look."""

    ALARM = "alarm"
    NOTE = "note"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One detector's word on one environment."""

    detector: str
    env: str
    severity: Severity
    strength: float  # in (0, 1]: how sure, for the ranking
    sentence: str
    """What was seen, in numbers. Never quotes the policy."""
    rollouts: tuple[str, ...] = ()
    """Ids of all rollouts that show it, the most telling first."""
    answers: frozenset[str] = frozenset()
    """Row.said of answers that are suspect wherever they come again; for the gate."""

    def to_json(self) -> dict[str, Any]:
        return {
            "detector": self.detector,
            "severity": self.severity.value,
            "strength": round(self.strength, 3),
            "sentence": self.sentence,
            "count": len(self.rollouts),
            "rollouts": list(self.rollouts[:MAX_NAMED]),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """One environment, and all that speaks against the reward that was paid in it."""

    env: str
    findings: tuple[Finding, ...]  # alarms first, then by strength

    @property
    def score(self) -> float:
        """Chance that at least one alarm is right, if each is right with its strength and they are independent."""
        return 1 - prod(1 - f.strength for f in self.findings if f.severity is Severity.ALARM)

    @property
    def rollouts(self) -> list[str]:
        """Rollouts that alarms name, those named by most alarms first."""
        named = Counter(id for f in self.findings if f.severity is Severity.ALARM for id in f.rollouts)
        return [id for id, _ in named.most_common()]

    def to_json(self) -> dict[str, Any]:
        return {
            "env": self.env,
            "score": round(self.score, 3),
            "rollouts": self.rollouts[:MAX_NAMED],
            "findings": [f.to_json() for f in self.findings],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescored:
    """How re-scoring went, of one environment."""

    tried: int = 0
    same: int = 0
    different: int = 0
    timing: int = 0  # different, but one of the two verdicts is a time-out
    impossible: int = 0  # our side failed while re-scoring
    second_opinions: int = 0
    disagreements: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The whole audit."""

    run: str
    rollouts: int  # sampled for training, or as honeypots
    held_out: int
    rescorable: bool  # False: the store is too old to hold what re-scoring needs
    rescored: dict[str, Rescored] = field(default_factory=dict)
    suspects: tuple[Suspect, ...] = ()  # most suspect first

    @property
    def alarms(self) -> list[Finding]:
        return [f for s in self.suspects for f in s.findings if f.severity is Severity.ALARM]


def rank(findings: Sequence[Finding]) -> tuple[Suspect, ...]:
    """Findings by environment, the most suspect first."""
    envs = sorted({f.env for f in findings})
    order = {Severity.ALARM: 0, Severity.NOTE: 1}
    suspects = [
        Suspect(env=env, findings=tuple(sorted((f for f in findings if f.env == env), key=lambda f: (order[f.severity], -f.strength))))
        for env in envs
    ]
    return tuple(sorted(suspects, key=lambda s: (-s.score, -len(s.findings), s.env)))
