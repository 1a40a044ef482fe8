"""polyrl envs: list, show, check, new."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.cli.common import Json, print_json
from infra.errors import UsageError


def register(app: typer.Typer) -> None:
    envs = typer.Typer(help="Environments: list, show, check, make a new one.", no_args_is_help=True, rich_markup_mode=None)
    envs.command("list")(list_)
    envs.command("show")(show)
    envs.command("check")(check)
    envs.command("new")(new)
    app.add_typer(envs, name="envs")


def list_(json: Json = False) -> None:
    """List the environments that are installed."""
    from environments.registry import list_environments

    entries = list_environments()
    if json:
        print_json([{"id": e.id, "target": e.target, "source": e.source, "summary": e.summary, "error": e.error} for e in entries])
        return
    for e in entries:
        typer.echo(f"{e.id:<14} {e.source:<10} {e.error or e.summary}")


def show(
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
    env_class, knobs = resolve(env), read_options(options or [])
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


def check(
    env: Annotated[str, typer.Argument(metavar="ENV", help="Id, or module:Class.")],
    options: Annotated[list[str] | None, typer.Argument(help="Options, such as max_digits=2.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Check an environment against the contract: seeds, oracle, hostile answers, isolation."""
    from environments.check import check_environment
    from environments.registry import resolve

    results = check_environment(resolve(env), read_options(options or []))
    if json:
        print_json([asdict(r) for r in results])
    else:
        for r in results:
            typer.echo(str(r))
    if not all(r.ok for r in results):
        raise typer.Exit(1)


def new(
    name: Annotated[str, typer.Argument(help="Its id, such as word_sums.")],
    into: Annotated[Path, typer.Option(help="Folder in which the package's folder is made.")] = Path("."),
) -> None:
    """Make a package of one environment, which passes its check and trains as it is."""
    from infra.scaffold import scaffold

    folder = scaffold(name, into)
    typer.echo(f"made {folder}; next: pip install -e {folder}; polyrl envs check {name}; README.md there says the rest")


def read_options(items: list[str]) -> dict[str, Any]:
    """`key=value` pairs as an environment's options, read like those of a config."""
    from omegaconf import OmegaConf

    for item in items:
        if "=" not in item:
            raise UsageError(f"option {item!r}: wanted key=value, for example max_digits=2")
    options = OmegaConf.to_container(OmegaConf.from_dotlist(items))
    assert isinstance(options, dict)
    return {str(key): value for key, value in options.items()}
