"""polyrl config show, check, diff."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from infra.cli.common import ConfigPath, Json, Overrides, RunsDir, print_json
from infra.cli.completion import config_files, configs_and_runs
from infra.errors import UsageError
from infra.preflight import preflight
from rl_core.config import EnvironmentConfig, RunConfig
from rl_core.config_files import ABSENT, differences, load_config, reference, to_yaml
from rl_core.run_store import NoSuchRun, RunStore

Side = Annotated[
    str,
    typer.Argument(
        help="YAML file; or a run: its id, a unique part of it, its folder, or latest.", show_default=False, autocompletion=configs_and_runs
    ),
]


def register(app: typer.Typer) -> None:
    config = typer.Typer(help="Configs: show the resolved one, check it, compare two.", no_args_is_help=True, rich_markup_mode=None)
    config.command("show")(config_show)
    config.command("check")(config_check)
    config.command("diff")(config_diff)
    app.add_typer(config, name="config")


def config_show(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="YAML file; without it, every key with type and default.", autocompletion=config_files),
    ] = None,
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Print a config with overrides and defaults filled in, or all keys that there are."""
    if config is not None:
        checked = load_config(config, overrides or [])
        if json:
            print_json(asdict(checked))
        else:
            typer.echo(to_yaml(checked), nl=False)
        return
    rows = reference(RunConfig)
    if json:
        print_json([{"key": key, "type": kind, "default": default} for key, kind, default in rows])
        return
    for key, kind, default in rows:
        typer.echo(f"{key:<48} {kind:<6} {default}")


def config_check(config: ConfigPath, overrides: Overrides = None, json: Json = False) -> None:
    """Say what is wrong with a config, or that it can run here."""
    checked = load_config(config, overrides or [])
    preflight(checked)
    if json:
        print_json({"config": str(config), "fine": True, "words": _in_words(checked)})
    else:
        typer.echo(f"{config}: fine. {_in_words(checked)}")


def config_diff(a: Side, b: Side, runs_dir: RunsDir = Path("runs"), json: Json = False) -> None:
    """Say in which keys two configs differ, each with its defaults filled in. Exit code 1 if they do, as diff has it.

    Example: polyrl config diff configs/quickstart.yaml latest
    """
    found = differences(config_of(a, runs_dir), config_of(b, runs_dir))
    if json:
        print_json([{"key": d.key} | {side: v for side, v in (("a", d.old), ("b", d.new)) if v is not ABSENT} for d in found])
    else:
        width = max((len(d.key) for d in found), default=0)
        for d in found:
            typer.echo(f"{d.key:<{width}}  {d.old!r} -> {d.new!r}")
        if not found:
            typer.echo("no difference")
    if found:
        raise typer.Exit(1)


def config_of(name: str, runs_dir: Path) -> RunConfig:
    """Of a file, or of a stored run."""
    path = Path(name)
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return load_config(path)
    try:
        return load_config(RunStore.find(runs_dir, name).run_dir / "config.yaml")
    except NoSuchRun as error:
        raise UsageError(f"{name!r} is no config file and no run: {error}") from error


def _in_words(config: RunConfig) -> str:
    """What this config would do."""
    environments: dict[str, EnvironmentConfig] = config.environments
    groups = config.loop.groups_per_step
    return (
        f"{config.loop.steps} steps of {groups} groups over {', '.join(environments)}; {config.rollout.num_workers} engine(s), "
        f"{config.learner.num_ranks} learner rank(s), staleness at most {config.loop.max_staleness}; "
        f"{config.learner.objective}"
    )
