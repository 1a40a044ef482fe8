"""polyrl envs, config, model, bench, doctor: everything that is not about a run."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.cli.common import Json, Overrides, print_json
from infra.errors import UsageError
from infra.preflight import preflight
from rl_core.config import EnvironmentConfig, RunConfig, load_config, reference, to_yaml
from rl_core.process_env import cpu_environment


def register(app: typer.Typer) -> None:
    envs = typer.Typer(help="Environments: list, show, check.", no_args_is_help=True, rich_markup_mode=None)
    envs.command("list")(envs_list)
    envs.command("show")(envs_show)
    envs.command("check")(envs_check)
    app.add_typer(envs, name="envs")
    config = typer.Typer(help="Configs: show the resolved one, check it.", no_args_is_help=True, rich_markup_mode=None)
    config.command("show")(config_show)
    config.command("check")(config_check)
    app.add_typer(config, name="config")
    model = typer.Typer(help="Models: make the small one.", no_args_is_help=True, rich_markup_mode=None)
    model.command("seed")(model_seed)
    app.add_typer(model, name="model")
    app.command("bench")(bench)
    app.command("doctor")(doctor)


def envs_list(json: Json = False) -> None:
    """List the environments that are installed."""
    from environments.registry import list_environments

    entries = list_environments()
    if json:
        print_json([{"id": e.id, "target": e.target, "source": e.source, "summary": e.summary, "error": e.error} for e in entries])
        return
    for e in entries:
        typer.echo(f"{e.id:<14} {e.source:<10} {e.error or e.summary}")


def envs_show(
    env: Annotated[str, typer.Argument(metavar="ENV", help="Id, or module:Class.")],
    options: Annotated[list[str] | None, typer.Argument(help="Options, such as max_digits=2.", show_default=False)] = None,
    tasks: Annotated[int, typer.Option(min=1, help="How many tasks to show.")] = 2,
    split: Annotated[str, typer.Option(help="train or eval.")] = "train",
    seed: Annotated[int, typer.Option(help="Which tasks.")] = 0,
) -> None:
    """Show tasks of an environment, as the policy sees them and as the oracle solves them."""
    import random
    from itertools import islice

    from environments.registry import resolve

    if split not in ("train", "eval"):
        raise UsageError(f"--split {split!r}, wanted train or eval")
    env_class, knobs = resolve(env), _options(options or [])
    typer.echo((env_class.__doc__ or env_class.__name__).strip() + "\n")
    session = env_class(**knobs)
    for task in islice(env_class.tasks(split, seed, knobs), tasks):
        typer.echo(f"--- task {task.key} ({task.difficulty or 'no difficulty'})")
        _, info = session.reset(options={"task": task})
        rng, ended = random.Random(task.seed), False
        for message in info["observation"].messages:
            typer.echo(f"[{message.role}] {message.content}")
        for tool in info["observation"].tools:
            typer.echo(f"[tool schema] {tool}")
        while not ended:
            try:
                turn = session.oracle(info["observation"], rng)
            except NotImplementedError:
                break
            calls = "".join(f" {c.name}({dict(c.arguments)})" for c in turn.tool_calls)
            typer.echo(f"[oracle] {f'<think>{turn.thought}</think>' if turn.thought else ''}{turn.content}{calls}")
            _, _, terminated, truncated, info = session.step(turn)
            ended = terminated or truncated
            for message in info["observation"].messages:
                typer.echo(f"[{message.role}] {message.content}")
        if ended:
            typer.echo(f"[verdict] reward {info['verdict'].reward}, {dict(info['verdict'].components)}")
    session.close()


def envs_check(
    env: Annotated[str, typer.Argument(metavar="ENV", help="Id, or module:Class.")],
    options: Annotated[list[str] | None, typer.Argument(help="Options, such as max_digits=2.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Check an environment against the contract: seeds, oracle, hostile answers, isolation."""
    from environments.check import check_environment
    from environments.registry import resolve

    results = check_environment(resolve(env), _options(options or []))
    if json:
        print_json([asdict(r) for r in results])
    else:
        for r in results:
            typer.echo(str(r))
    if not all(r.ok for r in results):
        raise typer.Exit(1)


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


def model_seed(
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint.")] = Path("configs/models/seed"),
    seed: Annotated[int, typer.Option(help="Everything random comes from it.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Supervised steps.")] = 2200,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Train the small hybrid model from nothing, on demonstrations by the environments' oracles."""
    wanted = cpu_environment(threads)
    if any(name not in os.environ for name in wanted):  # the allocator reads its settings when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**wanted, **os.environ, "OMP_NUM_THREADS": str(threads)})
    from learner.seed.train import train_seed

    train_seed(out, seed=seed, steps=steps, threads=threads)
    typer.echo(f"wrote {out}")


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


def _options(items: list[str]) -> dict[str, Any]:
    """`key=value` pairs as an environment's options, read like those of a config."""
    from omegaconf import OmegaConf

    for item in items:
        if "=" not in item:
            raise UsageError(f"option {item!r}: wanted key=value, for example max_digits=2")
    options = OmegaConf.to_container(OmegaConf.from_dotlist(items))
    assert isinstance(options, dict)
    return {str(key): value for key, value in options.items()}


def _in_words(config: RunConfig) -> str:
    """What this config would do."""
    environments: dict[str, EnvironmentConfig] = config.environments
    groups = config.loop.groups_per_step
    return (
        f"{config.loop.steps} steps of {groups} groups over {', '.join(environments)}; {config.rollout.num_workers} engine(s), "
        f"{config.learner.num_ranks} learner rank(s), staleness at most {config.loop.max_staleness}"
    )
