"""The multi-token-prediction head of a NemotronH model, for training.

    hidden t  --hnorm--+
                       +--eh_proj--> attention block --> MoE block --> final_layernorm --> (shared lm_head) token t+2
    token t+1 --enorm--+

Wired as in vLLM's NemotronHMTP, which runs it as the draft of speculative decoding: hidden t is the trunk's final, normed
hidden state, and blocks add to a residual that starts at the output of eh_proj. Transformers neither builds, loads nor
saves this part of the checkpoint, so it is ours. Parameter names below `mtp.` are those of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHAttention, NemotronHMoE, NemotronHRMSNorm

from learner import moe, norm, shared_prefix
from learner.shared_prefix import Shared


class MTPLayer(nn.Module):
    """One block of the head. The first one also joins token and hidden state, the last one also norms the result."""

    def __init__(self, config: NemotronHConfig, index: int) -> None:
        super().__init__()
        kinds = config.mtp_layers_block_type or []
        size, eps = config.hidden_size, config.layer_norm_epsilon
        if index == 0:
            self.enorm = NemotronHRMSNorm(size, eps=eps)
            self.hnorm = NemotronHRMSNorm(size, eps=eps)
            self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.norm = NemotronHRMSNorm(size, eps=eps)
        if kinds[index] == "full_attention":
            self.mixer = NemotronHAttention(config, layer_idx=config.num_hidden_layers + index)
            shared_prefix.install(self.mixer)
        elif kinds[index] == "moe":
            self.mixer = NemotronHMoE(config)
            moe.install(self.mixer)
        else:
            raise ValueError(f"mtp_layers_block_type is {kinds}: block {index} is {kinds[index]!r}, vLLM knows full_attention and moe")
        if index == len(kinds) - 1:
            self.final_layernorm = NemotronHRMSNorm(size, eps=eps)
        for child in self.children():
            if isinstance(child, NemotronHRMSNorm):
                norm.install(child)

    def join(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """The residual [..., D] of hidden states and the tokens behind them. Of the first block only."""
        return self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))  # type: ignore[no-any-return]

    def forward(self, hidden: Tensor, embedded: Tensor, shared: Shared | None = None) -> Tensor:
        if hasattr(self, "eh_proj"):
            hidden = self.join(hidden, embedded)
        layout = {"shared": shared} if isinstance(self.mixer, NemotronHAttention) else {}
        out: Any = self.mixer(self.norm(hidden), **layout)
        hidden = hidden + (out[0] if isinstance(out, tuple) else out)
        return self.final_layernorm(hidden) if hasattr(self, "final_layernorm") else hidden


class MTPHead(nn.Module):
    """All blocks of the one MTP layer that vLLM accepts (`num_nextn_predict_layers` = 1)."""

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__()
        if config.num_nextn_predict_layers != 1:
            raise ValueError(
                f"num_nextn_predict_layers is {config.num_nextn_predict_layers}; vLLM runs exactly 1, repeatedly for more drafts"
            )
        self.layers = nn.ModuleList(MTPLayer(config, index) for index in range(len(config.mtp_layers_block_type or [])))

    @torch.no_grad()
    def initialise(self, std: float) -> None:
        """Fresh weights: normal with `std`, norms at one, router biases at zero."""
        for name, parameter in self.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, std)
        for buffer in self.buffers():
            buffer.zero_()

    def forward(self, hidden: Tensor, embedded: Tensor, shared: Shared | None = None) -> Tensor:
        """hidden [B, L, D] at positions t, embedded [B, L, D] of tokens t+1; returns [B, L, D], to predict tokens t+2.

        With `shared` they are packed, [1, N, D].
        """
        for layer in self.layers:
            hidden = layer(hidden, embedded, shared)
        return hidden

    def ahead(
        self, hidden: Tensor, embedded: Tensor, first: Tensor, following: Sequence[Tensor], starts: tuple[Tensor, Tensor],
        shared: Shared | None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Outputs [T, D] for second, third, ... drafts, from `first` [T, D], the output for the first ones, as the engine computes them:

            queries   head's own output of the draft before, and the token drafted there (`following`, [T, D] each, embedded)
            keys      of the trunk's hidden states up to the start, then of the head's own outputs

        hidden and embedded as in `forward`; starts: row and column [T] of each, row by row, and within its row where `shared`.
        """
        block, rest = self.layers[0], self.layers[1:]
        mixer: Any = block.mixer
        past = [self._by_head(proj(block.norm(block.join(hidden, embedded)))) for proj in (mixer.k_proj, mixer.v_proj)]
        own: list[tuple[Tensor, Tensor]] = []
        for token in following:
            x = block.join(first, token)
            query, key, value = (self._by_head(proj(block.norm(x))) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
            own.append((key, value))
            x = x + mixer.o_proj(_attend(query, past, own, starts, shared, mixer.scaling))
            x = x.unsqueeze(0)
            for layer in rest:
                x = layer(x, x)
            first = x.squeeze(0)
            yield first

    def _by_head(self, projected: Tensor) -> Tensor:
        """[..., H * P] -> [..., H, P]."""
        return projected.unflatten(-1, (-1, self.layers[0].mixer.head_dim))  # type: ignore[arg-type, union-attr]


def _attend(
    query: Tensor,  # [T, H, P]
    past: Sequence[Tensor],  # keys and values [B, L, K, P], or packed
    own: Sequence[tuple[Tensor, Tensor]],  # of each draft up to here, [T, K, P]
    starts: tuple[Tensor, Tensor],
    shared: Shared | None,
    scale: float,
) -> Tensor:
    """[T, H * P]: each query sees its row up to its start, and its own drafts. Row by row: few positions of a row are trained."""
    prefix, rows = (None, past) if shared is None else zip(*(shared.split(t) for t in past), strict=True)
    groups = query.shape[1] // past[0].shape[-2]
    lone_keys, lone_values = (torch.stack(t, 1).repeat_interleave(groups, 2) for t in zip(*own, strict=True))  # [T, J, H, P]
    outs = [query[:0]]
    for row, at in enumerate(_by_row(starts[0], len(rows[0]))):
        if at.start == at.stop:
            continue
        key, value = (t[row] for t in rows)
        if prefix is not None:
            key, value = (torch.cat([a[0], b]) for a, b in zip(prefix, (key, value), strict=True))
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))  # [L, H, P]
        last = starts[1][at] + (len(key) - rows[0].shape[1])
        seen = torch.arange(len(key), device=key.device) <= last[:, None]  # [T', L]
        far = torch.einsum("thp,lhp->htl", query[at], key).masked_fill(~seen, float("-inf"))
        near = torch.einsum("thp,tjhp->htj", query[at], lone_keys[at])
        weights = (torch.cat([far, near], -1) * scale).softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
        far, near = weights.split([len(key), near.shape[-1]], -1)
        outs.append(torch.einsum("htl,lhp->thp", far, value) + torch.einsum("htj,tjhp->thp", near, lone_values[at]))
    return torch.cat(outs).flatten(1)


def _by_row(rows: Tensor, count: int) -> list[slice]:
    """Where each of `count` rows has its entries in sorted `rows`."""
    ends = torch.bincount(rows, minlength=count).cumsum(0).tolist()
    return [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
