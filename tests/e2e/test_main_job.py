"""The main job, from the command line to the report, on the real stack: Ray job, vLLM with MTP, DeepSpeed, sandbox.

One short run, told to stop by nobody, must raise held-out reward; another is interrupted and must leave a run that can be read and no
process. Both start from the seed checkpoint that ships with the project.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.trackers import figures
from rl_core.ledger import read_balance
from rl_core.run_store import StoredRun
from tests.unit.test_trackers import undocumented

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

POLYRL = str(Path(sys.executable).parent / "polyrl")
ROOT = Path(__file__).parents[2]
TASKS = 64
STEPS = 10

CONFIG = f"""
name: e2e
model: {{path: {ROOT}/configs/models/seed}}
environments:
  math: {{max_tokens: 64, max_total_tokens: 128, options: {{digits: 3, kinds: [add, sub, chain], terms: 5}}}}
  code: {{share: 0.5, max_tokens: 96, max_total_tokens: 192, options: {{kinds: [ints, stdin, lists], num_steps: 3, digits: 2}}}}
  tools:
    {{max_tokens: 48, max_turns: 6, max_total_tokens: 512,
     options: {{kinds: [stock, points, move, refund], distractors: 0, failure_rate: 0.0}}}}
loop: {{steps: {STEPS}, groups_per_step: 10, max_staleness: 2}}
rollout: {{max_num_seqs: 48, max_model_len: 768, speculative_tokens: 2}}
learner: {{learning_rate: 3.0e-4}}
eval: {{tasks: {TASKS}, every: 0}}
"""


def polyrl(*arguments: object) -> str:
    done = subprocess.run([POLYRL, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def show(run: Path) -> dict[str, Any]:
    """What `polyrl show RUN --json` says."""
    found: dict[str, Any] = json.loads(polyrl("show", run, "--json"))
    return found


def started_by(process: psutil.Process) -> set[psutil.Process]:
    return set(process.children(recursive=True))


def alive(processes: set[psutil.Process]) -> list[psutil.Process]:
    """Those that still run, after a moment to end."""
    _, left = psutil.wait_procs(processes, timeout=15)
    return [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


class Started:
    """A command of ours with its output in a file, and every process that it was seen to start."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.log = folder / "log.txt"
        with self.log.open("wb") as log:
            self.process = psutil.Popen(
                [POLYRL, *map(str, arguments)], stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=folder, start_new_session=True,
                env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
            )  # fmt: skip
        self.family: set[psutil.Process] = set()

    def watch(self, *, until: str = "", seconds: float) -> None:
        """Return when the command ends, or its output holds `until`."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and not (until and until in self.text):
            assert time.monotonic() < deadline, f"not there after {seconds} s:\n{self.text}"
            self.family |= started_by(self.process)
            time.sleep(0.5)

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def end(self) -> None:
        for process in [self.process, *self.family]:
            if process.is_running():
                process.kill()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run that went through the job path to its end."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "e2e.yaml").write_text(CONFIG, encoding="utf-8")
    job = Started(folder, "submit", "e2e.yaml", "--follow")
    try:
        job.watch(seconds=540)
        assert job.process.returncode == 0, job.text
        assert len(job.family) >= 8
        assert not alive(job.family)
        (run,) = (p for p in (folder / "runs").iterdir() if p.is_dir())
        yield run
    finally:
        job.end()


def test_every_figure_of_the_run_is_in_the_table_of_metrics(finished: Path) -> None:
    names = {name for event in StoredRun(finished).events() if (said := figures(event)) for name in said[1]}
    assert {"learner/loss", "env/math/reward", "env/math/held_out/pass_rate"} <= names
    assert not undocumented(names)


def test_held_out_reward_rises(finished: Path) -> None:
    """Together by more than three standard errors, and in no environment down."""
    environments = show(finished)["environments"]
    assert set(environments) == {"math", "code", "tools"}
    assert all(e[when]["n"] == TASKS for e in environments.values() for when in ("before", "after"))
    before, after = (sum(e[when]["pass_rate"] for e in environments.values()) / 3 for when in ("before", "after"))
    error = sum((r * (1 - r) / (3 * TASKS)) for r in (before, after)) ** 0.5
    assert after - before > max(3 * error, 0.10), environments
    assert all(e["after"]["pass_rate"] >= e["before"]["pass_rate"] - 0.05 for e in environments.values())


def test_the_run_proved_its_invariants(finished: Path) -> None:
    shown = show(finished)
    assert (shown["outcome"], shown["step"]) == ("finished", STEPS)
    assert 0 < shown["logprob_agreement_nats"]["worst_mean"] < 1e-4
    assert shown["staleness"] == {"bound": 2, "max": pytest.approx(1.5, abs=0.5)}
    for env in shown["environments"].values():
        assert 0.2 < env["mtp_acceptance"] <= 1
        assert 1.2 < env["tokens_per_engine_step"] <= 3
        assert env["groups_trained"] > 0
    shares = {name: env["share"] for name, env in shown["environments"].items()}
    assert all(abs(s["trained"] - s["requested"]) < 0.1 for s in shares.values()), shares


def test_everything_that_a_run_promises_is_in_its_folder(finished: Path) -> None:
    names = {p.name for p in finished.iterdir()}
    assert names >= {"config.yaml", "events.jsonl", "ledger.sqlite", "rollouts", "checkpoints", "curves.png", "report.html"}
    report = (finished / "report.html").read_text(encoding="utf-8")
    assert "<svg" in report or "<img" in report
    assert all(name in report for name in ("math", "code", "tools"))
    checkpoint = finished / "checkpoints" / f"step-{STEPS:06d}"
    assert (checkpoint / "model" / "model.safetensors").stat().st_size > 10**6
    balances = read_balance(finished / "ledger.sqlite")
    assert {b.env for b in balances} == {"math", "code", "tools"}
    assert all(b.balanced for b in balances)
    assert sum(b.trained for b in balances) == STEPS * 10


def test_ctrl_c_saves_the_step_and_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "e2e.yaml").write_text(CONFIG, encoding="utf-8")
    run = Started(tmp_path, "run", "e2e.yaml", "eval.tasks=4", "loop.steps=500")
    try:
        run.watch(until="step 2/500", seconds=240)
        run.process.send_signal(signal.SIGINT)
        run.watch(seconds=90)
        assert run.process.returncode == 1, run.text
        assert not alive(run.family)
        (folder,) = (p for p in (tmp_path / "runs").iterdir() if p.is_dir())
        shown = show(folder)
        assert shown["outcome"] == "stopped"
        assert 2 <= shown["step"] < 20
        assert (folder / "checkpoints" / f"step-{shown['step']:06d}").is_dir()
    finally:
        run.end()
