"""The parts of a run that can die: engines, learner, the queue's process, and what the driver writes.

What they wrap is the true code wherever there is some without a GPU: replay queue, ledger, journal, checkpoint folder.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.simulation.faults import Fault
from infra.simulation.witness import next_weights
from learner import checkpoint
from rl_core.durable import MAX_DEATHS_IN_A_ROW
from rl_core.journal import GroupJournal
from rl_core.ledger import Ledger, State, group_id
from rl_core.replay_queue import ReplayQueue
from rl_core.seams import GroupResult, Ref
from rl_core.types import Agreement, Completion, EpisodeSpec, Group, Receipt, Rollout, Status, StepStats, Task, Verdict, VersionSpan

if TYPE_CHECKING:
    from infra.simulation.world import Life, World

PARTS_OF_A_GROUP = 3
"""Pieces in which a group's tokens are sampled: weights may change between them."""


class Died(Exception):
    """A part's process is gone; the driver hears of it as the answer to its call."""


def tasks(env: str, start: int = 0) -> Iterator[Task]:
    """Tasks without content, without end."""
    while True:
        yield Task(env=env, key=f"{env}-{start}", split="train", seed=start, public={})
        start += 1


def completion_of(versions: Sequence[int]) -> Completion:
    """One token of each of `versions`."""
    count = len(versions)
    spans = tuple(VersionSpan(start=i, stop=i + 1, version=v) for i, v in enumerate(versions))
    ids = np.zeros(count, np.int32)
    return Completion(prompt_ids=ids[:1], token_ids=ids, logprobs=np.zeros(count, np.float32), spans=spans, finish_reason="stop")


def group_of(name: str, task: Task, versions: Sequence[int], *, signal: bool, broken: bool) -> Group:
    """Two rollouts; the first has the tokens of `versions`, the second of the last one only."""

    def rollout(index: int) -> Rollout:
        lost = Verdict(status=Status.INFRA_ERROR, reward=None)
        verdict = lost if broken else Verdict(status=Status.OK, reward=float(signal and index == 0))
        mine = completion_of(versions if index == 0 else versions[-1:])
        return Rollout(id=f"{name}-{index}", env=task.env, task_key=task.key, completions=(mine,), messages=(), verdict=verdict)

    return Group(id=name, task=task, rollouts=(rollout(0), rollout(1)))


