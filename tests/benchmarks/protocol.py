"""Groups per second through the protocol: sampler, queue, ledger and batcher, with engines that cost nothing.

groups_per_s_10, _100, _1000   trained groups per second of wall time, with so many workers and 100,000 groups in flight
driver_us_per_group_10, ...    CPU time of the driver's process for each trained group, in microseconds: what a busy machine does not change
groups_per_s_ray_100           groups_per_s_100 with the replay queue as an actor of a real Ray, and 10,000 groups in flight
batcher_us_per_group           CPU time of the batcher (advantages, trajectories, microbatches), which has a process of its own
journal_groups_per_s           groups per second that a journal on this disk makes durable, eight writers at once
peak_mib                       largest resident memory of the driver's process over all of these runs
growth_mib                     its growth from the first measured step to the last, at 100 workers

What is real: `train`, Mixer, Breaker, DurableQueue, ReplayQueue, the pool's Routing, a Ledger in SQLite on disk, and in a process of its
own, as a learner's rank is, the batcher. A group's 64 KiB (8 rollouts) travel by reference: the driver never touches them, the batcher
reads them. What is not: engines, whose groups end as fast as they are trained; gradients; the record, which keeps nothing.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AsyncExitStack
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from rl_core.batching import microbatches
from rl_core.config import LoopConfig
from rl_core.durable import DurableQueue, RawQueue
from rl_core.journal import GroupJournal
from rl_core.ledger import Ledger
from rl_core.loop import Budget, train
from rl_core.mixer import Mixer
from rl_core.replay_queue import ReplayQueue
from rl_core.seams import GroupResult, Ref
from rl_core.trajectories import trajectories
from rl_core.types import (
    Agreement,
    Completion,
    EpisodeSpec,
    Group,
    Receipt,
    Rollout,
    SamplingParams,
    Status,
    StepStats,
    Task,
    Verdict,
    VersionSpan,
)  # fmt: skip
from rollout_workers.routing import Routing

SHARES = {"math": 1.0, "code": 1.0, "tools": 1.0, "long_context": 0.5}
SPEC = EpisodeSpec(group_size=8, sampling=SamplingParams(max_tokens=512), max_turns=1, max_total_tokens=4096, timeout_s=60.0)
GROUP_BYTES = 64 << 10
PAYLOADS = 32
"""Different groups that the references lead to."""

PER_STEP, AHEAD, PER_TURN = 1000, 2, 100
"""Groups of a step; steps whose groups wait in the queue; groups that end in one turn of the event loop."""

WARMUP_STEPS, STEPS = 3, 20
REPETITIONS = 2


def bench() -> dict[str, list[float]]:
    logging.getLogger("rl_core").setLevel(logging.ERROR)
    figures: dict[str, list[float]] = {}
    peak = 0.0
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as batcher:
        batcher.submit(batch, [0]).result()
        figures["batcher_us_per_group"] = [batcher.submit(batch_cost).result() for _ in range(REPETITIONS)]
        for _ in range(REPETITIONS):
            for workers in (10, 100, 1000):
                rate, cost, memory = measure(workers, in_flight=100_000, batcher=batcher)
                figures.setdefault(f"groups_per_s_{workers}", []).append(rate)
                figures.setdefault(f"driver_us_per_group_{workers}", []).append(cost)
                peak = max(peak, *memory)
                if workers == 100:
                    figures.setdefault("growth_mib", []).append(memory[-1] - memory[0])
        figures["journal_groups_per_s"] = [journal_rate() for _ in range(REPETITIONS)]
        figures["groups_per_s_ray_100"] = on_ray(lambda make: measure(100, in_flight=10_000, batcher=batcher, make_queue=make)[0])
    return figures | {"peak_mib": [peak]}


def measure(
    workers: int, *, in_flight: int, batcher: ProcessPoolExecutor, make_queue: Callable[[int], RawQueue] | None = None
) -> tuple[float, float, list[float]]:
    """(groups per second, microseconds of CPU for each, resident MiB at each measured step)."""
    gc.collect()
    # window chosen so that (max_staleness + 1) * PER_STEP - (window - 1) is `in_flight`
    cfg = LoopConfig(steps=WARMUP_STEPS + STEPS, groups_per_step=PER_STEP, max_staleness=in_flight // PER_STEP, window=PER_STEP + 1)
    assert Budget.of(cfg).slots == in_flight
    clock = StepClock()

    async def main() -> None:
        with tempfile.TemporaryDirectory() as folder:
            ledger = Ledger(Path(folder) / "ledger.sqlite")
            queue = DurableQueue(partial(make_queue or LocalQueue, Budget.of(cfg).window), ())
            await queue.open()
            await train(
                cfg, mixer=Mixer({env: partial(tasks, env) for env in SHARES}, SHARES), specs=dict.fromkeys(SHARES, SPEC),
                workers=Workers(workers, fill=in_flight), queue=queue, learner=Learner(batcher), ledger=ledger, record=clock,
                weights=0, version=0, stop=asyncio.Event(),
            )  # fmt: skip
            ledger.close()

    asyncio.run(main())
    times, cpu, memory = (series[WARMUP_STEPS - 1 :] for series in (clock.times, clock.cpu, clock.memory))
    groups = PER_STEP * (len(times) - 1)
    return groups / (times[-1] - times[0]), 1e6 * (cpu[-1] - cpu[0]) / groups, memory


class Workers:
    """Engines that cost nothing. They hold their groups until all places are taken; from then on as many end as train, those that
    started first. So what is in flight stays in flight, and a step has the same work for any number of workers.

    A group's worker is chosen as the pool chooses it, and each worker has a receipt for every version.
    """

    def __init__(self, count: int, *, fill: int) -> None:
        self._names = [f"w{i}" for i in range(count)]
        self._routing = Routing(self._names)
        self._open: deque[asyncio.Future[None]] = deque()
        self._left_to_fill, self._version = fill, 0
        self._owed, self._ending = 0, False

    async def run_group(self, group_id: str, task: Task, spec: EpisodeSpec) -> GroupResult:
        version, worker = self._version, self._routing.take()
        assert worker is not None
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._open.append(done)
        self._left_to_fill -= 1
        if self._left_to_fill == 0:
            self._owe(AHEAD * PER_STEP)
        elif self._owed:
            self._owe(0)
        await done
        self._routing.give_back(worker)
        return GroupResult(
            ref=int(group_id[1:]) % PAYLOADS, group_id=group_id, env=task.env, task_key=task.key, num_trainable=8, has_signal=True,
            min_version=version, max_version=self._version, rewards=(0.0, 1.0) * 4, statuses=("ok",) * 8, sampled_tokens=4096,
            prompt_tokens=1024, drafted=4096, accepted=2048, engine_steps=2048, components={"correct": 0.5}, seconds=1.0,
        )  # fmt: skip

    async def load_weights(self, version: int, weights: Ref) -> Sequence[Receipt]:
        self._version = version
        if version:
            self._owe(PER_STEP)
        return [Receipt(worker=name, version=version, pause_s=0.0, num_bytes=0, probe=()) for name in self._names]

    def _owe(self, more: int) -> None:
        """`more` groups shall end, PER_TURN in each turn of the event loop; those that have not started yet, when they have."""
        self._owed += more
        if not self._ending:
            self._ending = True
            asyncio.get_running_loop().call_soon(self._end)

    def _end(self) -> None:
        for _ in range(min(self._owed, PER_TURN, len(self._open))):
            self._owed -= 1
            if not (done := self._open.popleft()).done():  # else the run has ended
                done.set_result(None)
        self._ending = False
        if self._owed and self._open:
            self._owe(0)


class Learner:
    """Seals batches in another process; its step is free."""

    def __init__(self, batcher: ProcessPoolExecutor) -> None:
        self._batcher, self._version = batcher, 0

    async def accumulate(self, groups: Sequence[Ref]) -> dict[str, float]:
        rows = await asyncio.get_running_loop().run_in_executor(self._batcher, batch, list(groups))
        assert rows == 8 * len(groups)
        return {}

    async def agreement(self, completions: Sequence[Completion]) -> Agreement:
        return Agreement(mean=0.0, max=0.0, num_tokens=1)

    async def apply(self) -> tuple[StepStats, Ref]:
        self._version += 1
        return StepStats(version=self._version, metrics={}), self._version

    async def roll_back(self, version: int) -> tuple[StepStats, Ref]:
        raise AssertionError("no step of the benchmark is bad")

    async def save(self) -> str:
        return ""


class StepClock:
    """Time and memory at each step."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.cpu: list[float] = []
        self.memory: list[float] = []
        self._process = psutil.Process()

    async def group(self, result: GroupResult) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    async def step(self, step: int, version: int, metrics: dict[str, float]) -> None:
        self.times.append(time.perf_counter())
        self.cpu.append(time.process_time())
        self.memory.append(self._process.memory_info().rss / 2**20)


