"""The ledger: one row per task drawn, and where it went (invariant 4).

    drawn --> ready --> trained(version)
      |         +-----> filtered(reason)      its step was bad, and skipped: it taught nothing
      |         +-----> abandoned(reason)
      +--> filtered(reason)
      +--> abandoned(reason)

    passed(reason)     by a curriculum: a position of the stream that was not drawn

SQLite in WAL mode, so that other processes read it while the run writes. It is also what a resumed run starts from: which
batch made which version, which groups wait, which were cut off, and how far each environment's tasks were drawn.
A group is trained once, in its state; `uses` counts the steps that it was in, and `reuses` says which they were after the first.
Versions that no batch made are rows of `rollbacks`: weights and optimizer went back to a checkpoint.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from rl_core.types import Task


class State(StrEnum):
    """Where a task is. The last four are final."""

    DRAWN = "drawn"
    READY = "ready"
    TRAINED = "trained"
    FILTERED = "filtered"
    ABANDONED = "abandoned"
    PASSED = "passed"


SCHEMA = """
CREATE TABLE IF NOT EXISTS tasks (
    ticket INTEGER PRIMARY KEY, group_id TEXT UNIQUE NOT NULL, env TEXT NOT NULL, task_key TEXT NOT NULL, position INTEGER NOT NULL,
    attempt INTEGER NOT NULL DEFAULT 1, restarts TEXT NOT NULL DEFAULT '', state TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '',
    version INTEGER, uses INTEGER NOT NULL DEFAULT 0, drawn_at REAL NOT NULL, ended_at REAL, difficulty TEXT NOT NULL DEFAULT '',
    solved REAL);
