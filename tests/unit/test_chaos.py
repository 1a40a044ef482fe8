"""What chaos compares and what it may kill; the run under fire itself is `polyrl chaos configs/quickstart.yaml`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from infra.chaos import ENGINE, KINDS, Chaos, Comparison, DockerEngine, Outcome, check, compare
from infra.cli.chaos import undisturbed_run
from infra.errors import UsageError
from infra.run_state import Score
from rl_core.config_files import load_config, to_yaml
from rl_core.events import Event
from rl_core.ledger import Ledger
from rl_core.run_store import RunStore, StoredRun
from tests.unit.fakes import tasks

ROOT = Path(__file__).parents[2]


def score(low: float, high: float) -> Score:
    return Score(version=2, pass_rate=(low + high) / 2, mean_reward=0.5, n=128, ci95=(low, high))


def stored(folder: Path, *, steps: int = 2, score: float = 0.5) -> StoredRun:
    """A finished run of two steps, one of which went back to a checkpoint."""
    folder.mkdir()
    config = load_config(ROOT / "configs" / "quickstart.yaml", [f"model.path={ROOT}/configs/models/seed", "loop.steps=2"])
    (folder / "config.yaml").write_text(to_yaml(config))
    store = RunStore(folder)
    store.emit(Event(kind="run_started", data={"run": folder.name, "steps": 2, "environments": {"math": 1.0}}))
    for version in range(1, steps + 1):
        store.emit(Event(kind="step", data={"version": version, "metrics": {}}))
    after = {"pass_rate": score, "mean_reward": score, "n": 100, "ci95": [score - 0.1, score + 0.1]}
    store.emit(Event(kind="eval", data={"version": 2, "label": "after", "environments": {"math": after}}))
    store.emit(Event(kind="run_finished", data={"outcome": "finished", "reason": "", "seconds": 1.0}))
    store.close()
    ledger = Ledger(folder / "ledger.sqlite")
    source = tasks("math")
    names = [f"g{ledger.draw(next(source), position):06d}" for position in range(2)]
    for name in names:
        ledger.ready(name)
    ledger.train(names, 1)
    ledger.roll_back(2, "the loss is nan")
    ledger.close()
    return StoredRun(folder)


def test_within_noise_is_that_the_intervals_overlap() -> None:
    def verdict(*intervals: tuple[float, float]) -> bool:
        mine, theirs = (score(*i) for i in intervals)
        return Comparison(env="math", disturbed=mine, undisturbed=theirs).within_noise

    assert verdict((0.4, 0.6), (0.55, 0.7))
    assert verdict((0.5, 0.6), (0.4, 0.7))
    assert not verdict((0.4, 0.5), (0.51, 0.7))
    assert not verdict((0.8, 0.9), (0.51, 0.7))


def test_a_whole_run_has_no_problems_and_is_compared_by_environment(tmp_path: Path) -> None:
    one, other, worse = stored(tmp_path / "one"), stored(tmp_path / "other", score=0.65), stored(tmp_path / "worse", score=0.1)
    assert check(Outcome(run_dir=one.run_dir), one, steps=2) == []
    assert [(c.env, c.within_noise) for c in compare(one, other)] == [("math", True)]
    assert [c.within_noise for c in compare(one, worse)] == [False]
    assert "NOT within noise" in str(compare(one, worse)[0])


def test_what_is_missing_or_left_is_a_problem(tmp_path: Path) -> None:
    run = stored(tmp_path / "one", steps=1)
    with_rest = Outcome(run_dir=run.run_dir, left=["ray::RolloutWorker"])
    problems = check(with_rest, run, steps=2)
    assert len(problems) == 2
    assert "steps recorded are [1]" in problems[0]
    assert "outlived" in problems[1]


def test_a_baseline_that_was_trained_otherwise_is_refused(tmp_path: Path) -> None:
    run = stored(tmp_path / "one")
    quickstart, model = ROOT / "configs" / "quickstart.yaml", f"model.path={ROOT}/configs/models/seed"

    def baseline(*overrides: str) -> StoredRun | None:
        return undisturbed_run(str(run.run_dir), quickstart, [], load_config(quickstart, [model, "loop.steps=2", *overrides]))

    assert baseline("learner.checkpoint_every=5", "rollout.num_workers=2") == run
    with pytest.raises(UsageError, match=r"learner\.learning_rate"):
        baseline("learner.learning_rate=0.1")
    assert undisturbed_run("none", quickstart, [], load_config(quickstart, [model])) is None


def test_only_a_docker_engine_of_our_own_folder_is_ever_a_victim(tmp_path: Path) -> None:
    engine = DockerEngine(tmp_path)
    assert engine.processes() == [], "there is no file with its id"
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen([*sleep, "--exec-root", f"{tmp_path}/exec"]) as ours, subprocess.Popen(sleep) as somebody:
        try:
            (tmp_path / "dockerd.pid").write_text(str(somebody.pid))
            assert engine.processes() == []
            (tmp_path / "dockerd.pid").write_text(str(ours.pid))
            assert [p.pid for p in engine.processes()] == [ours.pid]
        finally:
            ours.kill()
            somebody.kill()


def test_every_kind_comes_once_before_any_comes_again() -> None:
    chaos = Chaos(kills=12, mean_pause_s=1.0, seed=3, say=lambda text: None)
    assert sorted(chaos._shuffled()) == sorted(KINDS)
    with_engine = Chaos(kills=12, mean_pause_s=1.0, seed=3, say=lambda text: None, engine=DockerEngine(Path("x")))
    assert sorted(with_engine._shuffled()) == sorted([*KINDS, ENGINE])
