"""Pool: all engines and environment hosts of a run.

    run_group     --> the worker with the fewest groups under way
    load_weights  --> every worker at once; returns when each has proved that it samples from the new weights

A worker that dies is restarted, and loads the newest weights before it serves. Its groups are taken up on another worker, or on the
new one: what it left of them in its drafts is kept or continued, the rest starts again. So do the groups that an earlier life of the
run left. The pool owns the references to finished groups, so they outlive the worker that made them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, TaskCancelledError

from environments.plugin_files import absolute
from rl_core.config import RunConfig
from rl_core.drafts import Drafts, prune, read_drafts
from rl_core.process_env import cpu_environment
from rl_core.seams import GroupResult, Ref
from rl_core.types import EpisodeSpec, Receipt, Task
from rollout_workers.engine import EngineError, WeightsMismatch
from rollout_workers.hosts import HostSet, start_hosts
from rollout_workers.rewards import RewardActors
from rollout_workers.routing import Routing
from rollout_workers.worker import Job, RolloutWorker

T = TypeVar("T")
log = logging.getLogger(__name__)

START_TIMEOUT_S = 600.0
"""An engine of a large model loads for minutes; a small one on a busy laptop for one."""
PUBLISH_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 30.0
HOST_END_S = 5.0

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
    groups: set[str] = field(default_factory=set)
    """Under way here."""
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
        self._hosts = HostSet()
        self._drafts: dict[str, Drafts] = {}
        """What an earlier life of the run left of its groups; taken out as they are taken up."""
        self._reading: dict[Any, asyncio.Future[dict[str, Drafts]]] = {}  # by dead worker
        self._reviving: set[asyncio.Future[None]] = set()
        self._revived: list[Receipt] = []
        self._rewards = RewardActors()
        self._places = {(name := f"w{i}"): Place(name=name) for i in range(config.rollout.num_workers)}
        self._routing = Routing(self._places)

    @staticmethod
    async def start(config: RunConfig, *, run_dir: Path | None = None, unfinished: Collection[str] = ()) -> Pool:
        """Start hosts and workers; returns when every engine is warm. What has started is stopped if one of them fails.

        `unfinished` are groups that an earlier life of the run left in `run_dir`.
        """
        pool = Pool(config, run_dir)
        try:
            pool._hosts = start_hosts(config)
            pool._drafts = await pool._left(unfinished)
            pool._rewards = await RewardActors.start(config)
            await asyncio.gather(*(pool._start_worker(place) for place in pool._places.values()))
        except BaseException:
            await pool.aclose()
            raise
        return pool

    async def run_group(self, group_id: str, task: Task, spec: EpisodeSpec) -> GroupResult:
        """Roll out one group, on another worker if its own dies; what was left of it goes on."""
        settings = self.config.environments[task.env]
        options = {"tokenizer": self.config.model.path, **settings.options}
        job = Job(group_id=group_id, task=task, spec=spec, env_id=absolute(settings.id or task.env), options=options)
        job = replace(job, drafts=self._young_enough(self._drafts.pop(group_id, {})))
        deaths: list[str] = []
        while True:
            place = await self._next_place()
            actor = place.actor
            place.groups.add(group_id)
            try:
                return with_history(await self._on(actor, job), job, deaths)
            except DEATHS as death:
                log.warning("worker %s died while it ran group %s: %s", place.name, group_id, death)
                deaths.append(f"worker {place.name} died")
                left = await self._left_by(place, actor)
                await self._revive(place, actor, death)
            except WeightsMismatch as error:
                raise mismatch(error) from error
            finally:
                place.groups.discard(group_id)
                self._routing.give_back(place.name)
            job = replace(job, drafts=self._young_enough(left.get(group_id, {})))

    def settle(self, unfinished: Collection[str]) -> None:
        """Forget the drafts of all groups but these."""
        if self._run_dir is not None:
            prune(self._run_dir / "drafts", unfinished)

    async def _left(self, groups: Collection[str]) -> dict[str, Drafts]:
        """Drafts of `groups` in the run folder."""
        if self._run_dir is None or not groups:
            return {}
        return await asyncio.to_thread(read_drafts, self._run_dir / "drafts", groups)

    async def _left_by(self, place: Place, dead: Any) -> dict[str, Drafts]:
        """What the worker that died left of all the groups that it had. Read once."""
        if dead not in self._reading:
            self._reading[dead] = asyncio.ensure_future(self._left(tuple(place.groups)))
        return await asyncio.shield(self._reading[dead])

    def _young_enough(self, drafts: Drafts) -> Drafts:
        """Drafts whose tokens may still train. Admission promises that all may, since a group keeps its place in the order of start."""
        version = self.latest[0] if self.latest is not None else 0
        bound = self.config.loop.max_staleness
        return {i: d for i, d in drafts.items() if d.min_version is not None and version - d.min_version <= bound}

    async def load_weights(self, version: int, weights: Ref) -> Sequence[Receipt]:
        """Publish `weights` (a reference to a safetensors blob) to every engine."""
        self.latest = (version, weights)
        return list(await asyncio.gather(*(self._publish(place, version, weights) for place in self._places.values())))

    def revived(self) -> Sequence[Receipt]:
        receipts, self._revived = self._revived, []
        return receipts

    async def aclose(self) -> None:
        """End everything that this pool started."""
        for reviving in self._reviving:
            reviving.cancel()
        actors = [place.actor for place in self._places.values() if place.actor is not None]
        stops = [asyncio.ensure_future(as_future(actor.shutdown.remote())) for actor in actors]
        if stops:
            _, late = await asyncio.wait(stops, timeout=STOP_TIMEOUT_S)
            for stop in late:
                stop.cancel()
            await asyncio.gather(*stops, return_exceptions=True)  # a dead worker's engine has ended with it
        ends = [asyncio.ensure_future(as_future(host.end.remote())) for host in self._hosts.all]
        if ends:  # a host that hangs cannot answer; what it has left is swept away by the next host that starts on its machine
            _, late = await asyncio.wait(ends, timeout=HOST_END_S)
            for end in late:
                end.cancel()
            await asyncio.gather(*ends, return_exceptions=True)
        for actor in [*actors, *self._hosts.all]:
            ray.kill(actor)
        for place in self._places.values():
            place.actor = None
        self._hosts = HostSet()
        self._rewards.close()

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
        seed = config.seed * 1009 + 31 * int(place.name[1:]) + place.restarts
        place.actor = actor.remote(
            place.name,
            life=f"{place.name}.{place.restarts}",
            model_path=config.model.path,
            dtype=config.model.dtype,
            rollout=rollout,
            seed=seed,
            hosts=self._hosts,
            run_dir=self._run_dir.absolute() if self._run_dir is not None else None,
            rewards=(config.environments, self._rewards),
            tool_format=config.model.tool_format,
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
        """Restart the worker in `place`, unless somebody has done so since `dead` was seen dead. Waits for it if no other is up."""
        if place.actor is dead:
            self._routing.down(place.name)

        async def restart() -> None:
            async with place.control:
                if place.actor is dead:
                    await self._bring_back(place, death)

        reviving = asyncio.ensure_future(restart())
        if not self._routing.any_up():
            await reviving
            return
        self._reviving.add(reviving)  # should it fail, the next publication fails for the same reason, and ends the run
        reviving.add_done_callback(self._has_revived)

    def _has_revived(self, done: asyncio.Future[None]) -> None:
        self._reviving.discard(done)
        if not done.cancelled() and done.exception() is not None:
            log.error("a worker did not come back: %s", done.exception())

    async def _next_place(self) -> Place:
        """Of the least busy worker; starts one again if none is up."""
        while (worker := self._routing.take()) is None:
            place = next(iter(self._places.values()))
            async with place.control:
                if not self._routing.is_up(place.name):
                    await self._bring_back(place, EngineError(f"worker {place.name} is gone"))
        return self._places[worker]

    async def _bring_back(self, place: Place, death: BaseException) -> None:
        """A restart between publications: the learner has yet to see its receipt."""
        receipt = await self._restart(place, death)
        if receipt is not None:
            self._revived.append(receipt)

    async def _restart(self, place: Place, death: BaseException) -> Any:
        self._routing.down(place.name)
        while True:
            place.restarts += 1
            if place.restarts > MAX_RESTARTS:
                raise PoolError(f"worker {place.name} died {place.restarts} times; the last time: {death}") from death
            ray.kill(place.actor)
            try:
                receipt = await self._start_worker(place)
                self._routing.up(place.name)
                return receipt
            except DEATHS as again:
                death = again

    async def _on(self, actor: Any, job: Job) -> GroupResult:
        """One group on one worker. Giving up the wait gives up the work."""
        group, summary = actor.run_group.options(num_returns=2).remote(job)
        try:
            result: GroupResult = await summary
        except asyncio.CancelledError:
            ray.cancel(summary)
            raise
        except TaskCancelledError as error:
            raise asyncio.CancelledError(f"group {job.group_id} was cancelled") from error
        return replace(result, ref=group)


def with_history(result: GroupResult, job: Job, deaths: Sequence[str]) -> GroupResult:
    """`result`, and what there is to tell of earlier attempts."""
    if not deaths and not job.drafts:
        return result
    anew = job.spec.group_size - result.kept - result.continued
    became = f"{result.kept} rollouts kept, {result.continued} continued, {anew} started again"
    return replace(result, attempts=1 + len(deaths), history=f"{', '.join(deaths) or 'taken up'}: {became}")


async def as_future(ref: Any) -> Any:
    """An object reference as a coroutine."""
    return await ref


async def bounded(ref: Awaitable[T], seconds: float, sentence: str) -> T:
    """The value behind a reference, or PoolError with `sentence`."""
    try:
        return await asyncio.wait_for(as_future(ref), seconds)
    except TimeoutError:
        raise PoolError(sentence) from None
    except WeightsMismatch as error:
        raise mismatch(error) from error


def mismatch(error: WeightsMismatch) -> PoolError:
    """Not a death, after which a worker is started again: it would be given the same bytes."""
    return PoolError(str(getattr(error, "cause", error)))
