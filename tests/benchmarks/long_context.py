"""A run that samples and trains 32k-token prompts beside short ones, and what it takes: configs/long-context-32k.yaml, about seven minutes.

peak_gib                  proportional memory (PSS) of all processes of the run together, the most that was seen in one look a second
peak_gib_learner|engine|worker   of it, those of the learner, the engine and the rollout worker around it, each at its own peak
seconds                   from the command to its end
trained_groups_ENV        groups that trained
prompt_tokens_ENV         mean length of a conversation without what was sampled
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil

from rl_core.run_store import RunStore

ROOT = Path(__file__).parents[2]
CONFIG = "configs/long-context-32k.yaml"
PROCESSES = {"learner": "ray::LearnerRank", "engine": "VLLM::EngineCore", "worker": "ray::RolloutWorker"}


def bench(*overrides: str) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory(prefix="polyrl-bench-") as folder:
        began = time.monotonic()
        command = [sys.executable, "-c", "from infra.cli.main import main; main()", "run", CONFIG, f"runs_dir={folder}", *overrides]
        run = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=sys.stderr)
        try:
            peaks = watch(run)
        finally:
            run.terminate()  # a run that is over does not mind; one that is not ends in order
            run.wait(timeout=60)
        figures = {**peaks, "seconds": time.monotonic() - began}
        steps = [event.data["metrics"] for event in RunStore.find(Path(folder), "latest").events() if event.kind == "step"]
    for name in ("math", "long_context"):
        figures[f"trained_groups_{name}"] = steps[-1][f"env/{name}/groups_trained"]
        figures[f"prompt_tokens_{name}"] = max(step.get(f"env/{name}/prompt_tokens_per_rollout", 0.0) for step in steps)
    return {name: [value] for name, value in figures.items()}


def watch(run: subprocess.Popen[bytes]) -> dict[str, float]:
    """Look at the run once a second until it ends. Raises RuntimeError if it does not end well."""
    peaks: dict[str, float] = defaultdict(float)
    while run.poll() is None:
        total = 0.0
        for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]:
            try:
                name, gib = " ".join(process.cmdline()[:1]), process.memory_full_info().pss / 2**30
            except psutil.Error:  # it ended meanwhile
                continue
            total += gib
            for part, title in PROCESSES.items():
                if name.startswith(title):
                    peaks[f"peak_gib_{part}"] = max(peaks[f"peak_gib_{part}"], gib)
        peaks["peak_gib"] = max(peaks["peak_gib"], total)
        time.sleep(1.0)
    if run.returncode:
        raise RuntimeError(f"the run ended with code {run.returncode}; what it said is above")
    return dict(peaks)
