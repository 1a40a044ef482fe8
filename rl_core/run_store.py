"""The run store: everything that a run leaves behind, in one folder that is readable while the run goes.

    runs/<id>/
        config.yaml                the resolved config
        events.jsonl               one event per line, appended as it happens (rl_core/events.py)
        rollouts/part-00000.parquet  every rollout, in segments that appear whole or not at all
        ledger.sqlite              where every task went (rl_core/ledger.py)
        journal/                   finished groups that a resumed run would need (rl_core/journal.py)
        drafts/                    rollouts under way (rl_core/drafts.py)
        checkpoints/               written by the learner
        curves.png, report.html    drawn at the end, and again by `polyrl curves`

One process writes (`RunStore`), any number read (`StoredRun`). The writer holds a lock on events.jsonl for as long as it
lives, so a reader can tell a run that goes on from one that was killed.
"""

from __future__ import annotations

import fcntl
import json
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rl_core.config import RunConfig
from rl_core.config_files import to_yaml
from rl_core.events import Event
from rl_core.segments import Retention, list_segments, number_of, write_atomically
from rl_core.types import Group, Rollout

LABELS = ("train", "before", "during", "after", "honeypot")

SEGMENT_ROWS = 512
"""Rollouts per Parquet segment: large enough to compress, small enough to lose little when the machine dies."""

SEGMENT_SECONDS = 10.0
"""A segment is written at the latest this long after its first rollout."""

SCHEMA = pa.schema(
    [
        ("rollout_id", pa.string()),
        ("group_id", pa.string()),
        ("env", pa.string()),
        ("task_key", pa.string()),
        ("split", pa.string()),
        ("label", pa.string()),  # one of LABELS
        ("difficulty", pa.string()),
        ("step", pa.int32()),  # null where the caller does not know it
        ("reward", pa.float32()),  # null where the rollout is masked
        ("status", pa.string()),
        ("components", pa.string()),  # JSON object of numbers
        ("evidence", pa.string()),  # JSON object of strings
        ("messages", pa.string()),  # JSON list of {role, content}
        ("task", pa.string()),  # JSON object {seed, public, private}: with the turns, what re-scoring needs
        ("turns", pa.string()),  # JSON list of {content, thought, tool_calls, malformed}
        ("truncated", pa.bool_()),  # a budget ended the episode, after the turns
        ("num_prompt_tokens", pa.int32()),
        ("num_sampled_tokens", pa.int32()),
        ("num_thinking_tokens", pa.int32()),  # of these, within thoughts
        ("thoughts_closed", pa.int32()),  # thoughts that reached environments.<id>.thinking_budget: we closed them, with a token each
        ("min_version", pa.int32()),
        ("max_version", pa.int32()),
        ("drafted", pa.int32()),
        ("accepted", pa.int32()),
        ("engine_steps", pa.int32()),
        ("started_at", pa.float64()),
        ("seconds", pa.float32()),
        ("worker", pa.string()),
        ("prompt_ids", pa.list_(pa.list_(pa.int32()))),  # per completion; null unless the store keeps tokens
        ("token_ids", pa.list_(pa.list_(pa.int32()))),
        ("logprobs", pa.list_(pa.list_(pa.float32()))),
        ("forced", pa.list_(pa.list_(pa.int32()))),  # places in token_ids of what we wrote and the policy did not sample
        ("versions", pa.list_(pa.list_(pa.int32()))),  # of the policy that sampled each token
    ]
)


STEP = Event(kind="step", data={}, time=0.0).to_json().split(",")[0]
"""How the line of a step starts."""


class NoSuchRun(ValueError):
    """There is no stored run of that name."""


