"""The scan, convolution, experts, norm and logprobs, each with its own backward pass, against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from learner.mamba_scan import causal_conv_silu, chunked_scan, kernel_scan
from learner.moe import SortedExperts, route
from learner.norm import rms_norm
from learner.token_logprobs import head_logprobs

torch.set_num_threads(1)


def step_by_step(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The recurrence as it is defined, one position at a time; states [B, H, N, P]."""
    batch, length, heads, width = x.shape
    per_group = heads // b.shape[2]
    b, c = b.repeat_interleave(per_group, 2), c.repeat_interleave(per_group, 2)
    state = x.new_zeros(batch, heads, b.shape[-1], width) if state is None else state
    out = []
    for t in range(length):
        decay = (dt[:, t] * a).exp()[..., None, None]
        state = decay * state + b[:, t, :, :, None] * (dt[:, t, :, None] * x[:, t])[:, :, None, :]
        out.append((c[:, t, :, :, None] * state).sum(2) + d[:, None] * x[:, t])
    return torch.stack(out, 1), state


def scan_inputs(length: int, groups: int, dtype: torch.dtype, fast: float = 1.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(length)
    heads, width, states = 4, 6, 5
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    inputs = [rand(2, length, heads, width), rand(2, length, heads).exp() * 0.1 * fast, -torch.arange(1.0, heads + 1, dtype=torch.float64)]
    inputs += [rand(2, length, groups, states), rand(2, length, groups, states), rand(heads)]
    return [t.to(dtype).requires_grad_() for t in inputs]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("length", "chunk"), [(1, 32), (5, 32), (32, 32), (33, 32), (50, 8), (64, 8)])
