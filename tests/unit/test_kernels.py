"""The compiled routines for few tokens compute what the modules that call them say in PyTorch's operations."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rollout_workers.vllm_plugin import conv_update, kernels, ssm_update
from rollout_workers.vllm_plugin.latent_moe import FEW_OPERATIONS, Routing, dense_experts, route
from rollout_workers.vllm_plugin.mtp_draft import Batch, Doubt, Head, likeliest
from rollout_workers.vllm_plugin.raw_weights import Views
from rollout_workers.vllm_plugin.rejection import verify
from tests.unit.test_rejection import MANY, assert_distributed, distributions


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


LENGTHS = [[3, 3, 3], [3, 1, 2], [1], [2, 5, 1, 4], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("activation", ["silu", None])
def test_convolution(lengths: list[int], activation: str | None) -> None:
    k, dim, width = 4, 20, 4
    tokens, count = sum(lengths), len(lengths)
    x = randn(tokens, dim + 7)[:, 3 : 3 + dim]  # a view, as in the layer
    state = randn(9, width - 1 + k, dim).transpose(1, 2)
    slots = torch.randperm(9, generator=torch.Generator().manual_seed(1))[:count, None].int().expand(-1, 1 + k)
    accepted = torch.arange(count).remainder(1 + k).add(1).int()
    starts = torch.tensor([0, *np.cumsum(lengths)]).int()
    fixed = (randn(dim, width), randn(dim), activation)
    states = [state.clone(), state.clone()]
    got = conv_update.causal_conv1d_update(
        x, states[0], *fixed, conv_state_indices=slots, num_accepted_tokens=accepted, query_start_loc=starts
    )
    wanted = conv_update.by_operations(x, states[1], *fixed[:2], bool(activation), slots, accepted, starts)
    torch.testing.assert_close(got, wanted)
    for s, length in enumerate(lengths):  # of a shorter sequence, what stands behind is never read
        torch.testing.assert_close(*(states[i][slots[s, 0], :, : width - 2 + length] for i in (0, 1)))
    others = [i for i in range(9) if i not in slots[:, 0].tolist()]
    assert torch.equal(states[0][others], state[others])


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("groups", [1, 2])
def test_recurrent_state(lengths: list[int], groups: int) -> None:
    heads, size, width, k = 4, 8, 6, 4
    tokens, count = sum(lengths), len(lengths)
    state = randn(40, heads, size, width)
    packed = randn(tokens, heads * size + 2 * groups * width)
    x, b, c = packed.split([heads * size, groups * width, groups * width], -1)  # views, as in the layer
    dt = 30 * randn(tokens, heads)[..., None].expand(-1, -1, size)  # far into where softplus is linear
    decay, skip, bias = -randn(heads).abs(), randn(heads, seed=1), randn(heads, seed=2)
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(2))[: count * (1 + k)].view(count, 1 + k).int()
    accepted = torch.arange(count).remainder(1 + k).add(1).int()
    starts = torch.tensor([0, *np.cumsum(lengths)]).int()
    states, outs = [state.clone(), state.clone()], [torch.zeros(tokens, heads, size), torch.zeros(tokens, heads, size)]
    for i, update in enumerate((ssm_update.verify_update, ssm_update.by_operations)):
        update(
            states[i], x.view(tokens, heads, size), dt, decay[:, None, None].expand(-1, size, width), b.view(tokens, groups, width),
            c.view(tokens, groups, width), skip[:, None].expand(-1, size), bias[:, None].expand(-1, size), slots, accepted, starts, outs[i],
        )  # fmt: skip
    torch.testing.assert_close(outs[0], outs[1], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(states[0], states[1], atol=1e-4, rtol=1e-5)


EXPERTS, INNER, LATENT, DIM, SHARED = 12, 10, 16, 24, 14
MOE = {
    "gate": randn(EXPERTS, DIM), "bias": randn(EXPERTS, seed=1), "fc1": randn(LATENT, DIM), "up": randn(EXPERTS, INNER, LATENT),
    "down": randn(LATENT, EXPERTS, INNER), "fc2": randn(DIM, LATENT), "shared_up": randn(SHARED, DIM), "shared_down": randn(DIM, SHARED),
}  # fmt: skip


def moe_by_operations(x: Tensor, routing: Routing, shared: int) -> Tensor:
    weight, index = route(x, MOE["gate"], MOE["bias"], routing)
    out = F.linear(dense_experts(F.linear(x, MOE["fc1"]), MOE["up"], MOE["down"], weight, index), MOE["fc2"])
    return out + F.linear(F.relu(F.linear(x, MOE["shared_up"][:shared])).square(), MOE["shared_down"][:, :shared].contiguous())


def arguments(routing: Routing, shared: int = SHARED) -> tuple[Any, ...]:
    gate, bias, *others = kernels.views(*(MOE[name] for name in ("gate", "bias", "fc1", "up", "down", "fc2")))
    rest = kernels.views(MOE["shared_up"][:shared], MOE["shared_down"][:, :shared].contiguous())
    return gate, bias, routing.num_experts_per_tok, routing.norm_topk_prob, routing.routed_scaling_factor, *others, *rest


@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("top_k", "shared"), [(1, SHARED), (3, SHARED), (3, 0)])
def test_mixture_of_experts(tokens: int, normalise: bool, top_k: int, shared: int) -> None:
    routing = Routing(n_group=1, topk_group=1, num_experts_per_tok=top_k, norm_topk_prob=normalise, routed_scaling_factor=1.5)
    x, out = randn(tokens, DIM), torch.empty(tokens, DIM)
    kernels.moe_rows(x.numpy(), *arguments(routing, shared), out.numpy())
    torch.testing.assert_close(out, moe_by_operations(x, routing, shared), atol=1e-3, rtol=1e-4)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-5)


@pytest.mark.parametrize("tokens", [1, 6])
def test_both_halves_of_the_head(tokens: int) -> None:
    vocab, queries, qkv_size = 50, 8, 20
    routing = Routing(n_group=1, topk_group=1, num_experts_per_tok=2, norm_topk_prob=True, routed_scaling_factor=1.0)
    embedding, eh, qkv, o, lm_head = (
        randn(vocab, DIM),
        randn(DIM, 2 * DIM),
        randn(qkv_size, DIM),
        randn(DIM, queries),
        randn(vocab, DIM, seed=3),
    )
    norms = [1 + 0.1 * randn(DIM, seed=i) for i in range(5)]
    ids, hidden, attended = torch.arange(tokens) * 7 % vocab, randn(tokens, DIM, seed=4), randn(tokens, queries)
    x, found = torch.empty(tokens, DIM), torch.empty(tokens, qkv_size)
    kernels.head_enter(*kernels.views(ids, hidden, embedding, norms[0], norms[1], eh, norms[2], qkv), 1e-5, x.numpy(), found.numpy())
    wanted = torch.cat([rms_norm(embedding[ids], norms[0]), rms_norm(hidden, norms[1])], -1) @ eh.T
    torch.testing.assert_close(x, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found, rms_norm(wanted, norms[2]) @ qkv.T, atol=1e-4, rtol=1e-4)

    after, draft, logprob = torch.empty(tokens, DIM), torch.empty(tokens, dtype=torch.int64), torch.empty(tokens)
    kernels.head_leave(
        *kernels.views(x.clone(), attended, o, norms[3]), *arguments(routing), *kernels.views(norms[4], lm_head), 1e-5,
        *kernels.views(after, draft, logprob),
    )  # fmt: skip
    middle = x + attended @ o.T
    wanted = rms_norm(middle + moe_by_operations(rms_norm(middle, norms[3]), routing, SHARED), norms[4])
    torch.testing.assert_close(after, wanted, atol=1e-3, rtol=1e-4)
    best, chosen = (wanted @ lm_head.T).log_softmax(-1).max(-1)
    assert torch.equal(draft, chosen)
    torch.testing.assert_close(logprob, best, atol=1e-3, rtol=1e-4)


def layer(weight: Tensor, *, packed: bool) -> SimpleNamespace:
    """A layer of vLLM's, which lets go of its weight where it has packed it."""
    return SimpleNamespace(weight=torch.empty(0), polyrl_raw_weight=weight) if packed else SimpleNamespace(weight=weight)


