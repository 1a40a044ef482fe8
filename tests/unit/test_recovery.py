"""Crashes at any moment, of any part: the run ends at the same step, no group is trained twice, none is lost, no bound is broken.

The loop, queue, ledger, mixer, breaker and recovery are the real ones, on a virtual clock; engines and learner are fakes whose
"weights" are a chain of hashes over the batches that made them: two lineages with one different step never end in the same weights.

    POLYRL_SIMULATIONS=10000 pytest tests/unit/test_recovery.py      the long study; a sample runs always
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_core.config import LoopConfig
from rl_core.durable import DurableLearner, DurableQueue
from rl_core.faults import unusable
from rl_core.ledger import Ledger, LedgerError, read_balance
from rl_core.loop import Budget, train
from rl_core.mixer import Mixer
from rl_core.recovery import recover
from rl_core.replay_queue import ReplayQueue
from rl_core.seams import GroupResult, Ref
from rl_core.types import Agreement, Completion, EpisodeSpec, Group, Receipt, Rollout, Status, StepStats, Task, Verdict, VersionSpan
from tests.unit.fakes import SPEC, Recorder, probe, simulate, tasks

SIMULATIONS = int(os.environ.get("POLYRL_SIMULATIONS", "150"))
SHARES = {"math": 1.0, "code": 1.0, "tools": 2.0}
PLENTY_S = 50_000.0
"""Virtual seconds after which a run counts as hung; a calm one takes about a hundred."""


class Killed(BaseException):
    """The driver's process is gone."""


class Died(Exception):
    """A part's process is gone."""


def make_group(name: str, task: Task, version: int, rng: random.Random, *, signal: float, broken: bool) -> Group:
    ids = np.array([version], np.int32)
    span = (VersionSpan(start=0, stop=1, version=version),)
    completion = Completion(prompt_ids=ids, token_ids=ids, logprobs=np.zeros(1, np.float32), spans=span, finish_reason="stop")
    differ = rng.random() < signal

    def rollout(index: int) -> Rollout:
        verdict = (
            Verdict(status=Status.INFRA_ERROR, reward=None) if broken else Verdict(status=Status.OK, reward=float(differ and index == 0))
        )
        return Rollout(id=f"{name}-{index}", env=task.env, task_key=task.key, completions=(completion,), messages=(), verdict=verdict)

    return Group(id=name, task=task, rollouts=(rollout(0), rollout(1)))


class Disk:
    """What survives every process: journal, checkpoints, and the ledger's file."""

    def __init__(self, path: Path) -> None:
        self.ledger = path
        self.journal: dict[str, Group] = {}
        self.checkpoint = (0, "seed")
        self.drafts: dict[str, int] = {}  # group -> the version under which its first tokens were sampled
        self.steps: list[int] = []
        self.went_back: dict[int, int] = {}  # rollback version -> version of the checkpoint that it is again

    def append(self, group: Group) -> None:
        self.journal[group.id] = group

    def read(self, names: Collection[str]) -> dict[str, Group]:
        return {n: self.journal[n] for n in names if n in self.journal}

    def prune(self, keep: Collection[str]) -> None:
        self.journal = self.read(keep)


def next_weights(weights: str, names: Sequence[str]) -> str:
    return hashlib.sha256(" ".join([weights, *names]).encode()).hexdigest()


