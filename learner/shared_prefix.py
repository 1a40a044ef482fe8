"""Rows that continue one prefix: the prompt of a group goes through the model once, not once per rollout.

    ids      prefix p p p p p p    rows  a a a        packed  p p p p p p a a a b b b c c c      [1, P + B * S, ...]
                                         b b b
                                         c c c

Everything per token (norms, projections, experts) works on the packed positions. Only the two mixers look along the
sequence, and they are told the layout: attention lets each row see the prefix and itself, Mamba-2 starts each row from the
state after the prefix (`mamba_scan`). The gradient of the prefix is the sum over its rows, as it is when each row repeats it.

GRPO samples G rollouts of one prompt; with 4k tokens of document and 50 of answer this computes (P + G * S) / (G * (P + S)) of the
positions, a seventh at G = 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHAttention

from rl_core.architectures import has_full_attention_only

SHARED_SDPA = "polyrl_shared"
"""Name of our attention in Transformers' registry: its own "sdpa", and `attention` for a packed layout."""


@dataclass(frozen=True, slots=True)
class Shared:
    """The layout of a packed tensor [1, P + B * S, ...]."""

    prefix: int  # P
    rows: int  # B

    def split(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Prefix [1, P, ...] and rows [B, S, ...]."""
        return packed[:, : self.prefix], packed[0, self.prefix :].unflatten(0, (self.rows, -1))

    def join(self, prefix: Tensor, rows: Tensor) -> Tensor:
        """The inverse of `split`."""
        return torch.cat([prefix, rows.flatten(0, 1).unsqueeze(0)], dim=1)

    def before_each_row(self, prefix: Tensor) -> Tensor:
        """[1, ...] as [B, ...], without a copy."""
        return prefix.expand(self.rows, *prefix.shape[1:])


def attention(query: Tensor, key: Tensor, value: Tensor, shared: Shared, scale: float) -> Tensor:
    """Causal attention over a packed layout. query [1, N, H, D], key and value [1, N, K, D] with K dividing H; returns [1, N, H * D]."""
    key, value = (t.repeat_interleave(query.shape[2] // t.shape[2], dim=2) for t in (key, value))
    if query.is_cpu:
        out: Tensor = _SplitAttention.apply(query, key, value, shared, scale)  # type: ignore[no-untyped-call]
        return out.flatten(-2)
    (q0, q), (k0, k), (v0, v) = shared.split(query), shared.split(key), shared.split(value)
    first = F.scaled_dot_product_attention(q0.transpose(1, 2), k0.transpose(1, 2), v0.transpose(1, 2), is_causal=True, scale=scale)
    keys, values = (torch.cat([shared.before_each_row(a), b], dim=1).transpose(1, 2) for a, b in ((k0, k), (v0, v)))
    seen = torch.ones(q.shape[1], keys.shape[2], dtype=torch.bool, device=q.device).tril(shared.prefix)
    rest = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=seen, scale=scale)
    return shared.join(first.transpose(1, 2), rest.transpose(1, 2)).flatten(-2)


class _SplitAttention(torch.autograd.Function):
    """Without a mask and without a copy of the prefix for each row: query, key and value [1, N, H, D] -> [1, N, H, D].

    What a row's query sees falls in two parts, the prefix and its own row. Of each, PyTorch's kernel gives the output o and the log of its
    sum of exponentials z, and together they are

        z = log(exp z_prefix + exp z_own)        o = exp(z_prefix - z) o_prefix + exp(z_own - z) o_own

    The kernel's backward pass needs of the forward one only o and z. Given those of the whole, it finds a part's exact share of the
    gradients (as in ring attention, Liu et al. 2023, arXiv:2310.01889).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, shared: Shared, scale: float) -> Tensor:  # type: ignore[override]
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        (q0, q), (k0, k), (v0, v) = (_by_head(t, shared) for t in (query, key, value))
        first, z0 = kernel(q0, k0, v0, 0.0, True, scale=scale)
        seen, z_seen = kernel(_in_a_line(q), k0, v0, 0.0, False, scale=scale)
        own, z_own = kernel(q, k, v, 0.0, True, scale=scale)
        seen, z_seen = _in_rows(seen, shared), _in_rows(z_seen, shared)
        z = torch.logaddexp(z_seen, z_own)
        rest = seen * (z_seen - z).exp().unsqueeze(-1).to(seen.dtype) + own * (z_own - z).exp().unsqueeze(-1).to(own.dtype)
        ctx.save_for_backward(query, key, value, first, z0, rest, z)
        ctx.shared, ctx.scale = shared, scale
        return shared.join(first.transpose(1, 2), rest.transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kernel, scale, shared = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, ctx.scale, ctx.shared
        query, key, value, first, z0, rest, z = ctx.saved_tensors
        (g0, g), (q0, q), (k0, k), (v0, v) = (_by_head(t, shared) for t in (grad, query, key, value))
        of_prefix = kernel(g0, q0, k0, v0, first, z0, 0.0, True, scale=scale)
        of_seen = kernel(_in_a_line(g), _in_a_line(q), k0, v0, _in_a_line(rest), _in_a_line(z), 0.0, False, scale=scale)
        of_own = kernel(g, q, k, v, rest, z, 0.0, True, scale=scale)
        gq = shared.join(of_prefix[0].transpose(1, 2), (of_own[0] + _in_rows(of_seen[0], shared)).transpose(1, 2))
        gk, gv = (shared.join((of_prefix[i] + of_seen[i]).transpose(1, 2), of_own[i].transpose(1, 2)) for i in (1, 2))
        return gq, gk, gv, None, None


def _by_head(packed: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
    """[1, N, H, D] -> prefix [1, H, P, D] and rows [B, H, S, D]."""
    prefix, rows = shared.split(packed)
    return prefix.transpose(1, 2), rows.transpose(1, 2)


def _in_a_line(rows: Tensor) -> Tensor:
    """[B, H, S, ...] -> [1, H, B * S, ...]: all rows as one."""
    return rows.transpose(1, 2).flatten(0, 1).transpose(0, 1).unsqueeze(0)


def _in_rows(line: Tensor, shared: Shared) -> Tensor:
    """The inverse of `_in_a_line`."""
    return line.squeeze(0).transpose(0, 1).unflatten(0, (shared.rows, -1)).transpose(1, 2)


def _attention_forward(self: Any, hidden_states: Tensor, shared: Shared | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """NemotronHAttention.forward, which knows no positions, for whole sequences or a packed layout."""
    if shared is None:
        result: tuple[Tensor, Tensor | None] = NemotronHAttention.forward(self, hidden_states, **kwargs)
        return result
    query, key, value = (proj(hidden_states).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
    return self.o_proj(attention(query, key, value, shared, self.scaling)), None


def install(mixer: nn.Module) -> None:
    """Let this one attention layer of a hybrid understand `shared=`."""
    mixer.forward = MethodType(_attention_forward, mixer)  # type: ignore[method-assign]


def _registered_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, shared: Shared | None = None,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """As Transformers calls it: query [B, H, N, D], key and value [B, K, N, D] -> [B, N, H, D]."""
    if shared is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)  # type: ignore[return-value]
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention(query, key, value, shared, scale).unflatten(-1, query.shape[2:]), None


def install_registered(config: PretrainedConfig) -> bool:
    """Let a model of this configuration, whose layers take their attention from the registry, understand `shared=`; False if it cannot.

    Transformers makes no mask for an attention that it does not know: ours is causal by itself.
    """
    if not has_full_attention_only(config.to_dict()):
        return False
    AttentionInterface.register(SHARED_SDPA, _registered_attention)
    config._attn_implementation = SHARED_SDPA
    return True


def positions(shared: Shared, length: int, device: torch.device) -> Tensor:
    """[1, P + B * S] of a packed layout whose rows have `length` positions: each row goes on where the prefix ends."""
    at = torch.arange(shared.prefix + length, device=device)
    return torch.cat([at[: shared.prefix], at[shared.prefix :].repeat(shared.rows)])[None]
