"""Benchmarks: `tests/benchmarks/<name>.py` with `def bench() -> dict[str, list[float]]`.

A figure is a list of repetitions. Two things that are compared are measured in turns within one run (`interleaved`): a
machine that slows down for a while then slows both.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

from infra.errors import UsageError

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "benchmarks"

Figures = Mapping[str, Sequence[float]]


def interleaved(measures: Mapping[str, Callable[[], float]], repetitions: int, *, warmups: int = 1) -> dict[str, list[float]]:
    """Call each measure `repetitions` times, taking turns: a b c, a b c, ... Warm-up rounds are not kept.

    interleaved({"with_mtp": lambda: tokens_per_s(k=2), "without": lambda: tokens_per_s(k=0)}, 5)
    """
    figures: dict[str, list[float]] = {name: [] for name in measures}
    for round_ in range(warmups + repetitions):
        for name, measure in measures.items():
            value = measure()
            if round_ >= warmups:
                figures[name].append(value)
    return figures


def ratio(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Paired ratios, one for each repetition: their median is what a comparison should report."""
    return [a / b for a, b in zip(over, under, strict=True)]


def find_benchmarks(folder: Path = FOLDER) -> dict[str, Path]:
    """{name: file}."""
    return {p.stem: p for p in sorted(folder.glob("*.py")) if not p.stem.startswith("_")}


def run_benchmark(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Run one: {"bench", "machine", "figures": {name: {median, min, max, n}}}."""
    known = find_benchmarks(folder)
    if name not in known:
        raise UsageError(f"no benchmark {name!r}; there are: {', '.join(known) or f'none in {folder}'}")
    module = load(name, known[name])
    figures: Figures = module.bench()
    return {"bench": name, "machine": machine(), "figures": {figure: summary(values) for figure, values in figures.items()}}


def load(name: str, path: Path) -> ModuleType:
    """The benchmark's module. One of ours by its real name, so that processes which it starts can import it as well."""
    if path.parent == FOLDER:
        sys.path.append(str(FOLDER.parents[1]))
        return importlib.import_module(f"tests.benchmarks.{name}")
    spec = importlib.util.spec_from_file_location(f"polyrl_bench_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and range of the repetitions."""
    if not values:
        raise ValueError("a figure without repetitions: bench() must return at least one number for each")
    return {"median": float(median(values)), "min": float(min(values)), "max": float(max(values)), "n": len(values)}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import psutil

    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def cpu_model() -> str:
    """The processor's name, where the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), "unknown")
