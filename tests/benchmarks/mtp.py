"""What drafting with the MTP head is worth on the shipped seed policy: generated tokens/s with k drafts per step over none.

    speedup_batch_1|4|16|64      k = 2, as in the quickstart, over k = 0, with so many sequences at a time
    tokens_per_s_k0|k2_batch_N   of the same prompts, in turns
    acceptance, tokens_per_step  accepted over drafted tokens, and tokens per sequence and engine step, at k = 2

Prompts are those of the four environments' first turns, in equal parts; answers are sampled at temperature 1.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

from omegaconf import OmegaConf

from environments.registry import resolve
from infra.bench import interleaved, ratio
from rl_core.chat import ChatML
from rl_core.config import RolloutConfig
from rl_core.types import SamplingParams
from rollout_workers.engine import Engine

ROOT = Path(__file__).parents[2]
SEED_MODEL = ROOT / "configs" / "models" / "seed"
BATCHES = (1, 4, 16, 64)
ANSWERS = {1: 12, 4: 32, 16: 96, 64: 192}  # per repetition
DRAFTS = 2
REPETITIONS = 3


def bench() -> dict[str, list[float]]:
    return asyncio.run(measure())


async def measure() -> dict[str, list[float]]:
    chat = ChatML(SEED_MODEL)
    prompts = first_turns(chat)
    engines = {k: await start(k, chat) for k in (0, DRAFTS)}
    figures: dict[str, list[float]] = {"acceptance": [], "tokens_per_step": []}
    numbers = itertools.count()

    async def tokens_per_s(k: int, batch: int) -> float:
        """`batch` askers, each with one question at a time."""
        asked = iter([next(prompts) for _ in range(ANSWERS[batch])])
        done = []

        async def ask() -> None:
            for prompt in asked:
                done.append(await engines[k].sample(prompt, SamplingParams(max_tokens=64), request_id=f"bench-{next(numbers)}"))

        began = time.perf_counter()
        await asyncio.gather(*(ask() for _ in range(batch)))
        seconds = time.perf_counter() - began
        if k:
            figures["acceptance"].append(sum(c.accepted for c in done) / max(sum(c.drafted for c in done), 1))
            figures["tokens_per_step"].append(sum(len(c.token_ids) for c in done) / sum(c.engine_steps for c in done))
        return sum(len(c.token_ids) for c in done) / seconds

    loop = asyncio.get_running_loop()
    try:
        for batch in BATCHES:

            def turn(k: int, batch: int = batch) -> float:
                return asyncio.run_coroutine_threadsafe(tokens_per_s(k, batch), loop).result()

            measured = await asyncio.to_thread(interleaved, {"k0": lambda: turn(0), f"k{DRAFTS}": lambda: turn(DRAFTS)}, REPETITIONS)
            figures |= {f"tokens_per_s_{name}_batch_{batch}": values for name, values in measured.items()}
            figures[f"speedup_batch_{batch}"] = ratio(measured[f"k{DRAFTS}"], measured["k0"])
    finally:
        for engine in engines.values():
            engine.shutdown()
    return figures


async def start(k: int, chat: ChatML) -> Engine:
    rollout = RolloutConfig(max_num_seqs=64, max_model_len=4608, speculative_tokens=k, kv_cache_gib=0.5)
    return await Engine.start(name=f"k{k}", model_path=str(SEED_MODEL), dtype="float32", rollout=rollout, stop_ids=chat.stop_ids)


def first_turns(chat: ChatML) -> Iterator[list[int]]:
    """Prompts of the quickstart's environments, one after the other, without end."""
    config = OmegaConf.load(ROOT / "configs" / "quickstart.yaml")
    streams = []
    for name, env in config.environments.items():
        options = {"tokenizer": str(SEED_MODEL), **OmegaConf.to_container(env.options)}  # type: ignore[dict-item]
        streams.append((resolve(name)(**options), resolve(name).tasks("train", 7, options)))
    while True:
        for env, tasks in streams:
            _, info = env.reset(options={"task": next(tasks)})
            seen = info["observation"]
            yield chat.prompt(seen.messages, seen.tools)
