"""The runs of one folder, by id: opened once, kept while they are looked at.

The only way from a request to a file: an id is looked up among the runs that the folder holds, and never joined to a path.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from infra.dashboard.feed import Feed
from infra.dashboard.rollouts import Rollouts
from rl_core.events import Event
from rl_core.run_store import NoSuchRun, StoredRun, list_runs

OPEN_RUNS = 16
"""Runs whose curves stay in memory."""

READ_WHOLE = 8 << 20
"""Bytes of events up to which the list of runs reads a run as a whole; of a longer one, only its first and last lines."""

EDGE = 2 << 20
"""Bytes at each end of a long run's events: a step of 200 environments is about 300 KB."""


READ_AHEAD = 256 << 20
"""Bytes of events up to which the newest run is read before somebody asks for it: a second or two of one core."""


class OpenRun:
    """One run, and what is known of it so far."""

    def __init__(self, stored: StoredRun) -> None:
        self.stored, self.feed, self.rollouts = stored, Feed(stored), Rollouts(stored)


class Library:
    """Thread-safe."""

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = runs_dir
        self._open: OrderedDict[str, OpenRun] = OrderedDict()
        self._rows: dict[str, tuple[int, dict[str, Any]]] = {}  # by id: bytes of events, and the row that they made
        self._lock = threading.Lock()

    def stored(self) -> list[StoredRun]:
        """Newest first. A folder that is itself a run is a library of one."""
        if (self.runs_dir / "config.yaml").is_file():
            return [StoredRun(self.runs_dir)]
        return list_runs(self.runs_dir)[::-1]

    def find(self, run_id: str) -> OpenRun:
        """Raises NoSuchRun."""
        stored = next((r for r in self.stored() if r.id == run_id), None)
        if stored is None:
            raise NoSuchRun("there is no run of that name here; it may have been removed")
        with self._lock:
            if run_id not in self._open:
                self._open[run_id] = OpenRun(stored)
            found = self._open[run_id]
            self._open.move_to_end(run_id)
            while len(self._open) > OPEN_RUNS:
                self._open.popitem(last=False)
            return found

    def read_ahead(self, seconds: float) -> None:
        """Begin to read the newest run, which most visitors look at first; wait for it, at most so long."""
        newest = next(iter(self.stored()), None)
        if newest is not None and _size(newest) <= READ_AHEAD:
            reader = threading.Thread(target=self.find(newest.id).feed.refresh, name="read-ahead", daemon=True)
            reader.start()
            reader.join(seconds)

    def overview(self) -> list[dict[str, Any]]:
        """One row per run, newest first."""
        return [self._row(run) for run in self.stored()]

    def _row(self, run: StoredRun) -> dict[str, Any]:
        size = _size(run)
        if run.id in self._open:
            return self._open[run.id].feed.refresh().summary()
        known, row = self._rows.get(run.id, (-1, {}))
        if known != size or row["state"] == "running":  # which ends without an event when the run is killed
            row = Feed(run).refresh().summary() if size <= READ_WHOLE else _glance(run, run.run_dir / "events.jsonl")
            self._rows[run.id] = (size, row)
        return row


def _size(run: StoredRun) -> int:
    """Bytes of its events."""
    path = run.run_dir / "events.jsonl"
    return path.stat().st_size if path.is_file() else 0


def _glance(run: StoredRun, path: Path) -> dict[str, Any]:
    """The ends of a long run: what it is, and how far it came."""
    with path.open("rb") as file:
        first = _events(file.read(EDGE))
        file.seek(max(0, path.stat().st_size - EDGE))
        last = _events(file.read(EDGE))
    start: dict[str, Any] = next((dict(e.data) for e in first if e.kind == "run_started"), {})
    turn = next((e for e in last[::-1] if e.kind in ("run_started", "run_finished")), None)  # of a resumed run the second one counts
    end = turn if turn is not None and turn.kind == "run_finished" else None
    step = next((int(e.data["version"]) for e in last[::-1] if e.kind == "step"), 0)
    return {
        "run": run.id,
        "state": run.state_after(str(end.data["outcome"]) if end else ""),
        "reason": str(end.data.get("reason", "")) if end else "",
        "started": first[0].time if first else None,
        "updated": last[-1].time if last else None,
        "seconds": end.data.get("seconds") if end else None,
        "step": step,
        "steps": start.get("steps", 0),
        "environments": [{"name": name, "before": None, "after": None, "reward": None} for name in start.get("environments", {})],
    }


def _events(chunk: bytes) -> list[Event]:
    """Those whose lines are whole within `chunk`."""
    found = []
    for line in chunk.split(b"\n"):
        try:
            found.append(Event.from_json(line.decode("utf-8")))
        except (ValueError, KeyError, TypeError):
            continue  # cut at the edge
    return found


__all__ = ["Library", "OpenRun"]
