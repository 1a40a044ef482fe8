"""Trackers: the real packages where they are installed, and that none of them can hold up a run."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from infra.launch import Fan
from infra.trackers import Background, open_trackers
from infra.trackers import background as background_module
from infra.trackers.background import TRACKERS, check_trackers
from infra.trackers.figures import figures
from infra.trackers.ray_metrics import COUNTERS, HISTOGRAMS, exported, series
from rl_core.config import ConfigError, EnvironmentConfig, RunConfig, TrackersConfig
from rl_core.config_checks import validate
from rl_core.events import Event
from rl_core.metrics import group_figures
from rl_core.seams import GroupResult
from tests.unit.stored_runs import events

ROOT = Path(__file__).parents[2]


def step(version: int, **metrics: float) -> Event:
    return Event(kind="step", data={"version": version, "metrics": metrics or {"learner/loss": 1.0 / version}})


class Kept:
    """Keeps what it is told, and can be made to wait or to raise."""

    def __init__(self, *, go: threading.Event | None = None, fails_at: int = -1) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.outcome = ""
        self._go, self._fails_at = go, fails_at

    def log(self, version: int, metrics: Mapping[str, float]) -> None:
        if self._go is not None:
            self._go.wait()
        if version == self._fails_at:
            raise ConnectionError("no route to the server")
        self.rows.append((version, dict(metrics)))

    def finish(self, outcome: str) -> None:
        self.outcome = outcome


def test_a_tracker_gets_every_step_evaluation_and_the_outcome_in_order() -> None:
    tracker, notes = Kept(), []
    sink = Background("kept", lambda: tracker, notes.append)
    for event in events():
        sink.emit(event)
    sink.close()
    assert [version for version, _ in tracker.rows] == [0, 1, 2, 3, 4, 4]
    assert tracker.rows[0][1]["env/math/held_out/pass_rate"] == 0.3
    assert tracker.rows[1][1]["env/math/reward"] == pytest.approx(0.4)
    assert tracker.outcome == "finished"
    assert notes == []


def test_a_tracker_that_hangs_delays_nothing_and_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_module, "QUEUE_SIZE", 8)
    go = threading.Event()
    other, notes = Kept(), []
    hanging = Kept(go=go)
    sinks = [Background("hanging", lambda: hanging, notes.append), Background("other", lambda: other, notes.append)]
    try:
        for version in range(1, 101):
            for sink in sinks:
                sink.emit(step(version))
            if version % 8 == 0:  # `other` keeps up; what is tested is that the hanging one is not waited for
                while sinks[1]._events.qsize():
                    go.wait(0.001)
        assert hanging.rows == []  # a hundred steps went by meanwhile
        sinks[0].close(seconds=0.0)
        sinks[1].close()
    finally:
        go.set()
    assert [version for version, _ in other.rows] == list(range(1, 101))
    assert notes == ["tracker hanging is slower than the run: figures are left out; the run's own store has them all"]


@pytest.mark.parametrize("where", ["at the start", "amid the run"])
def test_a_tracker_that_raises_is_left_out_and_the_run_is_told_why_in_one_note(where: str) -> None:
    def broken() -> Kept:
        raise PermissionError("no such account")

    seen: list[Event] = []

    class Store:
        def emit(self, event: Event) -> None:
            seen.append(event)

    out = Fan([Store()])
    make = broken if where == "at the start" else lambda: Kept(fails_at=2)
    sink = Background("faulty", make, lambda text: out.emit(Event(kind="note", data={"text": text})))
    out.add(sink)
    for version in range(1, 10):
        out.emit(step(version))
    sink.close()
    notes = [event.data["text"] for event in seen if event.kind == "note"]
    reason = "PermissionError: no such account" if where == "at the start" else "ConnectionError: no route to the server"
    assert notes == [f"tracker faulty failed and is left out: {reason}"]
    assert len(seen) == 10


def test_events_without_figures_are_none_of_a_trackers_business() -> None:
    assert figures(Event(kind="note", data={"text": "x"})) is None
    assert figures(step(3, loss=0.5)) == (3, {"loss": 0.5})


def config(tmp_path: Path, **trackers: Any) -> RunConfig:
    return RunConfig(runs_dir=str(tmp_path), environments={"math": EnvironmentConfig()}, trackers=TrackersConfig(**trackers))


def tracked(tmp_path: Path, *parts: list[Event], **trackers: Any) -> Path:
    """The folder of a run with one process for each part of its events."""
    run_dir = tmp_path / "20260101-000000-demo"
    run_dir.mkdir()
    for part in parts:
        notes: list[str] = []
        sinks = open_trackers(config(tmp_path, **trackers), run_dir, {"name": "demo", "loop": {"steps": 4}}, notes.append)
        for event in part:
            for sink in sinks:
                sink.emit(event)
        for sink in sinks:
            sink.close(60)
        assert notes == []
    return run_dir


FIRST = [step(1), step(2), Event(kind="run_finished", data={"outcome": "stopped", "reason": "", "seconds": 1.0})]
SECOND = [step(3), step(4), Event(kind="run_finished", data={"outcome": "finished", "reason": "", "seconds": 1.0})]


def test_tensorboard_reads_one_curve_over_a_resumed_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_dir = tracked(tmp_path, FIRST, SECOND, use=["tensorboard"])
    found = reader.EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [point.step for point in found.Scalars("learner/loss")] == [1, 2, 3, 4]
    assert [point.value for point in found.Scalars("learner/loss")] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])


def test_wandb_offline_goes_on_under_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")  # no traffic
    from infra.trackers.wandb import run_id

    run_dir = tracked(tmp_path, FIRST, SECOND, use=["wandb"], wandb_mode="offline", tags=["demo"])
    files = sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {file.stem for file in files} == {f"run-{run_id(run_dir)}"}
    written = b"".join(file.read_bytes() for file in files)
    assert b"learner/loss" in written
    assert b"policy_version" in written
    assert run_id(tmp_path / "a") != run_id(tmp_path / "elsewhere" / "a")


def test_mlflow_keeps_one_run_in_a_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run_dir = tracked(tmp_path, FIRST, SECOND, use=["mlflow"], project="demo", tags=["a tag"])
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("demo")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == json.loads((run_dir / "mlflow.json").read_text())["run_id"]
    assert run.info.status == "FINISHED"
    assert run.data.params["loop.steps"] == "4"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "learner/loss")] == [1, 2, 3, 4]


def test_a_tracker_that_is_unknown_or_not_installed_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="tensorbored"):
        validate(config(tmp_path, use=["tensorbored"]))
    with pytest.raises(ConfigError, match="wandb_mode"):
        validate(config(tmp_path, wandb_mode="sometimes"))
    monkeypatch.setitem(TRACKERS, "wandb", (*TRACKERS["wandb"][:2], "no_such_package"))
    with pytest.raises(ConfigError, match=r"pip install 'polyrl\[trackers\]'"):
        check_trackers(config(tmp_path, use=["wandb"]))


# --- the board, and the table of names ------------------------------------------------------------------------------------


def documented() -> set[str]:
    """The names in docs/metrics.md, with <id>, <name> and <pool> as they stand there."""
    found: set[str] = set()
    prefix = ""
    for line in (ROOT / "docs/metrics.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            mark = re.search(r"`(\S+?)/\.\.\.`", line)
            prefix = f"{mark[1]}/" if mark else ""
        elif line.startswith("| `"):
            found |= {prefix + name for name in re.findall(r"`([^`]+)`", line.split("|")[1])}
    return found


def pattern(name: str) -> str:
    return re.sub(r"<\w+>", r".+?", re.escape(name).replace(r"\<", "<").replace(r"\>", ">"))


def undocumented(names: set[str]) -> set[str]:
    """Those that docs/metrics.md lacks. What is measured over trained tokens of one environment is measured over all as well."""
    known = documented()
    known |= {name.replace("env/<id>/", "learner/") for name in known if name.startswith("env/<id>/")}
    whole = re.compile("|".join(map(pattern, known)))
    return {name for name in names if not whole.fullmatch(name)}


def queried() -> set[str]:
    """The metrics that the board asks Prometheus for."""
    board = json.loads((ROOT / "infra/grafana/polyrl.json").read_text(encoding="utf-8"))
    texts = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    texts += [str(variable.get("query", "")) for variable in board["templating"]["list"]]
    return {name for text in texts for name in re.findall(r"ray_polyrl_\w+", text)}


def served() -> set[str]:
    """The names under which Ray serves everything that is documented."""
    names = set()
    for name in documented():
        known = name.replace("<id>", "math").replace("<name>", "exact").replace("<pool>", "easy")
        short = series(known)[0]
        names.add(f"ray_{exported(short)}" + ("_total" if short in COUNTERS else ""))
        if short in HISTOGRAMS:
            names |= {f"ray_{exported(short)}_hist_{part}" for part in ("bucket", "sum", "count")}
    return names


def test_every_metric_that_the_board_queries_is_one_that_we_export() -> None:
    assert len(queried()) > 15
    assert queried() <= served(), queried() - served()


def test_every_metric_of_a_run_is_documented() -> None:
    names = {name for event in events() if (said := figures(event)) for name in said[1]}
    assert not undocumented(names)
    assert undocumented({"env/math/mystery", "learner/loss"}) == {"env/math/mystery"}


def test_every_figure_of_a_group_is_documented() -> None:
    group = GroupResult(
        ref=None, group_id="g", env="math", task_key="k", num_trainable=2, has_signal=True, min_version=0, max_version=0,
        rewards=(0.0, 1.0), components={"exact": 0.5}, statuses=("ok", "ok"), sampled_tokens=9, prompt_tokens=9, drafted=9, accepted=6,
        engine_steps=4, seconds=1.0,
    )  # fmt: skip
    names = {f"env/math/{name}" for name in group_figures([group], 1.0)}
    assert "env/math/mtp_acceptance" in names
    assert not undocumented(names)


def test_names_become_labels() -> None:
    assert series("env/math/reward") == ("env/reward", {"env": "math"})
    assert series("env/code/component/tests") == ("env/component", {"env": "code", "name": "tests"})
    assert series("env/math/curriculum/digits=2/solved") == ("env/curriculum_solved", {"env": "math", "name": "digits=2"})
    assert series("env/math/held_out/pass_rate") == ("env/held_out/pass_rate", {"env": "math"})
    assert series("learner/loss") == ("learner/loss", {})
    assert exported("env/held_out/pass_rate") == "polyrl_env_held_out_pass_rate"
