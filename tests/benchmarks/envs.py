"""What an environment host costs and carries: the oracle as the policy, the host as the Ray actor that it is in a run.

host_overhead_ms             one step of a remote episode, less the environment's own part of it; one call at a time
host_overhead_ms_64_callers  the same with 64 episodes at once, per call
ray_call_ms                  what a call of any Ray actor takes, which is part of both
episodes_per_s_<env>         whole episodes through run_episode, 32 at a time; oracle and tokenizer run on the same cores
prompt_ms_long_context_32k   building one prompt of 32,768 tokens of the seed policy's tokenizer; also with 1,500 records
resident_mib_empty, resident_mib_1000_episodes   of the host: before, and with 1,000 episodes of several turns under way
resident_mib_after_wave_<n>  after they have all ended, three times over; memory is flat if the last two are alike
threads_1000_episodes        of the host, with all of them under way
open_after_cancel            episodes that 1,000 cancelled ones have left behind in the host
files_after_cancel           open files and sockets of the host that they have left behind
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from typing import Any

import ray

from environments.host_actor import HostActor
from environments.registry import resolve
from environments.scripted import OracleEpisode
from infra.ray_cluster import start_local
from rl_core.chat import ChatML
from rl_core.types import EpisodeSpec, Rollout, SamplingParams, Task, Turn
from rollout_workers.episode import run_episode
from rollout_workers.hosts import Hosts, HostSet, RemoteSession

SEED_MODEL = Path(__file__).parents[2] / "configs" / "models" / "seed"
SPEC = EpisodeSpec(group_size=1, sampling=SamplingParams(max_tokens=4096), max_turns=16, max_total_tokens=1 << 17, timeout_s=300)
EPISODES = {"code": 24}  # per repetition; each of these starts a sandbox
OPTIONS: dict[str, dict[str, Any]] = {"long_context": {"tokenizer": str(SEED_MODEL)}, "tools": {"oracle_working": 1.0}}
REPETITIONS, CONCURRENT, MANY, WAVES = 3, 32, 1000, 3
CLASSES = {env: resolve(env) for env in ("math", "code", "tools", "long_context", "instructions", "structured")}


def bench() -> dict[str, list[float]]:
    start_local(num_cpus=8, object_store_memory=1 << 28)
    try:
        return asyncio.run(measure())
    finally:
        ray.shutdown()


async def measure() -> dict[str, list[float]]:
    chat = ChatML(SEED_MODEL)
    figures: dict[str, list[float]] = {
        "prompt_ms_long_context_32k": prompt_ms(records=24),
        "prompt_ms_long_context_32k_1500_records": prompt_ms(records=1500, key_words=3),
    }
    host = start_host()
    await episodes(host, "math", chat, 64)  # warm
    for _ in range(REPETITIONS):
        for name, callers in (("host_overhead_ms", 1), ("host_overhead_ms_64_callers", 64)):
            figures.setdefault(name, []).append(await overhead_ms(host, callers=callers))
        figures.setdefault("ray_call_ms", []).append(await ray_call_ms(host))
    for env in CLASSES:
        figures[f"episodes_per_s_{env}"] = []
        await episodes(host, env, chat, 8)
        for _ in range(REPETITIONS):
            number, began = EPISODES.get(env, 192), time.perf_counter()
            await episodes(host, env, chat, number)
            figures[f"episodes_per_s_{env}"].append(number / (time.perf_counter() - began))
    ray.kill(host)
    return figures | await crowd(chat)


def start_host() -> Any:
    """As the pool does it."""
    remote = ray.remote(HostActor).options(num_cpus=0, max_concurrency=10_000, max_restarts=-1, max_task_retries=1)
    return remote.remote("auto", {}, memory_bytes=4 << 30, own_process=True)


def prompt_ms(**knobs: int) -> list[float]:
    options = {"min_tokens": 32_768, "max_tokens": 32_768, "tokenizer": str(SEED_MODEL), **knobs}
    env = CLASSES["long_context"](**options)
    found = []
    for task in islice(env.tasks("train", 1, options), 12):
        began = time.perf_counter()
        env.begin(task)
        found.append(1e3 * (time.perf_counter() - began))
    return found[2:]  # the first ones meet every filler sentence for the first time


async def overhead_ms(host: Any, *, callers: int, steps: int = 512) -> float:
    """Of one step: what its caller waited, less what the verdict says that the environment took; with many callers, per call."""
    tasks = list(islice(CLASSES["math"].tasks("train", 2), steps))
    sessions = [session(host, "math", task) for task in tasks]
    for one in sessions:
        await one.reset()
    waited, own = [], []

    async def call(mine: Iterator[RemoteSession]) -> None:
        for one in mine:
            began = time.perf_counter()
            transition = await one.step(Turn(content="12"))
            waited.append(time.perf_counter() - began)
            own.append(transition.verdict.latency_s)  # type: ignore[union-attr]

    began, shared = time.perf_counter(), iter(sessions)
    await asyncio.gather(*(call(shared) for _ in range(callers)))
    elapsed = time.perf_counter() - began
    await asyncio.gather(*(one.close() for one in sessions))
    if callers > 1:
        return 1e3 * (elapsed - sum(own)) / steps
    return 1e3 * median(w - o for w, o in zip(waited, own, strict=True))


async def ray_call_ms(host: Any, *, calls: int = 512) -> float:
    """Of a method that does nothing: what Ray alone takes."""
    waited = []
    for _ in range(calls):
        began = time.perf_counter()
        await host.ping.remote()
        waited.append(time.perf_counter() - began)
    return 1e3 * median(waited)


async def episodes(host: Any, env: str, chat: ChatML, number: int) -> list[Rollout]:
    """Play `number` episodes, CONCURRENT at a time; all must earn the full reward."""
    room = asyncio.Semaphore(CONCURRENT)

    async def one(task: Task) -> Rollout:
        async with room:
            return await episode(host, task, chat)

    tasks = islice(CLASSES[env].tasks("train", 3, OPTIONS.get(env, {})), number)
    rollouts = await asyncio.gather(*(one(task) for task in tasks))
    assert all(r.verdict.reward == 1.0 for r in rollouts), next(r.verdict for r in rollouts if r.verdict.reward != 1.0)
    return rollouts


def session(host: Any, env: str, task: Task) -> RemoteSession:
    return hosts_of(host).session(env, OPTIONS.get(env, {}), task)


@cache
def hosts_of(host: Any) -> Hosts:
    """As a worker sees it."""
    return Hosts(HostSet(shared=(host,)), owner="bench")


async def episode(host: Any, task: Task, chat: ChatML, think_s: Callable[[], float] | None = None) -> Rollout:
    oracle = CLASSES[task.env](**OPTIONS.get(task.env, {}))
    policy = OracleEpisode(session(host, task.env, task), oracle, task, chat, think_s=think_s)
    return await run_episode(task, SPEC, policy, policy, chat, "bench")


async def crowd(chat: ChatML) -> dict[str, list[float]]:
    """A thousand episodes of the tools environment at once, in a fresh host: how large it gets, and what stays of it."""
    host, rng, mib = start_host(), random.Random(0), 1 << 20
    await episodes(host, "tools", chat, CONCURRENT)
    empty = await host.status.remote()
    figures: dict[str, list[float]] = {"resident_mib_empty": [empty["resident_bytes"] / mib]}
    tasks = list(islice(CLASSES["tools"].tasks("train", 4, OPTIONS["tools"]), MANY))
    sizes, threads = [], []
    for wave in range(WAVES):
        running = [asyncio.create_task(episode(host, task, chat, think_s=lambda: rng.uniform(1.0, 4.0))) for task in tasks]
        most = 0
        while not all(r.done() for r in running):
            now = await host.status.remote()
            most = max(most, now["open"])
            sizes.append(now["resident_bytes"] / mib)
            threads.append(now["threads"])
            await asyncio.sleep(0.2)
        rollouts = [r.result() for r in running]
        assert all(r.verdict.reward == 1.0 for r in rollouts)
        assert fmean(len(r.completions) for r in rollouts) > 2, "the episodes have one turn only"
        assert most > 0.9 * MANY, f"only {most} episodes were under way at once"
        figures[f"resident_mib_after_wave_{wave + 1}"] = [(await host.status.remote())["resident_bytes"] / mib]
    figures |= {f"resident_mib_{MANY}_episodes": [max(sizes)], f"threads_{MANY}_episodes": [float(max(threads))]}
    files = (await host.status.remote())["files"]
    doomed = [asyncio.create_task(episode(host, task, chat, think_s=lambda: 120.0)) for task in tasks]
    while (await host.status.remote())["open"] < MANY:
        await asyncio.sleep(0.1)
    for one in doomed:
        one.cancel()
    await asyncio.gather(*doomed, return_exceptions=True)
    after = await host.status.remote()
    ray.kill(host)
    return figures | {"open_after_cancel": [float(after["open"])], "files_after_cancel": [float(after["files"] - files)]}
