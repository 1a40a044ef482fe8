"""The composition root: the one place that chooses classes, starts actors and wires them to the loop.

Everything that it starts, it ends, in reverse order, whatever happened.
"""

from __future__ import annotations

import asyncio
import logging
import math
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError

from environments.levels import leveled_tasks
from environments.registry import resolve
from environments.sources import guarded
from infra.audit.gate import AuditedWorkers
from infra.queue_actor import QueueActor
from infra.ray_cluster import connect
from infra.trackers import open_trackers
from infra.trackers.background import CLOSE_S
from infra.trackers.ray_metrics import RayMetrics
from learner.actor import LearnerGroup
from rl_core.bad_steps import TooManyBadSteps
from rl_core.breaker import AllBroken
from rl_core.config import EnvironmentConfig, RunConfig
from rl_core.curriculum import Curriculum
from rl_core.durable import DurableLearner, DurableQueue, rolled_back
from rl_core.evaluation import EvalResult, evaluate
from rl_core.events import Event, Sink
from rl_core.faults import unusable
from rl_core.journal import GroupJournal
from rl_core.ledger import Ledger, State
from rl_core.loop import Budget, RunError, train
from rl_core.mixer import Mixer
from rl_core.recovery import recover
from rl_core.run_store import RunStore, StoredRun
from rl_core.seams import GroupResult, RolloutWorkers
from rl_core.types import EpisodeSpec, SamplingParams, StepStats, Task
from rollout_workers.pool import Pool, as_future

log = logging.getLogger("polyrl")


def run(config: RunConfig, *, run_dir: Path, sinks: Sequence[Sink]) -> int:
    """Run `config` to its end in `run_dir`. Returns 0, or 1 if the run failed or was stopped; its cause is an event."""
    store = RunStore(run_dir, keep_tokens=config.store.keep_tokens, max_bytes=config.store.max_bytes)
    out = Fan([store, *sinks])
    trackers = open_trackers(config, run_dir, asdict(config), lambda text: out.emit(Event(kind="note", data={"text": text})))
    out.add(*trackers)
    began = time.time()
    try:
        connect(run_dir)
        if config.trackers.prometheus:
            out.add(RayMetrics(run_dir.name))
        outcome, reason = asyncio.run(Run(config, run_dir, store, out).main())
    except BaseException as error:  # the outcome of every run is recorded, also that of one that broke
        outcome, reason = "failed", explain(error)
        log.debug("run failed", exc_info=True)
        if not isinstance(error, (Exception, KeyboardInterrupt, asyncio.CancelledError)):
            raise
    finally:
        ray.shutdown()
    out.emit(Event(kind="run_finished", data={"outcome": outcome, "reason": reason, "seconds": time.time() - began}))
    until = time.monotonic() + CLOSE_S
    for tracker in trackers:
        tracker.close(max(until - time.monotonic(), 0.0))
    store.close()
    return 0 if outcome == "finished" else 1


