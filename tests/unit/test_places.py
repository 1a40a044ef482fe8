"""Sequences may queue inside an engine; a probe never waits behind them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rollout_workers.vllm_plugin.places import PROBE, keep_places


class Queue(list[Any]):
    def remove_request(self, request: Any) -> None:
        self.remove(request)

    def prepend_request(self, request: Any) -> None:
        self.insert(0, request)


class Scheduler:
    """What of vLLM's scheduler counts here: first come, first served, up to `max_num_active_reqs`."""

    def __init__(self, places: int) -> None:
        self.max_num_active_reqs = places
        self.requests: dict[str, Any] = {}
        self.waiting, self.running = Queue(), Queue()

    def add_request(self, request: Any) -> None:
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def schedule(self) -> list[str]:
        while self.waiting and len(self.running) < self.max_num_active_reqs:
            self.running.append(self.waiting.pop(0))
        return [r.request_id for r in self.running]

    def finish(self, name: str) -> None:
        self.running.remove(self.requests.pop(name))


@pytest.fixture
def scheduler() -> Scheduler:
    scheduler = Scheduler(6)
    keep_places(scheduler, 2)
    return scheduler


def add(scheduler: Scheduler, *names: str) -> None:
    for name in names:
        scheduler.add_request(SimpleNamespace(request_id=name))


def test_the_run_never_takes_the_places_of_probes(scheduler: Scheduler) -> None:
    add(scheduler, *"abcdefg")
    assert scheduler.schedule() == list("abcd")
    add(scheduler, f"{PROBE}1", f"{PROBE}2")
    assert set(scheduler.schedule()) == {*"abcd", f"{PROBE}1", f"{PROBE}2"}
    scheduler.finish(f"{PROBE}1")
    scheduler.finish(f"{PROBE}2")
    assert scheduler.schedule() == list("abcd")
    scheduler.finish("a")
    assert scheduler.schedule() == list("bcde")


def test_a_place_that_becomes_free_while_probes_run_is_the_next_ones(scheduler: Scheduler) -> None:
    add(scheduler, *"abcdef", f"{PROBE}1")
    assert set(scheduler.schedule()) == {*"abcd", f"{PROBE}1"}
    scheduler.finish("b")
    assert set(scheduler.schedule()) == {*"acde", f"{PROBE}1"}


def test_more_probes_than_places_take_the_next_ones(scheduler: Scheduler) -> None:
    add(scheduler, *"abcde", f"{PROBE}1", f"{PROBE}2", f"{PROBE}3")
    assert len(scheduler.schedule()) == 6
    scheduler.finish("a")
    assert "e" not in scheduler.schedule()
