"""polyrl sql, rollouts: questions to the store of one run. What a policy wrote is printed so that it cannot steer a terminal."""

from __future__ import annotations

import csv
import sys
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.cli.common import Json, RunName, RunsDir, print_json
from infra.errors import UsageError
from infra.view import number, visible
from rl_core.run_store import LABELS, RunStore, StoredRun

if TYPE_CHECKING:
    from infra.sql import Answer

TABLE_ROWS = 200
CELL = 60
"""Of a table on a terminal; --json and --csv print everything."""

SORTS = ("newest", "worst", "best", "longest")


def register(app: typer.Typer) -> None:
    app.command("sql")(sql)
    app.command("rollouts")(rollouts)


def sql(
    run: RunName = "latest",
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="One SELECT; without it, the views and columns.")] = "",
    runs_dir: RunsDir = Path("runs"),
    examples: Annotated[bool, typer.Option("--examples", help="Print ten ready questions.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    json: Json = False,
) -> None:
    """Ask a run in SQL, for example: polyrl sql latest "select env, avg(reward) from rollouts group by env"."""
    from infra.sql import EXAMPLES, ask, describe

    if json and csv:
        raise UsageError("--json or --csv, not both")
    if examples:
        if json:
            print_json([{"asks": e.asks, "sql": e.sql} for e in EXAMPLES])
        else:
            typer.echo("\n\n".join(f"-- {e.asks}\n{e.sql};" for e in EXAMPLES))
        return
    stored = RunStore.find(runs_dir, run)
    if not question:
        views = describe(stored)
        if json:
            print_json({view: dict(columns) for view, columns in views.items()})
        else:
            for view, columns in views.items():
                typer.echo(f"{view:<11} {', '.join(name for name, _ in columns)}")
        return
    with ask(stored, question) as answer:
        if json:
            print_json([dict(zip(answer.names, row, strict=True)) for row in answer])
        elif csv:
            _print_csv(answer)
        else:
            _print_answer(answer)


def rollouts(
    run: RunName = "latest",
    env: Annotated[str, typer.Option(help="Of this environment.")] = "",
    step: Annotated[int | None, typer.Option(help="Trained by this step.", show_default=False)] = None,
    min_reward: Annotated[float | None, typer.Option(help="At least this reward.", show_default=False)] = None,
    max_reward: Annotated[float | None, typer.Option(help="At most this reward.", show_default=False)] = None,
    status: Annotated[str, typer.Option(help="ok, truncated, infra_error, ...")] = "",
    label: Annotated[str, typer.Option(help=f"What for: {', '.join(LABELS)}.")] = "",
    search: Annotated[str, typer.Option(help="Text in the conversation or the evidence.")] = "",
    sort: Annotated[str, typer.Option(help=f"{', '.join(SORTS)} first.")] = "newest",
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    show: Annotated[str, typer.Option(metavar="ID", help="Show this rollout whole.")] = "",
    runs_dir: RunsDir = Path("runs"),
    json: Json = False,
) -> None:
    """List a run's rollouts, or show one whole, for example: polyrl rollouts latest --max-reward 0 --sort longest."""
    from infra.dashboard.rollouts import Filter, Rollouts

    if sort not in SORTS:
        raise UsageError(f"--sort {sort}, wanted one of {', '.join(SORTS)}")
    if label and label not in LABELS:
        raise UsageError(f"--label {label}, wanted one of {', '.join(LABELS)}")
    stored = RunStore.find(runs_dir, run)
    wanted = Filter(
        env=env, status=status, label=label, text=search, min_reward=min_reward, max_reward=max_reward, min_step=step, max_step=step
    )
    with closing(Rollouts(stored)) as known:
        if show:
            row = known.one(show, label)
            if row is None:
                raise UsageError(f"run {stored.id} has no rollout {show!r}; `polyrl rollouts {stored.id}` lists ids")
            _show_whole(stored, row, json)
        elif json:
            print_json(known.page(wanted, sort=sort, limit=limit))
        else:
            _print_list(known.some(wanted, sort=sort, limit=limit))
            typer.echo(f"{known.count(wanted):,} in all")


def _print_list(rows: list[dict[str, Any]]) -> None:
    typer.echo(f"{'rollout':<16} {'environment':<16} {'label':<8} {'status':<12} {'reward':>7} {'tokens':>7} {'seconds':>8} {'trained':>8}")
    for row in rows:
        typer.echo(
            f"{_cell(row['rollout_id']):<16} {_cell(row['env']):<16} {_cell(row['label']):<8} {_cell(row['status']):<12}"
            f" {number(row['reward'], '.3f'):>7} {number(row['num_sampled_tokens'], 'd'):>7} {number(row['seconds'], '.1f'):>8}"
            f" {number(row['trained'], 'd'):>8}"
        )


def _print_answer(answer: Answer) -> None:
    rows = [[_cell(value) for value in row] for row in islice(answer, TABLE_ROWS + 1)]
    more, rows = len(rows) > TABLE_ROWS, rows[:TABLE_ROWS]
    names = [_cell(name) for name in answer.names]
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    for row in (names, ["-" * width for width in widths], *rows):
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if more:
        typer.echo(f"... the first {TABLE_ROWS} rows; --json and --csv print all")


def _print_csv(answer: Answer) -> None:
    """As the data is, for a program; escaped, where a person looks on."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    person = sys.stdout.isatty()
    for row in ([answer.names], answer):
        for values in row:
            writer.writerow([visible(value) if person and isinstance(value, str) else value for value in values])


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.6g}" if isinstance(value, float) else visible(str(value))
    return text if len(text) <= CELL else text[: CELL - 3] + "..."


def _show_whole(stored: StoredRun, row: dict[str, Any], json: bool) -> None:
    """Verdict, evidence, conversation, tokens."""
    if json:
        print_json(row)
        return
    for line in (
        f"rollout {row['rollout_id']}  group {row['group_id']}  {row['env']}  {row['label']}  task {row['task_key']}",
        f"{row['status']}  reward {number(row['reward'], '.4g')}  {number(row['num_sampled_tokens'], 'd')} tokens  "
        f"versions {row['min_version']} to {row['max_version']}  {row['state'] or 'not drawn for training'} {row['reason'] or ''}",
    ):
        typer.echo(visible(line).rstrip())
    for title in ("components", "evidence"):
        for name, value in (row[title] or {}).items():
            typer.echo(f"  {title[:-1] if title == 'components' else title} {visible(str(name))}: {visible(str(value))}")
    for message in row["messages"] or []:
        typer.echo(f"\n--- {visible(str(message['role']))}\n{visible(str(message['content']), keep=chr(10) + chr(9))}")
    _show_tokens(stored, row)
    typer.echo("\nothers of the group: " + visible(", ".join(f"{r['rollout_id']} ({number(r['reward'], '.3g')})" for r in row["siblings"])))


def _show_tokens(stored: StoredRun, row: dict[str, Any]) -> None:
    from infra.dashboard.tokens import token_view

    view = token_view(stored, row)
    if not view["kept"]:
        typer.echo(f"\n{view['why']}")
        return
    for n, c in enumerate(view["completions"]):
        typer.echo(f"\n--- tokens of completion {n}: place, id, logprob, version, text")
        forced = set(c["forced"])
        for place, (text, id_, logprob, version) in enumerate(zip(c["tokens"], c["ids"], c["logprobs"], c["versions"], strict=True)):
            typer.echo(f"{place:>6} {id_:>7} {logprob:>9.4f} {version:>5}  {visible(str(text))}{'  (forced)' if place in forced else ''}")
    if view["cut"]:
        typer.echo("... cut: the rest is in the store, see `polyrl sql`, view tokens")


__all__ = ["register"]
