"""Verified drafts leave the policy's distribution as it is, whatever they were drawn from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rollout_workers.vllm_plugin.mtp_draft import pick
from rollout_workers.vllm_plugin.rejection import REJECTED, randomness, verify

V, MANY = 6, 40_000


def distributions(seed: int) -> Tensor:
    """[3, V]: of a first, a second and a third token."""
    return torch.softmax(2 * torch.randn(3, V, generator=torch.Generator().manual_seed(seed)), -1)


def verified(p: Tensor, drafts: Tensor, draft_probs: Tensor | None, counts: Tensor, greedy: Tensor | None = None) -> Tensor:
    """Sequences with the same three distributions; `counts` - 1 of each one's two drafts [B, 2] are verified."""
    torch.manual_seed(0)
    used = torch.arange(2) < (counts - 1)[:, None]
    logprobs = torch.cat([p[: int(n)] for n in counts]) if counts.min() < 3 else p.repeat(len(counts), 1)
    uniform, noise = randomness((counts - 1).tolist(), V, {})
    probabilities = None if draft_probs is None else draft_probs[used]
    return verify(logprobs.log(), drafts[used], probabilities, counts, greedy, uniform, noise)[0]


def assert_distributed(tokens: Tensor, p: Tensor) -> None:
    """Each place's tokens, where there is one, are draws from that place's distribution."""
    for place in range(tokens.shape[1]):
        there = tokens[:, place][tokens[:, place] != REJECTED]
        share = torch.bincount(there, minlength=V) / len(there)
        assert (share - p[place]).abs().max() < 5 * (0.25 / len(there)) ** 0.5, f"place {place}"


@pytest.mark.parametrize("certain", [True, False])
def test_tokens_are_draws_from_the_policy_whatever_the_drafts(certain: bool) -> None:
    p, q = distributions(1), distributions(2)[:2]
    if certain:
        drafts, probabilities = q.argmax(-1).expand(MANY, 2), None
    else:
        drafts, probabilities = torch.multinomial(q, MANY, replacement=True).T, q.expand(MANY, 2, V)
    tokens = verified(p, drafts, probabilities, torch.full((MANY,), 3))
    assert_distributed(tokens, p)
    kept = (tokens != REJECTED).sum(1)
    assert {1, 2, 3} == set(kept.tolist())
    expected = p[0, drafts[0, 0]] if certain else torch.minimum(p[0], q[0]).sum()
    assert abs((kept > 1).float().mean() - expected) < 0.02, "of the first drafts, as many are accepted as can be"


def test_drafts_drawn_from_the_policy_itself_all_stand() -> None:
    p = distributions(3)
    drafts = torch.multinomial(p[:2], 500, replacement=True).T
    tokens = verified(p, drafts, p[:2].expand(500, 2, V), torch.full((500,), 3))
    assert torch.equal(tokens[:, :2], drafts)


def test_sequences_may_have_different_numbers_of_drafts_and_none() -> None:
    p = distributions(4)
    counts = torch.arange(3 * 4000) % 3 + 1
    tokens = verified(p, p[:2].argmax(-1).expand(len(counts), 2), None, counts)
    assert bool(((tokens != REJECTED).sum(1) <= counts).all())
    assert_distributed(tokens, p)


def test_a_greedy_sequence_takes_the_most_likely_token_beside_others_that_do_not() -> None:
    p = distributions(5)
    drafts = torch.stack([p[0].argmax(), p[1].argmin()]).expand(MANY, 2)
    greedy = torch.arange(MANY) % 2 == 0
    tokens = verified(p, drafts, None, torch.full((MANY,), 3), greedy)
    assert tokens[greedy].unique(dim=0).tolist() == [[*p[:2].argmax(-1).tolist(), REJECTED]]
    assert_distributed(tokens[~greedy], p)


def test_a_sequence_with_a_generator_of_its_own_repeats_whatever_runs_beside_it() -> None:
    def own(rows: int) -> Tensor:
        uniform, noise = randomness([2] * rows, V, {rows - 1: torch.Generator().manual_seed(7)})
        return torch.cat([uniform[-2:].float(), noise[-1]])

    assert torch.equal(own(1), own(3))
    assert not torch.equal(randomness([2], V, {})[0], randomness([2], V, {})[0])


class Sampling:
    """What `pick` reads of vLLM's metadata."""

    def __init__(self, temperature: list[float]) -> None:
        self.temperature, self.generators = torch.tensor(temperature), dict[int, torch.Generator]()


def test_drafts_may_be_drawn_at_each_sequences_temperature() -> None:
    logits = distributions(6)[:1].log().expand(MANY, V)
    drafts, q = pick(logits, Sampling([2.0] * MANY))
    assert torch.allclose(q[0], torch.softmax(logits[0] / 2, -1))
    assert_distributed(drafts[:, None], q[:1])
    mixed, _ = pick(logits, Sampling([0.0, 1.0] * (MANY // 2)))
    assert set(mixed[::2].tolist()) == {int(logits[0].argmax())}