class RunStore:
    """The writer. Thread-safe; `close` returns once everything is on disk."""

    def __init__(self, run_dir: Path, *, keep_tokens: bool = False, max_bytes: int | None = None) -> None:
        """`max_bytes` of rollouts: beyond them the oldest ones of training go (rl_core/segments.py). None keeps all."""
        self.run_dir, self._keep_tokens = run_dir, keep_tokens
        (run_dir / "rollouts").mkdir(parents=True, exist_ok=True)
        _end_torn_line(run_dir / "events.jsonl")
        self._events: IO[str] = (run_dir / "events.jsonl").open("a", encoding="utf-8")
        try:
            fcntl.flock(self._events, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._events.close()
            raise ValueError(f"another process writes to the run {run_dir.name}; stop it first, or start a new run") from error
        self._lock = threading.Lock()
        self._rows: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._first_segment = max((number_of(p) + 1 for p in list_segments(run_dir / "rollouts")), default=0)
        self._retention = None if max_bytes is None else Retention(run_dir / "rollouts", max_bytes)
        self._writer = threading.Thread(target=self._write_segments, name="run-store", daemon=True)
        self._writer.start()

    def emit(self, event: Event) -> None:
        """Append one event; it is readable by others when this returns."""
        with self._lock:
            self._events.write(event.to_json() + "\n")
            self._events.flush()

    def add_groups(self, groups: Sequence[Group], label: str, step: int | None = None) -> None:
        """Keep every rollout of `groups`. `label` says what they were sampled for: one of LABELS."""
        if label not in LABELS:
            raise ValueError(f"label {label!r}, wanted one of {', '.join(LABELS)}")
        if self._failure is not None:
            raise RuntimeError(f"rollouts cannot be stored: {self._failure}") from self._failure
        for group in groups:
            for rollout in group.rollouts:
                self._rows.put(_row(group, rollout, label, step, keep_tokens=self._keep_tokens))

    def close(self) -> None:
        """Write what is left and let go of the folder."""
        if self._events.closed:
            return
        self._rows.put(None)
        self._writer.join()
        self._events.close()
        if self._failure is not None:
            raise RuntimeError(f"rollouts could not be stored: {self._failure}") from self._failure

    def _write_segments(self) -> None:
        """The background thread: rows come in, whole files come out."""
        rows: list[dict[str, Any]] = []
        due = 0.0
        number = self._first_segment
        open_ = True
        while open_:
            try:
                row = self._rows.get(timeout=max(0.05, due - time.monotonic()) if rows else None)
                if row is None:
                    open_ = False
                else:
                    due = due if rows else time.monotonic() + SEGMENT_SECONDS
                    rows.append(row)
            except queue.Empty:
                pass
            if rows and (not open_ or len(rows) >= SEGMENT_ROWS or time.monotonic() >= due):
                try:
                    self._write_segment(number, rows)
                except BaseException as error:  # noqa: BLE001 - kept, and raised by the next add_groups or by close
                    self._failure = error
                    return
                number, rows = number + 1, []

    def _write_segment(self, number: int, rows: list[dict[str, Any]]) -> None:
        path = self.run_dir / "rollouts" / f"part-{number:05d}.parquet"
        write_atomically(path, pa.Table.from_pylist(rows, schema=SCHEMA))
        if self._retention is not None and (said := self._retention.written(path)):
            self.emit(Event(kind="note", data={"text": said}))

    @staticmethod
    def find(runs_dir: Path, name: str) -> StoredRun:
        """The stored run called `name`: an id, a unique part of one, a path, or "latest". Raises NoSuchRun."""
        if name != "latest" and (Path(name) / "config.yaml").is_file():
            return StoredRun(Path(name))
        runs = list_runs(runs_dir)
        if not runs:
            raise NoSuchRun(
                f"no run in {str(runs_dir)!r}; start one with `polyrl run configs/quickstart.yaml`, or look elsewhere with --runs-dir"
            )
        if name == "latest":
            return runs[-1]
        matches = [r for r in runs if r.id == name] or [r for r in runs if name in r.id]
        if len(matches) == 1:
            return matches[0]
        known = ", ".join(r.id for r in (matches or runs)[-5:])
        raise NoSuchRun(f"{'several runs match' if matches else 'no run'} {name!r} in {str(runs_dir)!r}; wanted one of {known}, or latest")


def create_run_dir(config: RunConfig, run_id: str = "") -> Path:
    """Make the folder of a new run and put its resolved config into it. Ids sort by time: 20261123-214400-quickstart.

    With a `run_id`, the folder has that name. Raises FileExistsError if there is one.
    """
    stem = run_id or time.strftime("%Y%m%d-%H%M%S-") + "".join(c if c.isalnum() or c in "-_." else "-" for c in config.name)
    for attempt in range(1000):
        run_dir = Path(config.runs_dir).absolute() / (stem + (f"-{attempt}" if attempt else ""))
        try:
            run_dir.mkdir(parents=True)
        except FileExistsError:
            if run_id:
                raise
            continue
        (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        return run_dir
    raise RuntimeError(f"a thousand runs named {stem} in one second")


def list_runs(runs_dir: Path) -> list[StoredRun]:
    """All stored runs, oldest first."""
    folders = [p.parent for p in runs_dir.glob("*/config.yaml") if not p.parent.is_symlink()]
    return [StoredRun(f) for f in sorted(folders, key=lambda f: ((f / "config.yaml").stat().st_mtime_ns, f.name))]


@dataclass(frozen=True, slots=True)
class StoredRun:
    """The reader: of a run that ended, was killed, or still goes on."""

    run_dir: Path

    @property
    def id(self) -> str:
        return self.run_dir.name

    @property
    def state(self) -> str:
        """finished, stopped, failed; or running; or killed, if its process ended without a word."""
        outcome = ""
        for event in self.events(steps=False):
            if event.kind in ("run_started", "run_finished"):
                outcome = str(event.data.get("outcome", ""))
        return self.state_after(outcome)

    def state_after(self, outcome: str) -> str:
        """`state`, if the last start or end that its events tell of had this outcome; a start has none."""
        return outcome or ("running" if self.is_being_written else "killed")

    @property
    def is_being_written(self) -> bool:
        """Whether a process holds the run open."""
        return _is_locked(self.run_dir / "events.jsonl")

    def events(self, *, steps: bool = True) -> Iterator[Event]:
        """All whole events so far, oldest first. A torn last line is a write in progress, or the last breath of a killed run.

        Nearly all of a long run's events are steps; without them, their lines are not parsed.
        """
        path = self.run_dir / "events.jsonl"
        if not path.is_file():
            return
        with path.open(encoding="utf-8") as file:
            for line in file:
                if not line.endswith("\n"):
                    return
                if line.strip() and (steps or not line.startswith(STEP)):
                    yield Event.from_json(line)

    def segments(self) -> list[str]:
        """The files of its rollouts that are whole, oldest first."""
        return [str(p) for p in list_segments((self.run_dir / "rollouts").absolute())]

    def sql(self, query: str) -> list[dict[str, Any]]:
        """Rows of a SQL query over the view `rollouts` (DuckDB; columns are those of SCHEMA)."""
        import duckdb  # half a second to import, and only readers need it

        with duckdb.connect(config={"threads": 1}) as db:
            view_rollouts(db, self.segments())
            cursor = db.execute(query)
            names = [column[0] for column in cursor.description or []]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def view_rollouts(db: Any, segments: Sequence[str]) -> None:
    """The view `rollouts` of a DuckDB connection: one row per rollout, the columns those of SCHEMA. It replaces an earlier one.

    To match columns by name DuckDB opens every file first, a second for a million rollouts; it is told to where the columns changed
    between the first and the last segment, that is, where a later version of this program resumed the run. The newest segments come
    first: a question for the newest rollouts then skips all others, by the extremes that each file states of its columns.
    """
    if segments:
        changed = pq.read_schema(segments[0]).names != pq.read_schema(segments[-1]).names
        db.from_parquet(list(segments)[::-1], union_by_name=changed).create_view("rollouts", replace=True)
    else:  # a table, since cursors see nothing that is only registered
        db.register("incoming", SCHEMA.empty_table())
        db.execute("CREATE OR REPLACE TABLE nothing AS SELECT * FROM incoming")
        db.unregister("incoming")
        db.execute("CREATE OR REPLACE VIEW rollouts AS SELECT * FROM nothing")


def _row(group: Group, rollout: Rollout, label: str, step: int | None, *, keep_tokens: bool) -> dict[str, Any]:
    """One rollout as a row of SCHEMA."""
    completions = rollout.completions
    versions = [span.version for c in completions for span in c.spans if span.stop > span.start]
    verdict, task = rollout.verdict, group.task
    row: dict[str, Any] = {
        "rollout_id": rollout.id,
        "group_id": group.id,
        "env": task.env,
        "task_key": task.key,
        "split": task.split,
        "label": label,
        "difficulty": task.difficulty,
        "step": step,
        "reward": verdict.reward,
        "status": verdict.status.value,
        "components": json.dumps(dict(verdict.components)),
        "evidence": json.dumps(dict(verdict.evidence)),
        "messages": json.dumps([{"role": m.role, "content": m.content} for m in rollout.messages]),
        "task": json.dumps({"seed": task.seed, "public": dict(task.public), "private": dict(task.private)}),
        "turns": json.dumps([asdict(turn) for turn in rollout.turns]),
        "truncated": rollout.truncated,
        "num_prompt_tokens": rollout.num_prompt,
        "num_sampled_tokens": rollout.num_sampled,
        "num_thinking_tokens": rollout.thinking_tokens,
        "thoughts_closed": rollout.thoughts_closed,
        "min_version": min(versions, default=None),
        "max_version": max(versions, default=None),
        "drafted": sum(c.drafted for c in completions),
        "accepted": sum(c.accepted for c in completions),
        "engine_steps": sum(c.engine_steps for c in completions),
        "started_at": rollout.started_at,
        "seconds": rollout.seconds,
        "worker": rollout.worker,
    }
    if keep_tokens:
        row["prompt_ids"] = [c.prompt_ids.tolist() for c in completions]
        row["token_ids"] = [c.token_ids.tolist() for c in completions]
        row["logprobs"] = [c.logprobs.tolist() for c in completions]
        row["forced"] = [list(c.forced) for c in completions]
        row["versions"] = [[span.version for span in c.spans for _ in range(span.start, span.stop)] for c in completions]
    return row


def _end_torn_line(path: Path) -> None:
    """Cut off half a line that a killed writer left, so that the next event starts on a line of its own."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


def _is_locked(path: Path) -> bool:
    """Whether a RunStore holds this file."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


__all__ = ["LABELS", "SCHEMA", "NoSuchRun", "RunStore", "StoredRun", "create_run_dir", "list_runs", "view_rollouts"]
