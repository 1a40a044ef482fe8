"""Pages of a run's rollouts: DuckDB over the store's Parquet, joined with what the ledger says became of their groups.

Every value that a visitor gives is a bound parameter; every name that stands in the SQL text is one of ours.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from infra.sql import ledger_table
from rl_core.ledger import read_rows
from rl_core.run_store import StoredRun, view_rollouts

QUERY_SECONDS = 30.0
"""A question that takes longer is ended: a page that nobody waits for must not hold the machine."""

LIST_COLUMNS = (
    "rollout_id, group_id, env, label, split, difficulty, reward, status, min_version, max_version, "
    "num_prompt_tokens, num_sampled_tokens, started_at, seconds, worker, truncated"
)

SORTS = {
    "newest": "started_at DESC, rollout_id",
    "oldest": "started_at, rollout_id",
    "best": "reward DESC NULLS LAST, rollout_id",
    "worst": "reward NULLS LAST, rollout_id",
    "longest": "num_sampled_tokens DESC, rollout_id",
    "slowest": "seconds DESC, rollout_id",
}

FATES = "SELECT group_id, state, reason, version AS trained FROM tasks"
"""What became of each group, by the ledger."""


class TooSlow(ValueError):
    """A query was ended. The message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which rollouts; None and "" leave a condition out."""

    env: str = ""
    label: str = ""
    status: str = ""
    state: str = ""
    difficulty: str = ""
    group: str = ""
    worker: str = ""
    text: str = ""  # in the conversation, the evidence or the id; upper and lower case are the same
    min_reward: float | None = None
    max_reward: float | None = None
    min_step: int | None = None  # the step that trained it
    max_step: int | None = None

    @property
    def fates(self) -> bool:
        """Whether it asks for what became of a rollout's group."""
        return bool(self.state) or self.min_step is not None or self.max_step is not None

    def where(self) -> tuple[str, list[Any]]:
        """The condition, and its parameters."""
        conditions: list[str] = []
        values: list[Any] = []
        columns = {"env": "env", "label": "label", "status": "status", "state": "state", "difficulty": "difficulty", "worker": "worker"}
        for name, column in (columns | {"group": "group_id"}).items():
            if value := getattr(self, name):
                conditions.append(f"{column} = ?")
                values.append(value)
        bounds = (("min_reward", "reward >= ?"), ("max_reward", "reward <= ?"), ("min_step", "trained >= ?"), ("max_step", "trained <= ?"))
        for name, condition in bounds:
            if (value := getattr(self, name)) is not None:
                conditions.append(condition)
                values.append(value)
        if self.text:
            needle = json.dumps(self.text)[1:-1]  # the columns hold JSON
            conditions.append(
                "(" + " OR ".join(f"contains(lower({c}), lower(?))" for c in ("messages", "evidence")) + " OR rollout_id = ?)"
            )
            values += [needle, needle, self.text]
        return " AND ".join(conditions) or "true", values


