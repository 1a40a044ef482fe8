"""The recurrent state of Mamba-2 under speculative decoding, on CPU.

Defect upstream (vLLM 0.32, CPU): `selective_state_update_cpu` takes `num_accepted_tokens` and ignores it, and finds the right states
for the first sequence of a batch only. Each verifying step then starts from a state that holds rejected draft tokens, or
somebody else's. Random models hide it, since their states hardly matter; on a trained one logprobs are off by 0.4 nats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def verify_update(
    state: Tensor,  # [slots, H, P, N], updated in place
    x: Tensor,  # [T, H, P] tokens of all sequences, one after the other
    dt: Tensor,  # [T, H, P], the same for all P of a head
    A: Tensor,  # [H, P, N], the same for all P and N of a head
    B: Tensor,  # [T, G, N]
    C: Tensor,  # [T, G, N]
    D: Tensor,  # [H, P]
    dt_bias: Tensor,  # [H, P]
    slots: Tensor,  # [S, 1 + k] slot after each token of a sequence
    accepted: Tensor,  # [S] tokens of the last step that stand, 1 to 1 + k
    starts: Tensor,  # [S + 1] where each sequence's tokens begin
    out: Tensor,  # [T, H, P], written
) -> None:
    """Advance S sequences by their own number of tokens, each from its last accepted state; token j leaves its state in slots[:, j].

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = C_t h_t + D x_t
    """
    if {m.dtype for m in (state, x, dt, A, B, C, D, dt_bias, out)} == {torch.float32}:
        from rollout_workers.vllm_plugin import kernels

        tensors = (state, x, dt, A, B, C, D, dt_bias, slots.int(), accepted.int(), starts.int(), out)
        kernels.ssm_step(*kernels.views(*tensors))
    else:
        by_operations(state, x, dt, A, B, C, D, dt_bias, slots, accepted, starts, out)


def by_operations(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, slots: Tensor, accepted: Tensor,
    starts: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """The same in PyTorch's operations, for any type."""
    lengths = starts.diff()
    batch, longest = len(lengths), int(lengths.max())
    if batch * longest != len(x):  # [S, longest] index of each token; the tail of a shorter sequence repeats one that is never read
        rows = (starts[:-1, None] + torch.arange(longest)).clamp(max=len(x) - 1).long()
        x, dt, B, C = x[rows], dt[rows], B[rows], C[rows]
    x, dt, B, C = (m.view(batch, longest, *m.shape[-2:]).float() for m in (x, dt[..., :1], B, C))
    step = F.softplus(dt + dt_bias[:, :1].float())  # [S, L, H, 1]
    decay = (step * A[:, 0, :1].float()).exp()
    per_group = x.shape[2] // B.shape[2]
    if per_group > 1:
        B, C = B.repeat_interleave(per_group, 2), C.repeat_interleave(per_group, 2)  # [S, L, H, N]
    slots = slots.long()
    current = state[slots.gather(1, (accepted.long() - 1).clamp(min=0)[:, None])[:, 0]].float()  # [S, H, P, N]
    after = (step * x)[..., None] * B[:, :, :, None, :]  # [S, L, H, P, N]: first what each token adds, then the state behind it
    for j in range(longest):
        current = after[:, j].addcmul_(current, decay[:, j, :, :, None])
    y = (after @ C[..., None])[..., 0] + D.float() * x
    if batch * longest == len(out):
        out.copy_(y.view_as(out))
        state[slots[:, :longest]] = after.to(state.dtype)
    else:
        live = torch.arange(longest) < lengths[:, None]
        out.copy_(y[live])
        state[slots[:, :longest][live]] = after[live].to(state.dtype)


def install() -> None:
    """Replace the stock function where the Mamba-2 layer looks it up."""
    import vllm.model_executor.layers.mamba.mamba_mixer2 as mixer2

    if getattr(mixer2.selective_state_update, "is_ours", False):
        return
    mixer2.selective_state_update = wrap(mixer2.selective_state_update)


def wrap(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`stock`, except for the steps that verify drafts."""

    def selective_state_update(
        state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, **kwargs: Any
    ) -> Any:
        if kwargs.get("num_accepted_tokens") is None:
            return stock(state, x, dt, A, B, C, D, dt_bias, **kwargs)
        assert kwargs["dt_softplus"]
        slots, accepted = kwargs["dst_state_batch_indices"], kwargs["num_accepted_tokens"]
        if len(x) == len(slots) and bool((accepted <= 1).all()):  # nothing drafted, now or before: each state is where it always was
            first = slots[:, 0].contiguous()
            plain = {"num_accepted_tokens": None, "cu_seqlens": None, "state_batch_indices": first, "dst_state_batch_indices": first}
            return stock(state, x, dt, A, B, C, D, dt_bias, **kwargs | plain)
        verify_update(
            state, x, dt, A, B, C, D, dt_bias, slots, accepted, kwargs["cu_seqlens"], kwargs["out"]
        )  # fmt: skip
        return kwargs["out"]

    selective_state_update.is_ours = True  # type: ignore[attr-defined]
    return selective_state_update
