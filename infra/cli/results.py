"""polyrl runs, show, curves, ledger: what a run left behind, or has so far."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer

from infra.cli.common import Json, RunName, RunsDir, print_json
from infra.dashboard.feed import read_state
from infra.errors import UsageError
from infra.run_state import RunState
from infra.view import clock, number, short, sparkline, totals, visible
from rl_core.run_store import RunStore, StoredRun, list_runs

Buckets = Mapping[str, Mapping[str, float]]


def register(app: typer.Typer) -> None:
    app.command("runs")(runs)
    app.command("show")(show)
    app.command("curves")(curves)
    app.command("ledger")(ledger)


def runs(runs_dir: RunsDir = Path("runs"), json: Json = False) -> None:
    """List all runs, oldest first."""
    rows = []
    for run in list_runs(runs_dir):
        state = read_state(run)
        outcome = run.state_after(state.outcome)
        gains = {
            name: {"before": e.before and e.before.pass_rate, "after": e.after and e.after.pass_rate}
            for name, e in state.environments.items()
        }
        rows.append({"run": run.id, "state": outcome, "step": state.version, "steps": state.steps, "pass_rate": gains})
        if not json:
            scores = "  ".join(f"{e.name} {short(e.before)} -> {short(e.after)}" for e in state.environments.values())
            typer.echo(visible(f"{run.id}  {outcome:<9} {state.version}/{state.steps}  {scores}"))
    if json:
        print_json(rows)
    elif not rows:
        typer.echo(f"no run in {str(runs_dir)!r}")


def show(run: RunName = "latest", runs_dir: RunsDir = Path("runs"), json: Json = False) -> None:
    """Show one run: held-out scores before and after, and what was measured in between."""
    stored = RunStore.find(runs_dir, run)
    state = read_state(stored)
    outcome = stored.state_after(state.outcome)
    if json:
        print_json({"state": outcome, "run_dir": str(stored.run_dir), **state.to_json(), "run": stored.id})
        return
    typer.echo(f"run {stored.id}  {outcome}  step {state.version}/{state.steps}  {clock(state.seconds)}")
    if state.reason:
        typer.echo(visible(f"  {state.reason}"))
    typer.echo(f"  {totals(state)}\n")
    _print_table(state)
    _print_buckets(state)
    _print_objective(state)
    typer.echo(f"\n{_rollout_counts(stored)}\n{stored.run_dir}")


def curves(run: RunName = "latest", runs_dir: RunsDir = Path("runs"), json: Json = False) -> None:
    """Draw a run's reward curves into the terminal, and again into curves.png and report.html."""
    from infra.report import write_report

    stored = RunStore.find(runs_dir, run)
    state = read_state(stored)
    if not state.run:
        raise UsageError(f"run {stored.id} has no events yet")
    if json:
        rows = {
            e.name: {"share": e.share, "reward": e.points("reward"), "held_out": [s.to_json() for s in e.scores]}
            for e in state.environments.values()
        }
        print_json(rows)
        return
    for env in state.environments.values():
        rewards = env.values("reward")
        first, last = number(rewards[0] if rewards else None, ".2f"), number(env.recent("reward"), ".2f")
        train = f"train {first} {sparkline(rewards, 60)} {last}"
        typer.echo(f"{visible(env.name):<14} {train}   held-out {short(env.before)} -> {short(env.after)}")
    report = write_report(stored, state)
    typer.echo(f"{report.with_name('curves.png')}\n{report}")


def ledger(run: RunName = "latest", runs_dir: RunsDir = Path("runs"), json: Json = False) -> None:
    """Show where every task went: the sums per environment, and whether they add up."""
    from rl_core.ledger import read_balance

    stored = RunStore.find(runs_dir, run)
    path = stored.run_dir / "ledger.sqlite"
    if not path.is_file():
        raise UsageError(f"run {stored.id} drew no task: it has no ledger")
    balances = read_balance(path)
    if json:
        names = ("env", "drawn", "open", "trained", "filtered", "abandoned", "passed", "restarted", "uses", "balanced", "reasons")
        print_json([{name: getattr(b, name) for name in names} for b in balances])
    else:
        typer.echo(f"{'environment':<14} {'drawn':>6} {'trained':>8} {'filtered':>9} {'abandoned':>10} {'passed':>7} {'open':>5}")
        for b in balances:
            mark = "" if b.balanced else "   DOES NOT ADD UP"
            counts = f"{b.drawn:>6} {b.trained:>8} {b.filtered:>9} {b.abandoned:>10} {b.passed:>7} {b.open:>5}"
            typer.echo(f"{visible(b.env):<14} {counts}{mark}")
            if b.restarted:
                typer.echo(f"{'':<14}   {b.restarted:>6}  cut off, and taken up again")
            if b.uses > b.trained:
                typer.echo(f"{'':<14}   {b.uses - b.trained:>6}  trained once more")
            for reason, count in sorted(b.reasons.items(), key=lambda item: -item[1]):
                typer.echo(visible(f"{'':<14}   {count:>6}  {reason}"))
    if not all(b.balanced for b in balances):
        raise typer.Exit(1)


