"""Verdicts of the code environment: from handing a program over to its CaseScore, 8 hidden cases each, right programs of every kind.

    docker_warm_p50_ms, _p99_ms      the pool is kept filled: each program waits until it is full again (its rate is below the refill's)
    docker_cold_p50_ms, _p99_ms      no pool: the container is made on the verdict's path
    bubblewrap_p50_ms, _p99_ms       one program at a time
    docker|bubblewrap_verdicts_per_s     two programs at a time, one after the other, without a pause: what a machine sustains
    docker|bubblewrap_cpu_ms         processor time of the whole machine per verdict then, engine and removal included

A repetition takes turns between the three. Where no engine answers, one is started with infra/docker and stopped afterwards.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles

from environments.code import CodeEnv, pipeline_of
from environments.sandbox import Sandbox, SandboxJob, SandboxUnavailable
from environments.sandbox.bubblewrap import BubblewrapSandbox
from environments.sandbox.docker import DockerSandbox
from infra.bench import interleaved
from reward_models.code_cases import grade_cases

SCRIPTS = Path(__file__).parents[2] / "infra" / "docker"
VERDICTS, COLD, SUSTAINED = 30, 10, 30
"""Per repetition: alone, without a pool, and in a row."""
REPETITIONS = 3
WIDTH = 2

Case = tuple[SandboxJob, list[object], bool]


def bench() -> dict[str, list[float]]:
    cases = programs()
    with engine():
        bubblewrap, warm, cold = BubblewrapSandbox(WIDTH), DockerSandbox(WIDTH), DockerSandbox(WIDTH, warm=0)
        figures: dict[str, list[float]] = {}

        def alone(name: str, sandbox: Sandbox, count: int, before: Callable[[], None] = lambda: None) -> float:
            milliseconds = []
            for _ in range(count):
                before()
                milliseconds.append(1e3 * verdict(sandbox, next(cases)))
            cuts = quantiles(milliseconds, n=100, method="inclusive")
            figures.setdefault(f"{name}_p50_ms", []).append(cuts[49])
            figures.setdefault(f"{name}_p99_ms", []).append(cuts[98])
            return cuts[49]

        def sustained(name: str, sandbox: Sandbox) -> float:
            busy, started = processor_s(), time.perf_counter()
            with ThreadPoolExecutor(WIDTH) as threads:
                list(threads.map(lambda case: verdict(sandbox, case), itertools.islice(cases, SUSTAINED)))
            seconds = time.perf_counter() - started
            filled(warm)  # what the pool lent is paid back within the account
            figures.setdefault(f"{name}_cpu_ms", []).append(1e3 * (processor_s() - busy) / SUSTAINED)
            figures.setdefault(f"{name}_verdicts_per_s", []).append(SUSTAINED / seconds)
            return seconds

        try:
            interleaved(
                {
                    "warm": lambda: alone("docker_warm", warm, VERDICTS, lambda: filled(warm)),
                    "cold": lambda: alone("docker_cold", cold, COLD),
                    "bubblewrap": lambda: alone("bubblewrap", bubblewrap, VERDICTS),
                    "docker, sustained": lambda: sustained("docker", warm),
                    "bubblewrap, sustained": lambda: sustained("bubblewrap", bubblewrap),
                },
                REPETITIONS,
                warmups=0,  # both backends have run a program by now, and the pool is full before the first
            )
        finally:
            for sandbox in (bubblewrap, warm, cold):
                sandbox.close()
    return figures


def verdict(sandbox: Sandbox, case: Case) -> float:
    """Seconds for one. Raises where a right program is not paid: then there is nothing to measure."""
    job, expected, text = case
    started = time.perf_counter()
    result = sandbox.run(job)
    score = grade_cases(result.stdout, expected, text=text)
    seconds = time.perf_counter() - started
    if not score.correct:
        raise RuntimeError(f"{sandbox.name}: a right program scored {score} ({result.kind}: {result.stderr_tail[-200:]})")
    return seconds


def programs() -> Iterator[Case]:
    """Right programs for tasks of the environment, without end."""
    for task in CodeEnv.tasks("train", 7, {}):
        pipeline = pipeline_of(task)
        job = SandboxJob(program=pipeline.stepwise(), mode=pipeline.mode, inputs=tuple(task.private["inputs"]))
        yield job, task.private["expected"], pipeline.mode == "stdin"


def filled(sandbox: DockerSandbox) -> None:
    """Wait until the pool is full and what was used is removed."""
    while not sandbox.settled:
        time.sleep(0.01)


def processor_s() -> float:
    """Busy seconds of all processors since the machine started."""
    user, nice, system, _, _, irq, softirq = (int(ticks) for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


@contextmanager
def engine() -> Iterator[None]:
    """With a Docker engine that has the image: the one that answers, or one of our own."""
    try:
        DockerSandbox(warm=0).close()
        yield
        return
    except SandboxUnavailable as error:
        sys.stderr.write(f"{error}; starting one for this benchmark\n")
    before = os.environ.get("DOCKER_HOST")
    state = tempfile.mkdtemp(prefix="polyrl-engine-", dir="/tmp")  # short: a socket's address lies in it
    try:
        started = subprocess.run([SCRIPTS / "start-engine.sh", state], check=True, stdout=subprocess.PIPE, text=True)
        os.environ["DOCKER_HOST"] = started.stdout.strip()
        subprocess.run([SCRIPTS / "build-image.sh"], check=True)
        yield
    finally:
        subprocess.run([SCRIPTS / "stop-engine.sh", state, "--purge"], check=False)
        shutil.rmtree(state, ignore_errors=True)
        os.environ.pop("DOCKER_HOST", None)
        os.environ.update({} if before is None else {"DOCKER_HOST": before})
