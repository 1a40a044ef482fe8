"""A line to an environment host on the same machine: a call over it takes a fraction of what it takes through Ray.

    worker --[length, JSON: number, method, session, arguments]--> host --(HostActor.open, play, step, truncate, close)
           <--[length, JSON: number, answer, error]--------------

Ray starts, watches and ends hosts; what episodes ask of them goes over the line. It is a socket without a file (Linux, abstract
namespace), which only processes of the same user and network namespace reach: a program in a sandbox has neither. JSON and not
pickle, so that nothing that a policy or an environment says can become more than data on the other side.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import sys
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from itertools import count
from typing import Any, Protocol, cast

from environments.host import EnvironmentBug, EnvironmentFailure, TaskUnusable, describe, failed
from rl_core.seams import Observation, Transition
from rl_core.types import Message, Status, Task, Turn, Verdict, to_json

MAX_FRAME = 64 << 20
"""Bytes of one call or answer; an environment that shows more in one step is broken."""

_LENGTH = struct.Struct("!I")
_CREDENTIALS = struct.Struct("3i")  # process, user, group


class LineLost(ConnectionError):
    """The host has ended, or the connection to it."""


class Callee(Protocol):
    """What a line leads to: a HostActor."""

    async def open(self, session_id: str, env_id: str, options: Mapping[str, Any], task: Task) -> Observation: ...
    async def play(self, session_id: str, env_id: str, options: Mapping[str, Any], task: Task, turn: Turn | None) -> Transition: ...
    async def step(self, session_id: str, turn: Turn) -> Transition: ...
    async def truncate(self, session_id: str) -> Transition: ...
    async def close(self, session_id: str) -> None: ...


METHODS: dict[str, Callable[..., Awaitable[Any]]] = {
    "open": lambda host, session, env_id, options, task: host.open(session, env_id, options, Task(**task)),
    "play": lambda host, session, env_id, options, task, turn: host.play(
        session, env_id, options, Task(**task), None if turn is None else Turn.from_dict(turn)
    ),
    "step": lambda host, session, turn: host.step(session, Turn.from_dict(turn)),
    "truncate": lambda host, session: host.truncate(session),
    "close": lambda host, session: host.close(session),
}
"""What may be called, with its arguments as JSON has them."""

FAILURES: dict[str, type[EnvironmentFailure]] = {kind.__name__: kind for kind in (EnvironmentFailure, EnvironmentBug, TaskUnusable)}
"""What `open` and `play` may raise, which their caller must tell apart."""


# --- frames ---------------------------------------------------------------------------------------------------------------


class _Frames(asyncio.Protocol):
    """Whole frames out of a stream of bytes, and into it. Hangs up on users that are not this one."""

    _transport: asyncio.Transport

    def __init__(self) -> None:
        self._bytes = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by class
        peer = transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(peer)[1] != os.getuid():
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._bytes += data
        for frame in self._whole():
            self.frame_received(frame)

    def frame_received(self, frame: bytes) -> None:
        raise NotImplementedError

    def send(self, frame: bytes) -> None:
        self._transport.write(_LENGTH.pack(len(frame)) + frame)

    def _whole(self) -> Iterator[bytes]:
        at = 0
        while len(self._bytes) >= at + _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._bytes, at)
            if length > MAX_FRAME:
                self._transport.abort()
                break
            if len(self._bytes) < at + _LENGTH.size + length:
                break
            yield bytes(self._bytes[at + _LENGTH.size : at + _LENGTH.size + length])
            at += _LENGTH.size + length
        del self._bytes[:at]


# --- the host's end -------------------------------------------------------------------------------------------------------


async def listen(callee: Callee) -> tuple[str, asyncio.Server | None]:
    """Take calls for `callee` in this event loop. The address, "" where there are no such sockets; and what must be kept meanwhile."""
    if sys.platform != "linux":
        return "", None
    name = f"polyrl-host-{uuid.uuid4().hex}"
    return name, await asyncio.get_running_loop().create_unix_server(lambda: _HostEnd(callee), path=f"\0{name}")


class _HostEnd(_Frames):
    def __init__(self, callee: Callee) -> None:
        super().__init__()
        self._callee = callee
        self._serving: set[asyncio.Task[None]] = set()

    def frame_received(self, frame: bytes) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(frame))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, frame: bytes) -> None:
        number, method, session, arguments = json.loads(frame)
        try:
            answer = encode(number, await METHODS[method](self._callee, session, *arguments))
        except EnvironmentFailure as error:
            answer = _error(number, type(error).__name__, str(error))
        except Exception as error:  # noqa: BLE001 (the caller's to know)
            answer = _error(number, "", describe(error))
        if not self._transport.is_closing():
            self.send(answer)


# --- the worker's end -----------------------------------------------------------------------------------------------------


class Line(_Frames):
    """One worker's connection to one host."""

    def __init__(self) -> None:
        super().__init__()
        self.lost = False
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}

    @staticmethod
    async def connect(address: str) -> Line:
        """Raises OSError where nobody listens: the host has ended, or is on another machine."""
        loop, connection = asyncio.get_running_loop(), socket.socket(socket.AF_UNIX)
        try:
            connection.setblocking(False)
            await loop.sock_connect(connection, f"\0{address}")  # not by `path`: uvloop, which Ray's actors run on, cuts it at the NUL
            _, line = await loop.create_unix_connection(Line, sock=connection)
        except BaseException:
            connection.close()
            raise
        return line

    def call(self, method: str, session: str, *arguments: Any) -> asyncio.Future[Any]:
        """One of METHODS; arguments are JSON values, tasks and turns. It is sent now.

        The future has its answer, or LineLost, or one of FAILURES, or RuntimeError with what the host raised. Raises ValueError for a
        call beyond MAX_FRAME.
        """
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self.lost:
            answer.set_exception(LineLost("the environment host has ended"))
            return answer
        number = next(self._numbers)
        frame = to_json([number, method, session, arguments])
        if len(frame) > MAX_FRAME:
            raise ValueError(f"a turn or task of {len(frame) / 2**20:.0f} MiB, more than {MAX_FRAME >> 20}: no environment takes that")
        self._waiting[number] = answer
        answer.add_done_callback(lambda _: self._waiting.pop(number, None))  # also when nobody waits any more
        self.send(frame)
        return answer

    def hang_up(self) -> None:
        self._transport.abort()

    def frame_received(self, frame: bytes) -> None:
        number, value, error = json.loads(frame)
        if (answer := self._waiting.get(number)) is None or answer.done():
            return
        if error is None:
            answer.set_result(_read(value))
        else:
            kind, text = error
            answer.set_exception(FAILURES[kind](text) if kind in FAILURES else RuntimeError(f"the environment host failed: {text}"))

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        for answer in list(self._waiting.values()):
            if not answer.done():
                answer.set_exception(LineLost("the environment host ended amid the call"))


