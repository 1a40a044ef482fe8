"""Verification of drafts on CPU: all sequences and all drafts in one pass.

    logits [N, V] --> temperature, top-p --> logprobs [N, V] --+--> is each draft accepted? --> first rejected one
                                                               +--> one draw per sequence from what is left there

Cost upstream (vLLM 0.32, CPU): drafts and the token behind them are sampled by two samplers, with their logits gathered, scattered back
and normalised three times, and a loop over vocabulary and drafts in place of a GPU kernel: as much time as a fifth of the model.

With p the policy's distribution at a draft x, which is a certainty, x is accepted with probability p(x); else a token is drawn from what
is left of p without x. The outcome has distribution p whatever x is (Leviathan et al., 2023; Chen et al., 2023).

Drafts that were drawn, and requests that want more than temperature, top-k and top-p (penalties, logit processors, several logprobs),
are left to vLLM.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rollout_workers.vllm_plugin.sampling import expand_batch_to_tokens

REJECTED = -1
"""vLLM's placeholder in [B, 1 + k] sampled tokens."""


def verify(
    logprobs: Tensor,  # [N, V] of the policy: for each sequence its k_i drafts' rows, then the row behind them; N = sum(k_i + 1)
    drafts: Tensor,  # [sum(k_i)]
    counts: Tensor,  # [B] int64, k_i + 1
    greedy: Tensor | None,  # [B] bool: sequences that take the most likely token; None: none does
    uniform: Tensor,  # [sum(k_i)] float64 in [0, 1)
    noise: Tensor,  # [B, V] of the exponential distribution
) -> tuple[Tensor, Tensor]:
    """(tokens [B, max(k_i) + 1], REJECTED behind each sequence's last one; rows [B, max(k_i) + 1] of `logprobs` that they stand for)."""
    size, longest = len(counts), int(counts.max())
    ends = counts.cumsum(0)
    steps = torch.arange(longest)
    rows = ((ends - counts)[:, None] + steps).clamp(max=len(logprobs) - 1)
    drafted = steps[:-1] < (counts - 1)[:, None]  # [B, longest - 1]
    draft_rows = rows[:, :-1][drafted]
    drafts = drafts.long()
    accepted = uniform < logprobs[draft_rows, drafts].exp().double()
    if greedy is not None:
        accepted = torch.where(greedy.repeat_interleave(counts - 1), drafts == logprobs[draft_rows].argmax(-1), accepted)

    tokens = torch.full((size, longest), REJECTED)
    tokens[:, :-1][drafted] = drafts
    stands = torch.zeros((size, longest - 1), dtype=torch.int64)
    stands[drafted] = accepted.long()
    kept = stands.cumprod(1).sum(1)  # [B] drafts that stand

    here = logprobs[rows.gather(1, kept[:, None])[:, 0]]
    left = here.exp()
    refused = (kept < counts - 1).nonzero()[:, 0]
    if len(refused):
        at = (ends - counts - torch.arange(size) + kept)[refused]  # the refused drafts' places among all
        left[refused, drafts[at]] = 0.0
    drawn = (left / noise).argmax(-1)
    if greedy is not None:
        drawn = torch.where(greedy, here.argmax(-1), drawn)
    tokens.scatter_(1, kept[:, None], drawn[:, None])
    return tokens.masked_fill_(steps > kept[:, None], REJECTED), rows


def forward(metadata: Any, logits: Tensor, sampling: Any) -> Any:
    """vLLM's `RejectionSampler.forward` for the requests that `plain` names."""
    from vllm.v1.outputs import LogprobsTensors, SamplerOutput
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    counts = torch.tensor(metadata.num_draft_tokens) + 1
    logits = logits.float()
    if not sampling.all_greedy and not sampling.generators and sampling.top_k is None and sampling.top_p is None:
        return by_kernel(metadata, logits, sampling, counts)
    greedy = torch.ones(len(counts), dtype=torch.bool) if sampling.all_greedy else None
    if not sampling.all_greedy:
        if not sampling.all_random:
            greedy = sampling.temperature == 0
        temperature, top_k, top_p = (
            None if x is None else expand_batch_to_tokens(x, metadata.cu_num_sampled_tokens, len(logits), *once)
            for x, once in ((sampling.temperature, (0, 1)), (sampling.top_k, ()), (sampling.top_p, ()))
        )
        assert temperature is not None
        logits = apply_top_k_top_p(logits / temperature[:, None], top_k, top_p)
    logprobs = logits.log_softmax(-1)
    uniform, noise = randomness(metadata.num_draft_tokens, logprobs.shape[1], sampling.generators)
    tokens, rows = verify(logprobs, metadata.draft_token_ids, counts, greedy, uniform, noise)
    for row, generator in sampling.generators.items():
        if metadata.num_draft_tokens[row] == 0 and (greedy is None or not bool(greedy[row])):
            tokens[row, 0] = undrafted(logits[rows[row, :1]], generator)
    tensors = None
    if sampling.max_num_logprobs is not None:
        flat, there = tokens.clamp(min=0).flatten(), logprobs[rows.flatten()]
        chosen = there.gather(1, flat[:, None])
        tensors = LogprobsTensors(flat[:, None].int(), chosen, (there >= chosen).sum(-1))
    return SamplerOutput(sampled_token_ids=tokens.int(), logprobs_tensors=tensors)


