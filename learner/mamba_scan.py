"""Mamba-2 for training without GPU kernels: a chunked scan made of matrix products.

The recurrence of one head, with state S [N, P] (N = state size, P = head size):

    S_t = exp(dt_t A) S_(t-1) + B_t (dt_t x_t)^T          y_t = C_t S_t + D x_t

Within a chunk of Q positions this is a masked attention, and between chunks only S travels ("Transformers are SSMs",
Dao & Gu 2024, arXiv:2405.21060, section 6). B and C are shared by the heads of a group, so every product over N is
taken once per group with all its heads side by side; only the [Q, Q] decay mask is per head. Nothing of size
[L, H, P, N] is ever made, which is what makes a 32k-token sequence fit and Transformers' own CPU path slow.

The time step is not clamped from below, as in vLLM and in the published checkpoints' `time_step_limit` of (0, inf).
Transformers clamps it to `time_step_min` in its chunked path and not in its step-by-step path; the learner must agree
with the engine that sampled.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 32
"""Positions per chunk, Q. The result does not depend on it; the decay mask costs L*H*Q and the states L*H*P*N/Q."""


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision is raised to float32; float32 and float64 stay, so that tests can be exact."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def chunked_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """Run the recurrence above over whole sequences, from a zero state.

    x [B, L, H, P] inputs; dt [B, L, H] positive time steps; a [H] negative decay rates; b, c [B, L, G, N] with G
    dividing H; d [H] skip weights. Returns y [B, L, H, P]. L needs not be a multiple of `chunk`.
    """
    batch, length, heads, width = x.shape
    groups, states = b.shape[2:]
    per_group = heads // groups
    chunk = min(chunk, length)
    pad = -length % chunk
    u = x * dt.unsqueeze(-1)
    decay = dt * a
    if pad:  # dt = 0 in the padding: it neither decays the state nor adds to it
        u, b, c = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (u, b, c))
        decay = F.pad(decay, (0, 0, 0, pad))
    chunks = (length + pad) // chunk

    # g: group, h: head of the group, q: position in the chunk
    u = u.view(batch, chunks, chunk, groups, per_group, width)
    b = b.view(batch, chunks, chunk, groups, states).transpose(2, 3)  # [B, chunks, g, q, N]
    c = c.view(batch, chunks, chunk, groups, states).transpose(2, 3)
    total = decay.view(batch, chunks, chunk, groups, per_group).permute(0, 1, 3, 4, 2).cumsum(-1)  # [B, chunks, g, h, q]

    # Within the chunk: y_l += sum over s <= l of (C_l . B_s) exp(total_l - total_s) u_s.
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    mask = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill_(later, -torch.inf).exp_()  # [B, chunks, g, h, l, s]
    scores = c @ b.transpose(-1, -2)  # [B, chunks, g, l, s]
    heads_first = u.permute(0, 1, 3, 4, 2, 5)  # [B, chunks, g, h, q, P]
    y = ((mask * scores.unsqueeze(3)) @ heads_first).permute(0, 1, 4, 2, 3, 5)  # [B, chunks, q, g, h, P]

    if chunks > 1:
        # What each chunk adds to the state by its end, all heads of a group side by side: [B, chunks, g, N, h * P].
        to_end = (total[..., -1:] - total).exp().permute(0, 1, 4, 2, 3).unsqueeze(-1)
        weighted = (u * to_end).transpose(2, 3).reshape(batch, chunks, groups, chunk, per_group * width)
        added = b.transpose(-1, -2) @ weighted
        before = _states_before(added, total[..., -1], width)
        carried = (c @ before).view(batch, chunks, groups, chunk, per_group, width).transpose(2, 3)
        y = y + carried * total.exp().permute(0, 1, 4, 2, 3).unsqueeze(-1)

    y = y.reshape(batch, length + pad, heads, width)[:, :length]
    return y + x * d.unsqueeze(-1)


def _states_before(added: Tensor, decay: Tensor, width: int) -> Tensor:
    """The state at the start of every chunk.

    added [B, chunks, g, N, h * P]: what each chunk adds; decay [B, chunks, g, h]: log decay over each whole chunk.
    The recurrence over chunks is itself written as one masked product, since there are few of them.
    """
    batch, chunks, groups, states, _ = added.shape
    per_group = decay.shape[-1]
    total = decay.permute(0, 2, 3, 1).cumsum(-1)  # [B, g, h, chunks]
    before = torch.cat([torch.zeros_like(total[..., :1]), total[..., :-1]], dim=-1)
    not_earlier = torch.ones(chunks, chunks, dtype=torch.bool, device=added.device).triu()
    mask = (before.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill_(not_earlier, -torch.inf).exp_()  # [B, g, h, to, from]
    flat = added.view(batch, chunks, groups, states, per_group, width).permute(0, 2, 4, 1, 3, 5)
    flat = mask @ flat.reshape(batch, groups, per_group, chunks, states * width)
    flat = flat.view(batch, groups, per_group, chunks, states, width).permute(0, 3, 1, 4, 2, 5)
    return flat.reshape(batch, chunks, groups, states, per_group * width)


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise causal convolution and SiLU. x [B, L, C], weight [C, 1, K], bias [C]; returns [B, L, C].

    A sum of K shifted products: the channels stay last, where the projections before and after want them.
    """
    kernel, length = weight.shape[-1], x.shape[1]
    taps = weight.squeeze(1).unbind(-1)
    out = x * taps[-1] if bias is None else torch.addcmul(bias, x, taps[-1])
    for back in range(1, min(kernel, length)):
        out = out + F.pad(x[:, : length - back] * taps[-1 - back], (0, 0, back, 0))
    return F.silu(out)


