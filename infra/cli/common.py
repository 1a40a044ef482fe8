"""What the commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.cli.completion import config_files, run_names
from infra.dashboard.feed import read_state
from infra.strict_json import dumps
from infra.view import clock, visible
from rl_core.run_store import StoredRun

RunsDir = Annotated[Path, typer.Option("--runs-dir", help="Where run folders are.", envvar="POLYRL_RUNS_DIR")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides of single keys, such as loop.steps=20.", show_default=False)]
RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="Id of a run, a unique part of it, its folder, or latest.", autocompletion=run_names)
]
ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file of the run, such as configs/quickstart.yaml.", autocompletion=config_files)
]


def print_json(data: Any) -> None:
    """Indented JSON on standard output, nothing else beside it."""
    sys.stdout.write(dumps(data, indent=2) + "\n")


def draw(run: StoredRun) -> Path | None:
    """Draw curves.png and report.html; None if the run recorded nothing."""
    from infra.report import write_report  # matplotlib takes a second

    return write_report(run) if next(run.events(), None) else None


def finish(run: StoredRun) -> None:
    """After a run, however it ended: draw its curves and say where everything is."""
    report = draw(run)
    if report is None:
        typer.echo(f"nothing was recorded in {run.run_dir}")
        return
    state = read_state(run)
    seconds = f" in {clock(state.seconds)}" if state.seconds is not None else ""
    typer.echo(f"\nrun {run.id}: {run.state_after(state.outcome)}{seconds}" + (f": {visible(state.reason)}" if state.reason else ""))
    for env in state.environments.values():
        if env.before is not None:
            typer.echo(f"  {visible(env.name):<14} held-out {env.before}" + (f"  ->  {env.after}" if env.after else ""))
    typer.echo(f"  {report}\n  {report.with_name('curves.png')}\n  polyrl show {run.id}")