def model_of(dim: int, vocab: int, *, is_compiled: bool = True, bias: Tensor | None = None) -> SimpleNamespace:
    """As much of vLLM's NemotronHMTP as `Head` looks at when it is made: two heads of 4, one of keys and values."""
    attention = SimpleNamespace(
        attn=SimpleNamespace(kv_cache=torch.zeros(3, 1, 8, 8)), qkv_proj=layer(randn(16, dim), packed=True),
        o_proj=layer(randn(dim, 8), packed=True),
    )  # fmt: skip
    attention.o_proj.bias = bias
    first = SimpleNamespace(
        mixer=attention, eh_proj=layer(randn(dim, 2 * dim), packed=True), norm=SimpleNamespace(variance_epsilon=1e-5, weight=randn(dim))
    )
    first.enorm, first.hnorm = first.norm, first.norm
    second = SimpleNamespace(mixer=SimpleNamespace(is_compiled=is_compiled, operations=1000), norm=first.norm, final_layernorm=first.norm)
    layers, embed = {"0": first, "1": second}, layer(randn(vocab, dim), packed=False)
    return SimpleNamespace(
        model=SimpleNamespace(layers=layers, embed_tokens=embed), lm_head=layer(randn(vocab, dim), packed=False),
        config=SimpleNamespace(vocab_size=vocab),
    )  # fmt: skip