class SimWorker:
    """One engine. Its process may end; a new one takes its place with the newest weights."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.version: int | None = None
        self.deaths = 0
        self.busy = 0
        self.starting = asyncio.Lock()  # held while it loads or restarts

    def die(self) -> None:
        self.version = None
        self.deaths += 1


class SimPool:
    """Implements `rl_core.seams.RolloutWorkers` as the pool of a run does: dead workers restart, their groups start again."""

    def __init__(self, world: World, broken: str | None) -> None:
        self.world, self.rng, self.strike = world, world.rng, world.faults.strike
        self.workers = [SimWorker(f"w{i}") for i in range(self.rng.randint(1, 3))]
        self.latest: tuple[int, str] | None = None
        self._revived: list[Receipt] = []
        self._broken = broken  # an environment that fails now and then

    async def run_group(self, group_id: str, task: Task, spec: EpisodeSpec) -> GroupResult:
        while True:
            worker = min(self.workers, key=lambda w: w.busy)
            worker.busy += 1
            deaths = worker.deaths
            try:
                group = await self._roll_out(worker, group_id, task, spec)
            except Died:
                await self._revive(worker, deaths)
            else:
                return GroupResult.of(group, 1.0, ref=group)
            finally:
                worker.busy -= 1

    async def load_weights(self, version: int, weights: Ref) -> Sequence[Receipt]:
        assert weights[0] == version, f"version {version} is published with the weights of {weights[0]}"
        self.latest = weights
        await asyncio.gather(*(self._publish(worker) for worker in self.workers))
        self.world.witness.live(version, [w.version for w in self.workers])
        return [receipt(w, version) for w in self.workers]

    def revived(self) -> Sequence[Receipt]:
        receipts, self._revived = self._revived, []
        return receipts

    async def _roll_out(self, worker: SimWorker, name: str, task: Task, spec: EpisodeSpec) -> Group:
        """Tokens under the weights that are loaded at the time, piece by piece."""
        deaths, seconds = worker.deaths, duration(self.rng)
        hung = self.strike(Fault.HUNG_ENVIRONMENT)
        versions = self.world.draft(name, task)
        while len(versions) < PARTS_OF_A_GROUP:
            if worker.version is None or worker.deaths != deaths:
                raise Died(f"{worker.name} is gone")
            versions.append(worker.version)
            await asyncio.sleep(seconds / PARTS_OF_A_GROUP)
            if self.strike(Fault.WORKER_DEATH):
                worker.die()
        if self.strike(Fault.LOST_ANSWER):
            worker.die()
        if worker.deaths != deaths:
            raise Died(f"{worker.name} is gone")
        if hung:
            await asyncio.sleep(spec.timeout_s)
        if self.strike(Fault.LATE_ANSWER):
            await asyncio.sleep(self.rng.uniform(10, 60))
        broken = hung or (task.env == self._broken and asyncio.get_running_loop().time() % 120 < 40)
        return group_of(name, task, versions, signal=self.rng.random() < 0.7, broken=broken)

    async def _publish(self, worker: SimWorker) -> None:
        async with worker.starting:
            await self._load(worker)

    async def _load(self, worker: SimWorker) -> None:
        """The newest weights, through deaths."""
        while True:
            assert self.latest is not None, "a worker loads weights before there are any"
            version, weights = self.latest
            await asyncio.sleep(self.rng.uniform(10, 30) if self.strike(Fault.SLOW_LINK) else self.rng.uniform(0.01, 1.0))
            if not self.strike(Fault.WORKER_DEATH_IN_SYNC):
                break
            worker.die()
            await asyncio.sleep(5.0)
        self.world.witness.loaded(version, weights)
        worker.version = version

    async def _revive(self, worker: SimWorker, deaths: int) -> None:
        """A new process in the worker's place, unless somebody has seen to it."""
        async with worker.starting:
            if worker.version is None:
                await asyncio.sleep(5.0)
                await self._load(worker)
                if self.latest is not None:
                    self._revived.append(receipt(worker, self.latest[0]))


def receipt(worker: SimWorker, version: int) -> Receipt:
    return Receipt(worker=worker.name, version=version, pause_s=0.01, num_bytes=1, probe=(completion_of([version]),))


def duration(rng: random.Random) -> float:
    """Virtual seconds of a group; one in ten is a straggler."""
    return rng.uniform(20, 60) if rng.random() < 0.1 else rng.uniform(0.5, 2)


