"""The learner's step on a GPU in bfloat16: a hybrid of 1.26 billion parameters with its MTP head, random weights, long rows.

step_s_8k|32k                  seconds of a whole step (gradients, guard, clip, AdamW) over 65,536 tokens, each row a prompt of its own
tokens_per_s_8k|32k            of it
step_s_shared_8k|32k           the same rows, but those of a group share their prompt (8 and 2 answers)
peak_gib_8k|32k                most memory of the device while such a step runs (weights, gradients, master weights and moments included)
..._checkpointed               with learner.checkpoint_layers
kernels_over_own_8k|32k        tokens/s with the scan of `mamba_ssm` over that with our own chunked scan; only where it is installed
state_gib, billions            memory before a step; parameters in billions
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import NemotronHConfig

from infra.bench import interleaved, ratio
from infra.errors import UsageError
from learner import mamba_scan
from learner.learner import Learner
from learner.model import PolicyModel, cast
from learner.optimizer import solo
from rl_core.types import Group
from tests.benchmarks.learner import ENV, SETTINGS, group, take

LENGTHS = {"8k": (8192, 8), "32k": (32768, 2)}
"""Tokens of a row, and rows."""
REPETITIONS = 5


def hybrid() -> NemotronHConfig:
    """28 blocks: 12 of Mamba-2, 12 of LatentMoE (4 of 32 experts), 4 of attention."""
    return NemotronHConfig(
        vocab_size=65536, hidden_size=2048,
        layers_block_type=[*["linear_attention", "moe"] * 3, "full_attention"] * 4,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, intermediate_size=4096, max_position_embeddings=65536,
        mamba_num_heads=64, mamba_head_dim=64, ssm_state_size=128, n_groups=8, conv_kernel=4, chunk_size=256,
        n_routed_experts=32, num_experts_per_tok=4, moe_intermediate_size=1024, moe_shared_expert_intermediate_size=2048,
        moe_latent_size=512, num_nextn_predict_layers=1, mtp_layers_block_type=["full_attention", "moe"], initializer_range=0.02,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def bench() -> dict[str, list[float]]:
    if not torch.cuda.is_available():
        raise UsageError("polyrl bench gpu: torch sees no GPU here; `polyrl bench learner` measures the learner on a CPU")
    with solo():
        return measure(hybrid(), REPETITIONS)


def measure(config: NemotronHConfig, repetitions: int) -> dict[str, list[float]]:
    """Figures, each also printed to stderr as soon as it is known."""
    figures: dict[str, list[float]] = {}

    def note(name: str, values: list[float]) -> None:
        figures[name] = values
        print(name, [round(v, 3) for v in values], file=sys.stderr, flush=True)

    with torch.device("cuda"):
        model = PolicyModel.from_config(config, seed=0)
    model = cast(model, torch.bfloat16)
    note("billions", [sum(p.numel() for p in model.parameters()) / 1e9])
    settings = replace(SETTINGS, learning_rate=1e-6, spike_factor=0.0, zero_stage=1)
    learner = Learner(model, settings, temperatures={ENV: 1.0}, max_staleness=10**6)
    torch.cuda.synchronize()
    note("state_gib", [torch.cuda.memory_allocated() / 2**30])
    for name, (length, rows) in LENGTHS.items():
        tokens = length * rows
        apart, together = ([group(length, rows, 0, apart=flag)] for flag in (True, False))
        best = "own" if mamba_scan.kernels() is None else "kernels"
        steps: dict[str, Callable[[], float]] = {
            "own": partial(step, learner, apart, own=True),
            best: partial(step, learner, apart, own=best == "own"),
            "shared": partial(step, learner, together, own=best == "own"),
        }
        seconds = interleaved(steps, repetitions)
        note(f"step_s_{name}", seconds[best])
        note(f"tokens_per_s_{name}", [tokens / s for s in seconds[best]])
        note(f"step_s_shared_{name}", seconds["shared"])
        if best == "kernels":
            note(f"kernels_over_own_{name}", ratio(seconds["own"], seconds["kernels"]))
        note(f"peak_gib_{name}", [peak(learner, apart)])
        model.gradient_checkpointing = True
        note(f"step_s_{name}_checkpointed", interleaved({"it": steps[best]}, repetitions)["it"])
        note(f"peak_gib_{name}_checkpointed", [peak(learner, apart)])
        model.gradient_checkpointing = False
    return figures


def step(learner: Learner, batch: list[Group], *, own: bool) -> float:
    """Seconds of one step; `own`: with our scan, whatever is installed."""
    kernels: Any = mamba_scan.kernels
    mamba_scan.kernels = (lambda: None) if own else kernels  # type: ignore[assignment]
    try:
        torch.cuda.synchronize()
        began = time.perf_counter()
        take(learner, batch)
        torch.cuda.synchronize()
        return time.perf_counter() - began
    finally:
        mamba_scan.kernels = kernels


def peak(learner: Learner, batch: list[Group]) -> float:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    take(learner, batch)
    return torch.cuda.max_memory_allocated() / 2**30


if __name__ == "__main__":
    print(json.dumps(bench()))
