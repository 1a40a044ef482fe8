"""polyrl bench, doctor: how fast this machine is, and what it lacks."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import Annotated

import typer

from infra.cli.common import Json, print_json
from infra.cli.completion import benchmark_names


def register(app: typer.Typer) -> None:
    app.command("bench")(bench)
    app.command("doctor")(doctor)


def bench(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A benchmark of tests/benchmarks; without it, list them.", autocompletion=benchmark_names),
    ] = None,
    json: Json = False,
) -> None:
    """Measure: paired, interleaved repetitions within one run."""
    from infra.bench import find_benchmarks, run_benchmark

    if name is None:
        there = find_benchmarks()
        if json:
            print_json({known: str(path) for known, path in there.items()})
        else:
            for known, path in there.items():
                typer.echo(f"{known:<20} {path}")
        return
    with redirect_stdout(sys.stderr):  # libraries that log when they are imported
        result = run_benchmark(name)
    if json:
        print_json(result)
        return
    for figure, row in result["figures"].items():
        typer.echo(f"{figure:<40} median {row['median']:.6g}   min {row['min']:.6g}   max {row['max']:.6g}")


def doctor(json: Json = False) -> None:
    """Look at this machine: what a run needs, and what is there."""
    from infra.doctor import examine

    findings = examine()
    if json:
        print_json([asdict(f) for f in findings])
    else:
        for f in findings:
            typer.echo(f"{'ok  ' if f.ok else ('FAIL' if f.needed else 'note')} {f.name}: {f.detail}")
    if not all(f.ok for f in findings if f.needed):
        raise typer.Exit(1)
