"""Tasks from a file: JSON lines, Parquet, or a Hugging Face data set that was saved to disk.

    environments:
      math:
        options: {file: data/gsm8k.jsonl, columns: {question: problem, answer: solution}}

    row --> row_draft(row) of the environment --> split by the hash of what the policy sees --> a new order in each epoch, without end

Equal prompts have one key, so they never sit in both splits, whatever else their rows hold.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_core.types import Task

if TYPE_CHECKING:
    from environments.base import TaskDraft, TextEnv

KNOBS: dict[str, Any] = {"file": "", "columns": {}, "file_split": ""}
"""file: path of a .jsonl, .json or .parquet file, or of a folder that `save_to_disk` wrote or that holds Parquet files. columns: what
the environment calls a column -> what the file calls it. file_split: of a folder with several, such as train."""

EVAL_BUCKETS = 16
"""One task in this many is held out."""


@dataclass(frozen=True, slots=True)
class FileTasks:
    """The rows of one file as tasks, by split."""

    tasks: Mapping[str, tuple[Task, ...]] = field(default_factory=dict)

    def task_at(self, split: str, seed: int, index: int) -> Task:
        """At one position of the endless stream."""
        tasks = self.tasks[split]
        epoch, place = divmod(index, len(tasks))
        return tasks[order(len(tasks), f"{seed} {split} {epoch}")[place]]


@lru_cache(maxsize=8)
def order(count: int, seed: str) -> list[int]:
    return random.Random(seed).sample(range(count), count)


def file_tasks(env_class: type[TextEnv], options: Mapping[str, Any]) -> FileTasks:
    """The tasks of the file that `options` name. Read once per process. Raises ValueError that says what is wrong with the file."""
    path = Path(str(options["file"]))
    if not path.exists():
        raise ValueError(f"environment {env_class.id!r}: option file is {str(path)!r}, which does not exist")
    columns = json.dumps(options.get("columns") or {}, sort_keys=True)
    return _read(env_class, str(path.resolve()), path.stat().st_mtime_ns, columns, str(options.get("file_split", "")))


@lru_cache(maxsize=8)
def _read(env_class: type[TextEnv], path: str, changed: int, columns: str, split: str) -> FileTasks:
    del changed  # part of the key: a file that was written anew is read anew
    where = f"environment {env_class.id!r}, file {path!r}"
    found: dict[str, list[Task]] = {"train": [], "eval": []}
    for number, row in enumerate(read_rows(path, where, split)):
        try:
            task = make_task(env_class, env_class.row_draft(renamed(row, env_class, json.loads(columns))))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where}, row {number}: {error}") from error
        found[task.split].append(task)
    if not any(found.values()):
        raise ValueError(f"{where} holds no rows")
    if missing := [name for name, tasks in found.items() if not tasks]:
        count = sum(map(len, found.values()))
        raise ValueError(
            f"{where}: its {count} rows leave none for {missing[0]}; one prompt in {EVAL_BUCKETS} is held out, by the hash of its "
            f"content: some 100 rows are enough"
        )
    return FileTasks({name: tuple(tasks) for name, tasks in found.items()})


def make_task(env_class: type[TextEnv], draft: TaskDraft) -> Task:
    """The key is the hash of the public part alone."""
    key = hashlib.sha256(json.dumps([env_class.id, draft.public], sort_keys=True).encode()).hexdigest()[:16]
    return Task(
        env=env_class.id,
        key=key,
        split="eval" if int(key, 16) % EVAL_BUCKETS == 0 else "train",
        seed=int(key, 16),
        public=draft.public,
        private={**draft.private, **draft.hint},
        difficulty=draft.difficulty,
    )


def renamed(row: Mapping[str, Any], env_class: type[TextEnv], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under the environment's own names. Raises ValueError for a column that is not there or a required one that is empty."""
    known = env_class.file_columns
    if unknown := set(columns) - set(known):
        raise ValueError(f"option columns names {', '.join(sorted(unknown))}; this environment reads {', '.join(known)}")
    found = {}
    for name, required in known.items():
        column = columns.get(name, name)
        value = row.get(column)
        if value is None or value == "":
            if required or name in columns:
                what = f"column {column!r} is empty" if column in row else f"there is no column {column!r}, only {', '.join(row)}"
                raise ValueError(f"{what}; say which is which with options.columns, such as {{{name}: {next(iter(row), 'a column')}}}")
            continue
        found[name] = value
    return found


def json_list(value: Any, name: str) -> list[Any]:
    """A list, or the text of one: columns of mixed types can only be stored as text."""
    found = json.loads(value) if isinstance(value, str) else value
    if not isinstance(found, list) or not found:
        raise ValueError(f"{name} is {str(value)[:60]!r}, wanted a list with something in it")
    return found


def read_rows(path: str, where: str, split: str) -> Iterable[dict[str, Any]]:
    """The rows of a file or folder, by the `datasets` library."""
    import datasets  # a second, and only for those who read files

    datasets.disable_progress_bars()
    file = Path(path)
    with tempfile.TemporaryDirectory(prefix="polyrl-rows-") as cache:
        try:
            if file.is_dir() and any((file / name).is_file() for name in ("state.json", "dataset_dict.json")):
                data: Any = datasets.load_from_disk(path)
            elif file.is_dir():
                parts = sorted(map(str, file.rglob(f"{split}*.parquet")))
                if not parts:
                    raise ValueError(f"no Parquet file and no saved data set{f' of the split {split!r}' if split else ''} in it")
                data = datasets.Dataset.from_parquet(parts, cache_dir=cache)
            elif file.stat().st_size == 0:
                return []
            elif file.suffix in (".jsonl", ".json"):
                data = datasets.Dataset.from_json(path, cache_dir=cache)
            elif file.suffix == ".parquet":
                data = datasets.Dataset.from_parquet(path, cache_dir=cache)
            else:
                raise ValueError(f"it ends with {file.suffix!r}, wanted .jsonl, .json, .parquet or a folder")
            return list(pick_split(data, split))
        except Exception as error:
            cause = error.__cause__ or error
            raise ValueError(f"{where} cannot be read: {' '.join(str(cause).split())[:300]}") from error


def pick_split(data: Any, split: str) -> Any:
    """One of a saved data set's splits."""
    if not isinstance(data, dict):
        return data
    if split in data:
        return data[split]
    if len(data) == 1 and not split:
        return next(iter(data.values()))
    raise ValueError(f"it has the splits {', '.join(data)}; name one with the option file_split")