def test_the_head_is_compiled_where_vllm_has_packed_its_weights_and_let_go_of_them() -> None:
    head = Head(model_of(24, 50), 8, torch.float32, False, Doubt())
    assert head.is_compiled
    assert head.operations == 50 * 24 + 24 * 48 + 16 * 24 + 24 * 8 + 1000
    assert head.few(1)
    assert not head.few(FEW_OPERATIONS // head.operations + 1)


def test_a_head_with_a_bias_or_other_experts_is_left_to_operations() -> None:
    assert not Head(model_of(24, 50, bias=torch.zeros(24)), 8, torch.float32, False, Doubt()).few(1)
    assert not Head(model_of(24, 50, is_compiled=False), 8, torch.float32, False, Doubt()).few(1)


def test_without_a_place_to_keep_them_they_are_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.core.caching.CompileResultCacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="no locator available"):
        numba.njit(cache=True)(abs_difference)
    assert kernels.compiled(numba.float64(numba.float64, numba.float64))(abs_difference)(2.0, 5.0) == 3.0


def abs_difference(one: float, other: float) -> float:
    return abs(one - other)


def test_verified_tokens_are_draws_from_the_policy() -> None:
    """Drafts that are likely, that are not, and fewer of them or none."""
    p, counts = distributions(1), torch.arange(MANY) % 3 + 1
    drafts = torch.stack([p[0].argmax(), p[1].argmin()]).expand(MANY, 2)[torch.arange(2) < (counts - 1)[:, None]]
    logits = torch.cat([p[:n] for n in counts.tolist()]).log()
    generator = torch.Generator().manual_seed(3)
    uniform, draws = (torch.rand(n, dtype=torch.float64, generator=generator) for n in (len(drafts), MANY))
    tokens, logprobs, ranks = torch.full((MANY, 3), -1), torch.zeros(MANY, 3), torch.zeros(MANY, 3, dtype=torch.int64)
    kernels.verify_rows(*kernels.views(logits, torch.ones(MANY), drafts, counts, uniform, draws, tokens, logprobs, ranks))
    assert_distributed(tokens, p)
    assert bool(((tokens >= 0).sum(1) <= counts).all())


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_no_draw_reaches_a_token_that_cannot_be(draw: float) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]])
    tokens, logprobs, ranks = torch.full((1, 1), -1), torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    none, dice = torch.zeros(0, dtype=torch.int64), (torch.zeros(0, dtype=torch.float64), torch.tensor([draw], dtype=torch.float64))
    kernels.verify_rows(*kernels.views(logits, torch.ones(1), none, torch.tensor([1]), *dice, tokens, logprobs, ranks))
    assert tokens.item() == (3 if draw else 1)


def test_exponentials() -> None:
    x = torch.cat([torch.linspace(-87, 88, 20_001), torch.tensor([-torch.inf, -1000.0, 0.0, torch.nan])])
    found = torch.empty_like(x)
    kernels._exp(*kernels.views(x, found))
    torch.testing.assert_close(found, x.double().exp().float(), atol=1e-37, rtol=5e-7, equal_nan=True)


def test_views_follow_a_weight_that_moves_or_is_replaced() -> None:
    """As updates do: `staging.take` gives parameters other memory and layers other raw weights, and copies into what has no packed copy."""
    plain, packed = torch.nn.Linear(3, 2), layer(randn(2, 3), packed=True)
    views = Views((plain, "weight"), (packed, "weight"))

    def are(*wanted: Tensor) -> bool:
        return all(np.array_equal(found, one.detach().numpy()) for found, one in zip(views.now(), wanted, strict=True))

    assert are(plain.weight, packed.polyrl_raw_weight)
    assert views.now() is views.now()
    plain.weight.data.copy_(randn(2, 3, seed=1))
    assert are(plain.weight, packed.polyrl_raw_weight)
    plain.weight.data = randn(2, 3, seed=2)
    assert are(plain.weight, packed.polyrl_raw_weight)
    packed.polyrl_raw_weight = randn(2, 3, seed=3)
    assert are(plain.weight, packed.polyrl_raw_weight)
    plain.weight = torch.nn.Parameter(randn(2, 3, seed=4))
    assert are(plain.weight, packed.polyrl_raw_weight)