class LocalQueue:
    """The true queue in this process; answers are there in the next turn of the event loop, as an actor's are at the earliest."""

    def __init__(self, window: int) -> None:
        self._queue = ReplayQueue(window)

    def __getattr__(self, method: str) -> Callable[..., asyncio.Future[Any]]:
        def call(*arguments: Any) -> asyncio.Future[Any]:
            answer = asyncio.get_running_loop().create_future()
            answer.set_result(getattr(self._queue, method)(*arguments))
            return answer

        return call


def on_ray(rate: Callable[[Callable[[int], RawQueue]], float]) -> list[float]:
    """`rate` for a queue in an actor, once."""
    import ray

    from infra.queue_actor import QueueActor
    from infra.ray_cluster import start_local

    start_local(num_cpus=4, object_store_memory=256 << 20)
    try:
        return [rate(lambda window: QueueActor(window, AsyncExitStack()))]
    finally:
        ray.shutdown()


# --- payloads and the batcher ---------------------------------------------------------------------------------------------


@cache
def payload(index: int) -> Group:
    """A group of about GROUP_BYTES: ids, logprobs and prompts of eight rollouts of different lengths."""
    rng = np.random.default_rng(index)
    env = list(SHARES)[index % len(SHARES)]
    prompt = rng.integers(5, 700, 128).astype(np.int32)
    tokens = GROUP_BYTES // SPEC.group_size // 8 - len(prompt) // 2  # 8 bytes each: id and logprob

    def rollout(member: int) -> Rollout:
        length = tokens // 2 + member * tokens // (SPEC.group_size - 1)
        completion = Completion(
            prompt_ids=prompt, token_ids=rng.integers(5, 700, length).astype(np.int32),
            logprobs=-rng.random(length, np.float32), spans=(VersionSpan(start=0, stop=length, version=0),), finish_reason="stop",
        )  # fmt: skip
        verdict = Verdict(status=Status.OK, reward=float(member % 2))
        return Rollout(id=f"{index}-{member}", env=env, task_key="k", completions=(completion,), messages=(), verdict=verdict)

    task = Task(env=env, key=f"k{index}", split="train", seed=index, public={})
    return Group(id=f"p{index}", task=task, rollouts=tuple(rollout(m) for m in range(SPEC.group_size)))


def batch(refs: Sequence[int]) -> int:
    """What a rank does with a batch before its first forward pass; returns how many rows it has."""
    rows = [t for ref in refs for t in trajectories(payload(ref % PAYLOADS), "grpo")]
    (mine,) = microbatches(rows, envs=tuple(SHARES), max_tokens=16384)
    return sum(len(m.token_ids) for m in mine)


def journal_rate(count: int = 200, writers: int = 8) -> float:
    """Durable appends per second."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(writers) as pool:
        journal = GroupJournal(Path(folder))
        groups = [payload(i % PAYLOADS) for i in range(count)]
        began = time.perf_counter()
        list(pool.map(journal.append, groups))
        seconds = time.perf_counter() - began
        journal.close()
    return count / seconds


def batch_cost() -> float:
    """Microseconds of CPU for each group of a batch."""
    began = time.process_time()
    batch(range(PER_STEP))
    return 1e6 * (time.process_time() - began) / PER_STEP


def tasks(env: str, start: int = 0) -> Iterator[Task]:
    """Tasks without content, without end."""
    for index in itertools.count(start):
        yield Task(env=env, key=f"{env}-{index}", split="train", seed=index, public={})
