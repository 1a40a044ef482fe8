"""polyrl audit: was the reward of a run earned?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from infra.cli.common import Json, RunName, RunsDir, print_json
from rl_core.run_store import RunStore


def register(app: typer.Typer) -> None:
    app.command("audit")(audit_command)


def audit_command(
    run: RunName = "latest",
    sample: Annotated[int, typer.Option(min=0, help="Rollouts to score again, spread over the environments.")] = 200,
    first: Annotated[int, typer.Option(min=0, help="Look only at so many rollouts from the start; 0 is all.")] = 0,
    runs_dir: RunsDir = Path("runs"),
    json: Json = False,
) -> None:
    """Audit RUN: score a sample again, look for traces of unearned reward, rank the suspects. Exit code 1 if there is an alarm."""
    from infra.audit import Severity, audit  # the sandbox backends take a moment

    report = audit(RunStore.find(runs_dir, run), sample=sample, first=first)
    if json:
        print_json(
            {
                "run": report.run, "rollouts": report.rollouts, "held_out": report.held_out, "rescorable": report.rescorable,
                "rescored": {env: asdict(r) for env, r in report.rescored.items()}, "alarms": len(report.alarms),
                "suspects": [s.to_json() for s in report.suspects],
            }
        )  # fmt: skip
    else:
        typer.echo(f"run {report.run}: {report.rollouts} rollouts, {report.held_out} held-out ones")
        if not report.rescorable:
            typer.echo("  its store keeps no tasks and turns (written by an older version): nothing could be scored again")
        for env, r in ((env, r) for env, r in report.rescored.items() if r.tried):
            opinion = f"; second opinion: {r.disagreements} of {r.second_opinions} paid ones wrong" if r.second_opinions else ""
            late = f", {r.timing} differ by a time-out" if r.timing else ""
            typer.echo(f"  {env:<14} {r.same} of {r.tried} score the same again{late}{opinion}")
        for place, suspect in enumerate(report.suspects, start=1):
            typer.echo(f"\n{place}. {suspect.env}  suspicion {suspect.score:.2f}")
            for f in suspect.findings:
                typer.echo(f"   {f.severity.upper():<6} {f.detector}: {f.sentence}")
                if f.rollouts and f.severity is Severity.ALARM:
                    typer.echo(f"          for example {', '.join(f.rollouts[:3])}")
        typer.echo(f"\n{len(report.alarms)} alarms" if report.alarms else "\nno alarm")
    if report.alarms:
        raise typer.Exit(1)
