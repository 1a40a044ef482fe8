"""A line to an environment host on the same machine: a call over it takes a fraction of what it takes through Ray.

    worker --[length, JSON: number, session, turn or null]--> host --(HostActor.step or truncate)
           <--[length, JSON: number, transition, error]------

Ray starts, watches and ends hosts, and opens and closes sessions, in that order whatever happens; what an episode does again and again
goes over the line. It is a socket without a file (Linux, abstract namespace), which only processes of the same user and network
namespace reach: a program in a sandbox has neither. JSON and not pickle, so that nothing that a policy or an environment says can
become more than data on the other side.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import sys
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from itertools import count
from typing import Any, Protocol, cast

from environments.host import describe, failed
from rl_core.seams import Observation, Transition
from rl_core.types import Message, Status, Turn, Verdict

MAX_FRAME = 64 << 20
"""Bytes of one call or answer; an environment that shows more in one step is broken."""

_LENGTH = struct.Struct("!I")
_CREDENTIALS = struct.Struct("3i")  # process, user, group


class LineLost(ConnectionError):
    """The host has ended, or the connection to it."""


class Callee(Protocol):
    """What a line leads to: a HostActor."""

    async def step(self, session_id: str, turn: Turn) -> Transition: ...
    async def truncate(self, session_id: str) -> Transition: ...


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
        number, session, turn = json.loads(frame)
        try:
            call = self._callee.truncate(session) if turn is None else self._callee.step(session, Turn.from_dict(turn))
            answer = encode(number, await call)
        except Exception as error:  # noqa: BLE001 (the caller's to know)
            answer = json.dumps([number, None, describe(error)]).encode()
        if not self._transport.is_closing():
            self.send(answer)


# --- the worker's end -----------------------------------------------------------------------------------------------------


class Line(_Frames):
    """One worker's connection to one host."""

    def __init__(self) -> None:
        super().__init__()
        self.lost = False
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[Transition]] = {}

    @staticmethod
    async def connect(address: str) -> Line:
        """Raises OSError where nobody listens: the host has ended, or is on another machine."""
        _, line = await asyncio.get_running_loop().create_unix_connection(Line, path=f"\0{address}")
        return line

    def call(self, session: str, turn: Turn | None) -> asyncio.Future[Transition]:
        """Step with a turn, truncate with None. It is sent now; the future has its answer, or LineLost, or RuntimeError with what the
        host raised. Raises ValueError for a turn beyond MAX_FRAME."""
        answer: asyncio.Future[Transition] = asyncio.get_running_loop().create_future()
        if self.lost:
            answer.set_exception(LineLost("the environment host has ended"))
            return answer
        number = next(self._numbers)
        frame = json.dumps([number, session, None if turn is None else asdict(turn)]).encode()
        if len(frame) > MAX_FRAME:
            raise ValueError(f"a turn of {len(frame) / 2**20:.0f} MiB, more than {MAX_FRAME >> 20}: no environment takes that")
        self._waiting[number] = answer
        answer.add_done_callback(lambda _: self._waiting.pop(number, None))  # also when nobody waits any more
        self.send(frame)
        return answer

    def hang_up(self) -> None:
        self._transport.abort()

    def frame_received(self, frame: bytes) -> None:
        number, transition, error = json.loads(frame)
        if (answer := self._waiting.get(number)) is None or answer.done():
            return
        if error:
            answer.set_exception(RuntimeError(f"the environment host failed: {error}"))
        else:
            answer.set_result(_read(transition))

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        for answer in list(self._waiting.values()):
            if not answer.done():
                answer.set_exception(LineLost("the environment host ended amid the call"))


# --- what travels ---------------------------------------------------------------------------------------------------------


def encode(number: int, transition: Transition) -> bytes:
    """An answer. A transition that is no data, or too much of it, is its environment's fault, and becomes such a verdict."""
    try:
        frame = json.dumps([number, _written(transition), ""], default=_plain).encode()
        if len(frame) <= MAX_FRAME:
            return frame
        problem = f"its answer takes {len(frame) / 2**20:.0f} MiB, more than {MAX_FRAME >> 20}"
    except (TypeError, ValueError, RecursionError) as error:
        problem = f"its answer is no JSON: {describe(error)}"
    return json.dumps([number, _written(failed(Status.ENV_ERROR, problem)), ""]).encode()


def _written(transition: Transition) -> dict[str, Any]:
    return {
        "messages": [[m.role, m.content] for m in transition.observation.messages],
        "tools": list(transition.observation.tools),
        "terminated": transition.terminated,
        "truncated": transition.truncated,
        "verdict": None if transition.verdict is None else asdict(transition.verdict),
    }


def _read(data: dict[str, Any]) -> Transition:
    messages = tuple(Message(role=role, content=content) for role, content in data["messages"])
    return Transition(
        observation=Observation(messages=messages, tools=tuple(data["tools"])),
        terminated=data["terminated"],
        truncated=data["truncated"],
        verdict=None if data["verdict"] is None else Verdict.from_dict(data["verdict"]),
    )


def _plain(value: Any) -> Any:
    """NumPy's numbers, which environments like to return."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a {type(value).__name__}")
