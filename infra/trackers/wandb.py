"""Weights & Biases. The run's id there is made from its name here, so a resumed run goes on under it; `wandb sync` joins offline parts.

Figures have an axis of their own, `policy_version`: the steps of wandb must not go back, and an evaluation beside training comes late.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rl_core.config import RunConfig

AXIS = "policy_version"


class WeightsAndBiases:
    """Implements `Tracker`."""

    def __init__(self, config: RunConfig, run_dir: Path, settings: dict[str, Any]) -> None:
        import wandb

        trackers = config.trackers
        self._run = wandb.init(
            project=trackers.project,
            entity=trackers.wandb_entity or None,
            name=run_dir.name,
            id=run_id(run_dir),
            dir=run_dir,
            mode=trackers.wandb_mode,  # type: ignore[arg-type]
            resume="allow",
            tags=trackers.tags,
            config=settings,
            settings=wandb.Settings(console="off", silent=True),  # the terminal and its log are the run's
        )
        self._run.define_metric(AXIS)
        self._run.define_metric("*", step_metric=AXIS)

    def log(self, version: int, metrics: Mapping[str, float]) -> None:
        self._run.log({AXIS: version, **metrics})

    def finish(self, outcome: str) -> None:
        self._run.summary["outcome"] = outcome
        self._run.finish(exit_code=int(outcome == "failed"))


def run_id(run_dir: Path) -> str:
    """The same for each process of one run, another for a run of the same name elsewhere; at most 64 letters that wandb admits."""
    where = hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:8]
    return f"{''.join(c if c.isalnum() or c in '-_' else '-' for c in run_dir.name)[:50]}-{where}"
