"""polyrl run, polyrl submit: start a run here, or as a Ray job."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from infra.cli.common import Overrides, finish
from infra.preflight import preflight
from infra.view import EventLines, make_view
from rl_core.config import RunConfig, load_config
from rl_core.events import Sink
from rl_core.run_store import StoredRun, create_run_dir, list_runs

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run, such as configs/quickstart.yaml.")]


def register(app: typer.Typer) -> None:
    app.command("run")(run)
    app.command("submit")(submit)


def run(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run CONFIG in the foreground: on the cluster of RAY_ADDRESS if there is one, else on an embedded Ray."""
    checked = load_config(config, overrides or [])
    preflight(checked)

    from infra import launch  # Ray, and with it seconds: only now that the config is known to be right

    run_dir = create_run_dir(checked)
    with ExitStack() as closing:
        sinks: list[Sink] = []
        if os.environ.get("POLYRL_EVENTS") == "stdout":
            sinks.append(EventLines())
        else:
            view = make_view()
            closing.callback(view.close)
            sinks.append(view)
        code = launch.run(checked, run_dir=run_dir, sinks=sinks)
    finish(StoredRun(run_dir))
    raise typer.Exit(code)


def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_ADDRESS", help="Ray's job API, http://HOST:8265. Without it, a head is started on this machine."),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Show the run live until it ends. Ctrl-C stops it.")] = True,
) -> None:
    """Run CONFIG as a Ray job."""
    overrides = overrides or []
    checked = load_config(config, overrides)
    preflight(checked)

    from infra import jobs

    runs_dir = Path(checked.runs_dir).absolute()
    before = {r.id for r in list_runs(runs_dir)}
    with ExitStack() as closing:
        if address is None:
            address = _local_head(runs_dir, closing, stays=not follow)
        client = jobs.client(address)
        local = jobs.is_local(address)
        if local:
            overrides = [*overrides, *_absolute_paths(checked, overrides)]
        submission = jobs.Submission(
            working_dir=jobs.project_of(config), config=config.absolute(), overrides=tuple(overrides), local=local,
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
        run_id = view.state.run
    if run_id and (runs_dir / run_id).is_dir() and run_id not in before:
        finish(StoredRun(runs_dir / run_id))
    if status != "SUCCEEDED":
        typer.echo(f"job {job}: {status.lower()}", err=True)
        raise typer.Exit(1)


def _local_head(runs_dir: Path, closing: ExitStack, *, stays: bool) -> str:
    """The address of a head on this machine: one that still runs, or a new one, which ends with us unless it `stays`."""
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
    return head.address


def _absolute_paths(config: RunConfig, overrides: list[str]) -> list[str]:
    """A job runs in a copy of the checkout: results must land in the user's own, and a checkpoint outside of it be found."""
    model = Path(config.model.path)
    extra = [f"runs_dir={Path(config.runs_dir).absolute()}"]
    if any(o.startswith("model.path=") for o in overrides) or ".." in model.parts:
        extra.append(f"model.path={model.absolute()}")
    return extra
