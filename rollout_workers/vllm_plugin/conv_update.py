"""The Mamba convolution of decoding steps, with the roll-back that speculative decoding needs.

Defect upstream (vLLM 0.32, CPU): `causal_conv1d_update` accepts `num_accepted_tokens` and ignores it. After a step whose draft
tokens were partly rejected, the rejected ones stay in the convolution state, so every later token is sampled from a wrong
distribution (0.26 nats on average), without an error. The CUDA kernel is right.

The state of a sequence is [dim, width - 1 + k] for k draft tokens: after a step over n tokens it holds the inputs of the last
width - 1 tokens before the step, except the oldest, followed by the step's n tokens. Which of the n were accepted is known at
the next step only; a of them were: the window then starts at offset a - 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d_update(
    x: Tensor,  # [N, dim] tokens of all sequences, one after the other
    conv_state: Tensor,  # [slots, dim, width - 1 + k]
    weight: Tensor,  # [dim, width]
    bias: Tensor | None = None,
    activation: bool | str | None = None,
    conv_state_indices: Tensor | None = None,  # [B] or [B, 1 + k], of which the first column is the slot
    num_accepted_tokens: Tensor | None = None,  # [B] of the last step, 1 to 1 + k
    query_start_loc: Tensor | None = None,  # [B + 1]
    **kwargs: Any,
) -> Tensor:
    """Convolve the new tokens of B sequences in one go; returns [N, dim] and updates `conv_state` in place."""
    if num_accepted_tokens is None:
        from vllm.model_executor.layers.mamba.ops.cpu.causal_conv1d import causal_conv1d_update_cpu

        return causal_conv1d_update_cpu(
            x, conv_state, weight, bias, activation, conv_state_indices=conv_state_indices, query_start_loc=query_start_loc, **kwargs
        )
    assert conv_state_indices is not None
    assert query_start_loc is not None
    if x.dtype == conv_state.dtype == weight.dtype == torch.float32 and bias is not None:
        from rollout_workers.vllm_plugin import kernels

        first = conv_state_indices[:, 0] if conv_state_indices.dim() > 1 else conv_state_indices
        out = torch.empty(x.shape)
        places = kernels.views(first.int(), num_accepted_tokens.int(), query_start_loc.int(), out)
        kernels.conv_step(*kernels.views(x, conv_state, weight, bias), bool(activation), *places)
        return out
    return by_operations(x, conv_state, weight, bias, bool(activation), conv_state_indices, num_accepted_tokens, query_start_loc)


def by_operations(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: bool,
    conv_state_indices: Tensor,
    num_accepted_tokens: Tensor,
    query_start_loc: Tensor,
) -> Tensor:
    """The same in PyTorch's operations, for any type."""
    width = weight.shape[1]
    slots = (conv_state_indices[:, 0] if conv_state_indices.dim() > 1 else conv_state_indices).long()
    lengths = query_start_loc.diff()
    batch, longest = len(lengths), int(lengths.max())
    uniform = batch * longest == len(x)
    rows: Tensor | None = None
    if not uniform:  # [B, longest] index of each token in x; the tail of a shorter sequence repeats a token that is never read back
        rows = (query_start_loc[:-1, None] + torch.arange(longest)).clamp(max=len(x) - 1).long()
    new = x.view(batch, longest, -1) if rows is None else x[rows]

    offset = (num_accepted_tokens.long() - 1).clamp(min=0)
    states = conv_state[slots].transpose(1, 2)  # [B, width - 1 + k, dim]
    past = (offset[:, None] + torch.arange(width - 1))[..., None].expand(-1, -1, states.shape[2])
    window = torch.cat([states.gather(1, past).to(x.dtype), new], 1)  # [B, width - 1 + longest, dim]

    # A depthwise convolution of width 4 as 4 multiply-adds: an order of magnitude cheaper than F.conv1d(groups=dim) at this size.
    taps = weight.to(x.dtype)
    out = window[:, :longest] * taps[:, 0]
    for tap in range(1, width):
        out.addcmul_(window[:, tap : tap + longest], taps[:, tap])
    if bias is not None:
        out += bias
    if activation:
        out = F.silu(out)

    kept = window[:, 1:].transpose(1, 2).to(conv_state.dtype)
    if uniform:
        conv_state[slots, :, : kept.shape[2]] = kept
        return out.reshape(len(x), -1)
    live = lengths > 0
    conv_state[slots[live], :, : kept.shape[2]] = kept[live]
    return out[torch.arange(longest) < lengths[:, None]]


def install() -> None:
    """Replace the stock function where the Mamba-2 layer looks it up."""
    import vllm.model_executor.layers.mamba.mamba_mixer2 as mixer2

    mixer2.causal_conv1d_update = causal_conv1d_update
