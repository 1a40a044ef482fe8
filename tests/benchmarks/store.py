"""The reading commands on a run of a million rollouts, and what a million tokens take on disk: `polyrl bench store`.

The run has segments of the store's own size, 64 rollouts a step, the metrics of four environments, and a ledger of 125,000 groups. Each
command is a process of its own.

COMMAND_first_s    from its start to the first line that it prints
COMMAND_end_s      to its end
COMMAND_cpu_s      processor time, of all its threads, to its end
show_fresh_s       first line of the first command after set-up, which ends with `polyrl --help`: other modules are not compiled yet
mib_per_million_tokens, mib_per_million_tokens_kept   segments on disk, without and with store.keep_tokens
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from rl_core.run_store import SEGMENT_ROWS, RunStore
from rl_core.types import Completion, Group, Message, Rollout, Status, Task, Turn, Verdict, VersionSpan
from tests.benchmarks.dashboard import ENVIRONMENTS, METRICS, ROLLOUTS
from tests.unit.dashboards import large_run

REPETITIONS = 5

COMMANDS = {
    "show": ("show", "latest"),
    "curves": ("curves", "latest"),
    "rollouts": ("rollouts", "latest"),
    "rollouts_filtered": ("rollouts", "latest", "--search", "needle", "--sort", "worst"),
    "sql": ("sql", "latest", "select env, avg(reward) from rollouts group by env"),
    "sql_steps": ("sql", "latest", "select env, avg(value) from steps where name = 'reward' group by env"),
}

VOCABULARY, GROUPS, SIZE, TOKENS = 32_000, 64, 8, 256


def bench() -> dict[str, list[float]]:
    """Seconds, and MiB per million sampled tokens."""
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs_dir, modules = Path(folder, "runs"), Path(folder, "modules")
        runs_dir.mkdir()
        sizes = {"steps": ROLLOUTS // 64, "rollouts": ROLLOUTS, "metrics_per_environment": METRICS, "segment": SEGMENT_ROWS}
        large_run(runs_dir, environments=ENVIRONMENTS, **sizes)
        for _ in range(3):
            shutil.rmtree(modules, ignore_errors=True)
            watch(("--help",), runs_dir, modules)
            figures.setdefault("show_fresh_s", []).append(watch(COMMANDS["show"], runs_dir, modules)["first_s"])
        for repetition in range(1 + REPETITIONS):
            for name, args in COMMANDS.items():
                seen = watch(args, runs_dir, modules)
                if repetition:  # before, modules are compiled
                    for figure, seconds in seen.items():
                        figures.setdefault(f"{name}_{figure}", []).append(seconds)
    figures["mib_per_million_tokens"] = [size_of_a_million(keep_tokens=False)]
    figures["mib_per_million_tokens_kept"] = [size_of_a_million(keep_tokens=True)]
    return figures


def watch(args: tuple[str, ...], runs_dir: Path, modules: Path) -> dict[str, float]:
    """One command from its start to its end, with its compiled modules in a folder of ours: whether there are any is no accident."""
    command = [sys.executable, "-c", "from infra.cli import main; main()", *args]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    env |= {"PYTHONUNBUFFERED": "1", "PYTHONPYCACHEPREFIX": str(modules), "POLYRL_RUNS_DIR": str(runs_dir)}
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=env)
    assert process.stdout is not None
    with process.stdout:
        line = process.stdout.readline()
        first = time.perf_counter() - began
        process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not line:
        raise RuntimeError(f"polyrl {' '.join(args)} ended with exit code {process.returncode}")
    return {"first_s": first, "end_s": time.perf_counter() - began, "cpu_s": used.ru_utime + used.ru_stime}


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
