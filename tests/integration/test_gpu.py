"""The learner's parts on a GPU: what runs there otherwise than on a CPU. Skipped without one; test_learner.py runs on either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from learner import mamba_scan
from learner.shared_prefix import Shared, attention
from learner.token_logprobs import head_logprobs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def scan_inputs(length: int, dtype: torch.dtype, groups: int = 2) -> list[Tensor]:
    """x, dt, a, b, c, d, start as `chunked_scan` wants them; dt and a stay as exact as they are in the model. 8 heads of 64, 128 states."""
    rng = torch.Generator().manual_seed(0)
    x, b, c = (torch.randn(2, length, n, p, generator=rng) for n, p in ((8, 64), (groups, 128), (groups, 128)))
    dt = torch.nn.functional.softplus(torch.randn(2, length, 8, generator=rng) - 3)
    a, d = -torch.rand(8, generator=rng) - 0.1, torch.randn(8, generator=rng)
    start = torch.randn(2, groups, 128, 8 // groups * 64, generator=rng)
    low = [t.to(dtype) for t in (x, b, c)]
    return [low[0], dt, a, low[1], low[2], d, start]


def outputs_and_gradients(scan: Callable[..., Any], inputs: list[Tensor], device: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """y, the last state, and the gradients of all inputs, in float64 on the CPU."""
    leaves = [t.to(device, dtype or t.dtype).requires_grad_() for t in inputs]
    y, end = scan(*leaves[:-1], start=leaves[-1])
    rng = torch.Generator().manual_seed(1)
    pulls = [torch.randn(t.shape, generator=rng).to(device) for t in (y, end)]
    sum((t * pull.to(t.dtype)).sum() for t, pull in zip((y, end), pulls, strict=True)).backward()
    return [t.detach().cpu().double() for t in (y, end, *(leaf.grad for leaf in leaves))]


def far(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Relative distance of each."""
    return [float((f - w).norm() / w.norm()) for f, w in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("length", [1, 100, 700])
def test_the_chunked_scan_is_as_exact_as_on_a_cpu(length: int) -> None:
    inputs = scan_inputs(length, torch.float32)
    wanted = outputs_and_gradients(mamba_scan.chunked_scan, inputs, "cpu", torch.float64)
    assert max(far(outputs_and_gradients(mamba_scan.chunked_scan, inputs, "cuda"), wanted)) < 1e-4


@pytest.mark.parametrize("length", [1, 100, 256, 700])
def test_the_kernels_compute_what_the_chunked_scan_does(length: int) -> None:
    """bfloat16 has 8 bits: a relative distance of about 0.4 % for each rounding."""
    kernel = mamba_scan.kernels()
    if kernel is None:
        pytest.skip("mamba_ssm is not installed")
    inputs = scan_inputs(length, torch.bfloat16)
    wanted = outputs_and_gradients(mamba_scan.chunked_scan, inputs, "cpu", torch.float64)
    found = outputs_and_gradients(lambda *args, start: mamba_scan.kernel_scan(kernel, *args, start=start), inputs, "cuda")
    assert max(far(found, wanted)) < 0.02


def test_attention_behind_a_shared_prefix_is_that_of_whole_rows() -> None:
    rng = torch.Generator("cuda").manual_seed(0)
    shared, length = Shared(prefix=50, rows=3), 7
    packed = [torch.randn(1, 50 + 3 * length, n, 64, device="cuda", generator=rng) for n in (8, 2, 2)]
    prefix, rows = shared.split(attention(*packed, shared, 0.125))
    for row in range(3):
        q, k, v = (torch.cat([p[0], r[row]])[None].transpose(1, 2) for p, r in map(shared.split, packed))
        whole = torch.nn.functional.scaled_dot_product_attention(
            q, *(t.repeat_interleave(4, 1) for t in (k, v)), is_causal=True, scale=0.125
        )
        alone = whole.transpose(1, 2).flatten(-2)[0]
        assert torch.allclose(torch.cat([prefix[0], rows[row]]), alone, atol=1e-5)


def test_logprobs_of_many_rows_are_those_of_a_softmax() -> None:
    rng = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (torch.randn(n, 64, device="cuda", generator=rng, requires_grad=True) for n in (5000, 8000))
    targets = torch.randint(0, 8000, (5000,), device="cuda", generator=rng)
    pull = torch.randn(5000, device="cuda", generator=rng)
    found, _ = head_logprobs(hidden, weight, None, targets, None)
    ours = torch.autograd.grad((found * pull).sum(), (hidden, weight))
    wanted = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    theirs = torch.autograd.grad((wanted * pull).sum(), (hidden, weight))
    assert torch.allclose(found, wanted, atol=1e-4)
    assert max(far(list(ours), list(theirs))) < 1e-4
