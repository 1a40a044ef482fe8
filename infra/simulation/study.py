"""Many runs with faults: does every rule hold in each?"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from infra.simulation.faults import Fault
from infra.simulation.world import World

CHUNK = 20
"""Runs that a worker process does before it reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one run."""

    seed: int
    lives: int  # of the driver
    seconds: float  # virtual
    struck: dict[str, int]  # {fault: times}
    failure: str  # "" if every rule held


@dataclass(slots=True, kw_only=True)
class Tally:
    """The sum over runs."""

    runs: int = 0
    lives: int = 0
    virtual_hours: float = 0.0
    faults: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys((f.value for f in Fault), 0)))
    failures: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.runs += 1
        self.lives += outcome.lives
        self.virtual_hours += outcome.seconds / 3600
        self.faults.update(outcome.struck)
        if outcome.failure:
            self.failures.append(outcome)


def run_one(seed: int, folder: Path, *, intensity: float | None = None, only: Collection[Fault] = ()) -> Outcome:
    """One run, cleaned up after. A broken rule, and anything that a part raised, is the outcome's `failure`."""
    world = World(folder / f"run-{seed}", seed, intensity=intensity, only=only)
    failure = ""
    try:
        world.go()
    except Exception as error:  # noqa: BLE001 (whatever it is, it is this study's finding)
        failure = sentence(error)
    finally:
        world.clean_up()
    return Outcome(seed=seed, lives=world.lives, seconds=world.seconds, struck=dict(world.faults.struck), failure=failure)


def sentence(error: BaseException) -> str:
    """The first cause in a group of errors."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


def run_many(seeds: Sequence[int], *, jobs: int, on_progress: Callable[[Tally, float], None], only: Collection[Fault] = ()) -> Tally:
    """Simulate `seeds` until one fails. `only`: see `Faults`. `on_progress` gets the sum so far and the real seconds since the start."""
    tally, began = Tally(), time.monotonic()
    chunks = [seeds[i : i + CHUNK] for i in range(0, len(seeds), CHUNK)]
    with scratch() as folder:
        for outcomes in _outcomes(chunks, folder, jobs, only):
            for outcome in outcomes:
                tally.add(outcome)
            on_progress(tally, time.monotonic() - began)
            if tally.failures:
                break
    return tally


def _outcomes(chunks: Sequence[Sequence[int]], folder: Path, jobs: int, only: Collection[Fault]) -> Iterator[list[Outcome]]:
    work = partial(_chunk, folder, only)
    if jobs == 1:
        yield from map(work, chunks)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(work, chunks)
        finally:
            pool.shutdown(cancel_futures=True)


def _chunk(folder: Path, only: Collection[Fault], seeds: Sequence[int]) -> list[Outcome]:
    logging.getLogger("rl_core").setLevel(logging.ERROR)  # deaths are the point here, not news
    return [run_one(seed, folder, only=only) for seed in seeds]


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory, where the system has one: the runs' disks."""
    shm = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="polyrl-simulate-", dir=shm if shm.is_dir() else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