@pytest.mark.parametrize("broken", [[3], range(8)])
def test_verification_brings_a_token_also_where_logits_are_no_numbers(broken: Sequence[int]) -> None:
    """A sequence that got none would be asked again for ever. Its logprob says what is wrong."""
    logits, tokens, logprobs, ranks = randn(3, 8), torch.full((1, 3), -1), torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.int64)
    logits[0, list(broken)] = torch.nan
    dice = torch.rand(2, dtype=torch.float64), torch.rand(1, dtype=torch.float64)
    kernels.verify_rows(*kernels.views(logits, torch.ones(1), torch.tensor([1, 2]), torch.tensor([3]), *dice, tokens, logprobs, ranks))
    assert 0 <= int(tokens[0, 0]) < 8
    assert tokens[0, 1:].tolist() == [-1, -1]
    assert bool(logprobs[0, 0].isnan())


@pytest.mark.parametrize("seed", range(6))
def test_verification(seed: int) -> None:
    vocab, num_drafts, temperature = 40, [2, 0, 4, 1, 3], torch.tensor([1.0, 0.7, 1.0, 0.0, 2.0])
    counts = torch.tensor(num_drafts) + 1
    logits, drafts = 2 * randn(int(counts.sum()), vocab, seed=seed), torch.randint(0, 3, (sum(num_drafts),))
    logits[:, :3] += 4  # so that some stand
    drafts[6] = logits[9].argmax() if seed % 2 else 39  # of the greedy sequence
    uniform, draws = torch.rand(sum(num_drafts), dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    scaled = logits / torch.where(temperature == 0, 1, temperature).repeat_interleave(counts)[:, None]
    wanted, rows = verify(scaled.log_softmax(-1), drafts, counts, temperature == 0, uniform, torch.ones(5, vocab))
    tokens, logprobs, ranks = torch.full((5, 5), -1), torch.zeros(5, 5), torch.zeros(5, 5, dtype=torch.int64)
    kernels.verify_rows(*kernels.views(logits, temperature, drafts, counts, uniform, draws, tokens, logprobs, ranks))
    stands = tokens >= 0
    assert torch.equal(stands, wanted >= 0)
    last, first_draft = stands.sum(1) - 1, (counts - 1).cumsum(0) - (counts - 1)
    for s in range(5):
        kept = int(last[s])
        assert tokens[s, :kept].tolist() == drafts[first_draft[s] : first_draft[s] + kept].tolist()
        left = scaled.double().softmax(-1)[rows[s, kept]]
        if kept < num_drafts[s]:
            left[drafts[first_draft[s] + kept]] = 0
        drawn = int((left.cumsum(0) <= draws[s] * left.sum()).sum()) if temperature[s] else int(wanted[s, kept])
        assert tokens[s, kept] == drawn
    there = scaled.log_softmax(-1)[rows][stands]
    chosen = there.gather(1, tokens[stands][:, None])
    torch.testing.assert_close(logprobs[stands], chosen[:, 0], atol=1e-5, rtol=1e-5)
    assert torch.equal(ranks[stands], (there >= chosen).sum(-1))


class Drafts:
    """A head whose drafts and their chances are written down."""

    def __init__(self, chances: list[list[float]], doubt: Doubt) -> None:
        self.chances, self.doubt, self.asked = chances, doubt, 0

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        self.asked += 1
        chances = torch.tensor(self.chances[self.asked - 1])
        return torch.zeros(len(chances), 4), torch.full((len(chances),), 10 + self.asked), chances.log()

    def follow(self, draft: Tensor, hidden: Tensor, batch: Batch, longest: int) -> tuple[Tensor, Tensor, Tensor]:
        assert (draft == 10 + self.asked).all()
        return self.next()


def test_drafts_that_hardly_stand_are_dropped_with_those_behind_them_and_no_more_are_made() -> None:
    head = Drafts([[0.9, 0.5, 0.2], [0.9, 0.5, 1.0], [0.9, 1.0, 1.0], [0.1, 1.0, 1.0], [1.0] * 3], Doubt(0.3, 0.3))
    assert likeliest(head, head.next(), None, 8, 99) == [[11, 12, 13], [11], []]  # type: ignore[arg-type]
    assert head.asked == 4
    head = Drafts([[0.1, 0.5], [0.1, 0.5]], Doubt())
    assert likeliest(head, head.next(), None, 2, 99) == [[11, 12], [11, 12]]  # type: ignore[arg-type]


def test_a_draft_may_be_worth_verifying_but_none_behind_it_worth_making() -> None:
    head = Drafts([[0.4, 0.4, 0.9], [1.0, 1.0, 0.5], [1.0, 1.0, 0.5]], Doubt(verify=0.3, go_on=0.5))
    assert likeliest(head, head.next(), None, 8, 99) == [[11], [11], [11, 12]]  # type: ignore[arg-type]
    assert head.asked == 2
