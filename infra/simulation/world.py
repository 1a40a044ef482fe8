"""One simulated run, over all lives of its driver: a second composition root, of the true parts on a virtual clock.

A life ends well, or with the death of the driver's process; the next one starts from what is on the disk, as `polyrl resume` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from infra.simulation.clock import Killed, simulate
from infra.simulation.faults import Fault, Faults
from infra.simulation.parts import Died, SimJournal, SimLearner, SimLedger, SimPool, SimQueue, newest, tasks
from infra.simulation.witness import Witness, rule
from rl_core.config import LoopConfig
from rl_core.durable import DurableLearner, DurableQueue
from rl_core.faults import unusable
from rl_core.ledger import Ledger
from rl_core.loop import Budget, train
from rl_core.mixer import Mixer
from rl_core.recovery import recover
from rl_core.seams import GroupResult
from rl_core.types import EpisodeSpec, Group, SamplingParams, Task

SHARES = {"math": 1.0, "code": 1.0, "tools": 2.0}
SPEC = EpisodeSpec(group_size=2, sampling=SamplingParams(max_tokens=8), max_turns=1, max_total_tokens=64, timeout_s=60.0)

LIFE_S = 50_000.0
"""Virtual seconds after which a life counts as hung; a calm one takes about a hundred."""

MAX_LIVES = 200

STEPS = 8

MANY = 1000

DAY_S = 86_400.0


class Life:
    """The driver's process."""

    dead = False

    def die(self) -> None:
        """At once, wherever it is."""
        self.dead = True
        raise Killed

    def must_live(self) -> None:
        """Called before anything reaches the disk."""
        if self.dead:
            raise RuntimeError("a dead process cannot write")


