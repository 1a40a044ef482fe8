"""Where the time went: what the learner did, how busy the engines were, what waited, when sequences stood still.

Nothing is measured for this alone. Of the learner, a step's event says how long each part took and when it ended; of the engines,
every stored rollout says when it began, how long it took and on which worker (time in its environment included).

    |-- waited --|-- gradients --|-- proof --|-- optimizer --|   one step, ending at the time of its event
    |pause|                                                       of the publication of the step before
"""

from __future__ import annotations

from typing import Any

import numpy as np

from infra.dashboard.feed import Feed, Floats
from infra.dashboard.rollouts import Rollouts, busy

PARTS = ("waited", "gradients", "proof", "optimizer")

MAX_SEGMENTS = 400
"""Steps that are drawn one by one; a longer window shows shares of its bins."""

BINS = 240


def timeline(feed: Feed, rollouts: Rollouts, start: float | None, end: float | None) -> dict[str, Any]:
    """Everything of the window [start, end], in seconds since the run began."""
    columns = feed.columns(["step/seconds", "step/waited_s", "learner/accumulate_s", "learner/seconds", "sync/pause_ms", "queue/in_flight"])
    origin = feed.state.started or (columns["time"][0] if len(columns["time"]) else 0.0)
    whole = (feed.state.updated or origin) - origin
    low = 0.0 if start is None else max(0.0, start)
    high = max(whole, 1e-3) if end is None else max(end, low + 1e-3)
    edges = np.linspace(low, high, BINS + 1)
    workers, labels = rollouts.spans(low + origin, high + origin)
    steps = _steps(columns, origin)
    seen = (steps["end"] > low) & (steps["begin"] < high)
    return {
        "whole": whole,
        "window": [low, high],
        "phases": _phases(feed, origin, whole),
        "bins": [round(float(e), 4) for e in edges],
        "workers": busy({name: times - origin for name, times in workers.items()}, edges),
        "labels": busy({name: times - origin for name, times in labels.items()}, edges),
        "steps": int(seen.sum()),
        "segments": _segments(steps, seen) if seen.sum() <= MAX_SEGMENTS else None,
        "shares": {part: _seconds(steps, part, seen) for part in PARTS} | {"paused": float(np.nansum(steps["pause"][seen]))},
        "queue": {
            "time": [round(float(t), 3) for t in steps["end"][seen][:: _every(seen)]],
            "in_flight": [None if v != v else float(v) for v in steps["in_flight"][seen][:: _every(seen)]],
        },
    }


def _steps(columns: dict[str, Floats], origin: float) -> dict[str, Floats]:
    """Begin and end of every part of every step."""
    none = np.zeros(len(columns["time"]))

    def column(name: str) -> Floats:
        return np.nan_to_num(columns.get(name, none))

    end = columns["time"] - origin
    begin = end - column("step/seconds")
    waited = np.minimum(begin + column("step/waited_s"), end)
    gradients = np.minimum(waited + column("learner/accumulate_s"), end)
    optimizer = np.maximum(end - np.maximum(column("learner/seconds") - column("learner/accumulate_s"), 0.0), gradients)
    return {
        "version": columns["version"], "begin": begin, "waited": waited, "gradients": gradients, "proof": optimizer, "optimizer": end,
        "end": end, "pause": column("sync/pause_ms") / 1e3, "in_flight": columns.get("queue/in_flight", none * np.nan),
    }  # fmt: skip


def _segments(steps: dict[str, Floats], seen: np.ndarray[Any, np.dtype[np.bool_]]) -> list[dict[str, Any]]:
    names = ("begin", *PARTS, "pause")
    return [{"version": int(steps["version"][i])} | {name: round(float(steps[name][i]), 4) for name in names} for i in np.flatnonzero(seen)]


def _seconds(steps: dict[str, Floats], part: str, seen: np.ndarray[Any, np.dtype[np.bool_]]) -> float:
    before = {"waited": "begin", "gradients": "waited", "proof": "gradients", "optimizer": "proof"}[part]
    return float((steps[part] - steps[before])[seen].sum())


def _every(seen: np.ndarray[Any, np.dtype[np.bool_]]) -> int:
    return max(1, int(seen.sum()) // 600)


def _phases(feed: Feed, origin: float, whole: float) -> list[dict[str, Any]]:
    """What the run as a whole was doing, by its own words."""
    marks = [e for e in feed.happened if e.kind == "phase"]
    ends = ([e.time - origin for e in marks] + [whole])[1:]
    return [{"name": str(e.data["name"]), "start": e.time - origin, "end": end} for e, end in zip(marks, ends, strict=True)]


__all__ = ["PARTS", "timeline"]
