"""SQL over one stored run: DuckDB views over the store's Parquet, the ledger and the events. Readable while the run writes.

Only the views whose names occur in the question are made, so that a small question to a large store starts at once. Once they are
there, DuckDB is closed off: a question can read this run's segments and nothing else, and only SELECT is let through.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import duckdb
import msgspec
import numpy as np
import pyarrow as pa

from infra.errors import UsageError
from infra.strict_json import plain
from rl_core.events import Event
from rl_core.ledger import read_rows
from rl_core.run_store import StoredRun, view_rollouts

OVER: Mapping[str, str] = {
    "tasks": """
        SELECT group_id, label, any_value(env) AS env, any_value(task_key) AS task_key, any_value(split) AS split,
            any_value(difficulty) AS difficulty, any_value(task) AS task, count(*) AS rollouts, avg(reward) AS reward,
            stddev_pop(reward) AS reward_std
        FROM rollouts GROUP BY group_id, label""",
    "turns": """
        SELECT rollout_id, group_id, env, label, n AS turn, t ->> 'content' AS content, t ->> 'thought' AS thought,
            t -> 'tool_calls' AS tool_calls, t -> 'malformed' AS malformed
        FROM (SELECT rollout_id, group_id, env, label, unnest(list) AS t, generate_subscripts(list, 1) - 1 AS n
            FROM (SELECT rollout_id, group_id, env, label, from_json(CASE WHEN json_valid(turns) THEN turns
                ELSE regexp_replace(turns, '\\\\u[dD][89a-fA-F][0-9a-fA-F]{2}', '\\\\ufffd', 'g') END, '["JSON"]') AS list
            FROM rollouts))""",
    "components": """
        SELECT rollout_id, group_id, env, label, c.key AS name, c.value AS value
        FROM (SELECT rollout_id, group_id, env, label,
            unnest(map_entries(TRY_CAST(TRY_CAST(components AS JSON) AS MAP(VARCHAR, DOUBLE)))) AS c FROM rollouts)""",
    "tokens": """
        SELECT rollout_id, group_id, env, label, completion, unnest(ids) AS token_id, generate_subscripts(ids, 1) - 1 AS place,
            unnest(lps) AS logprob, unnest(vs) AS version, list_contains(f, generate_subscripts(ids, 1) - 1) AS forced
        FROM (SELECT rollout_id, group_id, env, label, generate_subscripts(token_ids, 1) - 1 AS completion, unnest(token_ids) AS ids,
            unnest(logprobs) AS lps, unnest(versions) AS vs, unnest(forced) AS f FROM rollouts)""",
    "ledger": "SELECT * FROM drawn",
    "batches": """
        SELECT version, group_id, env, task_key, difficulty, false AS again FROM drawn WHERE state = 'trained'
        UNION ALL
        SELECT reused.version, group_id, env, task_key, difficulty, true FROM reused JOIN drawn USING (group_id)""",
    "steps": "SELECT * FROM measured",
    "versions": """
        SELECT version, made_at, coalesce(groups, 0) AS groups, rolled_back
        FROM (SELECT version, min(time) AS made_at FROM measured GROUP BY version)
        FULL JOIN (SELECT version, count(*) AS groups FROM drawn WHERE state = 'trained' GROUP BY version) USING (version)
        FULL JOIN (SELECT version, reason AS rolled_back FROM undone) USING (version)""",
    "events": "SELECT * FROM happened",
}
"""View -> what it selects, from SOURCES."""

LEDGER = {
    "drawn": "SELECT ticket, group_id, env, task_key, position, attempt, restarts, state, reason, version, uses, drawn_at, ended_at, "
    "difficulty, solved FROM tasks",
    "reused": "SELECT version, group_id FROM reuses",
    "undone": "SELECT version, reason, at FROM rollbacks",
}

LEDGER_TYPES = {
    **dict.fromkeys(("ticket", "position", "attempt", "version", "uses", "trained"), pa.int64()),
    **dict.fromkeys(("drawn_at", "ended_at", "solved", "at"), pa.float64()),
}
"""All others are text."""

SOURCES = ("rollouts", *LEDGER, "measured", "happened")

VIEWS = ("rollouts", *OVER)
"""What a question may name; the first one is a source as it is."""


@dataclass(frozen=True, slots=True)
class Question:
    """One of the ready ones."""

    asks: str
    sql: str


EXAMPLES = (
    Question("How many rollouts are stored, and how good are they?",
             "SELECT label, env, count(*) AS rollouts, avg(reward) AS reward FROM rollouts GROUP BY ALL ORDER BY ALL"),
    Question("Which tasks does the policy always fail?",
             "SELECT env, task_key, rollouts, reward FROM tasks WHERE label = 'train' AND reward <= 0 ORDER BY rollouts DESC LIMIT 20"),
    Question("Which groups teach something: rewards that differ?",
             "SELECT env, count(*) FILTER (reward_std > 0) AS teach, count(*) AS groups FROM tasks GROUP BY env ORDER BY env"),
    Question("How long are the answers, by difficulty?",
             "SELECT env, difficulty, avg(num_sampled_tokens) AS mean_tokens, avg(reward) AS mean FROM rollouts GROUP BY ALL ORDER BY ALL"),
    Question("What went wrong, and how often?",
             "SELECT env, status, count(*) AS rollouts FROM rollouts WHERE status <> 'ok' GROUP BY ALL ORDER BY rollouts DESC"),
    Question("Which part of the reward moves?",
             "SELECT env, name, avg(value) AS mean, stddev_pop(value) AS deviation FROM components GROUP BY ALL ORDER BY ALL"),
    Question("How many turns are malformed?",
             "SELECT env, count(*) AS turns, count(*) FILTER (malformed::VARCHAR NOT IN ('null', '[]', 'false', '\"\"', '0')) AS malformed "
             "FROM turns GROUP BY env ORDER BY env"),
    Question("Where did every task go?",
             "SELECT env, state, reason, count(*) AS tasks FROM ledger GROUP BY ALL ORDER BY ALL"),
    Question("How did the reward of each environment develop?",
             "SELECT version, env, value AS reward FROM steps WHERE name = 'reward' ORDER BY env, version"),
    Question("What was each version of the policy trained on?",
             "SELECT version, made_at, groups, batches.env, count(*) AS of_env, rolled_back FROM versions "
             "LEFT JOIN batches USING (version) GROUP BY ALL ORDER BY version"),
)  # fmt: skip


class Answer:
    """Names of the columns, and rows as they come."""

    def __init__(self, cursor: Any) -> None:
        self.names = [str(column[0]) for column in cursor.description or []]
        self._cursor = cursor

    def __iter__(self) -> Iterator[list[Any]]:
        while rows := self._cursor.fetchmany(1000):
            for row in rows:
                yield [plain(value) for value in row]


@contextmanager
def ask(run: StoredRun, question: str) -> Iterator[Answer]:
    """The answer, while the block lasts. Raises UsageError, one sentence, for what DuckDB does not understand or may not do."""
    with duckdb.connect(config={"threads": 2, "memory_limit": "4GB"}) as db:
        try:
            _only_reads(db, question)
            make_views(db, run, named(question))
            _close_off(db, run)
            yield Answer(db.execute(question))
        except duckdb.Error as error:
            raise UsageError(f"SQL: {_sentence(error)}") from error


def describe(run: StoredRun) -> dict[str, list[tuple[str, str]]]:
    """View -> (column, type)."""
    with duckdb.connect(config={"threads": 2}) as db:
        make_views(db, run, VIEWS)
        return {view: [(row[0], row[1]) for row in db.execute(f"DESCRIBE {view}").fetchall()] for view in VIEWS}


def named(question: str) -> list[str]:
    """The views whose names occur in it; all of them, where it asks what there is."""
    words = set(re.findall(r"\w+", question.lower()))
    everything = words & {"show", "information_schema", "duckdb_views", "duckdb_columns", "duckdb_tables"}
    return [view for view in VIEWS if everything or view in words]


def make_views(db: Any, run: StoredRun, views: Sequence[str]) -> None:
    """`views`, and the sources that they need."""
    needed = {word for view in views for word in re.findall(r"\w+", OVER.get(view, view))}
    for source in SOURCES:
        if source in needed:
            _make_source(db, run, source)
    for view in views:
        if view in OVER:
            db.execute(f"CREATE VIEW {view} AS {OVER[view]}")


def _make_source(db: Any, run: StoredRun, source: str) -> None:
    if source == "rollouts":
        view_rollouts(db, run.segments())
        return
    rows = {"measured": _measured, "happened": _happened}
    table = rows[source](run) if source in rows else ledger_table(run, LEDGER[source])
    db.register(source, table)


def _only_reads(db: Any, question: str) -> None:
    """One SELECT (SHOW, DESCRIBE and SUMMARIZE are such): COPY and the like could write where the segments are."""
    statements = db.extract_statements(question)
    if len(statements) != 1:
        raise UsageError(f"SQL: one question at a time, got {len(statements)}")
    if statements[0].type not in (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN):
        raise UsageError(f"SQL: only SELECT is answered, got {statements[0].type.name}; a stored run is never changed")


def _close_off(db: Any, run: StoredRun) -> None:
    """No file but the segments, no network, no extension, and no Python variable of ours; not to be opened again."""
    folder = str(run.run_dir.absolute() / "rollouts").replace("'", "''")
    db.execute(f"SET allowed_directories = ['{folder}']")
    for setting in ("python_enable_replacements", "autoinstall_known_extensions", "autoload_known_extensions", "enable_external_access"):
        db.execute(f"SET {setting} = false")
    db.execute("SET lock_configuration = true")


def ledger_table(run: StoredRun, query: str) -> pa.Table:
    """What the ledger answers; no row where the run drew no task. (DuckDB's own reader of SQLite is an extension, to be downloaded.)"""
    names, rows = read_rows(run.run_dir / "ledger.sqlite", query)
    columns = list(zip(*rows, strict=True)) or [()] * len(names)
    types = [LEDGER_TYPES.get(name, pa.string()) for name in names]
    return pa.table({name: pa.array(column, type_) for name, column, type_ in zip(names, columns, types, strict=True)})


def _measured(run: StoredRun) -> pa.Table:
    """One row per step and figure. A figure env/<id>/<name> has its environment in a column of its own."""
    from infra.dashboard.feed import Feed

    feed = Feed(run).refresh()
    metrics = feed.metrics()
    columns = feed.columns(metrics)
    versions, times = columns["version"].astype(np.int64), columns["time"]
    known = {metric: ~np.isnan(columns[metric]) for metric in metrics}
    which = np.repeat(np.arange(len(metrics), dtype=np.int32), [known[m].sum() for m in metrics])
    split = [m.split("/", 2) if m.startswith("env/") and m.count("/") > 1 else ["", None, m] for m in metrics]

    def joined(pick: Any, empty: Any) -> Any:
        return np.concatenate([pick(m) for m in metrics]) if metrics else empty

    def word(values: list[Any]) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(which), pa.array(values, pa.string()))

    return pa.table(
        {
            "version": joined(lambda m: versions[known[m]], np.zeros(0, np.int64)),
            "time": joined(lambda m: times[known[m]], np.zeros(0)),
            "metric": word(list(metrics)),
            "env": word([part[1] for part in split]),
            "name": word([part[2] for part in split]),
            "value": joined(lambda m: columns[m][known[m]], np.zeros(0)),
        }
    )


