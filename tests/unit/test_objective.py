"""The objective over a real small model: the same loss and gradients however rows are packed, under every rule, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from learner.importance import RULES
from learner.learner import loss_metrics
from learner.losses import LOSSES
from learner.model import PolicyModel
from learner.objective import Batch, Objective, row_logprobs
from rl_core.batching import Microbatch, microbatches, num_loss_tokens, num_mtp_tokens
from rl_core.config import ImportanceConfig, LearnerConfig
from rl_core.trajectories import trajectories
from rl_core.types import Trajectory
from tests.integration.learner_ranks import random_groups
from tests.unit.test_losses import MASK_HALF
from tests.unit.test_model import VOCAB, small_config

torch.set_num_threads(1)
ENVS = ("math", "tools")
TEMPERATURES = torch.tensor([1.0, 0.7], dtype=torch.float64)
KL = 0.2


def to_batch(m: Microbatch, reference: PolicyModel) -> Batch:
    batch = Batch(
        prefix_ids=torch.from_numpy(m.prefix_ids.astype(np.int64)), token_ids=torch.from_numpy(m.token_ids.astype(np.int64)),
        loss_mask=torch.from_numpy(m.loss_mask), logprobs=torch.from_numpy(m.logprobs), advantages=torch.from_numpy(m.advantages),
        envs=torch.from_numpy(m.envs.astype(np.int64)), temperatures=TEMPERATURES[m.envs],
    )  # fmt: skip
    return replace(batch, reference=row_logprobs(reference, batch))


@pytest.fixture(scope="module")
def policies() -> tuple[PolicyModel, PolicyModel]:
    """The policy that trains, and a reference near it."""
    model, reference = (
        PolicyModel.from_config(small_config(layers_block_type=["linear_attention", "full_attention"]), 1).double() for _ in range(2)
    )
    with torch.no_grad():
        rng = torch.Generator().manual_seed(3)
        for parameter in reference.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
    return model, reference.requires_grad_(False)


@pytest.fixture(scope="module")
def rows(policies: tuple[PolicyModel, PolicyModel]) -> list[Trajectory]:
    """Ragged rows, five of which answer one long prompt; behaviour logprobs are the model's own, but for noise and drift."""
    made = [t for g in random_groups(2, vocab=VOCAB, seed=0, long_prompt=140) for t in trajectories(g, "grpo")]
    (plan,) = microbatches(made, envs=ENVS, max_tokens=10**6)
    rng = np.random.default_rng(0)
    own = {}
    for m in plan:
        batch = to_batch(m, policies[0])
        assert batch.reference is not None
        for ids, mask, logprobs in zip(m.token_ids, m.loss_mask, batch.reference.numpy(), strict=True):
            own[ids[: mask.nonzero()[0][-1] + 1].tobytes()] = logprobs[mask]
    sampled = []
    for row in made:
        drift, mask = rng.normal(0, 0.15), row.loss_mask
        logprobs = np.zeros(len(row), np.float32)
        logprobs[mask] = own[row.token_ids.tobytes()] + drift + rng.normal(0, 0.4, mask.sum())
        sampled.append(replace(row, logprobs=logprobs))
    return sampled


@pytest.fixture(scope="module")
def packings(policies: tuple[PolicyModel, PolicyModel], rows: list[Trajectory]) -> dict[str, list[Batch]]:
    """The same rows, four times."""
    two_ranks = microbatches(rows, envs=ENVS, max_tokens=200, num_ranks=2)
    plans = {
        "one by one": [m for row in rows for m in microbatches([row], envs=ENVS, max_tokens=1)[0]],
        "whole": microbatches(rows, envs=ENVS, max_tokens=10**6)[0],
        "shared prompt": microbatches(rows, envs=ENVS, max_tokens=10**6, share_prefixes=True)[0],
        "two ranks": [m for rank in two_ranks for m in rank],
    }
    assert len({(len(plan), sum(m.num_padded for m in plan)) for plan in plans.values()}) == len(plans), "these packings must differ"
    return {name: [to_batch(m, policies[1]) for m in plan] for name, plan in plans.items()}


