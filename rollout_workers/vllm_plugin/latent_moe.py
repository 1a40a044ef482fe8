"""Mixture of experts for NemotronH on CPU: sigmoid router, ungated relu^2 experts, optionally in a latent space.

Defect upstream (vLLM 0.32, CPU): the fused MoE layer refuses experts without a gate projection ("is_act_and_mul=False"), which
is what every NemotronH checkpoint has. This layer computes the same function as the Transformers implementation.

Parameters carry the names and meanings that vLLM's loaders of the policy and of the MTP draft expect, so checkpoints and weight
updates load as they do on CUDA.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rollout_workers.vllm_plugin.raw_weights import Views, raw_weight

DENSE_FLOPS = 400_000_000
"""Multiply-adds up to which all experts are computed for all tokens, in two matrix products: below some tens of milliseconds the
bookkeeping of a sparse dispatch costs more than it saves."""

FEW_OPERATIONS = 20_000_000
"""Multiply-adds up to which kernels.py is taken: some milliseconds of one core. Beyond, the products of a library, which takes all
threads, gain more than its calls cost."""


class RoutedExperts(nn.Module):
    """The weights of E experts: up [E, I, L] and down [L, E, I], laid out so that all experts together are one matrix each."""

    def __init__(self, num_experts: int, dim: int, intermediate: int) -> None:
        super().__init__()
        self.w13_weight = nn.Parameter(torch.empty(num_experts, intermediate, dim), requires_grad=False)
        self.w2_weight = nn.Parameter(torch.empty(dim, num_experts, intermediate), requires_grad=False)
        self.w13_weight.weight_loader = _load_up  # type: ignore[attr-defined]
        self.w2_weight.weight_loader = _load_down  # type: ignore[attr-defined]


def _load_up(
    param: Tensor, weight: Tensor, name: str = "", shard_id: str | None = None, expert_id: int = 0, return_success: bool = False
) -> bool:
    param.data[expert_id].copy_(weight)
    return True


def _load_down(
    param: Tensor, weight: Tensor, name: str = "", shard_id: str | None = None, expert_id: int = 0, return_success: bool = False
) -> bool:
    param.data[:, expert_id].copy_(weight)
    return True


@dataclass(frozen=True)
class Routing:
    """What of a checkpoint's configuration the router asks for in each step; the configuration itself takes microseconds to answer."""

    n_group: int
    topk_group: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    routed_scaling_factor: float


