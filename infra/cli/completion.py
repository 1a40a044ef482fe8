"""What a shell offers for the word that is being typed: `polyrl --install-completion` tells it to ask.

Each answer is made from names of files, in a moment; a command is never started for it.
"""

from __future__ import annotations

import os
from pathlib import Path

import typer

from rl_core.run_store import list_runs

MAX_RUNS = 50
"""Offered at once, newest first."""


def run_names(context: typer.Context, incomplete: str) -> list[str]:
    """Ids of runs, newest first, and latest."""
    folder = Path(context.params.get("runs_dir") or os.environ.get("POLYRL_RUNS_DIR") or "runs")
    names = ["latest", *(run.id for run in list_runs(folder)[::-1])]
    return [name for name in names if name.startswith(incomplete)][:MAX_RUNS]


def config_files(incomplete: str) -> list[str]:
    """YAML files that begin so, and folders on the way to one; those of configs/ where nothing is typed yet."""
    start = incomplete or ("configs/" if Path("configs").is_dir() else "")
    folder, _, name = start.rpartition("/")
    inside = Path(folder + "/" if folder or start.startswith("/") else ".")
    if not inside.is_dir():
        return []
    there = sorted(p for p in inside.iterdir() if p.name.startswith(name) and not p.name.startswith("."))
    prefix = start[: len(start) - len(name)]
    return [f"{prefix}{p.name}/" for p in there if p.is_dir()] + [f"{prefix}{p.name}" for p in there if p.suffix in (".yaml", ".yml")]


def configs_and_runs(context: typer.Context, incomplete: str) -> list[str]:
    return config_files(incomplete) + run_names(context, incomplete)


def environment_names(incomplete: str) -> list[str]:
    """Ids of installed environments."""
    from environments.registry import targets

    return sorted(name for name in targets() if name.startswith(incomplete))


def benchmark_names(incomplete: str) -> list[str]:
    from infra.bench import find_benchmarks

    return [name for name in find_benchmarks() if name.startswith(incomplete)]


__all__ = ["benchmark_names", "config_files", "configs_and_runs", "environment_names", "run_names"]
