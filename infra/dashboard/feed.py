"""The events of one run as columns, read on from where the last look ended: every curve of the page comes from here.

events.jsonl --(new bytes, whole lines)--> RunState (start, scores, outcome) + one column of numbers per metric
"""

from __future__ import annotations

import math
import threading
from array import array
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from infra.run_state import RunState
from rl_core.events import Event
from rl_core.run_store import StoredRun

Floats = npt.NDArray[np.float64]


class _Data(msgspec.Struct):
    """Of a step; the data of other events lack both."""

    version: int = -1
    metrics: dict[str, float] = {}


class _Line(msgspec.Struct):
    """A line, as far as curves need it: decoded in one go, and three times as fast as by json."""

    kind: str
    time: float
    data: _Data


_decode = msgspec.json.Decoder(_Line).decode


class Feed:
    """Thread-safe. `refresh` before a look; a look never waits for the writer."""

    def __init__(self, run: StoredRun) -> None:
        self.run = run
        self.state = RunState()
        self.happened: list[Event] = []  # every event but the steps
        self._versions, self._times = array("q"), array("d")
        self._columns: dict[str, array[float]] = {}
        self._names: tuple[str, ...] = ()  # of the metrics of `_block`
        self._block = array("d")  # rows of steps that are not in the columns yet; none between two calls
        self._offset = 0
        self._lock = threading.Lock()

    def refresh(self) -> Feed:
        """Read what has been written since."""
        with self._lock:
            path = self.run.run_dir / "events.jsonl"
            if not path.is_file():
                return self
            with path.open("rb") as file:
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # a write in progress
                    self._offset += len(line)
                    if line.strip():
                        self._apply(line)
            self._make_columns()
        return self

    def metrics(self) -> list[str]:
        """Names of all columns."""
        with self._lock:
            return sorted(self._columns)

    def summary(self) -> dict[str, Any]:
        """What every view needs: the run, its environments, their scores."""
        with self._lock:
            state = self.state
            shares = {name: env.share for name, env in state.environments.items()}
            return {
                "run": self.run.id,
                "state": self.run.state_after(state.outcome),
                "reason": state.reason,
                "phase": state.phase,
                "detail": state.detail,
                "started": state.started,
                "updated": state.updated,
                "seconds": state.seconds,
                "step": state.version,
                "steps": state.steps,
                "max_staleness": state.max_staleness,
                "environments": [
                    {
                        "name": name,
                        "share": shares[name],
                        "before": env.before and env.before.to_json(),
                        "after": env.after and env.after.to_json(),
                        "reward": self._recent(f"env/{name}/reward"),
                    }
                    for name, env in state.environments.items()
                ],
                "metrics": sorted({_family(name) for name in self._columns}),
            }

    def scores(self, names: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
        """Held-out evaluations of environments, by version."""
        with self._lock:
            found = {}
            for name in names:
                env = self.state.environments.get(name)
                if env is not None:
                    found[name] = [s.to_json() for s in (env.before, *env.during, env.after) if s is not None]
            return found

    def series(self, names: Sequence[str], *, points: int = 600, smooth: int = 1) -> dict[str, Any]:
        """Columns `names`, thinned to at most `points` bins: the mean of a bin, and the mean of `smooth` steps around its end.

        {"steps": [...], "time": [...], "tokens": [...], "values": {name: [...]}, "smooth": {name: [...]}}; null where a bin has no value.
        """
        with self._lock:
            steps, times = np.array(self._versions, np.float64), np.array(self._times, np.float64)
            columns = {name: np.array(self._columns[name], np.float64) for name in names if name in self._columns}
            tokens = np.cumsum(np.nan_to_num(np.array(self._columns.get("learner/trained_tokens", array("d")), np.float64)))
            started = self.state.started
        tokens = tokens if len(tokens) else np.full(len(steps), np.nan)
        size = max(1, math.ceil(len(steps) / points))
        ends = np.minimum(np.arange(size - 1, len(steps) + size - 1, size), len(steps) - 1) if len(steps) else np.zeros(0, int)
        return {
            "steps": _json(steps[ends]),
            "time": _json(times[ends] - (started or 0.0), digits=10),
            "tokens": _json(tokens[ends], digits=12),
            "values": {name: _json(_binned(column, size)) for name, column in columns.items()},
            "smooth": {name: _json(moving_mean(column, smooth)[ends]) for name, column in columns.items()} if smooth > 1 else {},
        }

    def columns(self, names: Sequence[str]) -> dict[str, Floats]:
        """Whole columns, "version" and "time" among them; NaN where a step lacks a value."""
        with self._lock:
            found = {name: np.array(self._columns[name], np.float64) for name in names if name in self._columns}
            return found | {"version": np.array(self._versions, np.float64), "time": np.array(self._times, np.float64)}

    def folded(self) -> RunState:
        """What `fold` makes of the events; the points of a series are made when somebody asks for them, as few views need many."""
        with self._lock:
            state, versions = deepcopy(self.state), list(self._versions)
            run: dict[str, array[float]] = {}
            environments: dict[str, dict[str, array[float]]] = {}
            for name, column in self._columns.items():
                _, env, metric = name.split("/", 2) if name.startswith("env/") else ("", "", name)
                (environments.setdefault(env, {}) if env else run)[metric] = column[:]
        state.series = _Series(versions, run)
        for env, columns in environments.items():
            state.env(env).series = _Series(versions, columns)
        return state

    def latest(self, metric: str, window: int = 10) -> dict[str, float | None]:
        """environment -> mean of the last values of `env/<id>/<metric>`."""
        with self._lock:
            return {name: self._recent(f"env/{name}/{metric}", window) for name in self.state.environments}

    def totals(self, metric: str) -> dict[str, float]:
        """environment -> sum over all steps of `env/<id>/<metric>`."""
        with self._lock:
            return {name: float(np.nansum(self._columns.get(f"env/{name}/{metric}", array("d")))) for name in self.state.environments}

    def _recent(self, name: str, window: int = 10) -> float | None:
        values = [v for v in self._columns.get(name, ())[-10 * window :] if v == v][-window:]
        return sum(values) / len(values) if values else None

    def _apply(self, line: bytes) -> None:
        try:
            step = _decode(line)
        except msgspec.DecodeError:
            step = None  # NaN and infinity are not JSON, but Python writes and reads them
        if step is not None and step.kind == "step":
            self._append(step.data.version, step.time, step.data.metrics)
            return
        event = Event.from_json(line.decode("utf-8"))
        if event.kind == "step":
            self._append(int(event.data["version"]), event.time, event.data["metrics"])
        else:
            self.state.apply(event)
            self.happened.append(event)

    def _append(self, version: int, time: float, metrics: Mapping[str, float]) -> None:
        """Steps with the same metrics wait as rows of one block, which become columns together."""
        names = tuple(metrics)
        if names != self._names or (self._versions and self._versions[-1] >= version):
            self._make_columns()
            self._names = names
        while self._versions and self._versions[-1] >= version:
            self._drop_last()  # a resumed run takes these steps again
        self._versions.append(version)
        self._times.append(time)
        self._block.extend(metrics.values())
        self.state.version, self.state.updated = version, time

    def _make_columns(self) -> None:
        """The rows that wait are appended to the columns; a column without a value there gets NaN."""
        count = len(self._versions)
        if self._names and len(self._block):
            block = np.array(self._block).reshape(-1, len(self._names)).T
            done = count - block.shape[1]
            for name, values in zip(self._names, block, strict=True):
                column = self._columns.get(name)
                if column is None:
                    column = self._columns[name] = array("d", [math.nan]) * done
                column.frombytes(values.tobytes())
            self._block = array("d")
        for column in self._columns.values():
            if len(column) < count:
                column.extend(array("d", [math.nan]) * (count - len(column)))

    def _drop_last(self) -> None:
        self._versions.pop()
        self._times.pop()
        for column in self._columns.values():
            column.pop()


class _Series(dict[str, list[tuple[int, float]]]):
    """Metric -> [(policy version, value)], made of its column at the first look."""

    def __init__(self, versions: list[int], columns: dict[str, array[float]]) -> None:
        self._versions, self._columns = versions, columns

    def __missing__(self, metric: str) -> list[tuple[int, float]]:
        column = self._columns[metric]
        self[metric] = [(version, value) for version, value in zip(self._versions, column, strict=True) if value == value]
        return self[metric]


def read_state(run: StoredRun) -> RunState:
    """All that a stored run's events say, several times as fast as `fold`."""
    return Feed(run).refresh().folded()


def moving_mean(values: Floats, window: int) -> Floats:
    """Centred, narrower at the ends; steps without a value do not count."""
    if window <= 1 or not len(values):
        return values
    half = window // 2
    known = ~np.isnan(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    n = counts[high] - counts[low]
    return np.where(n > 0, (sums[high] - sums[low]) / np.maximum(n, 1), np.nan)


def _binned(values: Floats, size: int) -> Floats:
    """Mean of every `size` values, NaN aside."""
    padded = np.concatenate([values, np.full(-len(values) % size, np.nan)]).reshape(-1, size)
    known = ~np.isnan(padded)
    n = known.sum(axis=1)
    return np.where(n > 0, np.where(known, padded, 0.0).sum(axis=1) / np.maximum(n, 1), np.nan)


def _json(values: Floats, digits: int = 6) -> list[float | None]:
    """`digits` significant digits are enough for a curve, and half the bytes."""
    return [float(f"{v:.{digits}g}") if math.isfinite(v) else None for v in values.tolist()]


def _family(metric: str) -> str:
    """env/math/reward -> env/*/reward."""
    if not metric.startswith("env/"):
        return metric
    return "env/*/" + metric.split("/", 2)[2]


__all__ = ["Feed", "moving_mean", "read_state"]
