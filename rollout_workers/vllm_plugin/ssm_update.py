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
    lengths = starts.diff()
    longest = int(lengths.max())
    rows = (starts[:-1, None] + torch.arange(longest)).clamp(max=len(x) - 1).long()
    step = F.softplus(dt[..., 0].float() + dt_bias[:, 0].float())  # [T, H]
    decay = (step * A[:, 0, 0].float()).exp()
    per_group = x.shape[1] // B.shape[1]
    slots = slots.long()
    current = state[slots.gather(1, (accepted.long() - 1).clamp(min=0)[:, None])[:, 0]].float()  # [S, H, P, N]
    for j in range(longest):
        t = rows[:, j]
        inputs = x[t].float()
        b, c = (m[t].float().repeat_interleave(per_group, 1) for m in (B, C))  # [S, H, N]
        current = current * decay[t][..., None, None] + (step[t][..., None] * inputs)[..., None] * b[:, :, None, :]
        y = torch.einsum("shpn,shn->shp", current, c) + D.float() * inputs
        live = lengths > j  # a shorter sequence has ended: what is computed for it here is never read
        out[t[live]] = y[live].to(out.dtype)
        state[slots[live, j]] = current[live].to(state.dtype)


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
        verify_update(
            state, x, dt, A, B, C, D, dt_bias, kwargs["dst_state_batch_indices"], kwargs["num_accepted_tokens"], kwargs["cu_seqlens"],
            kwargs["out"],
        )  # fmt: skip
        return kwargs["out"]

    selective_state_update.is_ours = True  # type: ignore[attr-defined]
    return selective_state_update