class Experts(nn.Module):
    """Where the policy's loader hands over `experts.<i>.<up|down>_proj.weight`."""

    def __init__(self, num_experts: int, dim: int, intermediate: int) -> None:
        super().__init__()
        self.routed_experts = RoutedExperts(num_experts, dim, intermediate)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Names are relative to this module: "3.up_proj.weight"."""
        names = {"up_proj": "w13_weight", "down_proj": "w2_weight"}
        loaded = set()
        for name, weight in weights:
            expert, projection = name.split(".")[:2]
            param = getattr(self.routed_experts, names[projection])
            param.weight_loader(param, weight, name, expert_id=int(expert))
            loaded.add("routed_experts." + names[projection])
        return loaded


class CpuLatentMoE(nn.Module):
    """Stands in for vLLM's `NemotronHMoE`; x [N, D] -> [N, D]."""

    def __init__(self, config: Any, quant_config: Any = None, parallel_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        from vllm.model_executor.models.nemotron_h import NemotronHMLP

        hidden, experts = config.hidden_size, config.n_routed_experts
        latent = getattr(config, "moe_latent_size", None) or hidden
        self.routing = Routing(**{field.name: getattr(config, field.name) for field in fields(Routing)})
        self.n_redundant_experts, self.n_shared_experts = 0, config.n_shared_experts
        self.n_routed_experts = self.n_logical_experts = self.n_physical_experts = self.n_local_physical_experts = experts
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.gate.e_score_correction_bias = nn.Parameter(torch.empty(experts, dtype=torch.float32), requires_grad=False)
        self.shared_experts: nn.Module | None = None
        if config.n_shared_experts:
            self.shared_experts = NemotronHMLP(
                config=config,
                hidden_size=hidden,
                intermediate_size=config.moe_shared_expert_intermediate_size * config.n_shared_experts,
                quant_config=quant_config,
                reduce_results=False,
                prefix=prefix + ".shared_experts",
            )
        self.in_latent_space = latent != hidden or bool(getattr(config, "moe_latent_size", None))
        if self.in_latent_space:
            self.fc1_latent_proj = nn.Linear(hidden, latent, bias=config.mlp_bias)
            self.fc2_latent_proj = nn.Linear(latent, hidden, bias=config.mlp_bias)
        self.experts = Experts(experts, latent, config.moe_intermediate_size)
        shared = config.moe_shared_expert_intermediate_size * config.n_shared_experts if config.n_shared_experts else 0
        self.operations = (
            hidden * (experts + 2 * latent + 2 * shared) + 2 * config.num_experts_per_tok * latent * config.moe_intermediate_size
        )
        """Multiply-adds per token."""

    @cached_property
    def is_compiled(self) -> bool:
        """Whether `kernels.moe_rows` serves this layer: float32, a latent space, shared experts, one group and no biases."""
        if self.routing.n_group > 1 or not self.in_latent_space or self.shared_experts is None:
            return False
        layers = (self.gate, self.fc1_latent_proj, self.fc2_latent_proj, self.shared_experts.up_proj, self.shared_experts.down_proj)
        floats = self.experts.routed_experts.w13_weight.dtype == torch.float32
        return floats and all(layer.bias is None and raw_weight(layer) is not None for layer in layers)

    @cached_property
    def views(self) -> Views:
        experts, shared = self.experts.routed_experts, self.shared_experts
        assert shared is not None
        return Views(
            (self.gate, "weight"), (self.gate, "e_score_correction_bias"), (self.fc1_latent_proj, "weight"), (experts, "w13_weight"),
            (experts, "w2_weight"), (self.fc2_latent_proj, "weight"), (shared.up_proj, "weight"), (shared.down_proj, "weight"),
        )  # fmt: skip

    def weights(self) -> tuple[Any, ...]:
        """What `kernels.moe_rows` wants between x and out. Asked at each call, since updates may replace a weight."""
        gate, bias, *others = self.views.now()
        routing = self.routing
        return gate, bias, routing.num_experts_per_tok, routing.norm_topk_prob, routing.routed_scaling_factor, *others

    def forward(self, x: Tensor) -> Tensor:
        if len(x) * self.operations <= FEW_OPERATIONS and self.is_compiled:
            from rollout_workers.vllm_plugin import kernels

            out = torch.empty_like(x)
            kernels.moe_rows(x.contiguous().numpy(), *self.weights(), out.numpy())
            return out
        return self.by_operations(x)

    def by_operations(self, x: Tensor) -> Tensor:
        """The same in PyTorch's operations, for any type and number of tokens."""
        weight, index = route(x, self.gate.weight, self.gate.e_score_correction_bias, self.routing)
        z = self.fc1_latent_proj(x) if self.in_latent_space else x
        up, down = self.experts.routed_experts.w13_weight, self.experts.routed_experts.w2_weight
        mix = dense_experts if len(x) * up.numel() * 2 <= DENSE_FLOPS else sparse_experts
        out = mix(z, up, down, weight, index)
        if self.in_latent_space:
            out = self.fc2_latent_proj(out)
        return out if self.shared_experts is None else out + self._shared(x)

    def _shared(self, x: Tensor) -> Tensor:
        """NemotronHMLP without its layers' ceremony, a third of what it takes for a few tokens."""
        assert self.shared_experts is not None
        up, down = self.shared_experts.up_proj, self.shared_experts.down_proj
        h = up.cpu_linear(x, up.weight, up.bias).relu_().square_()
        return down.cpu_linear(h, down.weight, down.bias)  # type: ignore[no-any-return]


def route(x: Tensor, gate: Tensor, bias: Tensor, config: Routing) -> tuple[Tensor, Tensor]:
    """(weights [N, top_k], expert index [N, top_k]); the correction bias chooses experts but does not weigh them (DeepSeek-V3)."""
    scores = torch.sigmoid(F.linear(x.float(), gate.float()))
    choice = scores + bias
    if config.n_group > 1:
        grouped = choice.view(len(x), config.n_group, -1)
        best = grouped.topk(2, -1)[0].sum(-1).topk(config.topk_group, -1, sorted=False)[1]
        closed = torch.ones(len(x), config.n_group, dtype=torch.bool, device=x.device).scatter_(1, best, False)
        choice = grouped.masked_fill(closed[..., None], float("-inf")).view_as(scores)
    index = choice.topk(config.num_experts_per_tok, -1, sorted=False)[1]
    weight = scores.gather(1, index)
    if config.norm_topk_prob:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
    return weight * config.routed_scaling_factor, index


def dense_experts(z: Tensor, up: Tensor, down: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """All experts for all tokens, weighed by zero where not chosen: two matrix products."""
    experts, intermediate, latent = up.shape
    share = torch.zeros(len(z), experts, dtype=weight.dtype, device=z.device).scatter_(1, index, weight).to(z.dtype)
    h = F.relu(F.linear(z, up.view(-1, latent))).square_().view(-1, experts, intermediate)
    h *= share[..., None]
    return F.linear(h.view(len(z), -1), down.view(latent, -1))


def sparse_experts(z: Tensor, up: Tensor, down: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """Each expert for its own tokens."""
    out = torch.zeros_like(z)
    for expert in index.unique().tolist():
        token, rank = (index == expert).nonzero(as_tuple=True)
        h = F.relu(F.linear(z[token], up[expert])).square_()
        h *= weight[token, rank, None].to(h.dtype)
        out.index_add_(0, token, F.linear(h, down[:, expert]))
    return out


def install() -> None:
    """Replace the stock layer where NemotronH's policy and draft build it."""
    import vllm.model_executor.models.nemotron_h as nemotron_h

    nemotron_h.NemotronHMoE = CpuLatentMoE