def _print_table(state: RunState) -> None:
    typer.echo(
        f"{'environment':<14} {'before':>22} {'after':>22} {'points':>7} {'groups':>7} {'share':>10}"
        f" {'stale':>9} {'MTP acc':>8} {'tok/step':>9}"
    )
    for env in state.environments.values():
        staleness = max(env.values("staleness_max"), default=None)
        figures = env.to_json()
        typer.echo(
            f"{visible(env.name):<14} {env.before or '-'!s:>22} {env.after or '-'!s:>22} {number(env.gain and 100 * env.gain, '+.0f'):>7}"
            f" {number(env.last('groups_trained'), '.0f'):>7} {number(env.last('share'), '.0%') + '/' + format(env.share, '.0%'):>10}"
            f" {number(figures['staleness']['mean'], '.2f') + '/' + number(staleness, '.0f'):>9}"
            f" {number(figures['mtp_acceptance'], '.0%'):>8} {number(figures['tokens_per_engine_step'], '.2f'):>9}"
        )


def _print_objective(state: RunState) -> None:
    """The rules in force, and what they did in each environment: means over all steps."""
    trained = [env for env in state.environments.values() if env.mean("masked_share") is not None]
    if not trained:
        return
    typer.echo(f"\n{state.objective or 'objective'}")
    typer.echo(f"{'':<14} {'masked':>8} {'clipped':>8} {'ess':>8} {'mismatch KL':>12} {'entropy':>8}")
    for env in trained:
        typer.echo(
            f"{visible(env.name):<14} {number(env.mean('masked_share'), '.2%'):>8} {number(env.mean('clip_share'), '.2%'):>8}"
            f" {number(env.mean('ess'), '.3f'):>8} {number(env.mean('mismatch_kl'), '.2g'):>12} {number(env.mean('entropy'), '.3f'):>8}"
        )


def _print_buckets(state: RunState) -> None:
    """Held-out pass@k, and pass rates by difficulty and by tokens read, before -> after; n rollouts of the last."""
    for env in state.environments.values():
        first, last = env.before, env.after or (env.during[-1] if env.during else None) or env.before
        if first is None or last is None:
            continue
        rows = [
            breakdown(before, after) for before, after in ((first.by_difficulty, last.by_difficulty), (first.by_length, last.by_length))
        ]
        if len(last.pass_at) > 1:
            rows.insert(0, "  ".join(f"pass@{k} {number(first.pass_at.get(k), '.0%')} -> {p:.0%}" for k, p in last.pass_at.items()))
        rows = [row for row in rows if row]
        for i, row in enumerate(rows):
            typer.echo(visible(f"{'' if i else env.name:<14} {row}"))


def breakdown(before: Buckets, after: Buckets) -> str:
    """ "add 20% -> 60% (40)  mul ..."; "" for one bucket, which would repeat the whole."""
    if len(after) < 2:
        return ""
    old = {name: bucket["pass_rate"] for name, bucket in before.items()}
    return "  ".join(f"{name} {number(old.get(name), '.0%')} -> {b['pass_rate']:.0%} ({b['n']:.0f})" for name, b in after.items())


def _rollout_counts(stored: StoredRun) -> str:
    rows = stored.sql("SELECT label, count(*) AS n, sum(num_sampled_tokens) AS tokens FROM rollouts GROUP BY label ORDER BY label")
    return "rollouts stored: " + (", ".join(f"{r['n']} {r['label']} ({r['tokens']} tokens)" for r in rows) or "none")
