"""The recurrent state under speculative decoding starts from the last accepted token, for every sequence of a batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from rollout_workers.vllm_plugin.ssm_update import by_operations, verify_update


def check_states(update: Callable[..., None]) -> None:
    """Three sequences of different lengths, of whose last steps different numbers of tokens stand."""
    torch.manual_seed(0)
    heads, width, size, groups, k, lengths = 4, 8, 6, 2, 2, [3, 1, 2]
    state = torch.randn(12, heads, width, size)
    slots = torch.arange(1, 10).view(3, 1 + k)
    accepted = torch.tensor([1, 3, 2])
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    tokens = sum(lengths)
    x, dt = torch.randn(tokens, heads, width), torch.randn(tokens, heads)
    decay, skip, bias = -torch.rand(heads), torch.randn(heads), torch.randn(heads)
    b, c = torch.randn(tokens, groups, size), torch.randn(tokens, groups, size)
    wanted_state, wanted = state.clone(), torch.zeros(tokens, heads, width)
    for s, length in enumerate(lengths):
        h = state[slots[s, accepted[s] - 1]].clone()
        for j in range(length):
            t = int(starts[s]) + j
            for head in range(heads):
                step = F.softplus(dt[t, head] + bias[head])
                group = head // (heads // groups)
                h[head] = h[head] * torch.exp(step * decay[head]) + step * torch.outer(x[t, head], b[t, group])
                wanted[t, head] = h[head] @ c[t, group] + skip[head] * x[t, head]
            wanted_state[slots[s, j]] = h
    out = torch.zeros_like(wanted)
    update(
        state, x, dt[..., None].expand(-1, -1, width), decay[:, None, None].expand(-1, width, size), b, c,
        skip[:, None].expand(-1, width), bias[:, None].expand(-1, width), slots, accepted, starts, out,
    )  # fmt: skip
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(state, wanted_state)


@pytest.mark.parametrize("update", [verify_update, by_operations])
def test_each_sequence_goes_on_from_its_own_last_accepted_state(update: Callable[..., None]) -> None:
    check_states(update)
