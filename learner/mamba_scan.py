"""Mamba-2 for training: a chunked scan made of matrix products, and its convolution.

The recurrence of one head, with state S [N, P] (N = state size, P = head size):

    S_t = exp(dt_t A) S_(t-1) + B_t u_t^T          y_t = C_t S_t          u_t = dt_t x_t

Written over pairs of positions, with T the running sum of dt A, it is a decayed, masked attention:

    y_t = sum over s <= t of (C_t . B_s) exp(T_t - T_s) u_s

Within a chunk of Q positions it is computed so, and between chunks only S travels ("Transformers are SSMs", Dao & Gu 2024,
arXiv:2405.21060, section 6). B and C are shared by the heads of a group, so every product over N is taken once per group
with all its heads side by side; only the [Q, Q] decay is per head. Nothing of size [L, H, P, N] is ever made, which is what
makes a 32k-token sequence fit and Transformers' own CPU path slow.

The backward pass is written out, since it is the same computation run from the end. The decay needs no backward pass through
the exponentials: by the pair form, d loss / d T_t = gy_t . y_t - u_t . gu_t.

On a CPU this is bound by memory, not arithmetic. So both functions here work through blocks that stay in the cache. On a GPU
the Triton kernels of the `mamba_ssm` package take the scan over where it is installed and the model is in half precision; in float32
they would round to TF32.

The time step is not clamped from below, as in vLLM and in the published checkpoints' `time_step_limit` of (0, inf).
Transformers clamps it to `time_step_min` in its chunked path and not in its step-by-step path; the learner must agree
with the engine that sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from learner.norm import at_least_float32, rms_norm
from learner.shared_prefix import Shared

CHUNK = 32
"""Positions per chunk on a CPU, Q. The result does not depend on it; the decay costs L*H*Q and the states L*H*P*N/Q."""
DEVICE_CHUNK = 128
"""Positions per chunk elsewhere: states travel from chunk to chunk one kernel at a time."""
KERNEL_CHUNK = 256
"""Positions per chunk of `mamba_ssm`: what its own layers take by default."""
BLOCK_FLOATS = 65_536
"""Size of the largest array that a block makes on a CPU: a quarter of a MiB, so that a few of them fit the second-level cache."""
NEGLIGIBLE = -50.0
"""Log decays stop here (2e-22, lost in any sum): denormal numbers and exponentials of -inf are ten times slower than others."""


def chunked_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, *, start: Tensor | None = None, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Run the recurrence above over whole sequences, from state `start` or from zero, and add the skip d x.

    x [B, L, H, P] inputs; dt [B, L, H] positive time steps; a [H] negative decay rates; b, c [B, L, G, N] with G
    dividing H; d [H] skip weights. L needs not be a multiple of `chunk`. Returns y [B, L, H, P] and the state after the last
    position, [B, G, N, H / G * P]; `start` has the same shape.
    """
    batch, length, heads, width = x.shape
    groups, states = b.shape[2:]
    chunk = min(chunk or (CHUNK if x.is_cpu else DEVICE_CHUNK), length)
    pad = -length % chunk
    u, decay = x * dt.unsqueeze(-1), dt * a
    if pad:  # no decay and no input in the padding: it leaves the state alone
        u, b, c = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (u, b, c))
        decay = F.pad(decay, (0, 0, 0, pad))
    chunked = (batch, (length + pad) // chunk, chunk, groups)
    if start is None:
        start = u.new_zeros(batch, groups, states, heads // groups * width)
    y, end = _Scan.apply(  # type: ignore[no-untyped-call]
        u.reshape(*chunked, heads // groups, width),
        decay.reshape(*chunked, heads // groups),
        b.reshape(*chunked, states),
        c.reshape(*chunked, states),
        start,
    )
    return torch.addcmul(y.view(batch, length + pad, heads, width)[:, :length], x, d.unsqueeze(-1)), end


class _Scan(torch.autograd.Function):
    """The recurrence over chunked arrays. B: batch, c: chunk, q: position in the chunk, g: group, h: head of the group.

    u [B, c, q, g, h, P], decay [B, c, q, g, h], b and c [B, c, q, g, N], start [B, g, N, h * P]; returns y like u, end like start.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, decay: Tensor, b: Tensor, c: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        total = decay.cumsum(2)  # within the chunk
        states, end = _travel(_contract(b, u, _decay(total[:, :, -1:] - total)), _decay(total[:, :, -1]), start)
        y = _expand(c, states, _decay(total), like=u)
        for at, mask, scores in _blocks(total, b, c):
            inputs = u.flatten(0, 1)[at].permute(0, 2, 3, 1, 4)  # [n, g, h, q, P]
            y.flatten(0, 1)[at] += (mask.mul_(scores.unsqueeze(2)) @ inputs).permute(0, 3, 1, 2, 4)
        ctx.save_for_backward(u, total, b, c, states, y, end)
        return y, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor, gend: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # type: ignore[override]
        u, total, b, c, states, y, end = ctx.saved_tensors
        gy = gy.contiguous()
        from_start = _decay(total)
        to_end = _decay(total[:, :, -1:] - total)
        # The gradient of each chunk's last state travels backwards as the states travel forwards.
        gstates, gstart = _travel(_contract(c, gy, from_start).flip(1), _decay(total[:, :, -1]).flip(1), gend)
        gstates = gstates.flip(1)
        gu = _expand(b, gstates, to_end, like=u)
        gb = _match(u, to_end, gstates)
        gc = _match(gy, from_start, states)
        for at, mask, scores in _blocks(total, b, c):
            inputs = u.flatten(0, 1)[at].permute(0, 2, 3, 1, 4)  # [n, g, h, q, P]
            grads = gy.flatten(0, 1)[at].permute(0, 2, 3, 1, 4).contiguous()
            gscores = (grads @ inputs.transpose(-1, -2)).mul_(mask).sum(2)  # [n, g, q, q]
            gu.flatten(0, 1)[at] += (mask.mul_(scores.unsqueeze(2)).transpose(-1, -2) @ grads).permute(0, 3, 1, 2, 4)
            gc.flatten(0, 1)[at] += (gscores @ b.flatten(0, 1)[at].transpose(1, 2)).transpose(1, 2)
            gb.flatten(0, 1)[at] += (gscores.transpose(-1, -2) @ c.flatten(0, 1)[at].transpose(1, 2)).transpose(1, 2)
        gtotal = (torch.linalg.vecdot(gy, y) - torch.linalg.vecdot(u, gu)).flatten(1, 2)  # over the whole sequence
        gtotal[:, -1] += (gend * end).unflatten(-1, (u.shape[-2], -1)).sum((2, 4))
        gdecay = gtotal.flip(1).cumsum(1).flip(1).view_as(total)
        return gu, gdecay, gb, gc, gstart


def _decay(log: Tensor) -> Tensor:
    return log.clamp(min=NEGLIGIBLE).exp_()


def _blocks(total: Tensor, b: Tensor, c: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(which chunks n of all B * c, decay from s to t [n, g, h, t, s] (ours to overwrite), C_t . B_s [n, g, t, s])."""
    total, b, c = total.flatten(0, 1).permute(0, 2, 3, 1).contiguous(), b.flatten(0, 1), c.flatten(0, 1)
    chunks, groups, heads, chunk = total.shape
    not_later = torch.ones(chunk, chunk, dtype=total.dtype, device=total.device).tril()
    size = chunks if total.is_cuda else max(1, BLOCK_FLOATS // (groups * heads * chunk * chunk))
    for start in range(0, chunks, size):
        at = slice(start, min(start + size, chunks))
        mask = (total[at].unsqueeze(-1) - total[at].unsqueeze(-2)).clamp_(NEGLIGIBLE, 0.0).exp_().mul_(not_later)
        scores = c[at].transpose(1, 2) @ b[at].permute(0, 2, 3, 1)
        yield at, mask, scores


def _contract(keys: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """What each chunk adds to the state: keys [B, c, q, g, N], values [.., q, g, h, P], scale [.., q, g, h] -> [B, c, g, N, h * P]."""
    scaled = (values * scale.unsqueeze(-1)).flatten(-2)
    return keys.permute(0, 1, 3, 4, 2) @ scaled.transpose(2, 3)


def _expand(keys: Tensor, states: Tensor, scale: Tensor, *, like: Tensor) -> Tensor:
    """What each position reads from its chunk's state [B, c, g, N, h * P]: an array like `like` [B, c, q, g, h, P], contiguous."""
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    read = (keys.transpose(2, 3) @ states).transpose(2, 3).unflatten(-1, like.shape[-2:])
    return torch.mul(read, scale.unsqueeze(-1), out=out)


def _match(values: Tensor, scale: Tensor, states: Tensor) -> Tensor:
    """Gradient of the keys in `_expand` or `_contract`: [B, c, q, g, N]."""
    scaled = (values * scale.unsqueeze(-1)).flatten(-2)
    return (scaled.transpose(2, 3) @ states.transpose(-1, -2)).transpose(2, 3).contiguous()


def _travel(added: Tensor, decay: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The state at the start of every chunk, and after the last one.

    added [B, c, g, N, h * P], decay over each chunk [B, c, g, h], start [B, g, N, h * P] -> like added, like start.
    """
    out, end = (
        torch.empty_like(added, memory_format=torch.contiguous_format),
        torch.empty_like(start, memory_format=torch.contiguous_format),
    )
    per_head = added.unflatten(-1, (decay.shape[-1], -1))
    state = out.unflatten(-1, (decay.shape[-1], -1))  # [B, c, g, N, h, P], a view of out
    out[:, 0] = start
    for i in range(added.shape[1]):
        after = state[:, i + 1] if i + 1 < added.shape[1] else end.unflatten(-1, (decay.shape[-1], -1))
        torch.addcmul(per_head[:, i], state[:, i], decay[:, i].unsqueeze(2).unsqueeze(-1), out=after)
    return out, end


class _ConvSilu(torch.autograd.Function):
    """silu of a depthwise causal convolution, as K shifted products over blocks of rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        before = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # before silu
        out = torch.empty_like(before)
        for at in _row_blocks(x):
            part = torch.addcmul(bias, x[at], taps[-1], out=before[at])
            for back in range(1, min(len(taps), x.shape[1])):
                part[:, back:].addcmul_(x[at][:, :-back], taps[-1 - back])
            torch.ops.aten.silu.out(part, out=out[at])
        ctx.save_for_backward(x, taps, before)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        x, taps, before = ctx.saved_tensors
        gx = torch.empty_like(before)
        gtaps, gbias = torch.zeros_like(taps), torch.zeros_like(taps[0])
        for at in _row_blocks(x):
            g = torch.ops.aten.silu_backward(grad[at], before[at])
            part = torch.mul(g, taps[-1], out=gx[at])
            gbias += g.sum((0, 1))
            gtaps[-1] += (g * x[at]).sum((0, 1))
            for back in range(1, min(len(taps), x.shape[1])):
                part[:, :-back].addcmul_(g[:, back:], taps[-1 - back])
                gtaps[-1 - back] += (g[:, back:] * x[at][:, :-back]).sum((0, 1))
        return gx, gtaps, gbias


def _row_blocks(x: Tensor) -> Iterator[slice]:
    size = len(x) if x.is_cuda else max(1, BLOCK_FLOATS // (x.shape[1] * x.shape[2]))
    return (slice(start, start + size) for start in range(0, len(x), size))


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise causal convolution and SiLU. x [B, L, C], weight [C, 1, K], bias [C]; returns [B, L, C].

    The channels stay last, where the projections before and after want them.
    """
    taps = weight.squeeze(1).t().contiguous()  # [K, C]
    bias = torch.zeros_like(taps[0]) if bias is None else bias
    out: Tensor = _ConvSilu.apply(x, taps, bias)  # type: ignore[no-untyped-call]
    return out


def gated_rms_norm(norm: nn.Module, x: Tensor, gate: Tensor) -> Tensor:
    """RMSNorm of x * silu(gate) within groups of `norm.group_size` channels. x, gate [B, L, C]."""
    x = (x * F.silu(at_least_float32(gate))).unflatten(-1, (-1, int(norm.group_size)))  # type: ignore[arg-type]
    return rms_norm(x, at_least_float32(norm.weight).view(x.shape[-2:]), float(norm.variance_epsilon)).flatten(-2)  # type: ignore[arg-type]


def _conv_forward(self: nn.Conv1d, x: Tensor) -> Tensor:
    return causal_conv_silu(x, self.weight, self.bias)


def _mixer_forward(
    self: Any,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    shared: Shared | None = None,
    **kwargs: Any,
) -> Tensor:
    """NemotronHMamba2Mixer.forward for whole, right-padded sequences, or rows behind a shared prefix; hidden_states [B, L, D]."""
    if cache_params is not None or attention_mask is not None:
        raise ValueError(
            "this Mamba-2 layer was made fast for training: it wants whole right-padded sequences, without a cache or a mask; "
            "generate with the engine, or with a copy loaded by Transformers"
        )
    gate, conv_in, dt = self.in_proj(hidden_states).split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
    if shared is None:
        y, _ = _convolved_scan(self, self.conv1d(conv_in), dt)
    else:
        (first, rest), (dt_first, dt_rest) = shared.split(conv_in), shared.split(dt)
        seen = self.conv_kernel_size - 1  # positions that the convolution looks back
        y_first, state = _convolved_scan(self, self.conv1d(first), dt_first)
        behind = self.conv1d(torch.cat([shared.before_each_row(first[:, -seen:]), rest], dim=1))[:, seen:]
        y_rest, _ = _convolved_scan(self, behind, dt_rest, shared.before_each_row(state))
        y = shared.join(y_first, y_rest)
    return self.out_proj(self.norm(y, gate).to(hidden_states.dtype))


def _convolved_scan(mixer: Any, convolved: Tensor, dt: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """convolved [B, L, C], dt [B, L, H] as projected -> y [B, L, H * P] and the last state."""
    keys = mixer.n_groups * mixer.ssm_state_size
    kernel = kernels() if convolved.is_cuda and convolved.dtype in (torch.bfloat16, torch.float16) else None
    x, b, c = (convolved if kernel else at_least_float32(convolved)).split([mixer.intermediate_size, keys, keys], dim=-1)
    inputs = (
        x.unflatten(-1, (mixer.num_heads, mixer.head_dim)),
        F.softplus(at_least_float32(dt) + at_least_float32(mixer.dt_bias)),
        -torch.exp(at_least_float32(mixer.A_log)),
        b.unflatten(-1, (mixer.n_groups, mixer.ssm_state_size)),
        c.unflatten(-1, (mixer.n_groups, mixer.ssm_state_size)),
        at_least_float32(mixer.D),
    )
    y, end = chunked_scan(*inputs, start=start) if kernel is None else kernel_scan(kernel, *inputs, start=start)
    return y.flatten(-2), end


@cache
def kernels() -> Callable[..., Any] | None:
    """The scan of the `mamba_ssm` package (Triton, forward and backward); None where it is not installed."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        return None
    return mamba_chunk_scan_combined  # type: ignore[no-any-return]


def kernel_scan(
    kernel: Callable[..., Any], x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, *, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`chunked_scan` by `kernels()`: x, b and c in half precision, sums in float32; y in half precision, states in float32."""
    groups, states = b.shape[2:]
    heads, width = x.shape[2:]
    if start is not None:  # ours lie as [B, G, N, heads of the group * P], theirs as [B, H, P, N]
        start = start.unflatten(-1, (-1, width)).permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous()
    y, end = kernel(x, dt, a, b, c, chunk_size=KERNEL_CHUNK, D=d, initial_states=start, return_final_states=True)
    return y, end.view(len(x), groups, heads // groups, width, states).permute(0, 1, 4, 2, 3).flatten(-2)


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
