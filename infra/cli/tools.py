"""polyrl config, bench, doctor: everything that is not about a run, a model or an environment."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from infra.cli.common import Json, Overrides, print_json
from infra.preflight import preflight
from rl_core.config import EnvironmentConfig, RunConfig
from rl_core.config_files import load_config, reference, to_yaml


def register(app: typer.Typer) -> None:
    config = typer.Typer(help="Configs: show the resolved one, check it.", no_args_is_help=True, rich_markup_mode=None)
    config.command("show")(config_show)
    config.command("check")(config_check)
    app.add_typer(config, name="config")
    app.command("bench")(bench)
    app.command("doctor")(doctor)


def config_show(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="YAML file; without it, every key with type and default.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Print a config with overrides and defaults filled in, or all keys that there are."""
    if config is not None:
        typer.echo(to_yaml(load_config(config, overrides or [])), nl=False)
        return
    for key, kind, default in reference(RunConfig):
        typer.echo(f"{key:<48} {kind:<6} {default}")


def config_check(config: Annotated[Path, typer.Argument(metavar="CONFIG")], overrides: Overrides = None) -> None:
    """Say what is wrong with a config, or that it can run here."""
    checked = load_config(config, overrides or [])
    preflight(checked)
    typer.echo(f"{config}: fine. {_in_words(checked)}")


def bench(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A benchmark of tests/benchmarks; without it, list them.")] = None,
    json: Json = False,
) -> None:
    """Measure: paired, interleaved repetitions within one run."""
    from infra.bench import find_benchmarks, run_benchmark

    if name is None:
        for known, path in find_benchmarks().items():
            typer.echo(f"{known:<20} {path}")
        return
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


def _in_words(config: RunConfig) -> str:
    """What this config would do."""
    environments: dict[str, EnvironmentConfig] = config.environments
    groups = config.loop.groups_per_step
    return (
        f"{config.loop.steps} steps of {groups} groups over {', '.join(environments)}; {config.rollout.num_workers} engine(s), "
        f"{config.learner.num_ranks} learner rank(s), staleness at most {config.loop.max_staleness}; "
        f"{config.learner.objective}"
    )
