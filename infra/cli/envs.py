"""polyrl envs: list, show, sample, check, new."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.cli.common import Json, print_json
from infra.cli.completion import environment_names
from infra.errors import UsageError

MAX_TURNS = 32

Env = Annotated[str, typer.Argument(metavar="ENV", help="Id, or module:Class.", autocompletion=environment_names)]


def register(app: typer.Typer) -> None:
    envs = typer.Typer(help="Environments: list, show, sample, check, make a new one.", no_args_is_help=True, rich_markup_mode=None)
    envs.command("list")(list_)
    envs.command("show")(show)
    envs.command("sample")(sample)
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
    env: Env,
    options: Annotated[list[str] | None, typer.Argument(help="Options, such as max_digits=2.", show_default=False)] = None,
    tasks: Annotated[int, typer.Option(min=1, help="How many tasks to show.")] = 2,
    split: Annotated[str, typer.Option(help="train or eval.")] = "train",
    seed: Annotated[int, typer.Option(help="Which tasks.")] = 0,
    json: Json = False,
) -> None:
    """Show tasks of an environment, as the policy sees them and as the oracle solves them."""
    from itertools import islice

    from environments.registry import resolve
    from infra.sample import oracle, play_aloud

    check_split(split)
    env_class, knobs = resolve(env), read_options(options or [])
    about = (env_class.__doc__ or env_class.__name__).strip()
    shown: list[dict[str, Any]] = []
    if not json:
        typer.echo(f"{about}\n")
    with closing(env_class(**knobs)) as session:
        for task in islice(env_class.tasks(split, seed, knobs), tasks):
            lines: list[str] = []
            say = lines.append if json else typer.echo
            verdict = play_aloud(session, task, oracle(session, task.seed), name="oracle", say=say, max_turns=MAX_TURNS)
            reward = None if verdict is None else verdict.reward
            shown.append({"key": task.key, "seed": task.seed, "difficulty": task.difficulty, "reward": reward, "lines": lines})
    if json:
        print_json({"env": env, "about": about, "tasks": shown})


def sample(
    env: Env,
    options: Annotated[list[str] | None, typer.Argument(help="Options, such as max_digits=2.", show_default=False)] = None,
    hand: Annotated[bool, typer.Option("--hand", help="Answer yourself.")] = False,
    model: Annotated[str | None, typer.Option(metavar="FOLDER", help="Let a checkpoint answer, sampled through Transformers.")] = None,
    index: Annotated[int, typer.Option(min=0, help="Position of the task in its stream.")] = 0,
    split: Annotated[str, typer.Option(help="train or eval.")] = "train",
    seed: Annotated[int, typer.Option(help="Of the stream, and of the dice.")] = 0,
    max_turns: Annotated[int, typer.Option(min=1, help="Turns, after which the episode is cut off.")] = MAX_TURNS,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of a model, per turn.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of a model; 0 takes the likeliest token.")] = 1.0,
) -> None:
    """Play one episode in the terminal: with the oracle, by hand, or with a model."""
    from environments.registry import resolve
    from infra.sample import a_model, by_hand, oracle, play_aloud

    check_split(split)
    if hand and model:
        raise UsageError("--hand and --model: one of them answers")
    knobs = read_options(options or [])
    if model:
        knobs = {"tokenizer": model, **knobs}
    env_class = resolve(env)
    session = env_class(**knobs)
    task = env_class.task_at(split, seed, index, knobs)
    if hand:
        name, policy = "you", by_hand(say=typer.echo)
    elif model:
        name, policy = "model", a_model(model, max_tokens=max_tokens, temperature=temperature, seed=seed)
    else:
        name, policy = "oracle", oracle(session, seed)
    verdict = play_aloud(session, task, policy, name=name, say=typer.echo, max_turns=max_turns)
    session.close()
    if verdict is None:
        typer.echo("the episode was left before its end")


def check_split(split: str) -> None:
    if split not in ("train", "eval"):
        raise UsageError(f"--split {split!r}, wanted train or eval")


def check(
    env: Env,
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
