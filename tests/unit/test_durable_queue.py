"""A replay queue that may die, and changes that nobody waits for: nothing is lost, and no failure stays unseen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from infra.queue_actor import ReplayQueueServer
from rl_core.durable import MAX_DEATHS_IN_A_ROW, DurableQueue
from rl_core.replay_queue import ReplayQueue
from tests.unit.fakes import group_result


class Died(Exception):
    pass


class Remote:
    """The true queue; answers come one turn of the event loop later. After `calls` calls its process is dead."""

    def __init__(self, calls: int = 10**9) -> None:
        self.queue, self.left = ReplayQueue(window=4), calls

    def __getattr__(self, method: str) -> Callable[..., asyncio.Future[Any]]:
        def call(*arguments: Any) -> asyncio.Future[Any]:
            answer = asyncio.get_running_loop().create_future()
            self.left -= 1
            try:
                if self.left < 0:
                    raise Died("SIGKILL")
                value = getattr(self.queue, method)(*arguments)
            except Exception as error:  # noqa: BLE001
                asyncio.get_running_loop().call_soon(answer.set_exception, error)
            else:
                asyncio.get_running_loop().call_soon(answer.set_result, value)
            return answer

        return call


@pytest.mark.parametrize("calls", range(12))
async def test_whenever_it_dies_every_group_is_taken_once(calls: int) -> None:
    made = iter([Remote(calls), *(Remote() for _ in range(3))])
    queue = DurableQueue(lambda: next(made), (Died,))
    await queue.open()
    taken: list[str] = []
    for i in range(6):
        await queue.start(2 * i)
        await queue.start(2 * i + 1)
        await queue.put(2 * i, group_result(group_id=f"g{i}"))
        await queue.drop(2 * i + 1)
        if i % 2:
            taken += [r.group_id for r in await queue.take(2)]
    assert taken == [f"g{i}" for i in range(6)]
    assert await queue.take(1) == []


async def test_a_refused_change_is_raised_at_the_next_call() -> None:
    remote = Remote()
    queue = DurableQueue(lambda: remote, (Died,))
    await queue.start(5)
    remote.queue.drop(5)  # behind its back
    await queue.put(5, group_result(group_id="g"))
    with pytest.raises(ValueError, match="ticket 5 was never started"):
        await queue.take(1)


async def test_one_that_dies_of_what_it_is_told_ends_the_run() -> None:
    queue = DurableQueue(lambda: Remote(0), (Died,))
    await queue.open()
    with pytest.raises(RuntimeError, match=f"died {MAX_DEATHS_IN_A_ROW + 1} times in a row; the last time: SIGKILL"):
        await queue.take(1)


def test_calls_that_travel_together_fail_alone() -> None:
    server = ReplayQueueServer(window=1)
    answers = server.call([("start", (1,)), ("start", (1,)), ("put", (1, group_result(group_id="a"))), ("take", (1,))])
    assert [type(a).__name__ for a in answers] == ["NoneType", "ValueError", "NoneType", "list"]
    assert [r.group_id for r in answers[3]] == ["a"]
