"""The replay queue in a process of its own. Calls made in one turn of the event loop travel together: a group costs no round trip."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import ray

from rl_core.replay_queue import ReplayQueue
from rl_core.seams import GroupResult

Call = tuple[str, tuple[Any, ...]]
"""A method of ReplayQueue, and its arguments."""


class ReplayQueueServer:
    """In the actor."""

    def __init__(self, window: int) -> None:
        self._queue = ReplayQueue(window)

    def call(self, calls: Sequence[Call]) -> list[Any]:
        """In order; for each what it returned, or the exception that it raised."""
        return [self._call(method, arguments) for method, arguments in calls]

    def _call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        try:
            return getattr(self._queue, method)(*arguments)
        except Exception as error:  # noqa: BLE001 (it is its caller's, not that of the other calls)
            return error


class QueueActor:
    """Implements `rl_core.durable.RawQueue`. The actor ends with `parts`."""

    def __init__(self, window: int, parts: AsyncExitStack) -> None:
        self._actor = ray.remote(ReplayQueueServer).options(num_cpus=0).remote(window)  # type: ignore[attr-defined]
        parts.callback(ray.kill, self._actor)
        self._unsent: list[tuple[Call, asyncio.Future[Any]]] = []

    def restore(self, groups: Mapping[int, GroupResult | None], overtakers: Sequence[int]) -> asyncio.Future[None]:
        return self._send("restore", groups, overtakers)

    def start(self, ticket: int) -> asyncio.Future[None]:
        return self._send("start", ticket)

    def put(self, ticket: int, result: GroupResult) -> asyncio.Future[None]:
        return self._send("put", ticket, result)

    def drop(self, ticket: int) -> asyncio.Future[None]:
        return self._send("drop", ticket)

    def take(self, count: int) -> asyncio.Future[list[GroupResult]]:
        return self._send("take", count)

    def _send(self, method: str, *arguments: Any) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        if not self._unsent:
            loop.call_soon(self._flush)
        answer: asyncio.Future[Any] = loop.create_future()
        self._unsent.append(((method, arguments), answer))
        return answer

    def _flush(self) -> None:
        sent, self._unsent = self._unsent, []
        reply = asyncio.wrap_future(self._actor.call.remote([call for call, _ in sent]).future())
        reply.add_done_callback(partial(_answer, [answer for _, answer in sent]))


def _answer(answers: Sequence[asyncio.Future[Any]], reply: asyncio.Future[list[Any]]) -> None:
    """Hand each caller its own; all of them the actor's death."""
    if reply.cancelled():
        return
    error = reply.exception()
    for answer, value in zip(answers, reply.result() if error is None else [error] * len(answers), strict=True):
        if answer.done():  # nobody waits any more
            continue
        if isinstance(value, BaseException):
            answer.set_exception(value)
        else:
            answer.set_result(value)