class ChainLearner:
    """Dies now and then; its weights tell its whole past."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.version, self.weights = world.disk.checkpoint
        self.batch: list[Group] = []
        self.dead = False

    async def _work(self, seconds: float) -> None:
        if self.dead or self.world.rng.random() < self.world.faults:
            self.dead = True
            raise Died("the learner's process is gone")
        await asyncio.sleep(seconds)

    async def accumulate(self, groups: Sequence[Group]) -> dict[str, float]:
        await self._work(self.world.rng.uniform(0.5, 3))
        for group in groups:
            assert group.min_version is not None
            assert 0 <= self.version - group.min_version <= self.world.cfg.max_staleness, "a token is too old, or from the future"
        self.batch = list(groups)
        return {}

    async def agreement(self, completions: Sequence[Completion]) -> Agreement:
        await self._work(0.01)
        assert all(s.version == self.version for c in completions for s in c.spans)
        return Agreement(mean=0.0, max=0.0, num_tokens=1)

    async def apply(self, *, again: bool = False) -> tuple[StepStats, Ref]:
        await self._work(0.1)
        if not again and self.world.rng.random() < self.world.bad_steps:
            await self._work(0.0)  # dead after the judgement, before its answer
            return StepStats(version=self.version, metrics={}, skipped="the loss is nan"), None
        self.weights = next_weights(self.weights, [g.id for g in self.batch])
        self.version += 1
        await self._work(0.0)  # dead after the step, before its answer
        return StepStats(version=self.version, metrics={}), (self.version, self.weights)

    async def adopt(self, version: int) -> None:
        await self._work(1.0)
        self.world.disk.went_back[version] = self.version
        self.version = version
        self.world.disk.checkpoint = (self.version, self.weights)
        await self._work(0.0)

    async def snapshot(self) -> tuple[int, Ref]:
        return self.version, (self.version, self.weights)

    async def save(self) -> str:
        await self._work(1.0)
        self.world.disk.checkpoint = (self.version, self.weights)
        await self._work(0.0)
        return f"step-{self.version}"

    async def aclose(self) -> None:
        self.dead = True


class Engines:
    """Groups take random times under the weights that are live; one environment may break for a while."""

    def __init__(self, world: World) -> None:
        self.world, self.version = world, -1

    async def run_group(self, group_id: str, task: Task, spec: EpisodeSpec) -> GroupResult:
        rng = self.world.rng
        assert self.version >= 0, "a group started before any engine had weights"
        drafts = self.world.disk.drafts
        if group_id not in drafts or rng.random() < 0.3:  # it starts, or starts again; else it goes on from its old tokens
            drafts[group_id] = self.version
        version = drafts[group_id]
        await asyncio.sleep(rng.uniform(20, 60) if rng.random() < 0.1 else rng.uniform(0.5, 2))
        now = asyncio.get_running_loop().time()
        broken = task.env == self.world.broken_env and now % 120 < 40
        group = make_group(group_id, task, version, rng, signal=0.7, broken=broken)
        return GroupResult.of(group, 1.0, ref=group)

    async def load_weights(self, version: int, weights: Ref) -> Sequence[Receipt]:
        await asyncio.sleep(self.world.rng.uniform(0.01, 1.0))
        assert weights[0] == version
        self.version = version
        return [Receipt(worker="w0", version=version, pause_s=0.01, num_bytes=1, probe=(probe(version),))]


class FlakyQueue:
    """The real queue in an actor that dies now and then, before or after it did what it was told."""

    def __init__(self, world: World) -> None:
        self.world, self.queue, self.dead = world, ReplayQueue(Budget.of(world.cfg).window), False

    def _call(self, method: str, *arguments: Any) -> asyncio.Future[Any]:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        fate = self.world.rng.random()
        if self.dead or fate < self.world.faults / 4:
            self.dead = True
            answer.set_exception(Died("the queue's process is gone"))
            return answer
        value = getattr(self.queue, method)(*arguments)
        if fate < self.world.faults / 2:
            self.dead = True
            answer.set_exception(Died("the queue's process is gone, and its answer too"))
        else:
            answer.set_result(value)
        return answer

    def restore(self, groups: Mapping[int, GroupResult | None], overtakers: Sequence[int]) -> Any:
        return self._call("restore", groups, overtakers)

    def start(self, ticket: int) -> Any:
        return self._call("start", ticket)

    def put(self, ticket: int, result: GroupResult) -> Any:
        return self._call("put", ticket, result)

    def drop(self, ticket: int) -> Any:
        return self._call("drop", ticket)

    def take(self, count: int) -> Any:
        return self._call("take", count)


class MortalLedger(Ledger):
    """The driver dies before or after a write of the ledger; a dead driver writes nothing more."""

    world: World
    dead = False

    def _maybe(self) -> None:
        if self.dead or self.world.rng.random() < self.world.kills:
            self.dead = True
            raise Killed


def mortal(name: str) -> Any:
    original = getattr(Ledger, name)

    def method(self: MortalLedger, *arguments: Any) -> Any:
        self._maybe()
        value = original(self, *arguments)
        self._maybe()
        return value

    return method


for _name in ("draw", "ready", "train", "filter", "skip", "roll_back"):
    setattr(MortalLedger, _name, mortal(_name))


class Watch(Recorder):
    """Makes groups durable, and counts steps once."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    async def group(self, result: GroupResult) -> None:
        await asyncio.sleep(0.001)
        self.world.disk.append(result.ref)

    async def step(self, step: int, version: int, metrics: dict[str, float]) -> None:
        self.world.disk.steps.append(version)


