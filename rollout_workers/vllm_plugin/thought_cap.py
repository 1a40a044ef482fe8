"""A request stops, by the scheduler's own rule for stops, at the token with which its thought is full.

Not a logits processor: vLLM has one of its own (`thinking_token_budget`, vLLM 0.32), which forces the closing marker amid drafts. What
it forces cannot be told from what was sampled (its processed logprob is 0, as that of any certain token is), it wants a tokenizer in
the engine, and it counts by steps that rejections take back. The scheduler looks at each accepted token by itself, after
verification, at any k; the closing marker is then ours to write and to mark as ours (rollout_workers/continuing.py). The price is a
second prefill of that sequence.
"""

from __future__ import annotations

from typing import Any

from rl_core.thinking import THOUGHT_FULL, Thinking

THINKING = "polyrl_thinking"
"""The key in a request's `extra_args` under which its cap stands, as a dict of `Thinking`'s fields."""


def thought_is_full(request: Any) -> bool:
    """Once for each token of a request, after it was appended."""
    params = request.sampling_params
    if not params.extra_args or THINKING not in params.extra_args:
        return False
    before = getattr(request, THINKING, None) or Thinking(**params.extra_args[THINKING])
    thinking = before.after(request.output_token_ids[-1:])
    setattr(request, THINKING, thinking)
    return thinking.full


def install() -> None:
    """Replace the scheduler's rule by itself and ours. In force once, however often it is installed."""
    from vllm.v1.core.sched import scheduler
    from vllm.v1.request import RequestStatus

    stock = scheduler.check_stop
    if getattr(stock, "stops_full_thoughts", False):
        return

    def check_stop(request: Any, max_model_len: int) -> bool:
        full = thought_is_full(request)
        if stock(request, max_model_len):
            return True
        if full:
            request.status, request.stop_reason = RequestStatus.FINISHED_STOPPED, THOUGHT_FULL
        return full

    check_stop.stops_full_thoughts = True  # type: ignore[attr-defined]
    scheduler.check_stop = check_stop
