"""LatentMoE for training without grouped kernels.

Routing and result are those of Transformers' module:

    s = sigmoid(W x)        chosen = top-k of s + bias        w_e = s_e / sum of chosen s, scaled
    y = fc2( sum over chosen e of w_e down_e relu(up_e fc1(x))^2 ) + shared(x)

Transformers loops over experts with a gather, four operations and a scatter each, and its autograd graph grows with the
number of experts. Here the (token, expert) pairs are sorted by expert once; the matrix products run on contiguous slices,
everything elementwise runs once over all pairs, and the whole is one autograd node.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learner.norm import at_least_float32


def route(scores: Tensor, bias: Tensor, top_k: int, *, normalise: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Choose experts. scores [T, E] in (0, 1); bias [E] only sways the choice; returns indices and weights [T, k]."""
    chosen = (scores.detach() + bias).topk(top_k, dim=-1, sorted=False).indices
    weights = scores.gather(-1, chosen)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return chosen, weights * scale if scale != 1.0 else weights


class SortedExperts(torch.autograd.Function):
    """sum over chosen e of w_e down_e relu(up_e x)^2, with pairs sorted by expert.

    x [T, K], chosen and weights [T, k], up [E, I, K], down [E, K, I]; returns [T, K]. Pairs P = T * k.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, chosen: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:  # type: ignore[override]
        top_k = chosen.shape[1]
        pairs = chosen.flatten()
        order = pairs.argsort(stable=True)
        sizes = torch.bincount(pairs, minlength=len(up)).tolist()
        token = order // top_k
        inputs = x.index_select(0, token)  # [P, K]
        active = _per_expert(inputs, up.transpose(1, 2), sizes).relu_()  # [P, I]
        outputs = _per_expert(active * active, down.transpose(1, 2), sizes)  # [P, K]
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        unsorted = outputs.index_select(0, place).view(*chosen.shape, -1)  # [T, k, K]
        ctx.save_for_backward(inputs, active, unsorted, weights, up, down, order, token, place)
        ctx.sizes = sizes
        return torch.einsum("tkd,tk->td", unsorted, weights.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs, active, unsorted, weights, up, down, order, token, place = ctx.saved_tensors
        sizes = ctx.sizes
        grad_weights = torch.einsum("tkd,td->tk", unsorted, grad).to(weights.dtype) if ctx.needs_input_grad[2] else None
        grad_outputs = grad.index_select(0, token) * weights.flatten().index_select(0, order).to(grad.dtype).unsqueeze(-1)
        grad_active = _per_expert(grad_outputs, down, sizes).mul_(active)  # d(relu(u)^2)/du is 2 relu(u), for any u
        grad_up = _outer_per_expert(grad_active, inputs, sizes).mul_(2.0)
        grad_down = _outer_per_expert(grad_outputs, active * active, sizes)
        grad_inputs = _per_expert(grad_active, up, sizes)
        grad_x = grad_inputs.index_select(0, place).view(*weights.shape, -1).sum(1).mul_(2.0)
        return grad_x, None, grad_weights, grad_up, grad_down


def _per_expert(rows: Tensor, matrices: Tensor, sizes: list[int]) -> Tensor:
    """rows [P, A] in slices of `sizes`, each times its matrix of [E, A, B]; returns [P, B]."""
    out = rows.new_empty(rows.shape[0], matrices.shape[-1])
    start = 0
    for matrix, size in zip(matrices.unbind(), sizes, strict=True):
        if size:
            torch.mm(rows[start : start + size], matrix, out=out[start : start + size])
        start += size
    return out


def _outer_per_expert(left: Tensor, right: Tensor, sizes: list[int]) -> Tensor:
    """left [P, A]^T times right [P, B] within slices of `sizes`; returns [E, A, B], zero for an expert without tokens."""
    out = left.new_zeros(len(sizes), left.shape[-1], right.shape[-1])
    start = 0
    for expert, size in enumerate(sizes):
        if size:
            torch.mm(left[start : start + size].t(), right[start : start + size], out=out[expert])
        start += size
    return out


def _gate_forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    x = at_least_float32(hidden_states)
    scores = F.linear(x, self.weight.to(x.dtype)).sigmoid()
    bias, scale = self.e_score_correction_bias, float(self.routed_scaling_factor)
    self.chosen, weights = route(scores, bias, self.top_k, normalise=self.norm_topk_prob, scale=scale)
    return self.chosen, weights


def _experts_forward(self: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    out: Tensor = SortedExperts.apply(x, chosen, weights, self.up_proj, self.down_proj)  # type: ignore[no-untyped-call]
    return out


def _moe_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """NemotronHMoE.forward; hidden_states [B, L, D]."""
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    routed = self.fc2_latent_proj(self.experts(self.fc1_latent_proj(flat), *self.gate(flat)))
    return (routed + self.shared_experts(flat)).view(hidden_states.shape)


def _shared_forward(self: Any, x: Tensor) -> Tensor:
    active = F.relu(self.up_proj(x))
    return self.down_proj(active * active)


def load(moe: nn.Module, real: Tensor) -> Tensor | None:
    """How many tokens each expert got in the last forward pass, [E]; `real` [T] is False at padding. None without the sorted path."""
    chosen: Tensor | None = getattr(moe.gate, "chosen", None)
    return None if chosen is None else torch.bincount(chosen[real].flatten(), minlength=moe.gate.weight.shape[0])  # type: ignore[union-attr,index]


def install(moe: nn.Module) -> None:
    """Give this one Transformers MoE layer the sorted path; a layer with other activations or grouped routing keeps its own."""
    gate: Any = moe.gate
    if moe.config.mlp_hidden_act != "relu2" or gate.num_group != 1:  # type: ignore[union-attr]
        return
    gate.forward = MethodType(_gate_forward, gate)
    moe.experts.forward = MethodType(_experts_forward, moe.experts)  # type: ignore[union-attr]
    moe.shared_experts.forward = MethodType(_shared_forward, moe.shared_experts)  # type: ignore[union-attr]
    moe.forward = MethodType(_moe_forward, moe)  # type: ignore[method-assign]