class _Line(msgspec.Struct):
    kind: str
    time: float
    data: msgspec.Raw


def _happened(run: StoredRun) -> pa.Table:
    """Every whole line of events.jsonl; its data is JSON as it stands there."""
    path = run.run_dir / "events.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    decode = msgspec.json.Decoder(_Line).decode
    kinds, times, data = [], [], []
    for line in lines:
        if not line.strip():
            continue
        try:
            event = decode(line)
            kind, time, text = event.kind, event.time, bytes(event.data).decode()
        except msgspec.DecodeError:  # NaN and infinity are not JSON, but Python writes and reads them
            loose = Event.from_json(line.decode())
            kind, time, text = loose.kind, loose.time, json.dumps(plain(dict(loose.data)))
        kinds.append(kind)
        times.append(time)
        data.append(text)
    return pa.table({"kind": pa.array(kinds, pa.string()), "time": pa.array(times, pa.float64()), "data": pa.array(data, pa.string())})


def _sentence(error: duckdb.Error) -> str:
    """DuckDB's message without the picture of the query below it."""
    lines = [line.strip() for line in str(error).split("\n\nLINE ")[0].splitlines() if line.strip()]
    return " ".join(lines) or type(error).__name__


__all__ = ["EXAMPLES", "VIEWS", "Answer", "Question", "ask", "describe", "ledger_table"]
