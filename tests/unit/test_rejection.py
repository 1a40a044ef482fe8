"""Verified drafts leave the policy's distribution as it is, whatever they were drawn from."""

from __future__ import annotations

import torch
from torch import Tensor

from rollout_workers.vllm_plugin.rejection import REJECTED, randomness, verify

V, MANY = 6, 40_000


def distributions(seed: int) -> Tensor:
    """[3, V]: of a first, a second and a third token."""
    return torch.softmax(2 * torch.randn(3, V, generator=torch.Generator().manual_seed(seed)), -1)


def verified(p: Tensor, drafts: Tensor, counts: Tensor, greedy: Tensor | None = None) -> Tensor:
    """Sequences with the same three distributions; `counts` - 1 of each one's two drafts [B, 2] are verified."""
    torch.manual_seed(0)
    used = torch.arange(2) < (counts - 1)[:, None]
    logprobs = torch.cat([p[: int(n)] for n in counts]) if counts.min() < 3 else p.repeat(len(counts), 1)
    uniform, noise = randomness((counts - 1).tolist(), V, {})
    return verify(logprobs.log(), drafts[used], counts, greedy, uniform, noise)[0]


def assert_distributed(tokens: Tensor, p: Tensor) -> None:
    """Each place's tokens, where there is one, are draws from that place's distribution."""
    for place in range(tokens.shape[1]):
        there = tokens[:, place][tokens[:, place] != REJECTED]
        share = torch.bincount(there, minlength=V) / len(there)
        assert (share - p[place]).abs().max() < 5 * (0.25 / len(there)) ** 0.5, f"place {place}"


def test_tokens_are_draws_from_the_policy_whatever_the_drafts() -> None:
    p, drafts = distributions(1), distributions(2)[:2].argmax(-1).expand(MANY, 2)
    tokens = verified(p, drafts, torch.full((MANY,), 3))
    assert_distributed(tokens, p)
    kept = (tokens != REJECTED).sum(1)
    assert {1, 2, 3} == set(kept.tolist())
    assert abs((kept > 1).float().mean() - p[0, drafts[0, 0]]) < 0.02, "of the first drafts, as many are accepted as can be"


def test_sequences_may_have_different_numbers_of_drafts_and_none() -> None:
    p = distributions(4)
    counts = torch.arange(3 * 4000) % 3 + 1
    tokens = verified(p, p[:2].argmax(-1).expand(len(counts), 2), counts)
    assert bool(((tokens != REJECTED).sum(1) <= counts).all())
    assert_distributed(tokens, p)


def test_a_greedy_sequence_takes_the_most_likely_token_beside_others_that_do_not() -> None:
    p = distributions(5)
    drafts = torch.stack([p[0].argmax(), p[1].argmin()]).expand(MANY, 2)
    greedy = torch.arange(MANY) % 2 == 0
    tokens = verified(p, drafts, torch.full((MANY,), 3), greedy)
    assert tokens[greedy].unique(dim=0).tolist() == [[*p[:2].argmax(-1).tolist(), REJECTED]]
    assert_distributed(tokens[~greedy], p)


def test_a_sequence_with_a_generator_of_its_own_repeats_whatever_runs_beside_it() -> None:
    def own(rows: int) -> Tensor:
        uniform, noise = randomness([2] * rows, V, {rows - 1: torch.Generator().manual_seed(7)})
        return torch.cat([uniform[-2:].float(), noise[-1]])

    assert torch.equal(own(1), own(3))
    generator = torch.Generator().manual_seed(7)
    before = generator.get_state()
    randomness([2, 0], V, {1: generator})
    assert torch.equal(generator.get_state(), before), "without drafts it is vLLM's plain sampler that takes its dice"
    assert not torch.equal(randomness([2], V, {})[0], randomness([2], V, {})[0])
