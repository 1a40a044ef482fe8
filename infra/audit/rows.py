"""A rollout as an audit reads it: from the run store afterwards, or from a finished group while the run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rl_core.rewards import VERIFIED
from rl_core.run_store import SCHEMA, StoredRun
from rl_core.types import Group, Message, Rollout, Task, Turn

PAID = 0.5
"""A reward from here on counts as paid."""

MAX_CHARS = 20_000
"""Of what the policy said, compared and searched; the rest is cut off."""

PENALTY = "audit_penalty"
"""Component that keeps the reward which the gate took away."""

HELD_OUT = ("before", "during", "after")

_NEEDED = ("rollout_id", "group_id", "env", "task_key", "label", "reward", "status", "components", "evidence", "messages", "started_at")
_OPTIONAL = ("split", "difficulty", "task", "turns", "truncated")  # missing in the segments of an older store


@dataclass(frozen=True, kw_only=True)
class Row:
    """One rollout. Everything in it that the policy wrote is hostile text: compared and counted, never followed."""

    rollout_id: str
    group_id: str
    env: str
    label: str  # one of rl_core.run_store.LABELS
    task_key: str
    task: Task | None
    """None where the store is too old to have kept it: such a rollout cannot be re-scored."""
    reward: float | None
    status: str
    components: Mapping[str, float]
    evidence: Mapping[str, str]
    messages: tuple[Message, ...]
    turns: tuple[Turn, ...] | None
    truncated: bool
    started_at: float

    @property
    def verified(self) -> float | None:
        """What the environment itself gave: the reward, unless other components or the gate made something else of it."""
        return self.components.get(VERIFIED, self.components.get(PENALTY, self.reward))

    @property
    def paid(self) -> bool:
        """By the environment or, where a model's score counts, by the whole."""
        return self.reward is not None and max(self.reward, self.components.get(VERIFIED, 0.0)) >= PAID

    @cached_property
    def said(self) -> str:
        """The policy's turns without its thoughts, capped, in one case and with single spaces: what is compared across tasks."""
        if self.turns is not None:
            parts = [
                turn.content + "".join(f" {c.name} {json.dumps(dict(c.arguments), sort_keys=True)}" for c in turn.tool_calls)
                for turn in self.turns
            ]
        else:
            parts = [m.content.rpartition("</think>")[2] for m in self.messages if m.role == "assistant"]
        return " ".join("\n".join(parts)[:MAX_CHARS].lower().split())

    @cached_property
    def length(self) -> int:
        """Characters of the policy's turns, without its thoughts."""
        return (
            len(self.said)
            if self.turns is None
            else sum(len(t.content) + sum(len(repr(c.arguments)) for c in t.tool_calls) for t in self.turns)
        )

    @cached_property
    def gold(self) -> str:
        """What tells apart two tasks that want different answers: the task's private part, or its key where that was not kept."""
        return json.dumps(self.task.private, sort_keys=True, default=str) if self.task and self.task.private else self.task_key

    @staticmethod
    def of(group: Group, rollout: Rollout, label: str) -> Row:
        """A rollout that has just finished."""
        verdict = rollout.verdict
        return Row(
            rollout_id=rollout.id, group_id=group.id, env=group.task.env, label=label, task_key=group.task.key, task=group.task,
            reward=verdict.reward, status=verdict.status.value, components=verdict.components, evidence=verdict.evidence,
            messages=rollout.messages, turns=rollout.turns, truncated=rollout.truncated, started_at=rollout.started_at,
        )  # fmt: skip


def read_rows(run: StoredRun, *, first: int = 0) -> list[Row]:
    """All stored rollouts in the order in which they started; with `first`, only so many of those sampled for training or as honeypots."""
    there = {row["column_name"] for row in run.sql("SELECT column_name FROM (DESCRIBE rollouts)")}
    columns = [*_NEEDED, *(c for c in _OPTIONAL if c in there)]
    assert set(columns) <= set(SCHEMA.names)
    rows = [_row(record) for record in run.sql(f"SELECT {', '.join(columns)} FROM rollouts ORDER BY started_at, rollout_id")]
    return list(_first(rows, first)) if first else rows


def _first(rows: Sequence[Row], count: int) -> Iterator[Row]:
    """The rows up to the `count`-th that is not held-out; held-out ones only up to that moment."""
    for row in rows:
        if row.label not in HELD_OUT:
            count -= 1
        yield row
        if count == 0:
            return


def _row(record: Mapping[str, Any]) -> Row:
    task = json.loads(record["task"]) if record.get("task") else None
    turns = json.loads(record["turns"]) if record.get("turns") else None
    return Row(
        rollout_id=record["rollout_id"],
        group_id=record["group_id"],
        env=record["env"],
        label=record["label"],
        task_key=record["task_key"],
        task=task
        and Task(
            env=record["env"],
            key=record["task_key"],
            split=record.get("split") or "train",
            difficulty=record.get("difficulty") or "",
            **task,
        ),
        reward=record["reward"],
        status=record["status"],
        components=json.loads(record["components"]),
        evidence=json.loads(record["evidence"]),
        messages=tuple(Message(**m) for m in json.loads(record["messages"])),
        turns=None if turns is None else tuple(Turn.from_dict(t) for t in turns),
        truncated=bool(record.get("truncated")),
        started_at=record["started_at"],
    )
