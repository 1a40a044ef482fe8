"""polyrl eval: held-out scores of a checkpoint or of a run's newest one, and reward over thinking budget."""

from __future__ import annotations

import sys
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from infra.cli.common import Json, RunsDir, print_json
from infra.cli.completion import run_names
from infra.cli.models import checkpoint_of
from infra.errors import UsageError
from infra.preflight import preflight
from rl_core.config import RunConfig
from rl_core.config_files import load_config
from rl_core.run_store import RunStore


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


Target = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_MODEL",
        help="Checkpoint folder; or a run: its id, a unique part of it, its folder, or latest.",
        autocompletion=run_names,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [KEY=VALUE]...", help="YAML with the environments (a run has its own); overrides.", show_default=False
    ),
]
Envs = Annotated[list[str] | None, typer.Option("--env", help="Only this environment; may be given several times.", show_default=False)]
Tasks = Annotated[int, typer.Option(min=1, help="Held-out tasks per environment.")]
Samples = Annotated[int, typer.Option(min=1, help="Rollouts per task; with more than one, pass@k is estimated as well.")]
Budgets = Annotated[
    str, typer.Option(help="Thinking budgets to compare: 0,64,256,none. Without it, each environment's own.", show_default=False)
]
Step = Annotated[int | None, typer.Option(min=1, help="Of a run: which checkpoint; the newest without it.", show_default=False)]
Out = Annotated[Path | None, typer.Option(help="Folder for scores.json, scores.csv and budgets.png.", show_default=False)]


def evaluate(
    target: Target,
    settings: Settings = None,
    env: Envs = None,
    tasks: Tasks = 64,
    samples: Samples = 1,
    budgets: Budgets = "",
    step: Step = None,
    out: Out = None,
    runs_dir: RunsDir = Path("runs"),
    json: Json = False,
) -> None:
    """Score a checkpoint on held-out tasks: pass@1, pass@k, by difficulty and length, and reward over thinking budget."""
    config = configured(target, settings or [], env or [], step, runs_dir)
    wanted = parse_budgets(budgets)
    if wanted is not None:  # before minutes are spent, whether every one of them can be had
        for value in wanted:
            preflight(at_budget(config, value))
    else:
        preflight(config)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)

    from infra.eval_report import draw, tables, to_csv
    from infra.evaluating import Plan, run

    rows = run(config, Plan(budgets=wanted, tasks=tasks, samples=samples), show_progress)
    report = {"model": config.model.path, "tasks": tasks, "samples": samples, "seed": config.eval.seed, "rows": [r.to_json() for r in rows]}
    if json:
        print_json(report)
    else:
        typer.echo("\n".join(tables(rows)))
    if out is not None:
        (out / "scores.json").write_text(dumps(report, indent=1), encoding="utf-8")
        (out / "scores.csv").write_text(to_csv(rows), encoding="utf-8")
        draw(rows, out / "budgets.png")
    if lost := sorted({row.env for row in rows if not row.result.n}):
        sys.stderr.write(f"polyrl: no rollout of {', '.join(lost)} counts: each ended in a failure of ours\n")
        raise typer.Exit(1)


def configured(target: str, settings: list[str], envs: list[str], step: int | None, runs_dir: Path) -> RunConfig:
    """The config of the evaluation: whose weights, and which environments."""
    files, overrides = [s for s in settings if "=" not in s], [s for s in settings if "=" in s]
    if len(files) > 1:
        raise UsageError(f"got {len(files)} configs ({', '.join(files)}), wanted one, and overrides as key=value")
    path = Path(files[0]) if files else None
    if Path(target, "config.json").is_file():
        model = Path(target)
        if step is not None:
            raise UsageError(f"--step {step} is of a run, and {target!r} is a model")
        if path is None:
            raise UsageError(f"{target!r} is a model; say as well which CONFIG has the environments, such as configs/quickstart.yaml")
    elif Path(target).suffix in (".yaml", ".yml"):
        raise UsageError(f"{target!r} is a config, wanted a run or a checkpoint folder before it: polyrl eval latest {target}")
    else:
        run = RunStore.find(runs_dir, target)
        model, path = checkpoint_of(run, step) / "model", path or run.run_dir / "config.yaml"
    config = load_config(path, [*overrides, f"model.path={model}"])
    if unknown := [name for name in envs if name not in config.environments]:
        raise UsageError(f"--env {unknown[0]}: {path} has {', '.join(config.environments)}")
    kept = {name: e for name, e in config.environments.items() if not envs or name in envs}
    return replace(config, environments=kept)


def parse_budgets(text: str) -> list[int | None] | None:
    """ "0,64,none" -> [0, 64, None]; "" -> None."""
    if not text.strip():
        return None
    found: list[int | None] = []
    for word in text.split(","):
        if word.strip() == "none":
            found.append(None)
        elif word.strip().isdecimal():
            found.append(int(word))
        else:
            raise UsageError(f"--budgets {text!r}: {word.strip()!r} is no budget, wanted numbers of tokens and none, such as 0,64,256,none")
    if len(set(found)) < len(found):
        raise UsageError(f"--budgets {text!r} names one twice")
    return found


def at_budget(config: RunConfig, budget: int | None) -> RunConfig:
    return replace(config, environments={name: replace(e, thinking_budget=budget) for name, e in config.environments.items()})


def show_progress(budget: int | None, done: int, total: int) -> None:
    """One line on standard error: kept up to date in a terminal, else now and then."""
    if not total:
        sys.stderr.write("starting engines and environments\n")
        return
    line = f"{done}/{total} groups" + (f" at a thinking budget of {budget}" if budget is not None else "")
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{line}\x1b[K" + ("\n" if done == total else ""))
    elif done == total or done % max(1, total // 4) == 0:
        sys.stderr.write(line + "\n")
    sys.stderr.flush()