class World:
    """One run over all of its lives."""

    def __init__(self, folder: Path, seed: int, *, faults: float = 0.02, kills: float = 0.003, steps: int = 8) -> None:
        self.rng = random.Random(seed)
        self.cfg = LoopConfig(
            steps=steps, groups_per_step=self.rng.randint(1, 5), max_staleness=self.rng.randint(0, 3), window=self.rng.randint(1, 5),
            bad_steps=2, max_rollbacks=100,
        )  # fmt: skip
        if self.cfg.max_staleness and self.rng.random() < 0.4:
            self.cfg.reuse, self.cfg.max_uses = self.rng.randint(0, self.cfg.groups_per_step - 1), self.rng.randint(2, 3)
        self.bad_steps = self.rng.choice([0.0, 0.0, 0.1, 0.4])
        self.faults, self.kills = faults, kills
        self.broken_env = self.rng.choice([None, *SHARES])
        self.disk = Disk(folder / f"{seed}.sqlite")
        self.lives = 0

    async def live(self) -> None:
        """The driver's process, from its start to its end or death."""
        self.lives += 1
        ledger = MortalLedger(self.disk.ledger)
        ledger.world = self
        try:
            mixer = Mixer({name: partial(tasks, name) for name in SHARES}, SHARES)
            learner = DurableLearner(
                self.launch, partial(self.batch, ledger), (Died,), on_saved=partial(self.saved, ledger), rollbacks=lambda: ledger.rollbacks
            )
            done_again = [stats.version for stats in await learner.open(ledger.version)]
            self.disk.steps += [v for v in (*done_again, *ledger.rollbacks) if v not in self.disk.steps]
            unfinished = recover(
                ledger, self.disk, mixer, own=lambda group: group, unusable=unusable, reusable=self.reusable(ledger)
            )  # fmt: skip
            queue = DurableQueue(lambda: FlakyQueue(self), (Died,), groups=unfinished.queue, overtakers=unfinished.overtakers)
            await queue.open()
            version, weights = await learner.snapshot()
            await train(
                self.cfg, mixer=mixer, specs=dict.fromkeys(SHARES, SPEC), workers=Engines(self), queue=queue, learner=learner,
                ledger=ledger, record=Watch(self), weights=weights, version=version, stop=asyncio.Event(), checkpoint_every=3,
                unfinished=unfinished,
            )  # fmt: skip
            await learner.save()
        finally:
            ledger.close()

    async def launch(self) -> ChainLearner:
        await asyncio.sleep(5.0)
        return ChainLearner(self)

    async def batch(self, ledger: Ledger, version: int) -> Sequence[Group]:
        names = ledger.batch(version)
        return [self.disk.read(names)[name] for name in names]

    def saved(self, ledger: Ledger, version: int) -> None:
        self.disk.prune([*(e.group_id for e in ledger.open()), *self.reusable(ledger)])

    def reusable(self, ledger: Ledger) -> dict[str, int]:
        return ledger.reusable(self.cfg.max_staleness, self.cfg.max_uses) if self.cfg.reuse else {}

    def go(self) -> None:
        """Live until a life ends well."""
        while True:
            try:
                simulate(asyncio.wait_for(self.live(), PLENTY_S))
            except BaseException as error:
                if not only_killed(error):
                    raise
                assert self.lives < 200, "the run makes no progress between its deaths"
                continue
            return

    def check(self) -> None:
        """The invariants, over all lives together."""
        ledger = Ledger(self.disk.ledger)
        lineage, seen = ["seed"], Counter[str]()
        for version in range(1, self.cfg.steps + 1):
            batch = ledger.batch(version)
            fresh = [name for name in batch if name not in seen]
            assert len(fresh) == (0 if version in ledger.rollbacks else self.cfg.fresh_per_step)
            assert len(batch) <= len(fresh) + self.cfg.reuse
            seen.update(batch)
            lineage.append(next_weights(lineage[-1], batch) if batch else lineage[self.disk.went_back[version]])
        weights = lineage[-1]
        assert self.disk.checkpoint == (self.cfg.steps, weights), "the weights are not those of the ledger's steps"
        assert sorted(self.disk.steps) == list(range(1, self.cfg.steps + 1)), "a step was recorded twice, or not at all"
        assert max(seen.values()) <= (self.cfg.max_uses if self.cfg.reuse else 1)
        assert ledger.open() == []
        ledger.close()
        assert all(b.balanced for b in read_balance(self.disk.ledger))


