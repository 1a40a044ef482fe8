"""An engine of attention alone: a group's prompt is computed once, and never found again after an update, even one in flight."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from learner.model import PolicyModel
from rl_core.config import RolloutConfig
from rl_core.seal import seal
from rl_core.types import Completion, SamplingParams
from rollout_workers.engine import CACHED_BLOCK, Engine
from tests.integration.learner_scenarios import VOCAB, make_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROLLOUT = RolloutConfig(max_num_seqs=8, max_model_len=512, max_batched_tokens=512, speculative_tokens=0, kv_cache_gib=0.25)
LENGTH = 3 * CACHED_BLOCK + 5
MAX_ERROR = 1e-4  # nats; old states are off by a tenth


def errors(model: PolicyModel, completion: Completion) -> np.ndarray[Any, Any]:
    """[T] |engine - learner| in nats."""
    ids = torch.from_numpy(np.concatenate([completion.prompt_ids, completion.token_ids]).astype(np.int64))[None]
    start = len(completion.prompt_ids)
    with torch.no_grad():
        logprobs = model.token_logprobs(model(ids)[0, start - 1 : -1], ids[0, start:])[0]
    return np.abs(logprobs.numpy() - completion.logprobs)


def watch(engine: Engine) -> list[int]:
    """Cached tokens of each request, as they end."""
    cached: list[int] = []
    generate = engine._llm.generate

    async def watched(*args: Any) -> AsyncIterator[Any]:
        async for output in generate(*args):
            if output.finished:
                cached.append(output.num_cached_tokens)
            yield output

    engine._llm.generate = watched
    return cached


async def test_a_groups_prompt_is_computed_once_and_forgotten_with_the_weights(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "llama")
    model = PolicyModel.from_pretrained(folder)
    prompt = np.random.default_rng(1).integers(4, VOCAB, LENGTH).tolist()
    engine = await Engine.start(name="w0", model_path=str(folder), dtype="float32", rollout=ROLLOUT, stop_ids=[])
    try:
        cached = watch(engine)

        async def sample(name: str, count: int, tokens: int = 24) -> list[Completion]:
            params = SamplingParams(max_tokens=tokens)
            return await asyncio.gather(*(engine.sample(prompt, params, request_id=f"{name}-{i}") for i in range(count)))

        first, *_ = await sample("first", 1)
        siblings = await sample("sibling", 7)
        assert cached == [0] + [LENGTH - LENGTH % CACHED_BLOCK] * 7
        assert max(errors(model, c).max() for c in (first, *siblings)) < MAX_ERROR

        running = asyncio.ensure_future(sample("running", 3, 300))
        while not any(name.startswith("running") for name in engine._began) or len(engine.under_way({"running-0": 0})) == 0:
            await asyncio.sleep(0.01)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        blob = safetensors.torch.save({name: tensor.contiguous().clone() for name, tensor in model.engine_state().items()})
        receipt = await engine.load_weights(1, seal(np.frombuffer(blob, np.uint8), 1))
        assert not running.done(), "the update met nothing in flight; make the running sequences longer"
        assert max(errors(model, c).max() for c in receipt.probe) < MAX_ERROR
        cached.clear()
        new = [*await sample("new", 1), *await sample("newer", 3)]
        assert cached[:4] == [0] + [LENGTH - LENGTH % CACHED_BLOCK] * 3
        assert max(errors(model, c).max() for c in new) < MAX_ERROR

        old = await running
        assert all([s.version for s in c.spans] == [0, 1] for c in old)
        assert max(errors(model, c)[: c.spans[0].stop].max() for c in old) > 100 * MAX_ERROR, "the update is too small to be seen"
        again = await sample("again", 4)  # and what they left behind is found by nobody
        assert max(errors(model, c).max() for c in again) < MAX_ERROR
    finally:
        await engine.aclose()
