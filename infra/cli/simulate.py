"""polyrl simulate: the protocol on a virtual clock, to look for bugs in it or to plan a run with it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.cli.common import Json, Overrides, print_json
from infra.errors import UsageError
from infra.view import clock

if TYPE_CHECKING:
    from infra.simulation.study import Tally


def register(app: typer.Typer) -> None:
    app.command("simulate")(simulate)


def simulate(
    overrides: Overrides = None,
    runs: Annotated[int, typer.Option(min=1, help="Runs with faults to simulate.")] = 200,
    seed: Annotated[int, typer.Option(help="The first run's seed; the others count up.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    fault: Annotated[list[str] | None, typer.Option(help="Only this kind of fault; may be given several times.")] = None,
    json: Json = False,
) -> None:
    """Simulate whole runs with faults of every kind and check what must hold; exit 1 naming the seed and the broken rule."""
    _study(runs, seed, jobs, fault or [], json)


def _study(runs: int, seed: int, jobs: int, faults: list[str], json: bool) -> None:
    from infra.simulation.faults import Fault
    from infra.simulation.study import run_many

    if unknown := set(faults) - set(Fault):
        raise UsageError(f"no fault {sorted(unknown)[0]!r}; there are: {', '.join(Fault)}")
    only = [Fault(name) for name in faults]

    progress = Progress(runs)
    tally = run_many(range(seed, seed + runs), jobs=jobs, only=only, on_progress=lambda tally, s: None if json else progress.show(tally, s))
    if json:
        print_json(study_as_json(tally))
    else:
        progress.end()
        for fault, count in tally.faults.items():
            typer.echo(f"  {fault:<26} {count:>9,}")
        typer.echo(
            f"{tally.runs:,} runs, {tally.lives:,} lives of the driver, {sum(tally.faults.values()):,} faults, "
            f"{tally.virtual_hours:,.0f} virtual hours: " + ("every rule held" if not tally.failures else "A RULE WAS BROKEN")
        )
    for outcome in tally.failures:
        typer.echo(f"seed {outcome.seed}, life {outcome.lives}: {outcome.failure}", err=True)
        typer.echo(f"  again: polyrl simulate --runs 1 --seed {outcome.seed}{''.join(f' --fault {f}' for f in faults)}", err=True)
    raise typer.Exit(1 if tally.failures else 0)


def study_as_json(tally: Tally) -> dict[str, Any]:
    return {
        "runs": tally.runs,
        "lives": tally.lives,
        "virtual_hours": tally.virtual_hours,
        "faults": dict(tally.faults),
        "failures": [{"seed": o.seed, "life": o.lives, "failure": o.failure} for o in tally.failures],
    }


class Progress:
    """Done, rate and time left: one line that redraws itself on a terminal, a line now and then in a pipe."""

    EVERY_S = 15.0

    def __init__(self, runs: int) -> None:
        self._runs, self._tty, self._next = runs, sys.stderr.isatty(), 0.0

    def show(self, tally: Tally, seconds: float) -> None:
        if not self._tty and seconds < self._next and tally.runs < self._runs:
            return
        self._next = seconds + self.EVERY_S
        rate = tally.runs / max(seconds, 1e-9)
        line = f"{tally.runs:,}/{self._runs:,} runs, {rate:.1f}/s, {clock((self._runs - tally.runs) / rate)} left, "
        line += f"{sum(tally.faults.values()):,} faults, {len(tally.failures)} failures"
        sys.stderr.write(f"\r{line:<79}" if self._tty else line + "\n")
        sys.stderr.flush()

    def end(self) -> None:
        if self._tty:
            sys.stderr.write("\n")
