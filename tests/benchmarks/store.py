"""First output of the reading commands on a run of a million rollouts, and what a million tokens take on disk: `polyrl bench store`.

The run has segments of the store's own size, 64 rollouts a step, and the metrics of four environments. The commands are processes of
their own; what is measured is the time from their start to the first line that they print.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from infra.bench import interleaved
from infra.dashboard.serving import serving
from rl_core.run_store import SEGMENT_ROWS, RunStore
from rl_core.types import Completion, Group, Message, Rollout, Status, Task, Turn, Verdict, VersionSpan
from tests.benchmarks.dashboard import METRICS, browse
from tests.unit.dashboards import large_run

ROLLOUTS, ENVIRONMENTS, REPETITIONS = 1_000_000, 4, 5

COMMANDS = {
    "show_s": ("show", "latest"),
    "curves_s": ("curves", "latest"),
    "rollouts_s": ("rollouts", "latest"),
    "rollouts_filtered_s": ("rollouts", "latest", "--search", "needle", "--sort", "worst"),
    "sql_s": ("sql", "latest", "select env, avg(reward) from rollouts group by env"),
    "sql_steps_s": ("sql", "latest", "select env, avg(value) from steps where name = 'reward' group by env"),
}

VOCABULARY, GROUPS, SIZE, TOKENS = 32_000, 64, 8, 256


def bench() -> dict[str, list[float]]:
    """Seconds, and MiB per million sampled tokens, without and with ids and logprobs."""
    with tempfile.TemporaryDirectory() as folder:
        runs_dir = Path(folder)
        large_run(
            runs_dir, environments=ENVIRONMENTS, steps=ROLLOUTS // 64, rollouts=ROLLOUTS, metrics_per_environment=METRICS,
            segment=SEGMENT_ROWS,
        )  # fmt: skip
        measures: dict[str, Callable[[], float]] = {name: partial(first_output, args, runs_dir) for name, args in COMMANDS.items()}
        figures = interleaved(measures, REPETITIONS)
        if shutil.which("chromium"):
            figures["curve_view_s"] = [curve_view(runs_dir) for _ in range(REPETITIONS)]
    figures["mib_per_million_tokens"] = [size_of_a_million(keep_tokens=False)]
    figures["mib_per_million_tokens_kept"] = [size_of_a_million(keep_tokens=True)]
    return figures


def first_output(args: tuple[str, ...], runs_dir: Path) -> float:
    """From the start of the process to its first line. The rest is read too: it must end well."""
    command = [sys.executable, "-c", "from infra.cli import main; main()", *args, "--runs-dir", str(runs_dir)]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"}) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - began
        process.stdout.read()
    if process.returncode or not line:
        raise RuntimeError(f"polyrl {' '.join(args)} ended with exit code {process.returncode}")
    return seconds


def curve_view(runs_dir: Path) -> float:
    """In a browser, from a server that has just started and has read nothing."""
    with serving(runs_dir) as address:
        return browse(address, ENVIRONMENTS)


def size_of_a_million(*, keep_tokens: bool) -> float:
    """MiB of segments per million sampled tokens: ids as frequent as words are (Zipf), a word of text for each."""
    dice = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        store = RunStore(Path(folder), keep_tokens=keep_tokens)
        for number in range(GROUPS):
            store.add_groups([made_up(number, dice)], "train")
        store.close()
        size = sum(p.stat().st_size for p in (Path(folder) / "rollouts").iterdir())
    return size / 2**20 / (GROUPS * SIZE * TOKENS / 1e6)


def made_up(number: int, dice: np.random.Generator) -> Group:
    """A group of rollouts of one turn."""
    task = Task(env="words", key=f"key-{number}", split="train", seed=number, public={"q": word(number)}, private={"gold": word(number)})
    prompt = Message(role="user", content=" ".join(map(word, dice.zipf(1.2, 64) % VOCABULARY)))
    rollouts = []
    for i in range(SIZE):
        ids = (dice.zipf(1.2, TOKENS) % VOCABULARY).astype(np.int32)
        text = " ".join(map(word, ids))
        completion = Completion(
            prompt_ids=(dice.zipf(1.2, 64) % VOCABULARY).astype(np.int32),
            token_ids=ids,
            logprobs=-dice.exponential(0.5, TOKENS).astype(np.float32),
            spans=(VersionSpan(start=0, stop=TOKENS, version=number // 8),),
            finish_reason="stop",
        )
        reward = float(dice.integers(2))
        rollouts.append(
            Rollout(
                id=f"g{number:06d}-{i}", env="words", task_key=task.key, completions=(completion,), turns=(Turn(content=text),),
                messages=(prompt, Message(role="assistant", content=text)), worker="w0", started_at=float(number), seconds=dice.random(),
                verdict=Verdict(status=Status.OK, reward=reward, components={"correct": reward}, evidence={"answer": text[-20:]}),
            )
        )  # fmt: skip
    return Group(id=f"g{number:06d}", task=task, rollouts=tuple(rollouts))


def word(id_: int) -> str:
    """A word of its own for each id: 2 to 7 letters."""
    return np.base_repr(int(id_) * 7919 % 2**31, 36).lower()