class SimLearner:
    """Its weights tell its whole past; its checkpoints are true folders, written by the true code."""

    def __init__(self, world: World, life: Life) -> None:
        self.world, self.life, self.root = world, life, world.folder / "checkpoints"
        self.version, self.weights = newest(self.root)
        self.batch: list[Group] = []
        self.dead = False

    async def accumulate(self, groups: Sequence[Group]) -> dict[str, float]:
        await self._work(Fault.LEARNER_DEATH, self.world.rng.uniform(0.5, 3))
        self.world.witness.trains(groups, self.version)
        self.batch = list(groups)
        return {}

    async def agreement(self, completions: Sequence[Completion]) -> Agreement:
        await self._work(Fault.LEARNER_DEATH, 0.01)
        versions = {span.version for c in completions for span in c.spans}
        wrong = versions != {self.version}  # other weights give other logprobs
        return Agreement(mean=float(wrong), max=float(wrong), num_tokens=1)

    async def apply(self, *, again: bool = False) -> tuple[StepStats, Ref]:
        await self._work(Fault.LEARNER_DEATH, 0.1)
        if not again and self.world.faults.strike(Fault.BAD_STEP):
            await self._work(Fault.LEARNER_DEATH_AFTER_STEP, 0.0)
            return StepStats(version=self.version, metrics={}, skipped="the loss is nan"), None
        self.weights = next_weights(self.weights, [g.id for g in self.batch])
        self.version += 1
        await self._work(Fault.LEARNER_DEATH_AFTER_STEP, 0.0)
        return StepStats(version=self.version, metrics={}), (self.version, self.weights)

    async def adopt(self, version: int) -> None:
        """The weights as they are, under a later version, and a checkpoint of that."""
        await self._work(Fault.LEARNER_DEATH, 0.1)
        self.world.witness.went_back(version, to=self.version)
        self.version = version
        await self.save()

    async def snapshot(self) -> tuple[int, Ref]:
        return self.version, (self.version, self.weights)

    async def save(self) -> str:
        await self._work(Fault.LEARNER_DEATH_IN_SAVE, 0.5)
        folder = checkpoint.begin(self.root, self.version)
        self._write(folder / "weights", self.weights)
        return str(checkpoint.commit(self.root, folder, self.version, {}, flush=self._flush))

    async def aclose(self) -> None:
        self.dead = True

    async def _work(self, fault: Fault, seconds: float) -> None:
        if self.dead:
            raise Died("the learner's process is gone")
        self._maybe_die(fault)
        await asyncio.sleep(seconds)

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text[: len(text) // 2])
        self._flush(path)
        path.write_text(text)

    def _flush(self, path: Path) -> None:
        """Where the true code waits for its disk, this learner may die."""
        self.life.must_live()
        self._maybe_die(Fault.LEARNER_DEATH_IN_SAVE)

    def _maybe_die(self, fault: Fault) -> None:
        """Not so often that the run would give it up, which is no bug."""
        if self.world.learner_deaths < MAX_DEATHS_IN_A_ROW and self.world.faults.strike(fault):
            self.dead = True
            self.world.learner_deaths += 1
            raise Died("the learner's process is gone")


def newest(root: Path) -> tuple[int, str]:
    """(version, weights) of the newest checkpoint."""
    folder = checkpoint.latest(root)
    return (0, "seed") if folder is None else (checkpoint.read_state(folder, {}), (folder / "weights").read_text())


class SimQueue:
    """The true queue behind a channel that keeps order: calls arrive later, some twice, and its process may die."""

    def __init__(self, world: World, window: int) -> None:
        self.world, self.queue, self.dead = world, ReplayQueue(window), False
        self._last_arrival = 0.0

    def restore(self, groups: Mapping[int, GroupResult | None], overtakers: Sequence[int]) -> asyncio.Future[Any]:
        return self._send("restore", groups, overtakers)

    def start(self, ticket: int) -> asyncio.Future[Any]:
        return self._send("start", ticket)

    def put(self, ticket: int, result: GroupResult) -> asyncio.Future[Any]:
        return self._send("put", ticket, result)

    def drop(self, ticket: int) -> asyncio.Future[Any]:
        return self._send("drop", ticket)

    def take(self, count: int) -> asyncio.Future[Any]:
        return self._send("take", count)

    def _send(self, method: str, *arguments: Any) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        delay = self.world.rng.uniform(0, 0.5) if self.world.faults.strike(Fault.SLOW_QUEUE) else 1e-4
        self._last_arrival = max(loop.time() + delay, self._last_arrival + 1e-6)
        loop.call_at(self._last_arrival, self._arrive, answer, method, arguments)
        return answer

    def _arrive(self, answer: asyncio.Future[Any], method: str, arguments: tuple[Any, ...]) -> None:
        strike = self.world.faults.strike
        self.dead = self.dead or strike(Fault.QUEUE_DEATH)
        value: Any = None
        error: Exception | None = Died("the queue's process is gone") if self.dead else None
        if not self.dead:
            try:
                value = getattr(self.queue, method)(*arguments)
            except Exception as raised:  # noqa: BLE001 (an actor hands every exception to its caller)
                error = raised
            if method != "take" and strike(Fault.DUPLICATE_DELIVERY):
                self._again(method, arguments)
            if strike(Fault.QUEUE_DEATH_AFTER_CALL):
                self.dead, error = True, Died("the queue's process is gone, and its answer too")
        if answer.done():  # nobody waits any more
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(value)

    def _again(self, method: str, arguments: tuple[Any, ...]) -> None:
        """The second delivery must be refused; its answer goes nowhere."""
        try:
            getattr(self.queue, method)(*arguments)
        except ValueError:
            return


class SimLedger(Ledger):
    """The true ledger. The driver may die before and after each write, and a dead driver writes nothing more."""

    def __init__(self, world: World, life: Life) -> None:
        self._path, self._world, self._life = world.ledger_path, world, life
        super().__init__(world.ledger_path, now=world.wall_clock)

    def draw(self, task: Task, position: int) -> int:
        self._before()
        ticket = super().draw(task, position)
        self._world.witness.drawn(group_id(ticket))
        self._after()
        return ticket

    def ready(self, name: str) -> None:
        self._before()
        super().ready(name)
        self._after()

    def filter(self, name: str, reason: str) -> None:
        self._before()
        super().filter(name, reason)
        self._world.witness.ended([name])
        self._after()

    def skip(self, names: Sequence[str], reason: str) -> None:
        self._before()
        super().skip(names, reason)
        self._world.witness.ended(names)
        self._after()

    def roll_back(self, version: int, reason: str) -> None:
        self._before()
        super().roll_back(version, reason)
        self._after()

    def train(self, names: Sequence[str], version: int, again: Sequence[str] = ()) -> None:
        self._before()
        super().train(names, version, again)
        self._world.witness.trained(names, version)
        self._world.learner_deaths = 0
        self._after()

    @contextmanager
    def _transaction(self, *, durable: bool) -> Iterator[None]:
        with super()._transaction(durable=durable):
            yield
        if durable:  # from here on a power cut cannot undo it
            self._world.flushed = files_of(self._path)

    def _move(self, names: Sequence[str], wanted: State, state: State, reason: str = "", version: int | None = None) -> None:
        for name in names:
            super()._move([name], wanted, state, reason, version)
            if len(names) > 1:
                self._maybe_die()

    def close(self) -> None:
        if self._life.dead:
            self._db.close()
        else:
            super().close()

    def _before(self) -> None:
        self._life.must_live()
        self._maybe_die()

    def _after(self) -> None:
        self._maybe_die()

    def _maybe_die(self) -> None:
        if self._world.faults.strike(Fault.DRIVER_DEATH_AT_LEDGER):
            self._life.die()


class SimJournal(GroupJournal):
    """The true journal. The driver may die in the middle of a write."""

    def __init__(self, world: World, life: Life) -> None:
        self._world, self._life = world, life
        super().__init__(world.folder / "journal")

    def append(self, group: Group) -> None:
        self._life.must_live()
        before = self._file.tell() if self._writer is not None else 0
        super().append(group)
        if self._world.faults.strike(Fault.TORN_JOURNAL):
            after = self._file.tell()
            os.truncate(self._file.name, self._world.rng.randint(before, after - 1))
            if self._world.rng.random() < 0.5:
                os.truncate(self._file.name, after)  # zeros, as some file systems leave them when the power is cut
            self._life.die()

    def prune(self, keep: Collection[str]) -> None:
        self._life.must_live()
        super().prune(keep)

    def close(self) -> None:
        if not self._life.dead:
            super().close()
        elif self._file is not None:
            self._file.close()


def files_of(database: Path) -> dict[Path, bytes]:
    """An SQLite file and its write-ahead log, as they are now."""
    return {path: path.read_bytes() for path in (database, Path(f"{database}-wal")) if path.exists()}
