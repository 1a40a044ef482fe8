"""The replay queue keeps the order of start, within its window."""

from __future__ import annotations

import pytest

from rl_core.replay_queue import ReplayQueue
from tests.unit.fakes import group_result


def filled(window: int, ready: list[int], running: list[int]) -> ReplayQueue:
    queue = ReplayQueue(window)
    for ticket in sorted(ready + running):
        queue.start(ticket)
    for ticket in ready:
        queue.put(ticket, group_result(group_id=f"g{ticket}"))
    return queue


def ids(queue: ReplayQueue, count: int) -> list[str]:
    return [r.group_id for r in queue.take(count)]


def test_a_batch_is_the_oldest_groups_in_order_of_start_not_of_finish() -> None:
    assert ids(filled(1, ready=[2, 0, 1], running=[]), 2) == ["g0", "g1"]


def test_a_batch_is_all_or_nothing() -> None:
    queue = filled(4, ready=[0], running=[1])
    assert ids(queue, 2) == []
    assert queue.depth() == (1, 1)


def test_a_window_of_one_waits_for_a_straggler() -> None:
    assert ids(filled(1, ready=[1, 2, 3], running=[0]), 2) == []


def test_at_most_window_minus_one_groups_overtake_a_straggler_over_several_batches() -> None:
    queue = filled(3, ready=[1, 2, 3, 4], running=[0])
    assert ids(queue, 1) == ["g1"]
    assert ids(queue, 1) == ["g2"]
    assert ids(queue, 1) == []
    queue.put(0, group_result(group_id="g0"))
    assert ids(queue, 2) == ["g0", "g3"]


def test_dropped_groups_do_not_count_as_overtaking() -> None:
    queue = filled(2, ready=[3], running=[0, 1, 2])
    queue.drop(1)
    queue.drop(2)
    assert ids(queue, 1) == ["g3"]


def test_double_delivery_is_an_error() -> None:
    queue = filled(2, ready=[0], running=[])
    with pytest.raises(ValueError, match="put twice"):
        queue.put(0, group_result())
    assert ids(queue, 1) == ["g0"]
    with pytest.raises(ValueError, match="never started, or has been taken"):
        queue.put(0, group_result())


def test_a_ready_group_cannot_be_dropped() -> None:
    queue = filled(2, ready=[0], running=[])
    with pytest.raises(ValueError, match="not running"):
        queue.drop(0)