class Fan:
    """Hands each event to every sink."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)

    def add(self, *sinks: Sink) -> None:
        self._sinks += sinks

    def emit(self, event: Event) -> None:
        for sink in self._sinks:
            sink.emit(event)


class Run:
    """One run: start the parts, evaluate, train, evaluate, stop the parts."""

    def __init__(self, config: RunConfig, run_dir: Path, store: RunStore, out: Sink) -> None:
        self.config, self.run_dir, self.store, self.out = config, run_dir, store, out
        self.specs = {name: episode_spec(env, config.rollout.num_workers) for name, env in config.environments.items()}
        self.stop = asyncio.Event()
        self.pool: Pool | None = None
        past = [event for event in StoredRun(run_dir).events() if event.kind in ("eval", "step")]
        self.is_new = not past
        """Nothing has been measured yet: the evaluation before training is still to come."""
        self.recorded_steps = {int(e.data["version"]) for e in past if e.kind == "step"}
        self.ledger = Ledger(run_dir / "ledger.sqlite")
        self.resumes = bool(self.ledger.counts())
        self.journal = GroupJournal(run_dir / "journal")

    async def main(self) -> tuple[str, str]:
        """(outcome, reason)."""
        loop = asyncio.get_running_loop()
        self.stop_signals(loop)
        config = self.config
        self.out.emit(Event(kind="run_started", data=self.describe()))
        async with AsyncExitStack() as parts:
            parts.callback(self.ledger.close)
            parts.callback(self.journal.close)
            self.phase("starting", "engines, learner, environment hosts")
            started = await self.interruptible(self.start_parts(parts))
            if started is None:
                return "stopped", "stopped while starting"
            pool, learner = started
            mixer = self.mixer()
            unfinished = recover(self.ledger, self.journal, mixer, own=ray.put, unusable=unusable, reusable=self.reusable())
            queue = DurableQueue(
                partial(QueueActor, Budget.of(config.loop).window, parts),
                (RayActorError,),
                groups=unfinished.queue,
                overtakers=unfinished.overtakers,
            )
            await queue.open()

            version, weights = await learner.snapshot()
            if self.resumes:
                text = f"resumed after step {version}: {len(unfinished.ready)} groups wait, {len(unfinished.cut_off)} start again"
                self.out.emit(Event(kind="note", data={"text": text}))
            if self.is_new and await self.interruptible(self.evaluation(pool, "before", version, config.eval.tasks)) is None:
                return "stopped", "stopped before training"
            self.phase("training", f"{config.loop.steps} steps")
            watch = Watch(self, pool)
            version = await train(
                config.loop,
                mixer=mixer,
                specs=self.specs,
                workers=self.audited(pool),
                queue=queue,
                learner=learner,
                ledger=self.ledger,
                record=watch,
                weights=weights,
                version=version,
                stop=self.stop,
                checkpoint_every=config.learner.checkpoint_every,
                unfinished=unfinished,
            )
            await watch.settle()
            self.phase("saving", f"version {version}")
            await learner.save()
            if self.stop.is_set():
                return "stopped", f"stopped after step {version} of {config.loop.steps}; `polyrl resume {self.run_dir.name}` goes on"
            if await self.interruptible(self.evaluation(pool, "after", version, config.eval.tasks)) is None:
                return "stopped", f"stopped in the final evaluation; the checkpoint of step {version} is saved"
        shutil.rmtree(self.run_dir / "drafts", ignore_errors=True)
        return "finished", ""

    def describe(self) -> dict[str, Any]:
        """What a viewer needs to know of the run beforehand."""
        config = self.config
        return {
            "run": self.run_dir.name,
            "steps": config.loop.steps,
            "environments": {name: env.share for name, env in config.environments.items()},
            "max_staleness": config.loop.max_staleness,
            "speculative_tokens": config.rollout.speculative_tokens,
            "objective": config.learner.objective,
        }

    async def start_parts(self, parts: AsyncExitStack) -> tuple[Pool, DurableLearner]:
        """Engines and learner start beside each other; what has started is stopped even if the other fails."""

        async def pool() -> Pool:
            unfinished = [entry.group_id for entry in self.ledger.open() if entry.state is State.DRAWN]
            started = await Pool.start(self.config, run_dir=self.run_dir, unfinished=unfinished)
            self.pool = started
            parts.push_async_callback(started.aclose)
            return started

        async def learner() -> DurableLearner:
            started = DurableLearner(
                partial(LearnerGroup.start, self.config, self.run_dir),
                self.batch,
                (RayActorError,),
                on_saved=self.saved,
                rollbacks=lambda: self.ledger.rollbacks,
            )
            parts.push_async_callback(started.aclose)
            for stats in await started.open(self.ledger.version):
                self.recover_step(stats)
            for version in self.ledger.rollbacks:
                self.recover_step(rolled_back(version))
            return started

        both = await asyncio.gather(pool(), learner(), return_exceptions=True)
        for part in both:
            if isinstance(part, BaseException):
                raise part
        return both[0], both[1]  # type: ignore[return-value]

    def recover_step(self, stats: StepStats) -> None:
        """Record a step between which and its record the old process died."""
        if stats.version not in self.recorded_steps:
            self.out.emit(Event(kind="step", data={"version": stats.version, "metrics": dict(stats.metrics)}))

    async def batch(self, version: int) -> list[Any]:
        """References to the groups that made `version`."""
        names = self.ledger.batch(version)
        groups = await asyncio.to_thread(self.journal.read, names)
        if missing := [name for name in names if name not in groups]:
            raise RunError(f"step {version} cannot be done again: the journal lacks {', '.join(missing)}; its folder is damaged")
        return [ray.put(groups[name]) for name in names]

    def saved(self, version: int) -> None:
        """A checkpoint covers what was trained so far: journal and drafts keep what is still to train, and what `replay` may ask for."""
        unfinished = [entry.group_id for entry in self.ledger.open()]
        keep = self.config.learner.keep_batches
        if keep != "all":
            self.journal.prune([*unfinished, *self.reusable(), *self.ledger.trained_since(version - int(keep))])
        if self.pool is not None:
            self.pool.settle(unfinished)

    def reusable(self) -> dict[str, int]:
        """Groups that have trained and may once more, with their uses."""
        loop = self.config.loop
        return self.ledger.reusable(loop.max_staleness, loop.max_uses) if loop.reuse else {}

    def mixer(self) -> Mixer:
        """The training streams."""
        environments = self.config.environments
        return Mixer(
            {name: partial(task_source, self.config, name, "train", self.config.seed) for name in environments},
            {name: e.share for name, e in environments.items()},
            {name: Curriculum(seed=self.config.seed, floor=e.curriculum.floor) for name, e in environments.items() if e.curriculum.enabled},
        )

    async def evaluation(self, pool: Pool, label: str, version: int, count: int) -> dict[str, EvalResult]:
        """Held-out score of every environment, as an event."""
        if label != "during":
            self.phase(f"evaluating {label}", f"{count} held-out tasks of each environment")
        sources = {name: task_source(self.config, name, "eval", self.config.eval.seed) for name in self.config.environments}
        prefix = label if label != "during" else f"during{version}"

        async def keep(result: GroupResult) -> None:
            await self.keep(result, label)

        cfg = self.config.eval
        results = await evaluate(
            pool, tasks=sources, specs=self.specs, count=count, seed=cfg.seed, label=prefix, samples=cfg.samples, record=keep
        )
        scores = {name: result.to_json() for name, result in results.items()}
        self.out.emit(Event(kind="eval", data={"version": version, "label": label, "environments": scores}))
        return results

    async def keep(self, result: GroupResult, label: str) -> None:
        """Every rollout goes to the store, and what may train to the journal first; the tokens come by reference."""
        group = await result.ref
        if label == "train":
            await asyncio.to_thread(self.journal.append, group)
        await asyncio.to_thread(self.store.add_groups, [group], label, None)

    def audited(self, pool: Pool) -> RolloutWorkers:
        """The engines, with honeypots among their tasks and the audit's gate behind them where the config asks for one."""
        if self.config.audit.gate == "off" and not self.config.audit.honeypots:
            return pool
        return AuditedWorkers(pool, self.config, fetch=as_future, own=ray.put, keep=self.keep, note=self.note)

    async def interruptible(self, work: Any) -> Any:
        """The result of `work`, or None if the run is asked to stop before it is there."""
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self.stop.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            return await task if task.done() else None
        finally:
            for future in (task, stop):
                future.cancel()
            await asyncio.gather(task, stop, return_exceptions=True)

    def stop_signals(self, loop: asyncio.AbstractEventLoop) -> None:
        """The first Ctrl-C or SIGTERM ends the run after its step, with a checkpoint; the second one at once."""
        me = asyncio.current_task()
        assert me is not None

        def on_signal() -> None:
            if self.stop.is_set():
                me.cancel("stopped by a second signal")
                return
            self.stop.set()
            self.out.emit(Event(kind="note", data={"text": "stopping: the current step ends and is saved; once more to stop at once"}))

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)

    def note(self, text: str) -> None:
        self.out.emit(Event(kind="note", data={"text": text}))

    def phase(self, name: str, detail: str) -> None:
        self.out.emit(Event(kind="phase", data={"name": name, "detail": detail}))


