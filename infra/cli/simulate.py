"""polyrl simulate: the protocol on a virtual clock, to look for bugs in it or to plan a run with it."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.cli.common import Json, Overrides, RunsDir, print_json
from infra.cli.completion import config_files, run_names
from infra.errors import UsageError
from infra.view import clock
from rl_core.config_files import load_config
from rl_core.run_store import RunStore

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
    plan: Annotated[
        Path | None,
        typer.Option(metavar="CONFIG", help="Plan a run of this config; overrides are of its keys.", autocompletion=config_files),
    ] = None,
    measured: Annotated[
        str | None,
        typer.Option("--from", metavar="RUN", help="Plan with lengths and times of this stored run.", autocompletion=run_names),
    ] = None,
    given: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="[ENV.]NAME=NUMBER", help="Plan with this number: math.mean_tokens=300, learner_step_s=4, ..."),
    ] = None,
    runs_dir: RunsDir = Path("runs"),
    peers: Annotated[bool, typer.Option(help="Compare with published speed-ups of others: the table in docs/protocol.md.")] = False,
    json: Json = False,
) -> None:
    """Simulate whole runs with faults of every kind and check what must hold; exit 1 naming the seed and the broken rule.

    With --plan: what to expect of a run without faults, beside the same run with max_staleness = 0.
    """
    if peers:
        from infra.simulation.peers import table

        for line in table():
            typer.echo(line)
    elif plan is not None:
        _plan(plan, overrides or [], measured, given or [], runs_dir, json)
    else:
        if overrides or given or measured:
            raise UsageError("overrides, --set and --from belong to a plan: polyrl simulate --plan CONFIG")
        _study(runs, seed, jobs, fault or [], json)


def _plan(config: Path, overrides: list[str], measured: str | None, given: list[str], runs_dir: Path, json: bool) -> None:
    from infra.simulation.estimates import changed, from_config, from_run
    from infra.simulation.planner import forecast

    checked = load_config(config, overrides)
    run = None if measured is None else RunStore.find(runs_dir, measured)
    plan = changed(from_config(checked) if run is None else from_run(checked, run), given)
    both = {f"max_staleness={plan.loop.max_staleness}": forecast(plan), "synchronous": forecast(plan.synchronous())}
    if json:
        print_json({"plan": asdict(plan), **{name: asdict(f) for name, f in both.items()}})
        return
    for name, env in plan.environments.items():
        figures = (f"{key} {value:g}" for key, value in asdict(env).items())
        typer.echo(f"{name:<14} {', '.join(figures)}")
    names = ("workers", "max_sequences", "base_s", "per_sequence_s", "learner_step_s", "learner_token_s", "publish_s")
    typer.echo(f"{'engines':<14} {', '.join(f'{name} {getattr(plan, name):g}' for name in names)}\n")
    typer.echo(f"{'':<18}" + "".join(f"{name:>18}" for name in both))
    for row in asdict(both["synchronous"]):
        typer.echo(f"{row:<18}" + "".join(f"{getattr(f, row):>18.4g}" for f in both.values()))
    a, b = both.values()
    typer.echo(f"{'speed-up':<18}{a.groups_per_s / b.groups_per_s:>18.2f}")


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
