"""Pool: all engines and environment hosts of a run.

    run_group     --> the worker with the fewest groups under way
    load_weights  --> every worker at once; returns when each has proved that it samples from the new weights

A worker that dies is restarted, loads the newest weights before it serves, and its groups start again: a half-finished group is
never used. The pool owns the references to finished groups, so they outlive the worker that made them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, TaskCancelledError

from environments.host_actor import EnvLimits, HostActor
from environments.plugin_files import absolute
from rl_core.config import RunConfig
from rl_core.process_env import cpu_environment
from rl_core.seams import GroupResult, Ref
from rl_core.types import EpisodeSpec, Receipt, Task
from rollout_workers.engine import EngineError
from rollout_workers.worker import RolloutWorker

T = TypeVar("T")
log = logging.getLogger(__name__)

START_TIMEOUT_S = 600.0
"""An engine of a large model loads for minutes; a small one on a busy laptop for one."""
PUBLISH_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 30.0

CALLS_PER_HOST = 10_000
"""Calls that one host may hold: those that wait are coroutines, so the number is only a backstop."""

MAX_RESTARTS = 5
"""Restarts of one worker within a run, after which its death is the run's."""

DEATHS = (RayActorError, EngineError)


class PoolError(RuntimeError):
    """The workers cannot go on. The message is a sentence for the run's user."""


