"""LatentMoE for training without grouped kernels: all experts at once, in two matrix products.

With few small experts it is cheaper to run every expert on every token and weight the results (the weight is zero for the
experts that the router did not choose) than to gather, loop and scatter: a token costs E/k times the needed
multiplications, but in two large products instead of E small ones. Routing and result are those of Transformers' module:

    s = sigmoid(W x)        chosen = top-k of s + bias        w_e = s_e / sum of chosen s (0 if not chosen), scaled
    y = fc2( sum_e w_e down_e relu(up_e fc1(x))^2 ) + shared(x)
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learner.mamba_scan import at_least_float32

DENSE_LIMIT = 16
"""Largest experts-to-chosen ratio for which running all experts was faster than Transformers' loop (measured at E = 8 to 32)."""


def dense_routing(scores: Tensor, choice: Tensor, top_k: int, *, normalise: bool, scale: float) -> Tensor:
    """Weights of all experts per token, zero where not chosen.

    scores [T, E] in (0, 1); choice [T, E]: scores plus the balancing bias, only for choosing; returns [T, E].
    """
    chosen = torch.zeros_like(scores).scatter_(1, choice.detach().topk(top_k, dim=-1, sorted=False).indices, 1.0)
    weights = scores * chosen
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale if scale != 1.0 else weights


def dense_experts(x: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """sum_e weights[:, e] down_e relu(up_e x)^2. x [T, K], weights [T, E], up [E, I, K], down [E, K, I]; returns [T, K]."""
    experts, inner, width = up.shape
    hidden = F.relu(x @ up.reshape(experts * inner, width).t())
    hidden = (hidden * hidden).unflatten(-1, (experts, inner)) * weights.to(x.dtype).unsqueeze(-1)
    return hidden.flatten(-2) @ down.transpose(1, 2).reshape(experts * inner, width)


def _gate_forward(self: Any, hidden_states: Tensor) -> Tensor:
    x = at_least_float32(hidden_states.view(-1, hidden_states.shape[-1]))
    scores = F.linear(x, self.weight.to(x.dtype)).sigmoid()
    choice = scores + self.e_score_correction_bias
    return dense_routing(scores, choice, self.top_k, normalise=self.norm_topk_prob, scale=float(self.routed_scaling_factor))


def _experts_forward(self: Any, x: Tensor, weights: Tensor) -> Tensor:
    return dense_experts(x, weights, self.up_proj, self.down_proj)


def _moe_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """NemotronHMoE.forward; hidden_states [B, L, D]."""
    flat = hidden_states.view(-1, hidden_states.shape[-1])
    routed = self.fc2_latent_proj(self.experts(self.fc1_latent_proj(flat), self.gate(flat)))
    return (routed + self.shared_experts(flat)).view(hidden_states.shape)


def install(moe: nn.Module) -> None:
    """Give this one Transformers MoE layer the dense path, where that is the faster and equal one."""
    gate: Any = moe.gate
    relu2 = moe.config.mlp_hidden_act == "relu2"  # type: ignore[union-attr]
    if not relu2 or gate.num_group != 1 or gate.num_experts > DENSE_LIMIT * gate.top_k:
        return  # Transformers' own path: correct for everything, and it has grouped kernels on GPUs
    gate.forward = MethodType(_gate_forward, gate)
    moe.experts.forward = MethodType(_experts_forward, moe.experts)  # type: ignore[union-attr]
    moe.forward = MethodType(_moe_forward, moe)  # type: ignore[method-assign]