class Watch:
    """Records what the loop does, and evaluates beside training every `eval.every` steps."""

    def __init__(self, run: Run, pool: Pool) -> None:
        self._run, self._pool = run, pool
        self._during: asyncio.Task[Any] | None = None

    async def group(self, result: GroupResult) -> None:
        await self._run.keep(result, "train")

    def note(self, text: str) -> None:
        self._run.note(text)

    async def step(self, step: int, version: int, metrics: dict[str, float]) -> None:
        self._run.out.emit(Event(kind="step", data={"version": version, "metrics": metrics}))
        cfg = self._run.config
        if cfg.eval.every and step % cfg.eval.every == 0 and step < cfg.loop.steps:
            await self.settle()
            self._during = asyncio.create_task(self._run.evaluation(self._pool, "during", version, cfg.eval.every_tasks))

    async def settle(self) -> None:
        """Wait for the evaluation that runs beside training."""
        if self._during is not None:
            await self._during
            self._during = None


def episode_spec(env: EnvironmentConfig, num_workers: int = 1) -> EpisodeSpec:
    """What each of the rollout workers needs to know of one environment's episodes."""
    return EpisodeSpec(
        group_size=env.group_size,
        sampling=SamplingParams(max_tokens=env.max_tokens, temperature=env.temperature),
        max_turns=env.max_turns,
        max_total_tokens=env.max_total_tokens,
        timeout_s=env.timeout_s,
        concurrency=math.ceil(env.concurrency / num_workers),
        thinking_budget=env.thinking_budget,
    )


def task_source(config: RunConfig, name: str, split: str, seed: int, start: int = 0) -> Iterator[Task]:
    """The tasks of one environment, from a position on."""
    env = config.environments[name]
    env_class, options = resolve(env.id or name), task_options(config, env)

    def source(position: int) -> Iterator[Task]:
        if split == "train" and env.curriculum.enabled and env.curriculum.levels:
            return leveled_tasks(env_class, split, seed, options, env.curriculum.levels, start=position)
        return env_class.tasks(split, seed, options, start=position)

    return guarded(source, name, split, start)


def task_options(config: RunConfig, env: EnvironmentConfig) -> dict[str, Any]:
    """The environment's knobs, the tokenizer that prompts of a token length are measured with, and where references run."""
    return {"tokenizer": config.model.path, "sandbox": config.sandbox, **env.options}


def explain(error: BaseException) -> str:
    """The sentence of the first cause in a group of errors."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, (RunError, TooManyBadSteps, AllBroken)):
        return str(error)
    if isinstance(error, (KeyboardInterrupt, asyncio.CancelledError)):
        return "stopped at once"
    return f"{type(error).__name__}: {error}"
