"""A model without Mamba, experts or MTP in the engine: sampled, its logprobs recomputed by the learner, new weights loaded.

One more engine costs some twenty seconds, so this runs when asked for: POLYRL_TEST_MODELS=1 for a random Llama, or
POLYRL_TEST_MODELS=FOLDER for any checkpoint folder.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from learner.model import PolicyModel
from rl_core.chat import ChatML
from rl_core.config import RolloutConfig
from rl_core.seal import seal
from rl_core.types import Completion, Message, SamplingParams
from rollout_workers.engine import Engine
from tests.integration.learner_scenarios import make_tiny_llama

ASKED = os.environ.get("POLYRL_TEST_MODELS", "")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.skipif(not ASKED, reason="set POLYRL_TEST_MODELS")]
ROLLOUT = RolloutConfig(max_num_seqs=8, max_model_len=256, max_batched_tokens=512, speculative_tokens=0, kv_cache_gib=0.25)


def error(model: PolicyModel, completion: Completion) -> float:
    """Largest |engine - learner| in nats."""
    ids = torch.from_numpy(np.concatenate([completion.prompt_ids, completion.token_ids]).astype(np.int64))[None]
    start = len(completion.prompt_ids)
    with torch.no_grad():
        logprobs = model.token_logprobs(model(ids)[0, start - 1 : -1], ids[0, start:])[0]
    return float(np.abs(logprobs.numpy() - completion.logprobs).max())


async def test_engine_and_learner_agree_before_and_after_new_weights(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "llama") if ASKED == "1" else Path(ASKED)
    prompt = list(range(4, 20)) if ASKED == "1" else ChatML(folder).prompt([Message(role="user", content="What is 12+7?")])
    model = PolicyModel.from_pretrained(folder)
    engine = await Engine.start(name="w0", model_path=str(folder), dtype="float32", rollout=ROLLOUT, stop_ids=[2])
    try:
        params = SamplingParams(max_tokens=40)
        for completion in await asyncio.gather(*(engine.sample(prompt, params, request_id=f"before-{i}") for i in range(8))):
            assert error(model, completion) < 1e-3
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.02)
        blob = safetensors.torch.save({name: tensor.contiguous().clone() for name, tensor in model.engine_state().items()})
        receipt = await engine.load_weights(1, seal(np.frombuffer(blob, np.uint8), 1))
        assert max(error(model, completion) for completion in receipt.probe) < 1e-3
        after = await engine.sample(prompt, params, request_id="after")
        assert error(model, after) < 1e-3
        assert {span.version for span in after.spans} == {1}
    finally:
        await engine.aclose()