class World:
    """A run in `folder`, everything about it drawn from `seed`."""

    def __init__(self, folder: Path, seed: int, *, intensity: float | None = None, only: Collection[Fault] = ()) -> None:
        """`intensity` scales the rates of all faults; None draws one. `only`: these faults instead of a random half of all."""
        self.folder, self.seed = folder, seed
        self.rng = random.Random(seed)
        self.cfg = LoopConfig(
            steps=STEPS, groups_per_step=self.rng.randint(1, 5), max_staleness=self.rng.randint(0, 3), window=self.rng.randint(1, 5),
            stall_s=1000.0, bad_steps=2, max_rollbacks=MANY,
        )  # fmt: skip
        if self.cfg.max_staleness and self.rng.random() < 0.3:
            self.cfg.reuse, self.cfg.max_uses = self.rng.randint(0, self.cfg.groups_per_step - 1), self.rng.randint(2, 3)
        self.faults = Faults(self.rng, intensity=self.rng.choice([0.5, 1.0, 2.0]) if intensity is None else intensity, only=only)
        self.checkpoint_every = self.rng.randint(1, 4)
        self.witness = Witness(self.cfg)
        self.ledger_path = folder / "ledger.sqlite"
        self.flushed: dict[Path, bytes] = {}
        """The ledger's files as a power cut would leave them."""
        self.lives, self.seconds = 0, 0.0
        self.learner_deaths = 0  # since its last step
        self._wall_clock_error = 0.0
        self._drafts: dict[str, tuple[Task, list[int]]] = {}

    def go(self) -> None:
        """Live until a life ends well; Violation, or whatever a part raised, if one does not."""
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            self.lives += 1
            rule("progress", self.lives <= MAX_LIVES, f"no end after {MAX_LIVES} lives")
            life, self.learner_deaths = Life(), 0
            try:
                simulate(self._bounded(life))
            except Killed:
                if self.faults.strike(Fault.POWER_CUT):
                    self._cut_power()
                continue
            break
        with contextlib.closing(Ledger(self.ledger_path)) as ledger:
            self.witness.end(ledger, newest(self.folder / "checkpoints"))
        self.witness.balance(self.ledger_path)

    def clean_up(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def draft(self, name: str, task: Task) -> list[int]:
        """The versions of the tokens that are left of an earlier attempt, in a list to add to: unfinished rollouts go on, as a rule."""
        drawn, versions = self._drafts.get(name, (task, []))
        if drawn.key != task.key or drawn.env != task.env or self.rng.random() < 0.3:
            versions = []
        self._drafts[name] = (task, versions)
        return versions

    def wall_clock(self) -> float:
        """What the ledger's `time.time` says."""
        if self.faults.strike(Fault.CLOCK_JUMP):
            self._wall_clock_error += self.rng.uniform(-DAY_S, DAY_S)
        return 1.8e9 + asyncio.get_running_loop().time() + self._wall_clock_error

    async def _bounded(self, life: Life) -> None:
        loop = asyncio.get_running_loop()
        if self.faults.strike(Fault.DRIVER_DEATH):
            loop.call_later(self.rng.uniform(0, 100), life.die)
        try:
            async with asyncio.timeout(LIFE_S):
                await self._live(life)
        except TimeoutError:
            rule("progress", False, f"a life did not end within {LIFE_S:.0f} virtual seconds")
        finally:
            self.seconds += loop.time()

    async def _live(self, life: Life) -> None:
        """The same order as in `infra.launch.Run.main`."""
        ledger, journal = SimLedger(self, life), SimJournal(self, life)
        try:
            self.witness.balance(self.ledger_path)
            mixer = Mixer({name: partial(tasks, name) for name in SHARES}, SHARES)
            learner = DurableLearner(
                partial(self._launch, life), partial(self._batch, ledger, journal), (Died,),
                on_saved=lambda version: journal.prune([*(e.group_id for e in ledger.open()), *self._reusable(ledger)]),
                rollbacks=lambda: ledger.rollbacks,
            )  # fmt: skip
            done_again = [stats.version for stats in await learner.open(ledger.version)]
            for version in (*done_again, *ledger.rollbacks):
                if version not in self.witness.steps:  # the old process died between the step and its record
                    self.witness.step(version)
            unfinished = recover(ledger, journal, mixer, own=lambda group: group, unusable=unusable, reusable=self._reusable(ledger))
            queue = DurableQueue(
                lambda: SimQueue(self, Budget.of(self.cfg).window), (Died,), groups=unfinished.queue, overtakers=unfinished.overtakers
            )
            await queue.open()
            version, weights = await learner.snapshot()
            broken = self.rng.choice(sorted(SHARES)) if self.faults.strike(Fault.BROKEN_ENVIRONMENT) else None
            self.witness.life_begins(ledger, asyncio.get_running_loop().time)
            await train(
                self.cfg, mixer=mixer, specs=dict.fromkeys(SHARES, SPEC), workers=SimPool(self, broken), queue=queue, learner=learner,
                ledger=ledger, record=SimRecord(self, journal), weights=weights, version=version, stop=asyncio.Event(),
                checkpoint_every=self.checkpoint_every, unfinished=unfinished,
            )  # fmt: skip
            await learner.save()
        finally:
            journal.close()
            ledger.close()

    async def _launch(self, life: Life) -> SimLearner:
        await asyncio.sleep(5.0)
        return SimLearner(self, life)

    async def _batch(self, ledger: Ledger, journal: SimJournal, version: int) -> Sequence[Group]:
        names = ledger.batch(version)
        groups = journal.read(names)
        return [groups[name] for name in names]

    def _reusable(self, ledger: Ledger) -> dict[str, int]:
        return ledger.reusable(self.cfg.max_staleness, self.cfg.max_uses) if self.cfg.reuse else {}

    def _cut_power(self) -> None:
        """The ledger falls back to its last flush. Journal and checkpoints were flushed before anybody counted on them."""
        for path in self.folder.glob("ledger.sqlite*"):
            path.unlink()
        for path, content in self.flushed.items():
            path.write_bytes(content)


class SimRecord:
    """Implements `rl_core.loop.Record`."""

    def __init__(self, world: World, journal: SimJournal) -> None:
        self._world, self._journal = world, journal

    async def group(self, result: GroupResult) -> None:
        await asyncio.sleep(0.001)
        self._journal.append(result.ref)

    def note(self, text: str) -> None:
        if "broken" in text:
            self._world.witness.paused()

    async def step(self, step: int, version: int, metrics: dict[str, Any]) -> None:
        self._world.witness.step(version)
