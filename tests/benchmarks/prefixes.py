"""What one computation of a group's prompt saves: gradients of a long_context group with its prompt shared and repeated.

speedup_shared_prefix   seconds repeated / seconds shared, the same groups, in turns
tokens_per_s_repeated, tokens_per_s_shared   prompt and answer tokens of all rollouts per second of forward and backward
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from infra.bench import interleaved, ratio
from learner.model import PolicyModel
from learner.objective import Batch, Objective
from rl_core.batching import Microbatch, microbatches, num_loss_tokens, num_mtp_tokens
from rl_core.config import LearnerConfig
from rl_core.types import Trajectory

SEED_MODEL = Path(__file__).parents[2] / "configs" / "models" / "seed"
GROUP, PROMPT, ANSWER, GROUPS = 8, 2500, 40, 2
REPETITIONS = 5


def bench() -> dict[str, list[float]]:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    model = PolicyModel.from_pretrained(SEED_MODEL)
    objective = Objective(model, LearnerConfig(), num_envs=1)
    rows = [t for g in range(GROUPS) for t in group(g)]
    everything = sum(len(r.token_ids) for r in rows)
    plans = {
        name: microbatches(rows, envs=("long_context",), max_tokens=LearnerConfig().microbatch_tokens, share_prefixes=shares)[0]
        for name, shares in (("repeated", False), ("shared", True))
    }

    def seconds(plan: list[Microbatch]) -> float:
        model.zero_grad(set_to_none=True)
        began = time.perf_counter()
        for microbatch in plan:
            loss, _ = objective(on_device(microbatch), num_loss_tokens(rows), num_mtp_tokens(rows))
            loss.backward()
        return time.perf_counter() - began

    measured = interleaved({name: lambda plan=plan: seconds(plan) for name, plan in plans.items()}, REPETITIONS)  # type: ignore[misc]
    return {
        "speedup_shared_prefix": ratio(measured["repeated"], measured["shared"]),
        **{f"tokens_per_s_{name}": [everything / s for s in values] for name, values in measured.items()},
    }


def group(seed: int) -> list[Trajectory]:
    """One prompt, GROUP answers."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(5, 700, PROMPT)
    rows = []
    for member in range(GROUP):
        mask = np.arange(PROMPT + ANSWER) >= PROMPT
        rows.append(
            Trajectory(
                env="long_context",
                token_ids=np.concatenate([prompt, rng.integers(5, 700, ANSWER)]).astype(np.int32),
                loss_mask=mask,
                logprobs=np.where(mask, -1.0, 0.0).astype(np.float32),
                versions=np.where(mask, 0, -1).astype(np.int32),
                advantage=1.0 if member % 2 else -1.0,
            )
        )
    return rows


def on_device(m: Microbatch) -> Batch:
    return Batch(
        prefix_ids=torch.from_numpy(m.prefix_ids.astype(np.int64)), token_ids=torch.from_numpy(m.token_ids.astype(np.int64)),
        loss_mask=torch.from_numpy(m.loss_mask), logprobs=torch.from_numpy(m.logprobs), advantages=torch.from_numpy(m.advantages),
        envs=torch.from_numpy(m.envs.astype(np.int64)), temperatures=torch.ones(len(m.token_ids)),
    )  # fmt: skip