def gradients(objective: Objective, batches: list[Batch], rows: Sequence[Trajectory]) -> tuple[torch.Tensor, ...]:
    """(loss, sums, all gradients as one vector)."""
    objective.zero_grad()
    total, sums = torch.zeros((), dtype=torch.float64), torch.zeros(0)
    for batch in batches:
        loss, part = objective(batch, num_loss_tokens(rows), num_mtp_tokens(rows))
        loss.backward()
        total, sums = total + loss.detach(), part if not len(sums) else sums + part
    flat = [p.grad.flatten() if p.grad is not None else torch.zeros(p.numel(), dtype=torch.float64) for p in objective.parameters()]
    return total, sums, torch.cat(flat)


COMBINATIONS = [(rule, "ppo", "recomputed") for rule in RULES] + [("masked", loss, "behaviour") for loss in LOSSES]


@pytest.mark.parametrize(("rule", "policy_loss", "proximal"), COMBINATIONS)
def test_packing_changes_neither_loss_nor_gradient_nor_metrics_of_any_rule(
    policies: tuple[PolicyModel, PolicyModel],
    rows: list[Trajectory],
    packings: dict[str, list[Batch]],
    rule: str,
    policy_loss: str,
    proximal: str,
) -> None:
    low, high = (-2e-3, 2e-3) if rule == "dppo" else MASK_HALF[rule]
    config = LearnerConfig(
        policy_loss=policy_loss, proximal=proximal, clip_low=0.2, clip_high=0.2, kl_weight=KL, mtp_depth=1 if rule == "none" else 3,
        importance=ImportanceConfig(rule=rule, low=low, high=high),
    )  # fmt: skip
    objective = Objective(policies[0], config, len(ENVS))
    loss, sums, gradient = gradients(objective, packings["one by one"], rows)
    for name in ("whole", "shared prompt", "two ranks"):
        other_loss, other_sums, other_gradient = gradients(objective, packings[name], rows)
        assert other_loss.item() == pytest.approx(loss.item(), rel=1e-12), name
        torch.testing.assert_close(other_sums, sums, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
        assert float((other_gradient - gradient).norm() / gradient.norm()) < 1e-11, name
    metrics = loss_metrics(sums.numpy(), ENVS, mtp_weight=config.mtp_loss_weight, kl_weight=KL)
    assert metrics["learner/loss"] == pytest.approx(loss.item())
    for env in ENVS:
        assert metrics[f"env/{env}/masked_share"] > 0 or rule == "none"
        assert 0 < metrics[f"env/{env}/ess"] <= 1
        assert metrics[f"env/{env}/reference_kl"] > 0
    assert (metrics["learner/clip_share"] > 0) is (proximal == "behaviour")


def test_expert_loads_count_every_token_once_and_no_padding(rows: list[Trajectory], packings: dict[str, list[Batch]]) -> None:
    model = PolicyModel.from_config(small_config(layers_block_type=["linear_attention", "moe", "full_attention", "moe"]), 2).double()
    seen = {}
    for name in ("one by one", "whole", "two ranks", "whole, twice computed"):
        model.gradient_checkpointing = name.endswith("twice computed")
        objective = Objective(model, LearnerConfig(), len(ENVS))
        gradients(objective, packings[name.partition(",")[0]], rows)
        seen[name] = {layer: load.tolist() for layer, load in objective.expert_loads.items()}
    assert set(seen["whole"]) == {1, 3}
    for loads in seen.values():
        assert loads == seen["whole"]
    top_k = model.config.num_experts_per_tok
    assert all(sum(load) == top_k * sum(len(row) - 1 for row in rows) for load in seen["whole"].values())
