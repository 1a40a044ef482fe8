"""polyrl reward train: a reward model from preference pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infra.errors import UsageError


def register(app: typer.Typer) -> None:
    reward = typer.Typer(help="Reward models: train one on preference pairs.", no_args_is_help=True, rich_markup_mode=None)
    reward.command("train")(train)
    reward.callback()(lambda: None)  # a group, though it has one command
    app.add_typer(reward, name="reward")


def train(
    pairs: Annotated[Path, typer.Argument(metavar="PAIRS", help="JSONL: question, chosen, rejected.", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint.")],
    base: Annotated[Path | None, typer.Option(help="Checkpoint to start from; without it, a tiny model from scratch.")] = None,
    tokenizer: Annotated[Path, typer.Option(help="Folder of a ChatML tokenizer; that of --base if it is given.")] = Path(
        "configs/models/seed"
    ),
    epochs: Annotated[int, typer.Option(min=1)] = 3,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 1e-3,
    held_out: Annotated[float, typer.Option(min=0.0, max=0.5, help="Share of the pairs, the last ones, to test on.")] = 0.1,
) -> None:
    """Train a reward model on PAIRS (Bradley-Terry), and say how many held-out pairs it ranks right."""
    from learner.reward_model import read_preferences, train_reward_model  # torch takes seconds
    from reward_models.classifier import Classifier
    from reward_models.learned import Answer

    try:
        rows = read_preferences(pairs)
        cut = len(rows) - round(held_out * len(rows))
        train_reward_model(
            rows[:cut], out, tokenizer=base or tokenizer, base=base, epochs=epochs, learning_rate=learning_rate, say=typer.echo
        )
        scorer = Classifier.load(out)
    except ValueError as error:
        raise UsageError(str(error)) from error
    tested = rows[cut:]
    scores = scorer.score([Answer(question=p.question, text=t) for p in tested for t in (p.chosen, p.rejected)])
    right = sum(a > b for a, b in zip(scores[0::2], scores[1::2], strict=True))
    typer.echo(f"{out}: {scorer.version}" + (f", {right} of {len(tested)} held-out pairs ranked right" if tested else ""))
