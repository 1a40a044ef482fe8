"""What vLLM says of a sequence, as a Completion: pure functions over its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rl_core.thinking import THOUGHT_FULL
from rl_core.types import CUT_OFF, Completion, VersionSpan


def completion(prompt: Sequence[int], output: Any, *, began: int, speculative: bool) -> Completion:
    """A Completion from what vLLM reports of a finished sequence, whose request `began` under that version.

    A pass of the policy yields its accepted drafts and one token more, and vllm_plugin/passes.py lists them all:

        T = passes + accepted      (less what stood behind a stop token)
    """
    ids = np.asarray(output.token_ids, np.int32)
    flat = output.logprobs
    logprobs = np.asarray([flat.logprobs[start] for start in flat.start_indices], np.float32)
    chosen = np.asarray([flat.token_ids[start] for start in flat.start_indices], np.int32)
    assert np.array_equal(ids, chosen), f"logprobs of tokens {chosen} came for sampled tokens {ids}"
    steps, drafted, accepted = len(ids), 0, 0
    positions: tuple[tuple[int, int], ...] = ()
    if speculative and (metrics := output.spec_decode_metrics) is not None:
        steps, drafted, accepted = len(metrics.per_step_drafted), metrics.num_draft_tokens, sum(metrics.per_step_accepted)
        positions = by_position(metrics.per_step_drafted, metrics.per_step_accepted)
    spans = tuple(VersionSpan(start=s.start, stop=s.end, version=int(s.version)) for s in output.weight_versions or ())
    age = state_age(spans, began)
    return Completion(
        prompt_ids=np.asarray(prompt, np.int32),
        token_ids=ids,
        logprobs=logprobs,
        spans=spans,
        finish_reason=THOUGHT_FULL if output.stop_reason == THOUGHT_FULL else output.finish_reason,
        engine_steps=steps,
        drafted=drafted,
        accepted=accepted,
        positions=positions,
        state_age_sum=age[0],
        state_age_max=age[1],
    )


def by_position(drafted: Sequence[int], accepted: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """From what each step drafted and accepted: [2, 1, 2], [1, 1, 0] -> ((3, 2), (2, 0))."""
    longest = max(drafted, default=0)
    return tuple((sum(d >= j for d in drafted), sum(a >= j for a in accepted)) for j in range(1, longest + 1))


def state_age(spans: Sequence[VersionSpan], began: int) -> tuple[int, int]:
    """(sum, max) over the tokens of a request, policy versions. The version that it `began` under is the oldest that may have read its
    prompt, since nothing is cached between requests, and all later states grow from that."""
    ages = [(s.version - began, s.stop - s.start) for s in spans]
    return sum(age * count for age, count in ages), max((age for age, _ in ages), default=0)


def cut_off(state: Any, start: int, *, began: int) -> Completion:
    """Tokens from `start` on of a sequence that has not ended, from vLLM's state of it. What it drafted is known at its end only."""
    ids, flat = state.detokenizer.output_token_ids[start:], state.logprobs_processor.logprobs
    whole = state._weight_version_spans() or ()
    spans = tuple(VersionSpan(start=max(s.start - start, 0), stop=s.end - start, version=int(s.version)) for s in whole if s.end > start)
    age = state_age(spans, began)
    return Completion(
        prompt_ids=np.asarray(state.prompt_token_ids if start == 0 else (), np.int32),
        token_ids=np.asarray(ids, np.int32),
        logprobs=np.asarray([flat.logprobs[at] for at in flat.start_indices[start:]], np.float32),
        spans=spans,
        finish_reason=CUT_OFF,
        engine_steps=len(ids),
        state_age_sum=age[0],
        state_age_max=age[1],
    )
