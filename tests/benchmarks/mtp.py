"""What drafting with the MTP head is worth on the shipped seed policy: generated tokens/s with drafts over none.

    speedup_batch_1|4|16|64        k = 4, for which the head was trained, over an engine without drafts, with so many sequences at a time
    speedup_two_batch_N            k = 2 over none
    control_batch_N                a second engine without drafts over the first: how far apart equal engines are here
    auto_over_on|two_batch_N       choosing k, from 0 to 4, over k = 4 and k = 2
    auto_over_best_batch_N         the same over the best of on, two, zero and off
    auto_k_worst                   the smallest of their medians
    tokens_per_s_<name>_batch_N    of the same prompts, in turns
    tokens_per_step_<name>_batch_N     generated tokens per sequence and forward pass of the policy, that of the prompt included
    drafts_per_step_<name>_batch_N     a little less than k, since prompts count as passes
    acceptance_<name>_<j>          accepted over proposed, of j-th drafts

Prompts are first turns of math, code and tools, of 15 to 105 tokens: what is measured is generation, and not how fast the 4,000 tokens
of a document are read, to which drafts add nothing. Answers are sampled at temperature 1 and are as long as the policy likes, some 14
tokens on average.

Two engines that do the same stay some percent apart for as long as they live, whatever the number of repetitions: by where their
memory lies, it seems. So one engine drafts: it is held at 0, 2 and 4 drafts in every step (zero, two, on), and chooses (auto), in turns.
Turns are short and many, since others share the machine: its speed wanders on all scales of time, so what is far apart in time compares
badly. Most are spent where the answer is closest, on the choice among numbers of drafts.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Sequence
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
Figures = dict[str, list[float]]

ROOT = Path(__file__).parents[2]
SEED_MODEL = ROOT / "configs" / "models" / "seed"
BATCHES = (1, 4, 16, 64)
ANSWERS = {1: 6, 4: 16, 16: 48, 64: 192}
"""Per turn."""
LEARNS = {1: 300, 4: 800, 16: 1600, 64: 4096}
"""Answers from which the engine learns to choose before it is measured: 300 steps at 64 sequences, some 1,400 of one."""
ENVIRONMENTS = ("math", "code", "tools")
ENGINES = {
    "off": {"speculative_tokens": 0},
    "control": {"speculative_tokens": 0},
    "drafting": {"speculative_tokens": 4, "auto_k": True},
}
HELD = {"zero": 0, "two": 2, "on": 4, "auto": None}
"""How the drafting engine goes about it."""
DRAFTS = ("off", "control", "zero", "two", "on")
"""What is compared for the worth of drafts, REPETITIONS times."""
CHOICES = ("two", "on", "auto")
"""What is compared for that of choosing, CHOSEN times."""
REPETITIONS = {1: 45, 4: 40, 16: 24, 64: 16}
CHOSEN = {1: 480, 4: 480, 16: 200, 64: 90}


def bench() -> Figures:
    return asyncio.run(measure())


async def measure() -> Figures:
    chat = ChatML(SEED_MODEL)
    engines = {name: await start(name, chat) for name in ENGINES}
    figures: Figures = {}
    chosen: dict[str, list[Completion]] = defaultdict(list)
    try:
        prompts = first_turns(chat)
        for batch in BATCHES:
            found, answers = await compare(engines, prompts, batch)
            for name, values in found.items():
                figures[f"{name}_batch_{batch}"] = values
                print(f"{name}_batch_{batch}: {median(values):.3f}", file=sys.stderr, flush=True)
            for name in CHOICES:
                chosen[name] += answers[name]
    finally:
        for engine in engines.values():
            await engine.aclose()
    # Not the worst of each repetition: the smallest of four ratios that are each a few percent off is below 1 for equal engines, too.
    figures["auto_k_worst"] = [min(median(figures[f"auto_over_best_batch_{batch}"]) for batch in BATCHES)]
    for name in CHOICES:
        for j, (drafted, accepted) in enumerate(add_positions(c.positions for c in chosen[name]), 1):
            figures[f"acceptance_{name}_{j}"] = [accepted / drafted]
    return figures


async def compare(engines: dict[str, Engine], prompts: Iterator[list[int]], batch: int) -> tuple[Figures, dict[str, list[Completion]]]:
    """Figures with so many sequences at a time, and the answers of CHOICES."""
    worth, _ = await in_turns(engines, DRAFTS, prompts, batch, REPETITIONS[batch])
    drafting = engines["drafting"]
    await drafting.hold_drafts(None)
    await answer(drafting, [next(prompts) for _ in range(LEARNS[batch])], batch)
    choice, answers = await in_turns(engines, CHOICES, prompts, batch, CHOSEN[batch])

    figures = {f"tokens_per_s_{name}": values for name, values in (choice | worth).items()}
    for name, completions in answers.items():
        passes = sum(c.engine_steps for c in completions)
        figures[f"tokens_per_step_{name}"] = [sum(len(c.token_ids) for c in completions) / passes]
        figures[f"drafts_per_step_{name}"] = [sum(c.drafted for c in completions) / passes]
    figures["control"] = ratio(worth["control"], worth["off"])
    figures["speedup"], figures["speedup_two"] = ratio(worth["on"], worth["off"]), ratio(worth["two"], worth["off"])
    over = {name: ratio(choice["auto"], choice[name]) for name in ("on", "two")}
    undrafted = max(median(ratio(worth[name], worth["on"])) for name in ("off", "zero"))
    over_undrafted = [value / undrafted for value in over["on"]]
    figures |= {f"auto_over_{name}": values for name, values in over.items()}
    figures["auto_over_best"] = min((*over.values(), over_undrafted), key=median)
    return figures, answers


async def in_turns(
    engines: dict[str, Engine], names: Sequence[str], prompts: Iterator[list[int]], batch: int, repetitions: int
) -> tuple[Figures, dict[str, list[Completion]]]:
    """Tokens per second of each, and its answers. Every round has the same prompts for all."""
    loop = asyncio.get_running_loop()
    rounds = {name: itertools.count() for name in names}
    asked: list[list[list[int]]] = []
    done: dict[str, list[Completion]] = {name: [] for name in names}

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
            return sum(len(c.token_ids) for c in answers) / seconds

        return measured

    return await asyncio.to_thread(interleaved, {name: turn(name) for name in names}, repetitions), done


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
