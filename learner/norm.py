"""RMSNorm as one autograd node, in float32 at least.

    y = w x / rms(x)        rms(x) = sqrt(mean x^2 + eps)

PyTorch's own on a CPU is a chain of seven nodes, each with passes over the activations; a narrow model norms so often that this
showed as a tenth of its training time.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision is raised to float32; float32 and float64 stay, so that tests can be exact."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., *weight.shape], normed over the last axis; weight [D], or [groups, D] for a norm within groups."""
    out: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        inverse = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        gweight = (grad * normed).sum(tuple(range(x.ndim - weight.ndim)))
        gnormed = grad * weight
        along = torch.linalg.vecdot(gnormed, normed).div_(-x.shape[-1]).unsqueeze(-1)
        return gnormed.addcmul_(normed, along).mul_(inverse), gweight, None


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(at_least_float32(hidden_states), at_least_float32(self.weight), self.variance_epsilon).to(hidden_states.dtype)


def install(norm: nn.Module) -> None:
    """Give this one NemotronHRMSNorm the fused path."""
    norm.forward = MethodType(_norm_forward, norm)  # type: ignore[method-assign]
