"""`polyrl chaos`: a real run whose processes are killed at random moments, and what is left of it.

    polyrl run --> [SIGKILL of one process, then a breath] x N --> polyrl resume after each death of the driver --> checks
                                                                                                 an undisturbed run --^

Kills only processes that its own run started, and the Docker engine of a folder that it was given (infra/docker/start-engine.sh),
which it starts again. Kinds are told apart by the titles that Ray and vLLM give them.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from infra.run_state import Score, fold
from infra.view import parse_line
from rl_core.events import Event
from rl_core.ledger import Ledger, read_balance
from rl_core.run_store import StoredRun

KINDS = {
    "rollout worker": "RolloutWorker",
    "engine core": "EngineCore",
    "learner": "LearnerRank",
    "queue": "ReplayQueue",
    "environment host": "HostActor",
    "driver": "",
}
"""Kind of process -> what its title contains; the driver is the process that was started here."""

ENGINE = "sandbox daemon"
"""One kind more, where the run's sandbox is a Docker engine of ours."""
ENGINE_AWAY_S = 15.0
"""How long it stays away: long enough for groups to break, and for the breaker to see them."""

POLL_S = 0.5
SETTLE_S = 120.0
"""Longest wait for the processes of a killed driver to end by themselves. Engines, actors and the raylet take seconds; Ray's two agents
65 s, measured: they try that long to tell a head that is gone."""


@dataclass(slots=True)
class Outcome:
    """What was done to the run, and what it came to."""

    run_dir: Path | None = None
    kills: list[str] = field(default_factory=list)
    lives: int = 0
    left: list[str] = field(default_factory=list)
    """Processes that outlived their driver by more than SETTLE_S; they were ended."""
    problems: list[str] = field(default_factory=list)


