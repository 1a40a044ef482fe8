"""polyrl run, polyrl submit, polyrl resume: start a run here or as a Ray job, or go on with one."""

from __future__ import annotations

import os
import re
import signal
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from infra.cli.common import ConfigPath, Overrides, RunName, RunsDir, draw, finish
from infra.dashboard.feed import read_state
from infra.errors import UsageError
from infra.preflight import preflight
from infra.view import EventLines, make_view
from rl_core.config import RunConfig
from rl_core.config_files import differences, load_config, to_yaml
from rl_core.run_store import RunStore, StoredRun, create_run_dir

if TYPE_CHECKING:
    from infra.jobs import Head

RunId = Annotated[
    str,
    typer.Option("--run", metavar="ID", help="Call the run ID. If there is a run of that name already, go on with it.", show_default=False),
]


def register(app: typer.Typer) -> None:
    app.command("run")(run)
    app.command("submit")(submit)
    app.command("resume")(resume)


def run(config: ConfigPath, overrides: Overrides = None, run_id: RunId = "") -> None:
    """Run CONFIG in the foreground: on the cluster of RAY_ADDRESS if there is one, else on an embedded Ray."""
    checked = load_config(config, overrides or [])
    preflight(checked)
    run_dir = named_run_dir(checked, run_id) if run_id else None

    from infra import launch  # Ray, and with it seconds: only now that the config is known to be right

    _launch(launch, checked, run_dir or create_run_dir(checked))


