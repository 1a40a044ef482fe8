"""Every pass of the policy over a sequence is counted, those without drafts too.

Upstream (vLLM 0.32) lists for each sequence what the passes that verified drafts had drafted and accepted. How many others there were does
not follow from the number of tokens: accepted drafts behind a stop token are cut off. With this, `per_step_drafted` and
`per_step_accepted` have an entry for each pass that sampled, 0 and 0 where nothing was drafted.
"""

from __future__ import annotations

from typing import Any


def install() -> None:
    """Count where the scheduler gives a sequence what a pass sampled for it."""
    from vllm.v1.core.sched.scheduler import Scheduler

    if hasattr(Scheduler, "polyrl_passes"):
        return
    stock = Scheduler._update_request_with_output

    def update(self: Any, request: Any, new_token_ids: list[int], *args: Any, **kwargs: Any) -> tuple[list[int], bool]:
        if (metrics := request.spec_decode_metrics) is not None and new_token_ids:
            request.polyrl_passes = passes = getattr(request, "polyrl_passes", 0) + 1
            if len(metrics.per_step_drafted) < passes:  # stock has just listed this pass if it verified drafts
                metrics.observe(num_draft_tokens=0, num_accepted=0, detailed=True)
        return stock(self, request, new_token_ids, *args, **kwargs)

    Scheduler._update_request_with_output = update
    Scheduler.polyrl_passes = True
