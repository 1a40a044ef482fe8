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
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHAttention


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
    (q0, q), (k0, k), (v0, v) = shared.split(query), shared.split(key), shared.split(value)
    first = F.scaled_dot_product_attention(q0.transpose(1, 2), k0.transpose(1, 2), v0.transpose(1, 2), is_causal=True, scale=scale)
    keys, values = (torch.cat([shared.before_each_row(a), b], dim=1).transpose(1, 2) for a, b in ((k0, k), (v0, v)))
    seen = torch.ones(q.shape[1], keys.shape[2], dtype=torch.bool, device=q.device).tril(shared.prefix)
    rest = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=seen, scale=scale)
    return shared.join(first.transpose(1, 2), rest.transpose(1, 2)).flatten(-2)


def _attention_forward(self: Any, hidden_states: Tensor, shared: Shared | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """NemotronHAttention.forward, which knows no positions, for whole sequences or a packed layout."""
    if shared is None:
        result: tuple[Tensor, Tensor | None] = NemotronHAttention.forward(self, hidden_states, **kwargs)
        return result
    query, key, value = (proj(hidden_states).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
    return self.o_proj(attention(query, key, value, shared, self.scaling)), None


def install(mixer: nn.Module) -> None:
    """Let this one attention layer understand `shared=`."""
    mixer.forward = MethodType(_attention_forward, mixer)  # type: ignore[method-assign]
