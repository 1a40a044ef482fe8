"""polyrl replay: a step of a stored run, done again, and what other rules would have made of it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infra.cli.common import Json, RunName, RunsDir, print_json
from infra.errors import UsageError
from rl_core.config import RunConfig
from rl_core.config_files import differences, load_config
from rl_core.process_env import cpu_environment
from rl_core.run_store import RunStore, StoredRun

if TYPE_CHECKING:
    from learner.replay import Figure

MAY_DIFFER = (
    "learner.advantage", "learner.policy_loss", "learner.proximal", "learner.clip_", "learner.importance.", "learner.kl_weight",
    "learner.train_staleness", "learner.mtp_loss_weight", "learner.mtp_depth",
)  # fmt: skip
"""Keys of the objective, which `--with` may change; so may overlong* of an environment."""

OWN_BOUNDS = {
    "learner.importance.rule": ("learner.importance.low", "learner.importance.high"),
    "learner.policy_loss": ("learner.clip_low", "learner.clip_high"),
}
"""Bounds belong to their rule: another rule comes with its own, unless they are given."""


def register(app: typer.Typer) -> None:
    app.command("replay")(replay)


def replay(
    run: RunName = "latest",
    step: Annotated[int, typer.Option(min=1, help="The step; it made the policy version of the same number.")] = 1,
    with_: Annotated[
        list[str] | None,
        typer.Option(
            "--with", metavar="KEY=VALUE", help="Also under another objective, for example importance.rule=icepop.", show_default=False
        ),
    ] = None,
    runs_dir: RunsDir = Path("runs"),
    json: Json = False,
) -> None:
    """Do a step of RUN again, from the checkpoint before it and the batch that the journal kept, and compare.

    Exit code 1 if the figures are not those that the run recorded. Needs learner.keep_batches in the run's config, or a step
    that no checkpoint covers yet.
    """
    stored = RunStore.find(runs_dir, run)
    path = stored.run_dir / "config.yaml"
    config = load_config(path)
    other = changed_config(path, config, with_) if with_ else None
    recorded = recorded_metrics(stored, step)
    figures = compute(stored, config, step, recorded, other)
    if json:
        print_json({"run": stored.id, "step": step, "agrees": all(f.agrees for f in figures), "figures": rows(figures)})
    else:
        show(stored, config, step, figures, other)
    if not all(f.agrees for f in figures):
        raise typer.Exit(1)


def changed_config(path: Path, config: RunConfig, changes: list[str]) -> RunConfig:
    """The run's config under another objective. Raises UsageError for a change of anything else."""
    overrides = [c if c.startswith(("learner.", "environments.")) else f"learner.{c}" for c in changes]
    given = {o.split("=")[0] for o in overrides}
    reset = [f"{bound}=null" for rule, bounds in OWN_BOUNDS.items() if rule in given for bound in bounds if bound not in given]
    other = load_config(path, [*reset, *overrides])
    for d in differences(config, other):
        if not d.key.startswith(MAY_DIFFER) and not (d.key.startswith("environments.") and ".overlong" in d.key):
            raise UsageError(f"--with {d.key}: a replay can change the objective alone: {', '.join(k.rstrip('._') for k in MAY_DIFFER)}")
    return other


def recorded_metrics(stored: StoredRun, step: int) -> dict[str, float]:
    """What the run said of the step."""
    steps = {int(e.data["version"]): e.data["metrics"] for e in stored.events() if e.kind == "step"}
    if step not in steps:
        raise UsageError(f"run {stored.id} has no step {step}; it recorded " + (f"{min(steps)} to {max(steps)}" if steps else "none"))
    return dict(steps[step])


def compute(stored: StoredRun, config: RunConfig, step: int, recorded: dict[str, float], other: RunConfig | None) -> list[Figure]:
    """Replay on one rank in this process."""
    os.environ.update(cpu_environment(config.learner.num_threads))  # before torch reads them
    import torch

    from learner.optimizer import solo
    from learner.replay import CannotReplay, compare, source_of, weights_before
    from learner.replay import replay as again

    torch.set_num_threads(config.learner.num_threads)
    try:
        source = source_of(stored.run_dir, step)
        batches = source.batches(stored.run_dir, step)
        with solo(), tempfile.TemporaryDirectory() as scratch:
            weights = weights_before(config, source, batches, Path(scratch))
            recomputed = again(config, weights, step, batches[step])
            changed = None if other is None else again(other, weights, step, batches[step])
    except CannotReplay as error:
        raise UsageError(str(error)) from error
    return compare(recorded, recomputed, changed)


def rows(figures: list[Figure]) -> list[dict[str, float | str | bool | None]]:
    return [
        {"name": f.name, "recorded": f.recorded, "recomputed": f.recomputed, "with": f.changed, "agrees": f.agrees} for f in figures
    ]  # fmt: skip


def show(stored: StoredRun, config: RunConfig, step: int, figures: list[Figure], other: RunConfig | None) -> None:
    """The table: a figure that does not agree is marked."""
    typer.echo(f"run {stored.id}, step {step}\nrecorded, recomputed: {config.learner.objective}")
    if other is not None:
        typer.echo(f"with:                 {other.learner.objective}")
    typer.echo(f"\n{'figure':<36} {'recorded':>14} {'recomputed':>14}" + (f" {'with':>14}" if other else ""))

    def cell(value: float | None) -> str:
        return f"{'-' if value is None else format(value, '.7g'):>14}"

    for f in figures:
        changed = f" {cell(f.changed)}" if other is not None else ""
        typer.echo(f"{f.name:<36} {cell(f.recorded)} {cell(f.recomputed)}{changed}" + ("" if f.agrees else "   DIFFERS"))
    exact = sum(f.recorded == f.recomputed for f in figures)
    typer.echo(f"\n{sum(f.agrees for f in figures)} of {len(figures)} figures agree, {exact} to the last bit")
