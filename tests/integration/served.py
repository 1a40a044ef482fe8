"""A real vLLM engine with MTP on a random hybrid model, for the tests of one module, and what plain Transformers makes of the same."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from transformers import NemotronHForCausalLM

from learner.export import export
from learner.model import PolicyModel
from rl_core.config import RolloutConfig
from rl_core.seal import seal
from rl_core.thinking import Thinking
from rl_core.types import Completion, SamplingParams
from rollout_workers import engine as engines
from rollout_workers.engine import Engine, engine_arguments
from tests.integration.ties import choices_of
from tests.integration.tiny_hybrid import make_tiny_hybrid

T = TypeVar("T")
VOCAB, STOP, DRAFTS = 128, 3, 2
ROLLOUT = RolloutConfig(
    max_num_seqs=16, max_model_len=512, max_batched_tokens=1024, speculative_tokens=DRAFTS, auto_k=False, kv_cache_gib=0.25
)
BUDGET = Thinking(budget=20, open_id=10, close_id=11, inside=True)
"""As if each prompt ended with an open thought; a random model would seldom open one."""


class Served:
    """The engine, its checkpoint, and a way to await it from a test."""

    def __init__(self, model: Path) -> None:
        self.model, self.version = model, 0
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.engine = self.run(Engine.start(name="w0", model_path=str(model), dtype="float32", rollout=ROLLOUT, stop_ids=[STOP]))

    def run(self, work: Awaitable[T], seconds: float = 300.0) -> T:
        async def awaited() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(awaited(), self.loop).result(seconds)

    def sample(self, prompts: Sequence[Sequence[int]], name: str, **params: Any) -> list[Completion]:
        async def together() -> list[Completion]:
            asked = SamplingParams(**({"max_tokens": 100} | params))
            return await asyncio.gather(*(self.engine.sample(p, asked, request_id=f"{name}-{i}") for i, p in enumerate(prompts)))

        return self.run(together())

    def load(self, blob: NDArray[np.uint8]) -> Any:
        self.version += 1
        return self.run(self.engine.load_weights(self.version, seal(blob, self.version)))


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """An engine in an event loop of its own; a start costs some twenty seconds."""
    # Matrices three times their usual size: distributions are far from uniform, so that a wrong one shows.
    PolicyModel.from_pretrained(make_tiny_hybrid(folder / "original", vocab_size=VOCAB, scale=3.0)).save_pretrained(folder / "checkpoint")
    export(folder / "checkpoint", folder / "export")
    with pytest.MonkeyPatch.context() as patch:
        extension = {"worker_extension_cls": "tests.integration.corruption.Corrupting"}
        patch.setattr(engines, "engine_arguments", lambda *given: engine_arguments(*given) | extension)
        made = Served(folder / "export")
    yield made
    made.run(made.engine.aclose())
    made.loop.call_soon_threadsafe(made.loop.stop)


def prompts(count: int, *, seed: int = 0, low: int = 2, high: int = 60) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, VOCAB, rng.integers(low, high)).tolist() for _ in range(count)]


def distribution(model: NemotronHForCausalLM, c: Completion, temperature: float) -> NDArray[np.float64]:
    """[T, V] logprobs at each sampled token, by a plain forward pass of Transformers; NaN behind a tie of experts."""
    ids = torch.from_numpy(np.concatenate([c.prompt_ids, c.token_ids])).long()[None]
    with torch.no_grad(), choices_of(model) as choices:
        logits = model(ids).logits[0, len(c.prompt_ids) - 1 : -1].double() / temperature
    logprobs = torch.log_softmax(logits, -1).numpy()
    logprobs[~choices.decided()[len(c.prompt_ids) - 1 : -1]] = np.nan
    return logprobs


def of_sampled(logprobs: NDArray[np.float64], c: Completion) -> NDArray[np.float64]:
    return logprobs[np.arange(len(c.token_ids)), c.token_ids]


def errors(model: NemotronHForCausalLM, c: Completion) -> NDArray[np.float64]:
    """[T] by how much the engine's logprobs are wrong, in nats; NaN behind a tie, and where nothing was sampled."""
    return np.where(c.sampled, of_sampled(distribution(model, c, 1.0), c) - c.logprobs, np.nan)


def checkpoint(served: Served, change: Callable[[str, torch.Tensor], torch.Tensor] = lambda _, w: w) -> NDArray[np.uint8]:
    """The checkpoint's bytes with changed tensors."""
    weights = {name: change(name, w).contiguous() for name, w in load_file(served.model / "model.safetensors").items()}
    return np.frombuffer(save(weights), np.uint8)


def reference(served: Served, blob: NDArray[np.uint8] | None = None, folder: Path | None = None) -> NemotronHForCausalLM:
    path = served.model
    if blob is not None:
        assert folder is not None
        (folder / "config.json").write_bytes((served.model / "config.json").read_bytes())
        (folder / "model.safetensors").write_bytes(blob.tobytes())
        path = folder
    return NemotronHForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
