"""What a run will do, before it does: staleness, idle engines, idle learner, throughput, from lengths and latencies.

The true loop, queue, ledger and mixer on a virtual clock; engines that decode as `engines` says; a learner that takes its time.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from infra.simulation.clock import simulate
from infra.simulation.engines import Engine
from infra.simulation.parts import completion_of, tasks
from infra.simulation.study import scratch
from rl_core.config import LoopConfig
from rl_core.ledger import Ledger, State
from rl_core.loop import Budget, train
from rl_core.mixer import Mixer
from rl_core.replay_queue import ReplayQueue
from rl_core.seams import GroupResult, Ref
from rl_core.types import Agreement, Completion, EpisodeSpec, Receipt, SamplingParams, StepStats, Task

FOREVER_S = 1e9
"""Virtual seconds: a plan waits for everything."""

Tokens = Mapping[int, float]
"""How many tokens were sampled by which version."""

ANY_SPEC = EpisodeSpec(group_size=2, sampling=SamplingParams(max_tokens=8), max_turns=1, max_total_tokens=64, timeout_s=FOREVER_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvPlan:
    """Episodes of one environment."""

    share: float = 1.0
    group_size: int = 8
    mean_tokens: float = 64.0  # sampled per episode, over all turns
    spread: float = 0.6  # standard deviation of the logarithm of an episode's tokens: 0 is constant, 1 has a long tail
    max_tokens: float = math.inf  # per episode
    turns: int = 1
    step_s: float = 0.0  # the environment's time for one turn
    signal: float = 0.7  # share of groups whose rewards differ

    def tokens(self, rng: random.Random) -> float:
        """One episode's: lognormal, cut at `max_tokens`."""
        mu = math.log(self.mean_tokens) - self.spread**2 / 2
        return min(self.max_tokens, max(1.0, rng.lognormvariate(mu, self.spread)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run, in numbers."""

    loop: LoopConfig
    environments: Mapping[str, EnvPlan]
    workers: int = 1
    max_sequences: int = 64  # per engine
    base_s: float = 0.02  # of an engine step
    per_sequence_s: float = 0.0005
    learner_step_s: float = 5.0  # a step without its tokens
    learner_token_s: float = 0.0  # for each sampled token of the batch
    publish_s: float = 1.0
    seed: int = 0

    def synchronous(self) -> Plan:
        """The same with max_staleness = 0."""
        return replace(self, loop=replace(self.loop, max_staleness=0, reuse=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What to expect, after the first steps."""

    step_s: float
    groups_per_s: float  # trained
    tokens_per_s: float  # trained
    staleness_mean: float  # versions, over trained tokens
    staleness_max: int
    engine_idle: float  # share of time in which an engine had no sequence
    engine_load: float  # mean running sequences as a share of max_sequences
    learner_idle: float  # share of time
    filtered: float  # share of finished groups


def forecast(plan: Plan) -> Forecast:
    """Simulate `plan`. Steps that fill the pipeline are not counted."""
    warmup = plan.loop.max_staleness + 2
    loop = replace(plan.loop, steps=plan.loop.steps + warmup, stall_s=FOREVER_S)
    run = PlannedRun(replace(plan, loop=loop), warmup)
    simulate(run.main())
    return run.result()


class PlannedRun:
    """Implements workers, learner and record of one simulated run."""

    def __init__(self, plan: Plan, warmup: int) -> None:
        self.plan, self.warmup, self.rng = plan, warmup, random.Random(plan.seed)
        self.engines: list[Engine] = []
        self.busy: list[int] = []
        self.version = 0
        self.learner_busy_s = 0.0
        self.staleness: dict[int, float] = defaultdict(float)  # trained tokens
        self.batch: Sequence[Tokens] = ()
        self.at_warm: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
        self.at_end = self.at_warm
        self.filtered = 0.0

    async def main(self) -> None:
        plan = self.plan
        self.engines = [
            Engine(max_sequences=plan.max_sequences, base_s=plan.base_s, per_sequence_s=plan.per_sequence_s) for _ in range(plan.workers)
        ]
        self.busy = [0] * plan.workers
        shares = {name: env.share for name, env in plan.environments.items()}
        with scratch() as folder:
            ledger = Ledger(folder / "ledger.sqlite")
            await train(
                plan.loop, mixer=Mixer({name: partial(tasks, name) for name in shares}, shares), specs=dict.fromkeys(shares, ANY_SPEC),
                workers=self, queue=Direct(Budget.of(plan.loop).window), learner=self, ledger=ledger, record=self, weights=0, version=0,
                stop=asyncio.Event(),
            )  # fmt: skip
            states: Counter[str] = Counter()
            for counts in ledger.counts().values():
                states.update({state: counts[state] for state in (State.TRAINED, State.FILTERED)})
            self.filtered = states[State.FILTERED] / max(states.total(), 1)
            ledger.close()

    def result(self) -> Forecast:
        (began, busy, sequences, learner), (ended, busy_end, sequences_end, learner_end) = self.at_warm, self.at_end
        seconds, plan = ended - began, self.plan
        steps, tokens = plan.loop.steps - self.warmup, sum(self.staleness.values())
        return Forecast(
            step_s=seconds / steps,
            groups_per_s=steps * plan.loop.fresh_per_step / seconds,
            tokens_per_s=tokens / seconds,
            staleness_mean=sum(age * n for age, n in self.staleness.items()) / tokens,
            staleness_max=max(self.staleness),
            engine_idle=max(0.0, 1 - (busy_end - busy) / seconds / plan.workers),
            engine_load=(sequences_end - sequences) / seconds / plan.workers / plan.max_sequences,
            learner_idle=max(0.0, 1 - (learner_end - learner) / seconds),
            filtered=self.filtered,
        )

    # --- workers --------------------------------------------------------------------------------------------------------

    async def run_group(self, group_id: str, task: Task, spec: EpisodeSpec) -> GroupResult:
        env = self.plan.environments[task.env]
        worker = min(range(len(self.engines)), key=self.busy.__getitem__)
        self.busy[worker] += 1
        lengths = [env.tokens(self.rng) for _ in range(env.group_size)]
        parts = await asyncio.gather(*(self._episode(env, self.engines[worker], n) for n in lengths))
        self.busy[worker] -= 1
        sampled = together(parts)
        return GroupResult(
            ref=sampled, group_id=group_id, env=task.env, task_key=task.key, num_trainable=env.group_size,
            has_signal=self.rng.random() < env.signal, min_version=min(sampled), max_version=max(sampled),
            rewards=(0.0, 1.0), components={},
            statuses=("ok",) * env.group_size, sampled_tokens=round(sum(sampled.values())), prompt_tokens=0, drafted=0, accepted=0,
            engine_steps=0, seconds=0.0,
        )  # fmt: skip

    async def _episode(self, env: EnvPlan, engine: Engine, tokens: float) -> Tokens:
        turns: list[Tokens] = []
        for _ in range(env.turns):
            turns.append(await engine.decode(tokens / env.turns))
            if env.step_s:
                await asyncio.sleep(self.rng.expovariate(1 / env.step_s))
        return together(turns)

    async def load_weights(self, version: int, weights: Ref) -> Sequence[Receipt]:
        await asyncio.sleep(self.plan.publish_s)
        for engine in self.engines:
            engine.load(version)
        return [Receipt(worker="w0", version=version, pause_s=0.0, num_bytes=0, probe=(completion_of([version]),))]

    def revived(self) -> Sequence[Receipt]:
        return ()

    # --- learner --------------------------------------------------------------------------------------------------------

    async def accumulate(self, groups: Sequence[Ref]) -> dict[str, float]:
        self.batch = groups
        seconds = self.plan.learner_step_s + self.plan.learner_token_s * sum(sum(g.values()) for g in groups)
        self.learner_busy_s += seconds
        await asyncio.sleep(seconds)
        return {}

    async def agreement(self, completions: Sequence[Completion]) -> Agreement:
        return Agreement(mean=0.0, max=0.0, num_tokens=1)

    async def apply(self) -> tuple[StepStats, Ref]:
        if self.version >= self.warmup:
            for group in self.batch:
                for version, tokens in group.items():
                    self.staleness[self.version - version] += tokens
        self.version += 1
        return StepStats(version=self.version, metrics={}), self.version

    async def roll_back(self, version: int) -> tuple[StepStats, Ref]:
        raise AssertionError("no planned step is bad")

    async def save(self) -> str:
        return ""

    # --- record ---------------------------------------------------------------------------------------------------------

    async def group(self, result: GroupResult) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    async def step(self, step: int, version: int, metrics: dict[str, Any]) -> None:
        for engine in self.engines:
            engine.look()
        now = asyncio.get_running_loop().time()
        reading = (now, sum(e.busy_s for e in self.engines), sum(e.sequence_s for e in self.engines), self.learner_busy_s)
        if version == self.warmup:
            self.at_warm = reading
        self.at_end = reading


def together(parts: Iterable[Tokens]) -> Tokens:
    """The sum."""
    total: dict[int, float] = defaultdict(float)
    for part in parts:
        for version, count in part.items():
            total[version] += count
    return total


class Direct:
    """The true queue, called directly."""

    def __init__(self, window: int) -> None:
        self._queue = ReplayQueue(window)

    async def start(self, ticket: int) -> None:
        self._queue.start(ticket)

    async def put(self, ticket: int, result: GroupResult) -> None:
        self._queue.put(ticket, result)

    async def drop(self, ticket: int) -> None:
        self._queue.drop(ticket)

    async def take(self, count: int) -> list[GroupResult]:
        return self._queue.take(count)
