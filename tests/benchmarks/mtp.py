"""What drafting with the MTP head is worth on the shipped seed policy: generated tokens/s with drafts over none.

    speedup_batch_1|4|16|64        k = 4, for which the head was trained, over an engine without drafts, with so many sequences at a time
    speedup_two_batch_N            k = 2 over none
    auto_over_best_batch_N         choosing k, from 0 to 4, over that one of off, zero, two and on whose median is best
    auto_k_worst                   the smallest of their medians
    control_batch_N                a second engine without drafts over the first: how far apart equal engines are here
    tokens_per_s_<engine>_batch_N  of the same prompts, in turns
    tokens_per_step_<engine>_batch_N   generated tokens per sequence and forward pass of the policy, that of the prompt included
    drafts_per_step_<engine>_batch_N   a little less than k, since prompts count as passes
    acceptance_<engine>_<j>        accepted over proposed, of j-th drafts

Prompts are first turns of math, code and tools, of 15 to 105 tokens: what is measured is generation, and not how fast the 4,000 tokens
of a document are read, to which drafts add nothing. Answers are sampled at temperature 1 and are as long as the policy likes, some 14
tokens on average.

Two engines that do the same stay some percent apart for as long as they live, whatever the number of repetitions: by where their
memory lies, it seems. So one engine drafts: it is held at 0, 2 and 4 drafts in every step (zero, two, on), and chooses (auto), in turns.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from omegaconf import OmegaConf

from environments.registry import resolve
from infra.bench import interleaved, ratio
from rl_core.chat import ChatML
from rl_core.config import RolloutConfig
from rl_core.types import Completion, SamplingParams, add_positions
from rollout_workers.engine import Engine

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
SEED_MODEL = ROOT / "configs" / "models" / "seed"
BATCHES = (1, 4, 16, 64)
ANSWERS = {1: 6, 4: 16, 16: 48, 64: 192}
"""Per turn. Turns are short and many: others share the machine, whose speed wanders on all scales of time, so what is far apart in time
compares badly."""
LEARNS = {1: 96, 4: 192, 16: 512, 64: 1024}
"""Answers from which the engine learns to choose before it is measured: 70 steps at 64 sequences, some 400 of one."""
ENVIRONMENTS = ("math", "code", "tools")
ENGINES = {
    "off": {"speculative_tokens": 0},
    "control": {"speculative_tokens": 0},
    "drafting": {"speculative_tokens": 4, "auto_k": True},
}
HELD = {"zero": 0, "two": 2, "on": 4, "auto": None}
"""How the drafting engine goes about it."""
NAMES = ("off", "control", *HELD)
REPETITIONS = {1: 45, 4: 40, 16: 40, 64: 24}


def bench() -> dict[str, list[float]]:
    return asyncio.run(measure())


async def measure() -> dict[str, list[float]]:
    chat = ChatML(SEED_MODEL)
    engines = {name: await start(name, chat) for name in ENGINES}
    figures: dict[str, list[float]] = {}
    done: dict[str, list[Completion]] = defaultdict(list)
    try:
        prompts = first_turns(chat)
        for batch in BATCHES:
            await engines["drafting"].hold_drafts(None)
            await answer(engines["drafting"], [next(prompts) for _ in range(LEARNS[batch])], batch)
            figures |= await compare(engines, prompts, batch, f"_batch_{batch}", done)
    finally:
        for engine in engines.values():
            await engine.aclose()
    # Not the worst of each repetition: the smallest of four ratios that are each a few percent off is below 1 for equal engines, too.
    figures["auto_k_worst"] = [min(median(figures[f"auto_over_best_batch_{batch}"]) for batch in BATCHES)]
    for name in ("two", "on", "auto"):
        for j, (drafted, accepted) in enumerate(add_positions(c.positions for c in done[name]), 1):
            figures[f"acceptance_{name}_{j}"] = [accepted / drafted]
    return figures


async def compare(
    engines: dict[str, Engine], prompts: Iterator[list[int]], batch: int, suffix: str, done: dict[str, list[Completion]]
) -> dict[str, list[float]]:
    """All in turns, each round with the same prompts for all."""
    loop = asyncio.get_running_loop()
    rounds = {name: itertools.count() for name in NAMES}
    asked: list[list[list[int]]] = []
    steps: dict[str, list[float]] = defaultdict(list)

    def wait_for(work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    def turn(name: str) -> Callable[[], float]:
        def measured() -> float:
            number = next(rounds[name])
            if number == len(asked):
                asked.append([next(prompts) for _ in range(ANSWERS[batch])])
            engine = engines.get(name, engines["drafting"])
            if name in HELD:
                wait_for(engine.hold_drafts(HELD[name]))
            began = time.perf_counter()
            answers = wait_for(answer(engine, asked[number], batch))
            seconds = time.perf_counter() - began
            done[name] += answers
            tokens, passes = sum(len(c.token_ids) for c in answers), sum(c.engine_steps for c in answers)
            steps[f"tokens_per_step_{name}"].append(tokens / passes)
            steps[f"drafts_per_step_{name}"].append(sum(c.drafted for c in answers) / passes)
            return tokens / seconds

        return measured

    rates = await asyncio.to_thread(interleaved, {name: turn(name) for name in NAMES}, REPETITIONS[batch])
    best = max((rates[name] for name in ("off", "zero", "two", "on")), key=median)
    return {
        **{f"tokens_per_s_{name}{suffix}": values for name, values in rates.items()},
        **{f"{figure}{suffix}": values for figure, values in steps.items() if not figure.endswith(("_off", "_control", "_zero"))},
        f"control{suffix}": ratio(rates["control"], rates["off"]),
        f"speedup{suffix}": ratio(rates["on"], rates["off"]),
        f"speedup_two{suffix}": ratio(rates["two"], rates["off"]),
        f"auto_over_best{suffix}": ratio(rates["auto"], best),
    }


async def answer(engine: Engine, prompts: list[list[int]], batch: int) -> list[Completion]:
    """`batch` askers, each with one question at a time."""
    left, done = iter(prompts), []

    async def ask(number: int) -> None:
        for prompt in left:
            name = f"bench-{time.monotonic_ns()}-{number}"
            done.append(await engine.sample(prompt, SamplingParams(max_tokens=64), request_id=name))

    await asyncio.gather(*(ask(number) for number in range(batch)))
    return done


async def start(name: str, chat: ChatML) -> Engine:
    rollout = RolloutConfig(max_num_seqs=64, max_model_len=512, kv_cache_gib=0.25, **ENGINES[name])  # type: ignore[arg-type]
    return await Engine.start(name=name, model_path=str(SEED_MODEL), dtype="float32", rollout=rollout, stop_ids=chat.stop_ids)


def first_turns(chat: ChatML) -> Iterator[list[int]]:
    """Prompts of the quickstart's short environments, one after the other, without end."""
    config = OmegaConf.load(ROOT / "configs" / "quickstart.yaml")
    streams = []
    for name in ENVIRONMENTS:
        options = OmegaConf.to_container(config.environments[name].options)
        streams.append((resolve(name)(**options), resolve(name).tasks("train", 7, options)))
    while True:
        for env, tasks in streams:
            _, info = env.reset(options={"task": next(tasks)})
            seen = info["observation"]
            yield chat.prompt(seen.messages, seen.tools)