def only_killed(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(only_killed(e) for e in error.exceptions)
    return isinstance(error, Killed)


@pytest.mark.timeout(3600)
def test_runs_with_crashes_of_every_part_end_whole(tmp_path: Path) -> None:
    lives = 0
    for seed in range(SIMULATIONS):
        world = World(tmp_path, seed)
        try:
            world.go()
            world.check()
        except BaseException as error:
            error.add_note(f"in simulation {seed}, life {world.lives}, {world.cfg}")
            raise
        lives += world.lives
        world.disk.ledger.unlink()
    assert lives > 1.2 * SIMULATIONS, "too few crashes to mean anything"


def ack_before_persist(monkeypatch: pytest.MonkeyPatch) -> None:
    async def forget(self: Watch, result: GroupResult) -> None:
        asyncio.get_running_loop().call_later(5.0, self.world.disk.append, result.ref)

    monkeypatch.setattr(Watch, "group", forget)


def double_delivery(monkeypatch: pytest.MonkeyPatch) -> None:
    original = DurableQueue.put

    async def twice(self: DurableQueue, ticket: int, result: GroupResult) -> None:
        await original(self, ticket, result)
        await original(self, ticket, result)

    monkeypatch.setattr(DurableQueue, "put", twice)


def slots_before_weights_are_live(monkeypatch: pytest.MonkeyPatch) -> None:
    async def load(self: Engines, version: int, weights: Ref) -> Sequence[Receipt]:
        first = self.version < 0
        if first:
            self.version = version
        else:
            asyncio.get_running_loop().call_later(20.0, setattr, self, "version", version)
        return [Receipt(worker="w0", version=version, pause_s=0.01, num_bytes=1, probe=(probe(version),))]

    monkeypatch.setattr(Engines, "load_weights", load)


def steps_forgotten_after_a_death(monkeypatch: pytest.MonkeyPatch) -> None:
    async def start(self: DurableLearner) -> list[StepStats]:
        learner = self._learner = await self._launch()
        learner.version = self.version  # claims the version without doing its steps
        return []

    monkeypatch.setattr(DurableLearner, "_start", start)


def journal_pruned_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "saved", lambda self, ledger, version: self.disk.prune([]))


def half_a_batch_in_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_by_one(self: MortalLedger, names: Sequence[str], version: int) -> None:
        for name in names:
            self._maybe()
            Ledger.train(self, [name], version)

    monkeypatch.setattr(MortalLedger, "train", one_by_one)


def a_queue_that_forgets_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    def take(self: ReplayQueue, count: int) -> list[GroupResult]:
        taken = self._ready[:count] if len(self._ready) >= count else []
        del self._ready[: len(taken)]
        return [self._results.pop(t) for t in taken]

    monkeypatch.setattr(ReplayQueue, "take", take)


def one_slot_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Budget.of
    monkeypatch.setattr(
        Budget, "of", staticmethod(lambda cfg: Budget(slots=original(cfg).slots + cfg.groups_per_step, window=original(cfg).window))
    )


def a_rollback_that_the_ledger_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MortalLedger, "roll_back", lambda self, version, reason: None)


def a_skipped_step_whose_groups_stay_in_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MortalLedger, "skip", lambda self, names, reason: None)


BUGS = [
    ack_before_persist, double_delivery, slots_before_weights_are_live, steps_forgotten_after_a_death, journal_pruned_too_early,
    half_a_batch_in_the_ledger, a_queue_that_forgets_the_window, one_slot_too_many,
    a_rollback_that_the_ledger_does_not_know, a_skipped_step_whose_groups_stay_in_the_ledger,
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: Any) -> None:
    bug(monkeypatch)

    def forty_runs() -> None:
        for seed in range(40):
            world = World(tmp_path, seed, kills=0.01)
            world.go()
            world.check()

    with pytest.raises((AssertionError, LedgerError, RuntimeError, ValueError, KeyError, BaseExceptionGroup)):
        forty_runs()


@pytest.mark.parametrize("seed", range(5))
def test_a_calm_run_has_one_life(tmp_path: Path, seed: int) -> None:
    world = World(tmp_path, seed, faults=0.0, kills=0.0)
    world.go()
    world.check()
    assert world.lives == 1


def test_without_a_planted_bug_the_same_runs_end_well(tmp_path: Path) -> None:
    for seed in range(40):
        world = World(tmp_path, seed, kills=0.01)
        world.go()
        world.check()