class Chaos:
    """One run under fire."""

    def __init__(
        self, *, kills: int, mean_pause_s: float, seed: int, say: Callable[[str], None], engine: DockerEngine | None = None
    ) -> None:
        self.rng = random.Random(seed)
        self.wanted, self.mean_pause_s, self.say, self.engine = kills, mean_pause_s, say, engine
        self.outcome = Outcome()
        self._order = self._shuffled()
        self._due = 0.0
        self._training = False
        self._runs_dir = Path("runs")

    def go(self, config: Path, overrides: list[str], runs_dir: Path) -> Outcome:
        """Run to the end, through every death."""
        self._runs_dir = runs_dir
        command = ["run", str(config), *overrides, f"runs_dir={runs_dir}"]
        while True:
            code, was_killed = self._live(command)
            if not was_killed:
                break
            if self.outcome.run_dir is None:
                continue
            command = ["resume", str(self.outcome.run_dir)]
        if code != 0:
            self.outcome.problems.append(f"the last life of the run ended with exit code {code}")
        return self.outcome

    def _live(self, arguments: list[str]) -> tuple[int, bool]:
        """One life of the driver: (exit code, whether it was killed here)."""
        self.outcome.lives += 1
        self._training = False
        self.say(f"life {self.outcome.lives}: polyrl {' '.join(arguments)}")
        environment = os.environ | {"POLYRL_EVENTS": "stdout", "PYTHONUNBUFFERED": "1"}
        if self.engine is not None:
            environment["DOCKER_HOST"] = self.engine.address
        driver = subprocess.Popen(
            [str(Path(sys.executable).parent / "polyrl"), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, env=environment, start_new_session=True,
        )  # fmt: skip
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        reader = threading.Thread(target=_forward, args=(driver, lines), daemon=True)
        reader.start()
        family: dict[int, psutil.Process] = {}
        was_killed = False
        try:
            while driver.poll() is None:
                time.sleep(POLL_S)
                with contextlib.suppress(psutil.NoSuchProcess):
                    family |= {p.pid: p for p in psutil.Process(driver.pid).children(recursive=True)}
                self._read(lines)
                if self._training and len(self.outcome.kills) < self.wanted and time.monotonic() >= self._due:
                    was_killed = self._kill(driver, family) or was_killed
            reader.join(timeout=5)
            self._read(lines)
        except BaseException:
            driver.kill()
            raise
        finally:
            self._settle(list(family.values()))
        return driver.returncode, was_killed

    def _read(self, lines: queue.SimpleQueue[str]) -> None:
        """Follow the run's events."""
        while not lines.empty():
            line = lines.get()
            if (event := parse_line(line)) is not None:
                self._hear(event)
            elif "Error" in line or "Traceback" in line:
                self.say("  | " + line[:300])

    def _hear(self, event: Event) -> None:
        if event.kind == "run_started":
            self.outcome.run_dir = self._runs_dir / str(event.data["run"])
        if event.kind == "step" and not self._training:
            self._training = True
            self._plan()
        if event.kind == "phase" and event.data["name"] in ("saving", "evaluating after"):
            self._training = False
        if event.kind in ("phase", "note", "run_finished"):
            self.say(f"  {event.kind}: {' '.join(str(v) for v in event.data.values())[:200]}")
        elif event.kind == "step":
            self.say(f"  step {event.data['version']}")

    def _plan(self) -> None:
        self._due = time.monotonic() + self.rng.expovariate(1 / self.mean_pause_s)

    def _kill(self, driver: subprocess.Popen[str], family: dict[int, psutil.Process]) -> bool:
        """SIGKILL one process of the next kind; returns whether it was the driver."""
        kind = self._order[0]
        victims = self._victims(kind, driver, family)
        self._plan()
        if not victims:
            return False  # it is being restarted
        victim = self.rng.choice(victims)
        self._order = self._order[1:] or self._shuffled()
        self.say(f"kill {len(self.outcome.kills) + 1}: {kind} (process {victim.pid})")
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
            self.outcome.kills.append(kind)
        if kind == ENGINE and self.engine is not None:
            self.engine.start_again(after_s=ENGINE_AWAY_S)
        return kind == "driver"

    def _victims(self, kind: str, driver: subprocess.Popen[str], family: dict[int, psutil.Process]) -> list[psutil.Process]:
        if kind == ENGINE:
            return self.engine.processes() if self.engine is not None else []
        return [psutil.Process(driver.pid)] if kind == "driver" else [p for p in family.values() if KINDS[kind] in title(p)]

    def _shuffled(self) -> list[str]:
        kinds = [*KINDS, *([ENGINE] if self.engine is not None else [])]
        return self.rng.sample(kinds, len(kinds))

    def _settle(self, family: list[psutil.Process]) -> None:
        """Nothing of a dead driver may live on."""
        _, alive = psutil.wait_procs(family, timeout=SETTLE_S)
        for process in alive:
            self.outcome.left.append(title(process))
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


class DockerEngine:
    """The engine that start-engine.sh started in a folder of ours."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.address = f"unix://{self.folder}/docker.sock"
        self._starting: threading.Timer | None = None

    def processes(self) -> list[psutil.Process]:
        """The daemon, if it runs. The id in its file may belong to somebody else by now: only one with our folder is ours."""
        try:
            process = psutil.Process(int((self.folder / "dockerd.pid").read_text()))
            return [process] if f"--exec-root {self.folder}/exec" in title(process) else []
        except (OSError, ValueError, psutil.Error):
            return []

    def start(self) -> None:
        """Start it, or see that it answers."""
        script = Path(__file__).parent / "docker" / "start-engine.sh"
        subprocess.run([str(script), str(self.folder)], check=True, stdout=subprocess.DEVNULL, timeout=180)

    def start_again(self, *, after_s: float) -> None:
        self._starting = threading.Timer(after_s, self.start)
        self._starting.start()

    def wait(self) -> None:
        """Until it has been started again, if it was to be."""
        if self._starting is not None:
            self._starting.join(timeout=200)


def _forward(driver: subprocess.Popen[str], lines: queue.SimpleQueue[str]) -> None:
    assert driver.stdout is not None
    for line in driver.stdout:
        lines.put(line.rstrip("\n"))


def title(process: psutil.Process) -> str:
    """What a process calls itself; "" if it is gone."""
    try:
        return " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One environment's final held-out score, disturbed and not."""

    env: str
    disturbed: Score
    undisturbed: Score

    @property
    def within_noise(self) -> bool:
        """The 95 % intervals of the two pass rates overlap."""
        (low, high), (other_low, other_high) = self.disturbed.ci95, self.undisturbed.ci95
        return low <= other_high and other_low <= high

    def __str__(self) -> str:
        verdict = "within noise" if self.within_noise else "NOT within noise"
        return f"{self.env:<14} held-out {self.disturbed}   undisturbed {self.undisturbed}   {verdict}"


def compare(disturbed: StoredRun, undisturbed: StoredRun) -> list[Comparison]:
    """The scores after training of the environments that both runs have."""
    mine, theirs = fold(disturbed.events()).environments, fold(undisturbed.events()).environments
    return [
        Comparison(env=name, disturbed=env.after, undisturbed=other.after)
        for name, env in mine.items()
        if env.after is not None and (other := theirs.get(name)) is not None and other.after is not None
    ]


def check(outcome: Outcome, run: StoredRun, steps: int) -> list[str]:
    """What is wrong with the run that is left, in sentences; none if it is whole."""
    problems = list(outcome.problems)
    recorded = [int(e.data["version"]) for e in run.events() if e.kind == "step"]
    if recorded != list(range(1, steps + 1)):
        problems.append(f"steps recorded are {json.dumps(recorded)}, wanted each of 1 to {steps} once")
    path = run.run_dir / "ledger.sqlite"
    for balance in read_balance(path):
        if not balance.balanced or balance.open:
            problems.append(f"the ledger of {balance.env} does not add up: {balance}")
    ledger = Ledger(path)
    sizes = {len(ledger.batch(version)) for version in range(1, steps + 1) if version not in ledger.rollbacks}
    reuses = ledger.reused
    ledger.close()
    if len(sizes) != 1 and not reuses:
        problems.append(f"batches have {sorted(sizes)} groups, wanted one size")
    if outcome.left:
        problems.append(f"{len(outcome.left)} processes outlived their driver: {outcome.left[0][:80]}")
    return problems
