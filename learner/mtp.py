"""The multi-token-prediction head of a NemotronH model, for training.

    hidden t  --hnorm--+
                       +--eh_proj--> attention block --> MoE block --> final_layernorm --> (shared lm_head) token t+2
    token t+1 --enorm--+

Wired as in vLLM's NemotronHMTP, which runs it as the draft of speculative decoding: hidden t is the trunk's final, normed
hidden state, and blocks add to a residual that starts at the output of eh_proj. Transformers neither builds, loads nor
saves this part of the checkpoint, so it is ours. Parameter names below `mtp.` are those of the checkpoint.
"""

from __future__ import annotations

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

    def forward(self, hidden: Tensor, embedded: Tensor, shared: Shared | None = None) -> Tensor:
        if hasattr(self, "eh_proj"):
            hidden = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))
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