def gated_rms_norm(norm: nn.Module, x: Tensor, gate: Tensor) -> Tensor:
    """RMSNorm of x * silu(gate) within groups of `norm.group_size` channels. x, gate [B, L, C]."""
    x = x * F.silu(at_least_float32(gate))
    group = int(norm.group_size)  # type: ignore[arg-type]
    grouped = F.rms_norm(x.unflatten(-1, (-1, group)), (group,), eps=float(norm.variance_epsilon))  # type: ignore[arg-type]
    return grouped.flatten(-2) * norm.weight


def _conv_forward(self: nn.Conv1d, x: Tensor) -> Tensor:
    return causal_conv_silu(x, self.weight, self.bias)


def _mixer_forward(
    self: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """NemotronHMamba2Mixer.forward for whole, right-padded sequences; hidden_states [B, L, D]."""
    if cache_params is not None or attention_mask is not None:
        raise ValueError(
            "this Mamba-2 layer was made fast for training: it wants whole right-padded sequences, without a cache or a mask; "
            "generate with the engine, or with a copy loaded by Transformers"
        )
    batch, length, _ = hidden_states.shape
    shared = self.n_groups * self.ssm_state_size
    gate, conv_in, dt = self.in_proj(hidden_states).split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
    x, b, c = at_least_float32(self.conv1d(conv_in)).split([self.intermediate_size, shared, shared], dim=-1)
    y = chunked_scan(
        x.view(batch, length, self.num_heads, self.head_dim),
        F.softplus(at_least_float32(dt) + at_least_float32(self.dt_bias)),
        -torch.exp(at_least_float32(self.A_log)),
        b.view(batch, length, self.n_groups, self.ssm_state_size),
        c.view(batch, length, self.n_groups, self.ssm_state_size),
        at_least_float32(self.D),
    )
    return self.out_proj(self.norm(y.reshape(batch, length, -1), gate).to(hidden_states.dtype))


def install(mixer: nn.Module) -> None:
    """Give this one Transformers Mamba-2 layer the fast path.

    Only forward methods of this instance are replaced, and every weight is still read inside the module that owns it,
    so that hooks (DeepSpeed's gathering of partitioned weights, for one) keep working.
    """
    if mixer.activation not in ("silu", "swish"):
        raise ValueError(f"Mamba-2 layer with activation {mixer.activation!r}; the fast path knows silu only")
    mixer.conv1d.forward = MethodType(_conv_forward, mixer.conv1d)  # type: ignore[union-attr]
    mixer.norm.forward = MethodType(gated_rms_norm, mixer.norm)  # type: ignore[union-attr]
    mixer.forward = MethodType(_mixer_forward, mixer)  # type: ignore[method-assign]
