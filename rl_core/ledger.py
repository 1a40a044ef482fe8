"""The ledger: one row per task drawn, and where it went (invariant 4).

    drawn --> ready --> trained(version)
      |         +-----> abandoned(reason)
      +--> filtered(reason)
      +--> abandoned(reason)

SQLite in WAL mode, so that other processes read it while the run writes.
"""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rl_core.types import Task


class State(StrEnum):
    """Where a drawn task is. The last three are final."""

    DRAWN = "drawn"
    READY = "ready"
    TRAINED = "trained"
    FILTERED = "filtered"
    ABANDONED = "abandoned"


SCHEMA = """
CREATE TABLE IF NOT EXISTS tasks (
    group_id TEXT PRIMARY KEY, env TEXT NOT NULL, task_key TEXT NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '',
    version INTEGER, drawn_at REAL NOT NULL, ended_at REAL)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """The sum over one environment's tasks."""

    env: str
    drawn: int
    open: int  # drawn or ready
    trained: int
    filtered: int
    abandoned: int
    reasons: dict[str, int]

    @property
    def balanced(self) -> bool:
        """Every task drawn is in exactly one state."""
        return self.drawn == self.open + self.trained + self.filtered + self.abandoned


class Ledger:
    """Written by the loop alone."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)  # autocommit: each change is durable as soon as it is made
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute(SCHEMA)
        self._next = int(self._db.execute("SELECT count(*) FROM tasks").fetchone()[0])

    def draw(self, task: Task) -> str:
        """A task was drawn: returns the id of its group."""
        group_id = f"g{self._next:06d}"
        self._next += 1
        self._db.execute(
            "INSERT INTO tasks (group_id, env, task_key, state, drawn_at) VALUES (?, ?, ?, ?, ?)",
            (group_id, task.env, task.key, State.DRAWN, time.time()),
        )
        return group_id

    def ready(self, group_id: str) -> None:
        """Its group waits in the queue."""
        self._move(group_id, (State.DRAWN,), State.READY)

    def train(self, group_id: str, version: int) -> None:
        """Its group is part of policy version `version`."""
        self._move(group_id, (State.READY,), State.TRAINED, version=version)

    def filter(self, group_id: str, reason: str) -> None:
        """Its group cannot train."""
        self._move(group_id, (State.DRAWN,), State.FILTERED, reason)

    def abandon_open(self, reason: str) -> int:
        """Every task that is not in a final state gets one. Returns how many."""
        return self._db.execute(
            "UPDATE tasks SET state = ?, reason = ?, ended_at = ? WHERE state IN (?, ?)",
            (State.ABANDONED, reason, time.time(), State.DRAWN, State.READY),
        ).rowcount

    def _move(self, group_id: str, wanted: tuple[State, ...], state: State, reason: str = "", version: int | None = None) -> None:
        ended = None if state is State.READY else time.time()
        marks = ", ".join("?" * len(wanted))
        changed = self._db.execute(
            f"UPDATE tasks SET state = ?, reason = ?, version = ?, ended_at = ? WHERE group_id = ? AND state IN ({marks})",
            (state, reason, version, ended, group_id, *wanted),
        ).rowcount
        if changed != 1:
            row = self._db.execute("SELECT state FROM tasks WHERE group_id = ?", (group_id,)).fetchone()
            raise RuntimeError(
                f"ledger: {group_id} cannot become {state.value}: it is {row[0] if row else 'unknown'}, wanted {' or '.join(wanted)}"
            )

    def close(self) -> None:
        self._db.close()


def read_balance(path: Path) -> list[Balance]:
    """The sums per environment, of a finished or a running run."""
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        rows = db.execute("SELECT env, state, reason, count(*) FROM tasks GROUP BY env, state, reason ORDER BY env").fetchall()
    finally:
        db.close()
    balances = []
    for env in sorted({r[0] for r in rows}):
        mine = [(state, reason, n) for e, state, reason, n in rows if e == env]
        count = {s: sum(n for state, _, n in mine if state == s) for s in State}
        reasons: dict[str, int] = {}
        for state, reason, n in mine:
            if reason:
                reasons[f"{state}: {reason}"] = reasons.get(f"{state}: {reason}", 0) + n
        balances.append(
            Balance(
                env=env, drawn=sum(n for _, _, n in mine), open=count[State.DRAWN] + count[State.READY], trained=count[State.TRAINED],
                filtered=count[State.FILTERED], abandoned=count[State.ABANDONED], reasons=reasons,
            )
        )  # fmt: skip
    return balances
