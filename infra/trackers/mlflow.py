"""MLflow. Which of its runs is ours stands in RUN/mlflow.json, so a resumed run goes on with it. Needs no more than mlflow-skinny."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rl_core.config import RunConfig
from rl_core.config_files import flat

STATUSES = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}

MAX_PARAMETERS = 100
"""MLflow takes so many in one call."""


class MLflow:
    """Implements `Tracker`."""

    def __init__(self, config: RunConfig, run_dir: Path, settings: dict[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would tell its makers about every run
        uri = config.trackers.mlflow_uri or (run_dir.parent / "mlruns").absolute().as_uri()
        if uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions advise a database, which mlflow-skinny lacks
        from mlflow import MlflowClient
        from mlflow.entities import Param, RunTag

        self._client = MlflowClient(tracking_uri=uri)
        note = run_dir / "mlflow.json"
        if note.is_file():
            self._run_id = str(json.loads(note.read_text(encoding="utf-8"))["run_id"])
            self._client.update_run(self._run_id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(config.trackers.project)
        experiment = found.experiment_id if found else self._client.create_experiment(config.trackers.project)
        run = self._client.create_run(experiment, run_name=run_dir.name, tags=dict.fromkeys(config.trackers.tags, "true"))
        self._run_id = run.info.run_id
        note.write_text(json.dumps({"run_id": self._run_id, "uri": uri}), encoding="utf-8")
        parameters = [Param(key, str(value)[:500]) for key, value in flat(settings).items()]
        for start in range(0, len(parameters), MAX_PARAMETERS):
            self._client.log_batch(self._run_id, params=parameters[start : start + MAX_PARAMETERS])
        self._client.log_batch(self._run_id, tags=[RunTag("polyrl.run_dir", str(run_dir))])

    def log(self, version: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        rows = [Metric(name, value, now, version) for name, value in metrics.items()]
        for start in range(0, len(rows), 1000):
            self._client.log_batch(self._run_id, metrics=rows[start : start + 1000])

    def finish(self, outcome: str) -> None:
        self._client.set_terminated(self._run_id, STATUSES.get(outcome, "FAILED"))
