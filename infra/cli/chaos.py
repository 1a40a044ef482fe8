"""polyrl chaos: a run under fire, beside one without."""

from __future__ import annotations

import json as jsonlib
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.cli.common import ConfigPath, Overrides, finish
from infra.errors import UsageError
from infra.preflight import preflight
from rl_core.config import RunConfig
from rl_core.config_files import differences, load_config
from rl_core.run_store import RunStore, StoredRun, list_runs

MAY_DIFFER = ("name", "runs_dir", "model.path", "rollout.", "sandbox", "loop.stall_s", "learner.checkpoint_every", "eval.every")
"""Keys that the undisturbed run may have otherwise: they say where and how, not what is learnt."""


def register(app: typer.Typer) -> None:
    app.command("chaos")(chaos)


def chaos(
    config: ConfigPath,
    overrides: Overrides = None,
    kills: Annotated[int, typer.Option(min=1, help="Processes to kill.")] = 12,
    pause: Annotated[float, typer.Option(min=1.0, help="Mean seconds between kills, counted from the first step of each life.")] = 20.0,
    seed: Annotated[int, typer.Option(help="Which processes, and when.")] = 0,
    baseline: Annotated[str, typer.Option(help="Undisturbed run to compare with; 'run' makes one first, 'none' is none.")] = "run",
    engine: Annotated[
        Path | None, typer.Option(help="Folder of a Docker engine of ours: it is the run's sandbox, and is killed like the rest.")
    ] = None,
) -> None:
    """Run CONFIG while its processes are killed at random: engines, learner, queue, hosts, and the driver, which is then resumed.

    Checks that the run ends whole: every step once, a ledger that adds up, no process left, and a final held-out score within noise of an
    undisturbed run (their 95 % intervals overlap). The checks are also in RUN/chaos.json.
    """
    checked = load_config(config, overrides or [])
    preflight(checked)
    from infra.chaos import Chaos, Comparison, DockerEngine, check, compare

    docker = None if engine is None else DockerEngine(engine)
    if docker is not None:
        docker.start()
    undisturbed = undisturbed_run(baseline, config, overrides or [], checked)
    outcome = Chaos(kills=kills, mean_pause_s=pause, seed=seed, say=typer.echo, engine=docker).go(
        config, overrides or [], Path(checked.runs_dir).absolute()
    )
    if docker is not None:
        docker.wait()
    if outcome.run_dir is None:
        typer.echo("the run did not start", err=True)
        raise typer.Exit(1)
    stored = StoredRun(outcome.run_dir)
    problems = check(outcome, stored, checked.loop.steps)
    if len(outcome.kills) < kills:
        problems.append(f"the run ended after {len(outcome.kills)} kills, wanted {kills}; raise loop.steps or lower --pause")
    compared: list[Comparison] = compare(stored, undisturbed) if undisturbed is not None else []
    if undisturbed is not None and {c.env for c in compared} != set(checked.environments):
        problems.append("not every environment has a final held-out score in both runs")
    problems += [f"{c.env}: its held-out score is not within noise of the undisturbed run's" for c in compared if not c.within_noise]
    finish(stored)
    for row in compared:
        typer.echo(f"  {row}")
    typer.echo(f"{len(outcome.kills)} kills ({', '.join(outcome.kills)}), {outcome.lives} lives of the driver")
    for problem in problems:
        typer.echo(f"PROBLEM: {problem}")
    write(stored, {"kills": outcome.kills, "lives": outcome.lives, "left": outcome.left, "problems": problems}, compared)
    raise typer.Exit(1 if problems else 0)


def write(run: StoredRun, data: dict[str, Any], compared: list[Any]) -> None:
    """RUN/chaos.json."""
    data["compared"] = [asdict(row) | {"within_noise": row.within_noise} for row in compared]
    (run.run_dir / "chaos.json").write_text(jsonlib.dumps(data, indent=1), encoding="utf-8")


def undisturbed_run(baseline: str, config: Path, overrides: list[str], wanted: RunConfig) -> StoredRun | None:
    """The run to compare with; one that was trained otherwise is refused."""
    runs_dir = Path(wanted.runs_dir).absolute()
    if baseline == "none":
        return None
    if baseline == "run":
        known = {run.id for run in list_runs(runs_dir)}
        typer.echo("first, an undisturbed run")
        polyrl = str(Path(sys.executable).parent / "polyrl")
        done = subprocess.run([polyrl, "run", str(config), *overrides, f"runs_dir={runs_dir}"], check=False)
        new = [run for run in list_runs(runs_dir) if run.id not in known]
        if done.returncode != 0 or not new:
            raise UsageError("the undisturbed run did not end well; there is nothing to compare with")
        return new[-1]
    found = RunStore.find(runs_dir, baseline)
    if found.state != "finished":
        raise UsageError(f"run {found.id} is {found.state}; --baseline wants one that has finished")
    for d in differences(load_config(found.run_dir / "config.yaml", [f"model.path={wanted.model.path}"]), wanted):
        if not d.key.startswith(MAY_DIFFER):
            raise UsageError(f"run {found.id} has {d.key}={d.old!r}, this one {d.new!r}: their scores cannot be compared")
    return found
