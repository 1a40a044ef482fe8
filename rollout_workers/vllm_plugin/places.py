"""Places in the batch that are kept for probes, so that sequences of the run may queue inside the engine.

A place that becomes free is filled in the same step if somebody waits for it here; through the worker's event loop it takes a step or
two, which is a tenth of a short answer's time. But a probe proves a weight update, and may not wait behind the run's work: it goes to the
front of the queue, and only as many sequences are let in as leave room for the probes that are not in the engine.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

PLACES_VARIABLE = "POLYRL_PROBE_PLACES"
"""Environment variable: how many of an engine's `max_num_seqs` places are for probes."""

PROBE = "/probe/"
"""How the id of a probe's request begins, and no rollout's: those begin with a group's, which begins with a letter or a number."""


def install() -> None:
    """Keep places free in the schedulers of engines whose process is told to."""
    from vllm.v1.core.sched.scheduler import Scheduler

    if hasattr(Scheduler, "polyrl_places"):
        return
    stock = Scheduler.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        if places := int(os.environ.get(PLACES_VARIABLE, "0")):  # asked now: a forked process inherits the patch
            keep_places(self, places)

    Scheduler.__init__ = __init__
    Scheduler.polyrl_places = True


def keep_places(scheduler: Any, places: int) -> None:
    """Let one vLLM scheduler keep `places` of its batch for probes."""
    schedule, add_request = scheduler.schedule, scheduler.add_request
    most = scheduler.max_num_active_reqs

    def schedule_with_room(*args: Any, **kwargs: Any) -> Any:
        scheduler.max_num_active_reqs = most - places + min(probes(scheduler.requests), places)
        return schedule(*args, **kwargs)

    def add_in_order(request: Any) -> None:
        add_request(request)
        if request.request_id.startswith(PROBE) and request in scheduler.waiting:
            scheduler.waiting.remove_request(request)
            scheduler.waiting.prepend_request(request)

    scheduler.schedule, scheduler.add_request = schedule_with_room, add_in_order


def probes(names: Iterable[str]) -> int:
    return sum(name.startswith(PROBE) for name in names)
