"""Re-scoring: a stored rollout's turns are played through its environment again (invariant 7).

    task, turns --> EnvHost.open, step, step, ... [truncate] --> verdict     the same status, reward and components as stored
                                                          \\-> second_opinion of the environment, where it has one

Code of the policy runs where it ran in the run: in a sandbox. Messages of the environment must be the same, too.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from environments.base import TextEnv
from environments.host import EnvHost, EnvironmentFailure, describe
from environments.registry import resolve
from infra.audit.rows import PAID, Row
from rl_core.config import RunConfig
from rl_core.types import Message, Status, Verdict

TOLERANCE = 1e-4
"""The store keeps rewards as 32-bit floats."""

log = logging.getLogger(__name__)


class Outcome(StrEnum):
    SAME = "same"
    DIFFERENT = "different"
    TIMING = "timing"  # different, but a time-out is one of the two: a matter of the machine's load
    IMPOSSIBLE = "impossible"  # our side failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What became of one rollout."""

    row: Row
    outcome: Outcome
    difference: str = ""
    second_opinion: bool | None = None


class Rescorer:
    """Holds one environment host; close it when done."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._host = EnvHost(config.sandbox)

    def env_class(self, env: str) -> type[TextEnv]:
        return resolve(self._config.environments[env].id or env)

    def options(self, env: str) -> dict[str, Any]:
        """As in the run: its own, and the tokenizer that prompts are measured with."""
        return {"tokenizer": self._config.model.path, "sandbox": self._config.sandbox, **self._config.environments[env].options}

    def replay(self, row: Row) -> Replay:
        """Score `row` again. Never raises for what happens in the environment."""
        assert row.task is not None
        assert row.turns is not None
        session = f"audit-{row.rollout_id}"
        env_id = self._config.environments[row.env].id or row.env
        try:
            said = list(self._host.open(session, env_id, self.options(row.env), row.task).messages)
            verdict: Verdict | None = None
            for turn in row.turns:
                said.append(Message(role="assistant", content=""))
                transition = self._host.step(session, turn)
                verdict = transition.verdict
                if verdict is not None:
                    break
                said += transition.observation.messages
            if verdict is None and row.truncated:
                verdict = self._host.truncate(session).verdict
        except EnvironmentFailure as failure:
            return Replay(row=row, outcome=Outcome.IMPOSSIBLE, difference=str(failure))
        finally:
            self._host.close(session)
        outcome, difference = compare(row, verdict, said)
        return Replay(
            row=row,
            outcome=outcome,
            difference=difference,
            second_opinion=self.second_opinion(row) if (row.verified or 0.0) >= PAID else None,
        )

    def second_opinion(self, row: Row) -> bool | None:
        """What the environment's second verifier says; None if there is none, or if it fails."""
        assert row.task is not None
        env = self.env_class(row.env)(**self.options(row.env))
        try:
            env.reset(options={"task": row.task})
            return env.second_opinion(row.turns or ())
        except Exception as error:  # noqa: BLE001 -- an author's code; what it raises says nothing about the policy
            log.warning("second opinion of %s failed: %s", row.env, describe(error))
            return None
        finally:
            env.close()

    def honest_length(self, env: str, rows: Sequence[Row]) -> int | None:
        """Characters of the longest answer that the oracle of a single-turn environment gives to these tasks."""
        if self._config.environments[env].max_turns != 1 or not rows:
            return None
        longest = 0
        session = self.env_class(env)(**self.options(env))
        try:
            for row in rows:
                observation = session.reset(options={"task": row.task})[1]["observation"]
                longest = max([longest, *(len(session.oracle(observation, random.Random(i)).content) for i in range(4))])
        except Exception as error:  # noqa: BLE001 -- as above
            log.debug("no oracle to measure %s with: %s", env, describe(error))
            return None
        finally:
            session.close()
        return longest


def compare(row: Row, verdict: Verdict | None, said: Sequence[Message]) -> tuple[Outcome, str]:
    """The stored rollout against its replay."""
    if verdict is None:
        return Outcome.DIFFERENT, "the environment wants more turns than there were"
    if not verdict.status.trains:
        return Outcome.IMPOSSIBLE, str(dict(verdict.evidence))
    theirs = [m for m in row.messages if m.role != "assistant"]
    if theirs != [m for m in said if m.role != "assistant"]:
        return Outcome.DIFFERENT, "the environment says something else than it did in the run"
    difference = (
        _differs("status", row.status, verdict.status.value)
        or _differs("reward", row.verified, verdict.reward)
        or next((d for name, value in verdict.components.items() if (d := _differs(name, row.components.get(name), value))), "")
    )
    if not difference:
        return Outcome.SAME, ""
    late = Status.TIMEOUT_MODEL.value in (row.status, verdict.status.value)
    return Outcome.TIMING if late else Outcome.DIFFERENT, difference


def _differs(name: str, stored: object, now: object) -> str:
    same = math.isclose(stored, now, abs_tol=TOLERANCE) if isinstance(stored, float) and isinstance(now, float) else stored == now
    return "" if same else f"{name} was {stored} and is {now}"


def choose(rows: Sequence[Row], count: int, rng: random.Random) -> list[Row]:
    """Up to `count` rollouts that can be re-scored, half of them paid where there are so many.

    A rollout that ended in a failure of ours has no verdict of its turns to come back to.
    """
    able = [r for r in rows if r.task is not None and r.turns and Status(r.status).trains]
    paid, unpaid = [r for r in able if r.paid], [r for r in able if not r.paid]
    rng.shuffle(paid)
    rng.shuffle(unpaid)
    half = max(count // 2, count - len(unpaid))
    chosen = paid[:half]
    return chosen + unpaid[: count - len(chosen)]


__all__ = ["Outcome", "Replay", "Rescorer", "choose", "compare"]