def by_kernel(metadata: Any, logits: Tensor, sampling: Any, counts: Tensor) -> Any:
    """`forward` where temperature is all that is asked for, as for nearly all rollouts: only rows that matter are read."""
    from vllm.v1.outputs import LogprobsTensors, SamplerOutput

    from rollout_workers.vllm_plugin import kernels

    uniform, draws = torch.rand(sum(metadata.num_draft_tokens), dtype=torch.float64), torch.rand(len(counts), dtype=torch.float64)
    shape = len(counts), max(metadata.num_draft_tokens) + 1
    tokens, logprobs, ranks = torch.full(shape, REJECTED), torch.zeros(shape), torch.zeros(shape, dtype=torch.int64)
    drafts = metadata.draft_token_ids.long()
    kernels.verify_rows(*kernels.views(logits.contiguous(), sampling.temperature, drafts, counts, uniform, draws, tokens, logprobs, ranks))
    tensors = None
    if sampling.max_num_logprobs is not None:
        tensors = LogprobsTensors(tokens.clamp(min=0).view(-1, 1).int(), logprobs.view(-1, 1), ranks.view(-1))
    return SamplerOutput(sampled_token_ids=tokens.int(), logprobs_tensors=tensors)


def randomness(num_drafts: list[int], vocab: int, generators: dict[int, torch.Generator]) -> tuple[Tensor, Tensor]:
    """(uniform [sum(num_drafts)], exponential [B, vocab]); rows of drafted sequences with a generator of their own come from it."""
    uniform = torch.rand(sum(num_drafts), dtype=torch.float64)
    noise = torch.empty(len(num_drafts), vocab).exponential_()
    for row, generator in generators.items():
        if not num_drafts[row]:
            continue
        start = sum(num_drafts[:row])
        uniform[start : start + num_drafts[row]].uniform_(generator=generator)
        noise[row].exponential_(generator=generator)
    return uniform, noise


def undrafted(logits: Tensor, generator: torch.Generator) -> int:
    """A token [1, V] of a sequence with its own generator and no drafts, by the dice that vLLM's plain sampler takes on CPU. Whether that
    one is called depends on the others of the batch, and what a seed gives must not."""
    seed = torch.randint(0, 2**31, (1,), generator=generator)
    return int(torch.ops._C.fused_gumbel_argmax(logits, seed)[0])


def plain(sampler: Any, sampling: Any) -> bool:
    """Whether all that the batch's requests ask for is temperature, top-k, top-p and the logprobs of what was sampled."""
    thinking = sampling.thinking_budget_state_holder
    return (
        sampling.no_penalties
        and sampling.max_num_logprobs in (None, 0)
        and sampling.allowed_token_ids_mask is None
        and not sampling.bad_words_token_ids
        and not sampling.logprob_token_ids
        and not (thinking is not None and thinking.has_tracked_requests())
        and sampler.is_processed_logprobs_mode
        and not sampler.is_logits_logprobs_mode
        and not sampler.synthetic_mode
        and all(idle(processor) for processor in sampling.logitsprocs.all)
    )


def idle(processor: Any) -> bool:
    """Whether a logits processor would leave every sequence of the batch alone. One that we do not know might not."""
    from vllm.v1.sample.logits_processor import builtin

    match processor:
        case builtin.MinPLogitsProcessor():
            return processor.min_p_count == 0
        case builtin.LogitBiasLogitsProcessor():
            return not processor.biases
        case builtin.MinTokensLogitsProcessor():
            return not processor.min_toks
        case _:
            return False


def install() -> None:
    """Replace the stock sampler's forward for the batches that `plain` names."""
    from vllm.v1.sample.rejection_sampler import RejectionSampler

    if hasattr(RejectionSampler, "polyrl_plain"):
        return
    stock = RejectionSampler.forward

    def forward_or_leave(self: Any, metadata: Any, draft_probs: Tensor | None, logits: Tensor, sampling_metadata: Any) -> Any:
        if draft_probs is None and plain(self, sampling_metadata):
            return forward(metadata, logits, sampling_metadata)
        return stock(self, metadata, draft_probs, logits, sampling_metadata)

    RejectionSampler.forward = forward_or_leave
    RejectionSampler.polyrl_plain = True