def named_run_dir(config: RunConfig, run_id: str) -> Path:
    """The folder of a run that is called so: a new one, or that of the run which goes on. A finished one ends the command well."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", run_id):
        raise UsageError(f"--run {run_id!r}: wanted letters, digits, '-', '_' and '.', a letter or digit first")
    stored = StoredRun(Path(config.runs_dir).absolute() / run_id)
    path = stored.run_dir / "config.yaml"
    if not path.is_file():
        try:
            return create_run_dir(config, run_id)
        except FileExistsError:
            raise UsageError(f"{stored.run_dir} is there and is no run; remove it, or choose another --run") from None
    before = load_config(path)
    if (steps := reopen(stored, replace(before, runs_dir=config.runs_dir), config)) is not None:
        typer.echo(f"run {run_id} has finished its {steps} steps")
        raise typer.Exit(0)
    path.write_text(to_yaml(config), encoding="utf-8")  # what it goes on under, for all that read it later
    return stored.run_dir


def resume(run: RunName = "latest", overrides: Overrides = None, runs_dir: RunsDir = Path("runs")) -> None:
    """Go on with RUN where it stopped, was killed or failed; no step is trained twice.

    Of its config, the end (loop.steps) and what does not touch its results may be changed: eval.*, rollout.*, store.*, trackers.*, sandbox,
    loop.stall_s, learner.checkpoint_every, learner.keep_batches.
    """
    stored = RunStore.find(runs_dir, run)
    path = stored.run_dir / "config.yaml"
    before, checked = load_config(path), load_config(path, overrides or [])
    if (steps := reopen(stored, before, checked)) is not None:
        raise UsageError(
            f"run {stored.id} has finished its {steps} steps; to train it further: polyrl resume {stored.id} loop.steps={2 * steps}"
        )
    preflight(checked)

    from infra import launch

    path.write_text(to_yaml(checked), encoding="utf-8")
    _launch(launch, checked, stored.run_dir)


def reopen(stored: StoredRun, before: RunConfig, after: RunConfig) -> int | None:
    """Raise UsageError if `stored` cannot go on under `after`; its number of steps if nothing is left to do, else None."""
    state = read_state(stored)
    if stored.state_after(state.outcome) == "running":
        raise UsageError(f"run {stored.id} is running; stop it first")
    refuse_changes(before, after)
    return state.version if state.outcome == "finished" and state.version >= after.loop.steps else None


MAY_CHANGE = (
    "loop.steps",
    "loop.stall_s",
    "eval.",
    "rollout.",
    "store.",
    "trackers.",
    "sandbox",
    "learner.checkpoint_every",
    "learner.keep_batches",
)
"""Keys that a resumed run may have otherwise than before; with any other it would not be the same run."""


def refuse_changes(before: RunConfig, after: RunConfig) -> None:
    """Raise UsageError for the first changed key that would make it another run."""
    for d in differences(before, after):
        if not d.key.startswith(MAY_CHANGE):
            raise UsageError(
                f"{d.key} was {d.old!r} and cannot become {d.new!r} in the same run; start a new one from its newest checkpoint "
                f"with model.path=RUN/checkpoints/STEP/model"
            )


def _launch(launch: ModuleType, checked: RunConfig, run_dir: Path) -> None:
    """Run in `run_dir` to the end, show it, and leave with its exit code."""
    followed = os.environ.get("POLYRL_EVENTS") == "stdout"  # by whoever reads our output, who will also say how it ended
    view = None if followed else make_view()
    try:
        code = launch.run(checked, run_dir=run_dir, sinks=[view or EventLines()])
    finally:
        if view is not None:
            view.close()
    if followed:
        draw(StoredRun(run_dir))
    else:
        finish(StoredRun(run_dir))
    raise typer.Exit(code)


def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_ADDRESS", help="Ray's job API, http://HOST:8265. Without it, a head is started on this machine."),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", "-f", help="Show the run live until it ends. Ctrl-C stops it.")] = True,
    run_id: RunId = "",
    plugin: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="Package folder or wheel that the job needs and the checkout lacks.", exists=True),
    ] = None,
) -> None:
    """Run CONFIG as a Ray job. With --run, submitting it again goes on with the same run."""
    overrides = overrides or []
    plugins = tuple(path.absolute() for path in plugin or ())
    sys.path += [str(path.parent if path.is_dir() else path) for path in plugins]  # the config is checked here, too
    checked = load_config(config, overrides)
    preflight(checked, runs_here=address is None)

    from infra import jobs

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was started here is ended
    runs_dir = Path(checked.runs_dir).absolute()
    with ExitStack() as closing:
        cluster = address or _local_head(runs_dir, closing, stays=not follow)
        client = jobs.client(cluster)
        local = jobs.is_local(cluster)
        if local:
            overrides = _absolute_paths(checked, overrides)
        submission = jobs.Submission(
            working_dir=jobs.project_of(config), config=config.absolute(), overrides=tuple(overrides), local=local, run_id=run_id,
            plugins=plugins,
        )  # fmt: skip
        job = submission.send(client)
        if not follow:
            typer.echo(f"{job}\nfollow it with `polyrl logs {job} --follow`, stop it with `polyrl stop {job}`")
            return
        view = make_view()
        try:
            status = jobs.follow(client, job, view, on_stopping=lambda: view.log("stopping: the current step ends and is saved"))
        finally:
            view.close()
    if view.state.run and (runs_dir / view.state.run).is_dir():
        finish(StoredRun(runs_dir / view.state.run))
    if status != "SUCCEEDED":
        typer.echo(f"job {job}: {status.lower()}", err=True)
        raise typer.Exit(1)


def _local_head(runs_dir: Path, closing: ExitStack, *, stays: bool) -> Head:
    """A head on this machine: one that still runs, or a new one, which ends with us unless it `stays`."""
    from infra import jobs

    note = jobs.head_note(runs_dir)
    head = jobs.Head.load(note)
    if head is None:
        typer.echo("starting Ray on this machine ...")
        head = jobs.start_head(dies_with_us=not stays)
        head.save(note)
        if not stays:
            closing.callback(note.unlink, missing_ok=True)
            closing.callback(jobs.stop_head, head)
    return head


def _absolute_paths(config: RunConfig, overrides: list[str]) -> list[str]:
    """A job runs in a copy of the checkout: results must land in the user's own, and a checkpoint outside of it be found."""
    model = Path(config.model.path)
    kept = [o for o in overrides if o.split("=")[0] not in ("runs_dir", "model.path")]
    return [*kept, f"runs_dir={Path(config.runs_dir).absolute()}", f"model.path={model.absolute()}"]
