"""Logprobs of given tokens straight from hidden states, without holding logits for all positions.

    z = (W h + bias) / temperature        logprob = z_target - log sum exp z        entropy = log sum exp z - sum p z

Positions pass through the LM head in blocks: on a CPU small enough for the cache, elsewhere small enough for memory. If the
probabilities of all positions are small they are kept for the backward pass, otherwise recomputed there. The entropy is a
measurement and carries no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from learner.norm import at_least_float32

KEEP_FLOATS = 2**24
"""Probabilities up to this many (64 MiB) are kept for the backward pass."""
BLOCK_FLOATS = 2**17
"""Logits per block on a CPU (half a MiB), but never fewer than `MIN_ROWS` rows, or the matrix products become slow."""
MIN_ROWS = 64
DEVICE_ROWS = 4096
"""Rows per block elsewhere."""
SMALLEST = -80.0
"""Logits this far below the largest stop there: their probability (2e-35) is lost in any sum, and denormal numbers are slow."""


def head_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: Tensor | None, *, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """hidden [n, D], weight [V, D], bias [V], targets [n], temperature [n] (None is 1) -> logprobs and entropies [n], float32."""
    if rows is None:
        rows = DEVICE_ROWS if hidden.is_cuda else max(MIN_ROWS, BLOCK_FLOATS // len(weight))
    logprobs, entropy = _HeadLogprobs.apply(hidden, weight, bias, targets, temperature, rows)  # type: ignore[no-untyped-call]
    return logprobs, entropy


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: Tensor | None, rows: int
    ) -> tuple[Tensor, Tensor]:
        kept = None
        if any(ctx.needs_input_grad[:3]) and len(hidden) * len(weight) <= KEEP_FLOATS:
            kept = hidden.new_empty(len(hidden), len(weight), dtype=_wide(hidden.dtype))
        logprobs = hidden.new_empty(len(hidden), dtype=_wide(hidden.dtype))
        entropy = torch.empty_like(logprobs)
        for start in range(0, len(hidden), rows):
            at = slice(start, start + rows)
            z = _shifted_logits(hidden[at], weight, bias, None if temperature is None else temperature[at])
            p = z.exp() if kept is None else torch.exp(z, out=kept[at])
            mass = p.sum(-1)
            logprobs[at] = z.gather(-1, targets[at].unsqueeze(-1)).squeeze(-1) - mass.log()
            p.div_(mass.unsqueeze(-1))
            entropy[at] = mass.log() - torch.linalg.vecdot(p, z)
        ctx.save_for_backward(hidden, weight, bias, targets, temperature, kept)
        ctx.rows = rows
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, targets, temperature, kept = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        ghidden = torch.empty_like(hidden) if wants_hidden else None
        gweight = torch.zeros_like(weight) if wants_weight else None
        gbias = torch.zeros_like(bias) if wants_bias else None
        pull = (grad if temperature is None else grad / temperature).unsqueeze(-1)
        for start in range(0, len(hidden), ctx.rows):
            at = slice(start, start + ctx.rows)
            if kept is None:
                p = _shifted_logits(hidden[at], weight, bias, None if temperature is None else temperature[at]).softmax(-1)
            else:
                p = kept[at]
            gz = torch.mul(p, -pull[at]).scatter_add_(-1, targets[at].unsqueeze(-1), pull[at]).to(weight.dtype)
            if ghidden is not None:
                torch.mm(gz, weight, out=ghidden[at])
            if gweight is not None:
                gweight.addmm_(gz.t(), hidden[at])
            if gbias is not None:
                gbias += gz.sum(0)
        return ghidden, gweight, gbias, None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _shifted_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor | None) -> Tensor:
    """Logits over the temperature, minus the largest of the row: at most 0, at least `SMALLEST`."""
    z = at_least_float32(F.linear(hidden, weight, bias))
    if temperature is not None:
        z.div_(temperature.unsqueeze(-1))
    return z.sub_(z.amax(-1, keepdim=True)).clamp_(min=SMALLEST)
