"""TensorBoard, by tensorboardX: event files in RUN/tensorboard, which `tensorboard --logdir runs` reads. A resumed run adds a file."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rl_core.config import RunConfig


class TensorBoard:
    """Implements `Tracker`."""

    def __init__(self, config: RunConfig, run_dir: Path, settings: dict[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        del config
        folder = run_dir / "tensorboard"
        is_new = not folder.exists()
        self._writer = SummaryWriter(
            str(folder), flush_secs=10, filename_suffix=f".{time.time_ns()}"
        )  # two processes may start within a second
        if is_new:
            self._writer.add_text("config", f"```\n{json.dumps(settings, indent=2)}\n```", 0)

    def log(self, version: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, version)
        self._writer.flush()

    def finish(self, outcome: str) -> None:
        self._writer.add_text("outcome", outcome)
        self._writer.close()