# --- what travels ---------------------------------------------------------------------------------------------------------


def encode(number: int, answer: Observation | Transition | None) -> bytes:
    """An answer. One that is no data, or too much of it, is its environment's fault: a step then ends with such a verdict."""
    try:
        frame = to_json([number, _written(answer), None])
        if len(frame) <= MAX_FRAME:
            return frame
        problem = f"its answer takes {len(frame) / 2**20:.0f} MiB, more than {MAX_FRAME >> 20}"
    except (TypeError, ValueError, RecursionError) as error:
        problem = f"its answer is no JSON: {describe(error)}"
    if isinstance(answer, Transition):
        return to_json([number, _written(failed(Status.ENV_ERROR, problem)), None])
    return _error(number, EnvironmentBug.__name__, problem)


def _error(number: int, kind: str, text: str) -> bytes:
    return to_json([number, None, [kind, text]])


def _written(answer: Observation | Transition | None) -> list[Any] | None:
    """[messages, tools], and of a transition [terminated, truncated, verdict, began] behind."""
    if answer is None:
        return None
    if isinstance(answer, Observation):
        return [[[m.role, m.content] for m in answer.messages], answer.tools]
    return [*cast(list[Any], _written(answer.observation)), answer.terminated, answer.truncated, answer.verdict, answer.began]


def _read(data: list[Any] | None) -> Observation | Transition | None:
    if data is None:
        return None
    messages, tools, *rest = data
    observation = Observation(messages=tuple(Message(role=role, content=content) for role, content in messages), tools=tuple(tools))
    if not rest:
        return observation
    terminated, truncated, verdict, began = rest
    return Transition(
        observation=observation,
        terminated=terminated,
        truncated=truncated,
        verdict=None if verdict is None else Verdict.from_dict(verdict),
        began=began,
    )