class Rollouts:
    """One run's rollouts. Thread-safe; sees new segments as they appear."""

    def __init__(self, run: StoredRun) -> None:
        self._run = run
        self._db: Any = None  # connected at the first question: most runs of a list are asked none
        self._segments: list[str] | None = None
        self._fates_seen: tuple[float, float] | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """Let go of DuckDB; another question would connect again."""
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db, self._segments, self._fates_seen = None, None, None

    def page(self, wanted: Filter, *, sort: str = "newest", offset: int = 0, limit: int = 50) -> dict[str, Any]:
        """{"total": matching, "rows": one page of them without their text}."""
        rows = self.some(wanted, sort=sort, offset=offset, limit=limit)
        return {"total": self.count(wanted), "offset": offset, "limit": limit, "rows": rows}

    def count(self, wanted: Filter) -> int:
        """How many match."""
        return int(self._matching("count(*) AS n", wanted)[0]["n"])

    def some(self, wanted: Filter, *, sort: str = "newest", offset: int = 0, limit: int = 50) -> list[dict[str, Any]]:
        """One page of them, without their text."""
        if sort not in SORTS:
            raise ValueError(f"sort {sort!r}, wanted one of {', '.join(SORTS)}")
        return self._with_fates(self._matching(LIST_COLUMNS, wanted, f"ORDER BY {SORTS[sort]} LIMIT ? OFFSET ?", [limit, offset]))

    def _matching(self, columns: str, wanted: Filter, rest: str = "", more: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Of the view that has all that is asked for."""
        where, values = wanted.where()
        view = "known" if wanted.fates else "rollouts"
        return self._rows(f"SELECT {columns} FROM {view} WHERE {where} {rest}", [*values, *more], fates=wanted.fates)

    def one(self, rollout_id: str, label: str = "") -> dict[str, Any] | None:
        """A rollout with everything that is stored of it, and its siblings; None if there is none of that id."""
        where, values = ("rollout_id = ? AND label = ?", [rollout_id, label]) if label else ("rollout_id = ?", [rollout_id])
        rows = self._with_fates(self._rows(f"SELECT * FROM rollouts WHERE {where} LIMIT 1", values))
        if not rows:
            return None
        row = rows[0]
        for name in ("components", "evidence", "messages", "task", "turns"):
            row[name] = json.loads(row[name]) if row[name] else None
        row["siblings"] = self._rows(
            "SELECT rollout_id, label, reward, status FROM rollouts WHERE group_id = ? AND label = ? ORDER BY rollout_id LIMIT 256",
            [row["group_id"], row["label"]],
        )
        return row

    def _with_fates(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows with what the ledger says of their groups: of these few, which is quicker than the view `known`."""
        groups = list({row["group_id"] for row in rows if row["label"] == "train"})
        query = f"{FATES} WHERE group_id IN ({', '.join('?' * len(groups))})"
        fates = {name: fate for name, *fate in read_rows(self._run.run_dir / "ledger.sqlite", query, groups)[1]}
        for row in rows:
            fate = fates.get(row["group_id"]) if row["label"] == "train" else None
            row["state"], row["reason"], row["trained"] = fate or (None, None, None)
        return rows

    def facets(self) -> dict[str, list[dict[str, Any]]]:
        """What there is to filter by, with counts."""
        return {
            column: self._rows(
                f"SELECT {column} AS value, count(*) AS n FROM known WHERE {column} IS NOT NULL "
                "GROUP BY ALL ORDER BY n DESC, value LIMIT 500",
                fates=True,
            )
            for column in ("env", "label", "status", "state", "difficulty", "worker")
        }

    def band(self, envs: Sequence[str], *, bins: int = 60) -> dict[str, dict[str, list[float | None]]]:
        """Mean reward of the training groups of each environment, by the newest version that sampled them: quartiles and extremes of a bin.

        {env: {"step": [...], "low": [...], "q1": [...], "q3": [...], "high": [...]}}
        """
        rows = self._rows(
            "WITH groups AS (SELECT env, group_id, max(max_version) AS v, avg(reward) AS r FROM rollouts "
            "WHERE label = 'train' AND reward IS NOT NULL AND list_contains(?, env) GROUP BY ALL), "
            "span AS (SELECT greatest(1, ceil((max(v) + 1) / ?))::INT AS width FROM groups) "
            "SELECT env, (v // width) * width + width / 2.0 AS step, min(r) AS low, quantile_cont(r, 0.25) AS q1, "
            "quantile_cont(r, 0.75) AS q3, max(r) AS high FROM groups, span WHERE v IS NOT NULL GROUP BY ALL ORDER BY env, step",
            [list(envs), bins],
        )
        found: dict[str, dict[str, list[float | None]]] = {}
        for row in rows:
            band = found.setdefault(row["env"], {name: [] for name in ("step", "low", "q1", "q3", "high")})
            for name, column in band.items():
                column.append(row[name])
        return found

    def staleness(self) -> list[dict[str, Any]]:
        """Trained rollouts by environment and staleness of their oldest token: the learner's version less the one that sampled it."""
        return self._rows(
            "SELECT env, trained - 1 - min_version AS staleness, count(*) AS rollouts, sum(num_sampled_tokens)::BIGINT AS tokens "
            "FROM known WHERE label = 'train' AND trained IS NOT NULL AND min_version IS NOT NULL GROUP BY ALL ORDER BY ALL",
            fates=True,
        )

    def spans(self, start: float, end: float) -> tuple[dict[str, npt.NDArray[np.float64]], dict[str, npt.NDArray[np.float64]]]:
        """worker -> (start, end) of every rollout that was under way between two times, seconds since the epoch; and the same by label."""
        with self._cursor(fates=False) as db:
            found = db.execute(
                "SELECT coalesce(worker, '') AS worker, label, started_at, started_at + seconds AS ended_at FROM rollouts "
                "WHERE started_at < ? AND started_at + seconds > ?",
                [end, start],
            ).fetchnumpy()
        times = np.stack([np.asarray(found["started_at"], np.float64), np.asarray(found["ended_at"], np.float64)], axis=1)
        workers, labels = np.asarray(found["worker"], object), np.asarray(found["label"], object)
        return (
            {name: times[workers == name] for name in sorted(set(workers))},
            {name: times[labels == name] for name in sorted(set(labels))},
        )

    def _rows(self, query: str, values: Sequence[Any] = (), *, fates: bool = False) -> list[dict[str, Any]]:
        with self._cursor(fates=fates) as db:
            cursor = db.execute(query, list(values))
            names = [column[0] for column in cursor.description or []]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    @contextmanager
    def _cursor(self, *, fates: bool) -> Iterator[Any]:
        """A connection of this thread, over what is stored now; with `fates` there is the view `known`. Ended after QUERY_SECONDS."""
        with self._lock:
            if self._db is None:
                self._db = duckdb.connect(config={"threads": 2, "memory_limit": "2GB"})
                self._db.execute("SET parquet_metadata_cache = true")
            self._look_again()
            if fates:
                self._read_fates()
            cursor = self._db.cursor()
        timer = threading.Timer(QUERY_SECONDS, cursor.interrupt)
        timer.daemon = True
        timer.start()
        try:
            yield cursor
        except duckdb.InterruptException as error:
            raise TooSlow(f"the question took more than {QUERY_SECONDS:.0f} s; narrow it by environment or label") from error
        finally:
            timer.cancel()
            timer.join()  # a thread that holds a cursor while the interpreter ends makes DuckDB complain on standard error
            cursor.close()

    def _look_again(self) -> None:
        """Segments appear whole: the view over them is made anew when they did."""
        if (segments := self._run.segments()) != self._segments:
            view_rollouts(self._db, segments)
            self._segments = segments

    def _read_fates(self) -> None:
        """The whole ledger, when it has changed, and `known`: every rollout with what became of its group."""
        path = self._run.run_dir / "ledger.sqlite"
        seen = (_changed(path), _changed(path.with_name(path.name + "-wal")))
        if seen != self._fates_seen:
            self._replace("fates", ledger_table(self._run, FATES))
            self._fates_seen = seen
        self._db.execute(
            "CREATE OR REPLACE VIEW known AS SELECT rollouts.*, fates.state, fates.reason, fates.trained "
            "FROM rollouts LEFT JOIN fates ON rollouts.label = 'train' AND rollouts.group_id = fates.group_id"
        )

    def _replace(self, name: str, rows: pa.Table) -> None:
        """A table, and no registered view of `rows`: cursors see only what the database itself holds."""
        self._db.register("incoming", rows)
        self._db.execute(f"CREATE OR REPLACE TABLE {name} AS SELECT * FROM incoming")
        self._db.unregister("incoming")


def _changed(path: Any) -> float:
    try:
        return float(path.stat().st_mtime_ns)
    except FileNotFoundError:
        return 0.0


def busy(spans: Mapping[str, npt.NDArray[np.float64]], edges: npt.NDArray[np.float64]) -> dict[str, list[float]]:
    """name -> mean number of rollouts under way in each bin between `edges`."""
    width = np.diff(edges)
    found = {}
    for name, times in spans.items():
        starts, ends = np.sort(times[:, 0]), np.sort(times[:, 1])
        area = _integral(starts, edges) - _integral(ends, edges)
        found[name] = [round(float(v), 3) for v in np.maximum(np.diff(area) / width, 0.0)]
    return found


def _integral(events: npt.NDArray[np.float64], at: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sum over events before t of (t - event), for each t of `at`."""
    counts = np.searchsorted(events, at)
    sums = np.concatenate([[0.0], np.cumsum(events - at[0])])
    return counts * (at - at[0]) - sums[counts]


__all__ = ["Filter", "Rollouts", "TooSlow", "busy"]
