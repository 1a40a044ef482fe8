"""What the engine says of its tokens is what the learner computes: in both precisions, at every number of drafts, batch size and length.

An engine costs some ten seconds, so `make test` starts one: bfloat16 with 4 drafts, beside float32 with 2 in test_engine.py. The whole
grid runs when asked for: POLYRL_LONG_TESTS=1.

    float32    the same numbers, but for the order of sums
    bfloat16   as far as the run allows before it stops (rl_core/loop.py): both round, at different places
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save

from learner.model import PolicyModel
from rl_core.config import RolloutConfig
from rl_core.loop import MAX_LOGPROB_ERROR
from rl_core.seal import seal
from rl_core.types import Completion, Receipt, SamplingParams
from rollout_workers.engine import Engine
from tests.integration.ties import logprob_errors, mean_of, worst
from tests.integration.tiny_hybrid import make_tiny_hybrid

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

T = TypeVar("T")
VOCAB, LIMIT = 16, 256
"""So few tokens that even an untrained head is right now and then."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EVERY = [(dtype, k) for dtype in DTYPES for k in (0, 1, 2, 4)]
CHOSEN = EVERY if os.environ.get("POLYRL_LONG_TESTS") else [("bfloat16", 4)]
BATCHES = (1, 4, 16, 64)


class Cell:
    """One engine and the learner's model of the same checkpoint."""

    def __init__(self, folder: Path, dtype: str, k: int) -> None:
        self.folder, self.dtype, self.k, self.version = make_tiny_hybrid(folder, vocab_size=VOCAB, scale=2.0), dtype, k, 0
        self.learner = PolicyModel.from_pretrained(self.folder, dtype=DTYPES[dtype])
        rollout = RolloutConfig(
            max_num_seqs=64, max_model_len=LIMIT, max_batched_tokens=1024, speculative_tokens=k, auto_k=False, kv_cache_gib=0.5
        )
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.engine = self.run(Engine.start(name="w0", model_path=str(self.folder), dtype=dtype, rollout=rollout, stop_ids=[]))

    def run(self, work: Awaitable[T], seconds: float = 300.0) -> T:
        async def awaited() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(awaited(), self.loop).result(seconds)

    def sample(self, prompts: Sequence[Sequence[int]], name: str, max_tokens: int) -> list[Completion]:
        async def together() -> list[Completion]:
            params = SamplingParams(max_tokens=max_tokens)
            return await asyncio.gather(*(self.engine.sample(p, params, request_id=f"{name}-{i}") for i, p in enumerate(prompts)))

        return self.run(together())

    def check(self, done: Sequence[Completion], learner: PolicyModel | None = None) -> None:
        """All logprobs agree with the learner's computation."""
        errors = [logprob_errors(learner or self.learner, c) for c in done]
        mean, highest = mean_of(errors), worst(errors)
        print(f"{self.dtype} k={self.k}: mean {mean:.1e}, max {highest:.1e} nats over {sum(map(len, errors))} tokens")
        assert mean < MAX_LOGPROB_ERROR
        assert self.dtype == "bfloat16" or highest < 1e-3


@pytest.fixture(scope="module", params=CHOSEN, ids=lambda cell: f"{cell[0]}-k{cell[1]}")
def cell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cell]:
    made = Cell(tmp_path_factory.mktemp("cell"), *request.param)
    yield made
    made.run(made.engine.aclose())
    made.loop.call_soon_threadsafe(made.loop.stop)


def prompts(count: int, low: int = 2, high: int = 40) -> list[list[int]]:
    rng = np.random.default_rng(count)
    return [rng.integers(0, VOCAB, rng.integers(low, high)).tolist() for _ in range(count)]


@pytest.mark.parametrize("batch", BATCHES)
def test_engine_and_learner_agree_at_any_batch_size(cell: Cell, batch: int) -> None:
    tokens = 40 if batch < 64 else 16
    done = cell.sample(prompts(batch), f"batch{batch}", tokens)
    assert {len(c.token_ids) for c in done} == {tokens}
    if cell.k and batch >= 16:
        assert sum(c.drafted for c in done) > sum(c.accepted for c in done) > 0, "no draft was accepted, or none rejected"
    print("drafted, accepted:", sum(c.drafted for c in done), sum(c.accepted for c in done))
    cell.check(done)


def test_engine_and_learner_agree_up_to_the_last_token_that_fits(cell: Cell) -> None:
    """Drafts reach beyond the limit there (vllm#38711)."""
    done = cell.sample(prompts(16, LIMIT - 24, LIMIT - 1), "limit", LIMIT)
    assert {len(c.prompt_ids) + len(c.token_ids) for c in done} == {LIMIT}
    cell.check(done)


def shaken(cell: Cell, folder: Path, seed: int) -> tuple[NDArray[np.uint8], PolicyModel]:
    """Every tensor changed by up to a fifth: as the next version's blob for the engine, and as the learner's model."""
    generator = torch.Generator().manual_seed(seed)
    old = load_file(cell.folder / "model.safetensors")
    blob = save({name: (w * (1 + 0.2 * torch.rand(w.shape, generator=generator))).contiguous() for name, w in old.items()})
    (folder / "config.json").write_bytes((cell.folder / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes(blob)
    return seal(np.frombuffer(blob, np.uint8), cell.version + 1), PolicyModel.from_pretrained(folder, dtype=DTYPES[cell.dtype])


def test_engine_and_learner_agree_on_both_sides_of_an_update_in_flight(cell: Cell, tmp_path: Path) -> None:
    """Before it under the old weights, and the probe after it under the new ones."""
    blob, after = shaken(cell, tmp_path, 7)
    before, cell.learner = cell.learner, after
    old = cell.version

    async def load_amid_sampling() -> tuple[list[Completion], Receipt]:
        names = [f"flight-{i}" for i in range(16)]
        params = SamplingParams(max_tokens=LIMIT)
        work = [asyncio.create_task(cell.engine.sample(p, params, request_id=n)) for n, p in zip(names, prompts(16, 2, 8), strict=True)]
        while not any(len(part.token_ids) for part in cell.engine.under_way(dict.fromkeys(names, 0)).values()):
            await asyncio.sleep(0.002)
        receipt = await cell.engine.load_weights(old + 1, blob)
        return await asyncio.gather(*work), receipt

    done, receipt = cell.run(load_amid_sampling())
    cell.version = old + 1
    straddling = [c for c in done if len(c.spans) == 2]
    assert straddling, "every sequence ended before the update: nothing was tested"
    for c in straddling:
        assert [s.version for s in c.spans] == [old, old + 1]
    cell.check([cut(c) for c in straddling], before)
    cell.check(receipt.probe)
    moved = mean_of(logprob_errors(before, c) for c in receipt.probe)
    assert moved > 3 * MAX_LOGPROB_ERROR, "the update is too small to be seen"


def cut(c: Completion) -> Completion:
    """What was sampled under the first version."""
    stop = c.spans[0].stop
    return replace(c, token_ids=c.token_ids[:stop], logprobs=c.logprobs[:stop], spans=c.spans[:1])


def test_a_prompt_that_was_seen_under_old_weights_is_computed_anew(cell: Cell, tmp_path: Path) -> None:
    """A prefix cache once served attention and Mamba state of weights up to 17 versions old (NeMo-RL#4018)."""
    asked = prompts(8, 64, 128)
    cell.check(cell.sample(asked, "seen", 8))
    blob, cell.learner = shaken(cell, tmp_path, 8)
    cell.version += 1
    cell.run(cell.engine.load_weights(cell.version, blob))
    cell.check(cell.sample(asked, "again", 8))
