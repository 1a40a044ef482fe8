"""Stored runs for the tests of the dashboard: a hostile one, and a large one of 200 environments and 100,000 rollouts."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rl_core.events import Event
from rl_core.ledger import Ledger
from rl_core.run_store import SCHEMA, RunStore
from rl_core.types import Task
from tests.unit.stored_runs import group, score

SCRIPT = "<script>window.hacked = 1</script>"
IMAGE = "<img src=x onerror=window.hacked=2>"
ANSI = "\x1b[31mred\x1b[0m"
OVERRIDE = "\u202etxet desrever\u202c"
SURROGATE = "\ud800"
HOSTILE = f"{SCRIPT} {IMAGE} {ANSI} {OVERRIDE} {SURROGATE} javascript:window.hacked=3 \"' onload=window.hacked=4"

HOSTILE_RUN = "20260101-000000-<img src=x onerror=window.hacked=5>"
LARGE_RUN = "20260102-000000-large"


def hostile_run(runs_dir: Path) -> Path:
    """Everything that a policy or a plugin can name or write tries to be markup."""
    folder = runs_dir / HOSTILE_RUN
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: hostile\n")
    store = RunStore(folder, keep_tokens=True)
    env = IMAGE + OVERRIDE
    store.emit(Event(kind="run_started", data={"run": HOSTILE, "steps": 2, "environments": {env: 1.0}, "max_staleness": 1}, time=1.0))
    store.emit(Event(kind="phase", data={"name": SCRIPT, "detail": HOSTILE}, time=2.0))
    store.emit(Event(kind="eval", data={"version": 0, "label": "before", "environments": {env: score(0.5)}}, time=3.0))
    metrics = {f"env/{env}/reward": 0.5, f"env/{env}/component/{IMAGE}": 0.5, f"env/{env}/mtp_acceptance": 0.5, f"env/{env}/share": 1.0}
    store.emit(Event(kind="step", data={"version": 1, "metrics": metrics}, time=4.0))
    store.emit(Event(kind="note", data={"text": f"{HOSTILE} is broken, 3 groups in a row"}, time=5.0))
    store.add_groups([group("g000000", env, (1.0, 0.0, None), text=HOSTILE)], "train")
    store.emit(Event(kind="run_finished", data={"outcome": "failed", "reason": HOSTILE, "seconds": 9.0}, time=9.0))
    store.close()
    ledger = Ledger(folder / "ledger.sqlite")
    ledger.draw(Task(env=env, key="k", split="train", seed=1, public={}, private={}), 0)
    ledger.filter("g000000", HOSTILE.replace(SURROGATE, ""))
    ledger.close()
    return folder


def environment_names(count: int) -> list[str]:
    return [f"env_{i:03d}" for i in range(count)]


def large_step(version: int, envs: list[str], more: int = 0) -> Event:
    metrics = {"step/seconds": 1.0, "step/waited_s": 0.5, "learner/trained_tokens": 1000.0, "queue/in_flight": 4.0}
    metrics |= {"learner/staleness_mean": 0.5, "learner/mismatch_kl": 1e-4 * version, "rollout/tokens_per_s": 900.0}
    for i, env in enumerate(envs):
        metrics |= {f"env/{env}/reward": (version + i) % 50 / 50, f"env/{env}/share": 1 / len(envs), f"env/{env}/mtp_acceptance": 0.5}
        metrics |= {f"env/{env}/component/c{j}": 0.123456789012 * j for j in range(more)}
    return Event(kind="step", data={"version": version, "metrics": metrics}, time=1000.0 + version)


def large_run(
    runs_dir: Path,
    *,
    environments: int = 200,
    steps: int = 50,
    rollouts: int = 100_000,
    metrics_per_environment: int = 3,
    segment: int = 20_000,
) -> Path:
    """Its rollouts are segments in the store's schema, made from whole columns."""
    folder = runs_dir / LARGE_RUN
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: large\n")
    envs = environment_names(environments)
    store = RunStore(folder)
    started = {"run": "large", "steps": 2 * steps, "environments": dict.fromkeys(envs, 1.0), "max_staleness": 2}
    store.emit(Event(kind="run_started", data=started, time=1000.0))
    for version in range(1, steps + 1):
        store.emit(large_step(version, envs, metrics_per_environment - 3))
    store.close()
    for part, first in enumerate(range(0, rollouts, segment)):
        ids = np.arange(first, min(first + segment, rollouts))
        pq.write_table(_rollouts(ids, envs), folder / "rollouts" / f"part-{part:05d}.parquet")
    _draw_groups(folder / "ledger.sqlite", rollouts // 8, steps, envs)
    return folder


def _draw_groups(path: Path, groups: int, steps: int, envs: list[str]) -> None:
    """Every group trained, in order: written as rows, since a ledger counts one by one."""
    Ledger(path).close()
    rows = [(i, f"g{i:06d}", envs[i % len(envs)], f"key-{i}", i // len(envs), 1 + i * steps // groups) for i in range(groups)]
    with closing(sqlite3.connect(path)) as db, db:
        db.executemany(
            "INSERT INTO tasks (ticket, group_id, env, task_key, position, version, state, uses, drawn_at) "
            "VALUES (?, ?, ?, ?, ?, ?, 'trained', 1, 1000)",
            rows,
        )


def _rollouts(ids: np.ndarray, envs: list[str]) -> pa.Table:
    words = np.array(["plain", "needle"], object)[(ids % 1000 == 7).astype(int)]
    columns = {
        "rollout_id": [f"g{i // 8:06d}-{i % 8}" for i in ids], "group_id": [f"g{i // 8:06d}" for i in ids],
        "env": np.array(envs, object)[ids // 8 % len(envs)], "label": ["train"] * len(ids), "split": ["train"] * len(ids),
        "reward": (ids % 3 == 0).astype(np.float32), "status": np.array(["ok", "truncated"], object)[(ids % 10 == 0).astype(int)],
        "messages": [f'[{{"role": "assistant", "content": "{word} {i}"}}]' for i, word in zip(ids, words, strict=True)],
        "components": ["{}"] * len(ids), "evidence": ["{}"] * len(ids), "turns": ["[]"] * len(ids), "task": ["{}"] * len(ids),
        "num_sampled_tokens": ids % 100, "min_version": ids // 2000, "max_version": ids // 2000,
        "started_at": 1000.0 + ids / 2000, "seconds": np.full(len(ids), 0.5), "worker": np.array(["w0", "w1"], object)[ids % 2],
    }  # fmt: skip
    arrays = [pa.array(columns[f.name], f.type, from_pandas=True) if f.name in columns else pa.nulls(len(ids), f.type) for f in SCHEMA]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)