@dataclass(slots=True)
class Place:
    """A worker's place in the pool; the actor in it may be replaced."""

    name: str
    actor: Any = None
    busy: int = 0  # groups under way
    restarts: int = 0
    control: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the worker starts or loads weights, so that a restart and a publication cannot overtake each other."""


class Pool:
    """Implements `rl_core.seams.RolloutWorkers`. Create it with `await Pool.start(...)`; end it with `await aclose()`."""

    def __init__(self, config: RunConfig, run_dir: Path | None) -> None:
        self.config = config
        self.latest: tuple[int, Ref] | None = None
        """The newest weights that were published: what a restarted worker loads first."""
        self._run_dir = run_dir
        self._hosts: list[Any] = []
        self._places = [Place(name=f"w{i}") for i in range(config.rollout.num_workers)]

    @staticmethod
    async def start(config: RunConfig, *, run_dir: Path | None = None) -> Pool:
        """Start hosts and workers; returns when every engine is warm. What has started is stopped if one of them fails."""
        pool = Pool(config, run_dir)
        try:
            pool._start_hosts()
            await asyncio.gather(*(pool._start_worker(place) for place in pool._places))
        except BaseException:
            await pool.aclose()
            raise
        return pool

    async def run_group(self, group_id: str, task: Task, spec: EpisodeSpec) -> GroupResult:
        """Roll out one group, on another worker from the start if its own dies."""
        settings = self.config.environments[task.env]
        options = {"tokenizer": self.config.model.path, **settings.options}
        while True:
            place = min(self._places, key=lambda p: p.busy)
            actor = place.actor
            place.busy += 1
            try:
                return await self._on(actor, group_id, task, spec, absolute(settings.id or task.env), options)
            except DEATHS as death:
                log.warning("worker %s died while it ran group %s: %s", place.name, group_id, death)
                await self._revive(place, actor, death)
            finally:
                place.busy -= 1

    async def load_weights(self, version: int, weights: Ref) -> Sequence[Receipt]:
        """Publish `weights` (a reference to a safetensors blob) to every engine."""
        self.latest = (version, weights)
        return list(await asyncio.gather(*(self._publish(place, version, weights) for place in self._places)))

    async def aclose(self) -> None:
        """End everything that this pool started."""
        actors = [place.actor for place in self._places if place.actor is not None]
        stops = [asyncio.ensure_future(as_future(actor.shutdown.remote())) for actor in actors]
        if stops:
            _, late = await asyncio.wait(stops, timeout=STOP_TIMEOUT_S)
            for stop in late:
                stop.cancel()
            await asyncio.gather(*stops, return_exceptions=True)  # a dead worker's engine has ended with it
        for actor in [*actors, *self._hosts]:
            ray.kill(actor)
        for place in self._places:
            place.actor = None
        self._hosts = []

    def _start_hosts(self) -> None:
        rollout = self.config.rollout
        limits = {
            name: EnvLimits(calls=rollout.env_threads, call_timeout_s=env.call_timeout_s, episode_timeout_s=env.timeout_s)
            for name, env in self.config.environments.items()
        }
        host = ray.remote(HostActor).options(  # type: ignore[attr-defined]
            num_cpus=0,
            max_concurrency=CALLS_PER_HOST,
            max_restarts=-1,
            max_task_retries=1,  # a call that waits when its host is replaced is served by the next process
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
        )
        memory = int(rollout.env_host_memory_gib * 2**30)
        self._hosts = [host.remote(self.config.sandbox, limits, memory_bytes=memory, own_process=True) for _ in range(rollout.env_hosts)]

    async def _start_worker(self, place: Place) -> Any:
        """A warm worker in `place`, under the newest weights; returns the receipt if there were any to load."""
        config, rollout = self.config, self.config.rollout
        concurrency = 4096  # calls of an async actor are tasks, not threads: the worker's own semaphores bound the work
        # Where Ray counts GPUs, the engine gets one; on CPU it declares its threads.
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        actor = ray.remote(RolloutWorker).options(  # type: ignore[attr-defined]
            num_cpus=0 if gpus else rollout.num_threads,
            num_gpus=gpus,
            max_concurrency=concurrency,
            runtime_env={"env_vars": cpu_environment(rollout.num_threads)},
        )
        log_path = str(self._run_dir.absolute() / "logs" / f"{place.name}.log") if self._run_dir else ""
        seed = config.seed * 1009 + 31 * int(place.name[1:]) + place.restarts
        place.actor = actor.remote(
            place.name,
            model_path=config.model.path,
            dtype=config.model.dtype,
            rollout=rollout,
            seed=seed,
            hosts=self._hosts,
            log_path=log_path,
        )
        await bounded(place.actor.start.remote(), START_TIMEOUT_S, f"worker {place.name} did not start within {START_TIMEOUT_S:.0f} s")
        if self.latest is None:
            return None
        return await self._load(place, *self.latest)

    async def _publish(self, place: Place, version: int, weights: Ref) -> Receipt:
        async with place.control:
            try:
                return await self._load(place, version, weights)
            except DEATHS as death:
                log.warning("worker %s died while it loaded version %d: %s", place.name, version, death)
                receipt: Receipt = await self._restart(place, death)
                return receipt

    async def _load(self, place: Place, version: int, weights: Ref) -> Receipt:
        sentence = f"worker {place.name} did not load version {version} within {PUBLISH_TIMEOUT_S:.0f} s"
        receipt: Receipt = await bounded(place.actor.load_weights.remote(version, weights), PUBLISH_TIMEOUT_S, sentence)
        return receipt

    async def _revive(self, place: Place, dead: Any, death: BaseException) -> None:
        """Restart the worker in `place`, unless somebody has done so since `dead` was seen dead."""
        async with place.control:
            if place.actor is dead:
                await self._restart(place, death)

    async def _restart(self, place: Place, death: BaseException) -> Any:
        while True:
            place.restarts += 1
            if place.restarts > MAX_RESTARTS:
                raise PoolError(f"worker {place.name} died {place.restarts} times; the last time: {death}") from death
            ray.kill(place.actor)
            try:
                return await self._start_worker(place)
            except DEATHS as again:
                death = again

    async def _on(self, actor: Any, group_id: str, task: Task, spec: EpisodeSpec, env_id: str, options: dict[str, Any]) -> GroupResult:
        """One group on one worker. Giving up the wait gives up the work."""
        group, summary = actor.run_group.options(num_returns=2).remote(group_id, task, spec, env_id, options)
        try:
            result: GroupResult = await summary
        except asyncio.CancelledError:
            ray.cancel(summary)
            raise
        except TaskCancelledError as error:
            raise asyncio.CancelledError(f"group {group_id} was cancelled") from error
        return replace(result, ref=group)


async def as_future(ref: Any) -> Any:
    """An object reference as a coroutine."""
    return await ref


async def bounded(ref: Awaitable[T], seconds: float, sentence: str) -> T:
    """The value behind a reference, or PoolError with `sentence`."""
    try:
        return await asyncio.wait_for(as_future(ref), seconds)
    except TimeoutError:
        raise PoolError(sentence) from None