def test_the_chunked_scan_and_its_gradients_are_the_recurrence_to_float64_precision(length: int, chunk: int, groups: int) -> None:
    inputs = scan_inputs(length, groups, torch.float64)
    ours, theirs = chunked_scan(*inputs, chunk=chunk)[0], step_by_step(*inputs)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)
    pull = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for mine, its in zip(torch.autograd.grad((ours * pull).sum(), inputs), torch.autograd.grad((theirs * pull).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, its, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("fast", [0.01, 1.0, 30.0])
def test_float32_keeps_five_digits_from_slow_to_violent_decay(fast: float) -> None:
    """fast = 30 decays by exp(-300) within a few positions: nothing may overflow on the masked side of the chunk."""
    exact, _ = step_by_step(*scan_inputs(200, 2, torch.float64, fast))
    ours, _ = chunked_scan(*scan_inputs(200, 2, torch.float32, fast))
    assert torch.isfinite(ours).all()
    assert (ours - exact).abs().max() / exact.abs().max() < 1e-5


def test_a_state_is_carried_across_many_chunks() -> None:
    x, dt, a, b, c, d = (t.detach() for t in scan_inputs(400, 1, torch.float64))
    x[:, 1:], d, a = 0, torch.zeros_like(d), torch.full_like(a, -1e-4)
    assert chunked_scan(x, dt, a, b, c, d, chunk=16)[0][:, -1].abs().max() > 1e-3


@pytest.mark.parametrize("cut", [1, 8, 13, 40])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_scan_that_starts_from_a_state_goes_on_as_if_it_had_not_stopped(cut: int, groups: int) -> None:
    inputs = scan_inputs(41, groups, torch.float64)
    x, dt, a, b, c, d = inputs
    whole, end = chunked_scan(*inputs, chunk=8)
    first, state = chunked_scan(x[:, :cut], dt[:, :cut], a, b[:, :cut], c[:, :cut], d, chunk=8)
    second, last = chunked_scan(x[:, cut:], dt[:, cut:], a, b[:, cut:], c[:, cut:], d, start=state, chunk=8)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(last, end, atol=1e-12, rtol=1e-10)
    g = torch.Generator().manual_seed(1)
    pull, pull_end = (torch.randn(t.shape, generator=g, dtype=torch.float64) for t in (whole, end))
    wanted = torch.autograd.grad((whole * pull).sum() + (end * pull_end).sum(), inputs)
    got = torch.autograd.grad((torch.cat([first, second], 1) * pull).sum() + (last * pull_end).sum(), inputs)
    for mine, its in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-11, rtol=1e-9)


def as_kernels(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, *, chunk_size: int, D: Tensor, initial_states: Tensor | None,
    return_final_states: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`step_by_step` with the arguments and layouts of `mamba_ssm`'s kernels: states [B, H, P, N]."""
    assert return_final_states
    y, end = step_by_step(x, dt, a, b, c, D, None if initial_states is None else initial_states.mT)
    return y, end.mT.contiguous()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("starts", [True, False])
def test_states_reach_the_kernels_and_come_back_in_their_layout(groups: int, starts: bool) -> None:
    """Whether the kernels themselves are right shows on a GPU alone: tests/integration/test_gpu.py."""
    inputs = scan_inputs(20, groups, torch.float64)
    start = chunked_scan(*(t.detach() for t in scan_inputs(9, groups, torch.float64)))[1].requires_grad_() if starts else None
    leaves = [*inputs, *([] if start is None else [start])]
    ours, theirs = chunked_scan(*inputs, start=start), kernel_scan(as_kernels, *inputs, start=start)
    pulls = [torch.randn_like(t) for t in ours]
    gradients = [torch.autograd.grad(sum((t * p).sum() for t, p in zip(found, pulls, strict=True)), leaves) for found in (ours, theirs)]
    for mine, wanted in zip((*ours, *gradients[0]), (*theirs, *gradients[1]), strict=True):
        assert torch.allclose(mine, wanted, atol=1e-10)


@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_the_convolution_is_causal_and_equals_conv1d(length: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((2, length, 6), (6, 1, 4), (6,)))
    wanted = torch.nn.functional.conv1d(x.transpose(1, 2), weight, bias, padding=3, groups=6)[..., :length].transpose(1, 2)
    torch.testing.assert_close(causal_conv_silu(x, weight, bias), torch.nn.functional.silu(wanted))
    unbiased = torch.nn.functional.conv1d(x.transpose(1, 2), weight, None, padding=3, groups=6)[..., :length].transpose(1, 2)
    torch.testing.assert_close(causal_conv_silu(x, weight, None), torch.nn.functional.silu(unbiased))


def test_sorted_experts_pass_a_numerical_gradient_check_even_where_an_expert_has_no_token() -> None:
    g = torch.Generator().manual_seed(0)
    x, up, down = (torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in ((7, 3), (4, 5, 3), (4, 3, 5)))
    weights = torch.rand(7, 2, generator=g, dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([[0, 1], [1, 0], [3, 1], [0, 3], [3, 0], [1, 3], [0, 1]])  # nobody chose expert 2
    assert torch.autograd.gradcheck(lambda x, w, up, down: SortedExperts.apply(x, chosen, w, up, down), (x, weights, up, down))
    wanted = torch.stack(
        [sum(weights[t, i] * (down[e] @ (up[e] @ x[t]).relu().square()) for i, e in enumerate(chosen[t])) for t in range(7)]  # type: ignore[misc]
    )
    torch.testing.assert_close(SortedExperts.apply(x, chosen, weights, up, down), wanted)


def test_the_balancing_bias_changes_who_is_chosen_but_not_what_they_weigh() -> None:
    scores = torch.tensor([[0.9, 0.6, 0.3]])
    chosen, weights = route(scores, torch.tensor([0.0, 0.0, 0.5]), 2, normalise=True, scale=2.0)
    assert set(chosen[0].tolist()) == {0, 2}
    by_expert = dict(zip(chosen[0].tolist(), weights[0].tolist(), strict=True))
    assert by_expert[0] == pytest.approx(2 * 0.9 / 1.2)
    assert by_expert[2] == pytest.approx(2 * 0.3 / 1.2)


@pytest.mark.parametrize("groups", [(), (3,)])
def test_rms_norm_is_its_definition_and_passes_a_numerical_gradient_check(groups: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, 8, generator=g, dtype=torch.float64, requires_grad=True) for shape in ((2, 5, *groups), groups))
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, weight))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("rows", [3, 100])
def test_head_logprobs_pass_a_numerical_gradient_check_kept_or_recomputed(monkeypatch: pytest.MonkeyPatch, rows: int, keep: bool) -> None:
    monkeypatch.setattr("learner.token_logprobs.KEEP_FLOATS", 2**24 if keep else 0)
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in ((7, 4), (9, 4), (9,)))
    targets = torch.randint(0, 9, (7,), generator=g)
    temperature = torch.rand(7, generator=g, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(lambda h, w, b: head_logprobs(h, w, b, targets, temperature, rows=rows)[0], (hidden, weight, bias))
    logprobs, entropy = head_logprobs(hidden, weight, bias, targets, temperature, rows=rows)
    full = ((hidden @ weight.T + bias) / temperature.unsqueeze(-1)).log_softmax(-1)
    torch.testing.assert_close(logprobs, full.gather(-1, targets.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(entropy, -(full.exp() * full).sum(-1))
    assert not entropy.requires_grad


def test_logprobs_of_extreme_logits_stay_finite() -> None:
    hidden, weight = torch.tensor([[1000.0]]), torch.tensor([[1.0], [-1.0], [0.999]])
    logprobs, entropy = head_logprobs(hidden, weight, None, torch.tensor([0]), None)
    assert logprobs.item() == pytest.approx(-torch.tensor(-1.0).exp().log1p().item(), abs=1e-4)
    assert torch.isfinite(entropy).all()