CREATE TABLE IF NOT EXISTS reuses (version INTEGER NOT NULL, group_id TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS rollbacks (version INTEGER PRIMARY KEY, reason TEXT NOT NULL, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS tickets (reserved INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS open_tasks ON tasks (ticket) WHERE state IN ('drawn', 'ready');
CREATE INDEX IF NOT EXISTS batches ON tasks (version) WHERE version IS NOT NULL;
"""


TICKETS_AT_ONCE = 256
"""Tickets that one flush to disk reserves. No ticket is given twice, even if a power cut takes the row of the first: a group of the
same name may be in the journal, with tokens that would be too old for the place that the name has now."""


class LedgerError(RuntimeError):
    """A task would be counted twice or lost: a bug, never bad luck."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One row."""

    ticket: int  # order of drawing, from 0; with a gap where a run was killed
    group_id: str
    env: str
    task_key: str
    position: int  # of the task in its environment's stream
    attempt: int  # 1, and one more for each time that the group was cut off and taken up again; `restarts` says why
    state: State


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """The sum over one environment's tasks."""

    env: str
    drawn: int  # from its stream, by position
    open: int  # drawn or ready
    trained: int
    filtered: int
    abandoned: int
    passed: int  # left out by a curriculum
    restarted: int  # drawn once, cut off and taken up again
    uses: int  # steps that its groups were in: more than `trained` where groups are reused
    reasons: dict[str, int]

    @property
    def balanced(self) -> bool:
        """Every task drawn is in exactly one state."""
        return self.drawn == self.open + self.trained + self.filtered + self.abandoned + self.passed


def group_id(ticket: int) -> str:
    """The name of the group with this ticket."""
    return f"g{ticket:06d}"


class Ledger:
    """Written by the loop alone.

    A change survives the death of this process at once. What a power cut may take are the changes since the last batch was
    trained (`train` flushes to disk): groups that were drawn since then are drawn again.
    """

    def __init__(self, path: Path, *, now: Callable[[], float] = time.time) -> None:
        self._now = now  # wall clock, seconds since the epoch: for people, never for order
        self._db = sqlite3.connect(path, isolation_level=None)  # autocommit
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(SCHEMA)
        query = "SELECT max((SELECT coalesce(max(ticket) + 1, 0) FROM tasks), (SELECT coalesce(max(reserved), 0) FROM tickets))"
        self._next = self._reserved = int(self._db.execute(query).fetchone()[0])

    # --- what happened --------------------------------------------------------------------------------------------------

    def draw(self, task: Task, position: int) -> int:
        """A task was drawn: returns its ticket."""
        return self._insert(task, position, State.DRAWN)

    def pass_over(self, task: Task, position: int, reason: str) -> None:
        """A curriculum left it out: it takes a ticket, but no group has it."""
        self._insert(task, position, State.PASSED, reason)

    def score(self, name: str, solved: float | None) -> None:
        """Its group earned so much on average; None if no rollout counts."""
        self._db.execute("UPDATE tasks SET solved = ? WHERE group_id = ?", (solved, name))

    def ready(self, name: str) -> None:
        """Its group waits in the queue."""
        self._move([name], State.DRAWN, State.READY)

    def train(self, names: Sequence[str], version: int, again: Sequence[str] = ()) -> None:
        """These groups, all of them or none, made policy version `version`; those in `again` had trained before."""
        with self._transaction(durable=True):
            self._move(names, State.READY, State.TRAINED, version=version)
            self._db.executemany("INSERT INTO reuses VALUES (?, ?)", [(version, name) for name in again])
            self._db.executemany("UPDATE tasks SET uses = uses + 1 WHERE group_id = ?", [(name,) for name in (*names, *again)])

    def filter(self, name: str, reason: str) -> None:
        """Its group cannot train."""
        self._move([name], State.DRAWN, State.FILTERED, reason)

    def abandon(self, name: str, reason: str) -> None:
        """Its group cannot be finished any more."""
        self._move([name], State.DRAWN, State.ABANDONED, reason)

    def skip(self, names: Sequence[str], reason: str) -> None:
        """The step over these groups was bad and not taken: they trained nothing, and will not."""
        with self._transaction(durable=False):
            self._move(names, State.READY, State.FILTERED, reason)

    def roll_back(self, version: int, reason: str) -> None:
        """`version` is to be the newest checkpoint's weights again. Written before it is done: a resumed run does it then."""
        with self._transaction(durable=True):
            self._db.execute("INSERT INTO rollbacks VALUES (?, ?, ?)", (version, reason, self._now()))

    def restart(self, name: str, reason: str, *, times: int = 1) -> None:
        """Its group was cut off `times` times, and taken up again; `reason` says how."""
        self._db.execute(
            "UPDATE tasks SET attempt = attempt + ?, restarts = restarts || ? || char(10) WHERE group_id = ? AND state = ?",
            (times, reason, name, State.DRAWN),
        )

    def abandon_open(self, reason: str) -> int:
        """Every task that is not in a final state gets one. Returns how many."""
        return self._db.execute(
            "UPDATE tasks SET state = ?, reason = ?, ended_at = ? WHERE state IN ('drawn', 'ready')",
            (State.ABANDONED, reason, self._now()),
        ).rowcount

    # --- what is known --------------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The last policy version that was made; 0 before the first."""
        trained = int(self._db.execute("SELECT coalesce(max(version), 0) FROM tasks WHERE version IS NOT NULL").fetchone()[0])
        return max(trained, self.rollbacks[-1]) if self.rollbacks else trained

    @property
    def rollbacks(self) -> list[int]:
        """The versions that no batch made, in order."""
        return [row[0] for row in self._db.execute("SELECT version FROM rollbacks ORDER BY version")]

    @property
    def reused(self) -> int:
        """How often a group trained once more."""
        return int(self._db.execute("SELECT count(*) FROM reuses").fetchone()[0])

    def batch(self, version: int) -> list[str]:
        """The groups that made `version`, in the order in which they were trained."""
        return _batch(self._db, version)

    def reusable(self, max_staleness: int, max_uses: int) -> dict[str, int]:
        """{group: its uses} of trained groups that may train once more, as far as the ledger knows: some are too old."""
        query = "SELECT group_id, uses FROM tasks WHERE version > ? AND uses < ?"
        return dict(self._db.execute(query, (self.version - max_staleness, max_uses)).fetchall())

    def trained_since(self, version: int) -> list[str]:
        """The groups that made versions above `version`, for the first time or once more."""
        query = "SELECT group_id FROM tasks WHERE version > ? UNION SELECT group_id FROM reuses WHERE version > ?"
        return [row[0] for row in self._db.execute(query, (version, version))]

    def open(self) -> list[Entry]:
        """Tasks without a final state, in the order in which they were drawn."""
        columns = "ticket, group_id, env, task_key, position, attempt, state"
        rows = self._db.execute(f"SELECT {columns} FROM tasks WHERE state IN ('drawn', 'ready') ORDER BY ticket").fetchall()
        return [
            Entry(ticket=t, group_id=g, env=e, task_key=k, position=p, attempt=a, state=State(s)) for t, g, e, k, p, a, s in rows
        ]  # fmt: skip

    def trained_after(self, ticket: int) -> list[int]:
        """Tickets above `ticket` whose groups have been trained: those that overtook it."""
        return [row[0] for row in self._db.execute("SELECT ticket FROM tasks WHERE ticket > ? AND state = 'trained'", (ticket,))]

    def scores(self, env: str) -> list[tuple[str, str, float]]:
        """(difficulty, task key, solved) of the groups that came back, in the order in which they were drawn."""
        rows = "SELECT difficulty, task_key, solved FROM tasks WHERE env = ? AND solved IS NOT NULL ORDER BY ticket"
        return [(d, k, s) for d, k, s in self._db.execute(rows, (env,))]

    def counts(self) -> dict[str, dict[str, int]]:
        """{env: {"position": where its stream goes on, and each state: how many}}."""
        counts: dict[str, dict[str, int]] = {}
        rows = self._db.execute("SELECT env, state, count(*), max(position) FROM tasks GROUP BY env, state")
        for env, state, count, position in rows:
            mine = counts.setdefault(env, {"position": 0, **dict.fromkeys(State, 0)})
            mine[state] = count
            mine["position"] = max(mine["position"], position + 1)
        return counts

    def close(self) -> None:
        """A ledger that was closed goes on without a gap in its tickets."""
        self._reserve(self._next, durable=False)
        self._db.close()

    def _reserve(self, tickets: int, *, durable: bool) -> None:
        """Tickets below this are given, or may have been."""
        with self._transaction(durable=durable):
            self._db.execute("DELETE FROM tickets")
            self._db.execute("INSERT INTO tickets VALUES (?)", (tickets,))
        self._reserved = tickets

    def _insert(self, task: Task, position: int, state: State, reason: str = "") -> int:
        if self._next == self._reserved:
            self._reserve(self._next + TICKETS_AT_ONCE, durable=True)
        ticket, now = self._next, self._now()
        self._db.execute(
            "INSERT INTO tasks (ticket, group_id, env, task_key, position, state, reason, drawn_at, difficulty)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (ticket, group_id(ticket), task.env, task.key, position, state, reason, now, task.difficulty),
        )
        self._next += 1
        return ticket

    def _move(self, names: Sequence[str], wanted: State, state: State, reason: str = "", version: int | None = None) -> None:
        ended = None if state is State.READY else self._now()
        for name in names:
            changed = self._db.execute(
                "UPDATE tasks SET state = ?, reason = ?, version = ?, ended_at = ? WHERE group_id = ? AND state = ?",
                (state, reason, version, ended, name, wanted),
            ).rowcount
            if changed != 1:
                row = self._db.execute("SELECT state FROM tasks WHERE group_id = ?", (name,)).fetchone()
                raise LedgerError(
                    f"ledger: {name} cannot become {state.value}: it is {row[0] if row else 'unknown'}, wanted {wanted.value}"
                )

    @contextmanager
    def _transaction(self, *, durable: bool) -> Iterator[None]:
        """All or nothing; with `durable`, on disk when it is left, with all that was written before it."""
        self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        else:
            self._db.execute("COMMIT")
        finally:
            self._db.execute("PRAGMA synchronous=NORMAL")


def read_batch(path: Path, version: int) -> list[str]:
    """The groups that made `version`, in the order in which they were trained; empty if none did. Of a finished or a running run."""
    with _reading(path) as db:
        return _batch(db, version)


def _batch(db: sqlite3.Connection, version: int) -> list[str]:
    """Those that trained for the first time, then those that did once more."""
    fresh = db.execute("SELECT group_id FROM tasks WHERE version = ? ORDER BY ticket", (version,))
    again = db.execute("SELECT group_id FROM reuses WHERE version = ? ORDER BY rowid", (version,))
    return [row[0] for row in (*fresh, *again)]


def read_rows(path: Path, query: str, values: Sequence[Any] = ()) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Names of the columns and rows of one SELECT over the tables of SCHEMA. Of a finished or a running run."""
    with _reading(path) as db:
        cursor = db.execute(query, values)
        return [column[0] for column in cursor.description], cursor.fetchall()


def read_balance(path: Path) -> list[Balance]:
    """The sums per environment, of a finished or a running run.

    What was drawn is counted by tickets, which have no gaps; what became of it by states: a lost or doubled row shows.
    """
    with _reading(path) as db:
        rows = db.execute(
            "SELECT env, state, reason, count(*), sum(attempt > 1), sum(uses) FROM tasks GROUP BY env, state, reason"
        ).fetchall()
        positions = dict(db.execute("SELECT env, max(position) + 1 FROM tasks GROUP BY env").fetchall())
    balances = []
    for env in sorted({r[0] for r in rows}):
        mine = [row[1:] for row in rows if row[0] == env]
        count = {s: sum(n for state, _, n, *_ in mine if state == s) for s in State}
        reasons: dict[str, int] = {}
        for state, reason, n, *_ in mine:
            if reason:
                reasons[f"{state}: {reason}"] = reasons.get(f"{state}: {reason}", 0) + n
        balances.append(
            Balance(
                env=env, drawn=positions[env], open=count[State.DRAWN] + count[State.READY], trained=count[State.TRAINED],
                filtered=count[State.FILTERED], abandoned=count[State.ABANDONED], passed=count[State.PASSED],
                restarted=sum(row[3] for row in mine), uses=sum(row[4] for row in mine), reasons=reasons,
            )
        )  # fmt: skip
    return balances


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """The ledger at `path`, to read; an empty one where the run has drawn no task yet."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True) if path.is_file() else sqlite3.connect(":memory:")) as db:
        if not path.is_file():
            db.executescript(SCHEMA)
        yield db
