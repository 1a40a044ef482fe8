"""Feed a job to a runner and read what comes back, within a deadline and byte limits, whatever the other side does.

Backends give a `Channel`: raw file descriptors for bubblewrap, a multiplexed socket for Docker.
"""

from __future__ import annotations

import math
import os
import select
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from environments.sandbox.base import READY, Kind, Limits

_CHUNK = 65_536


class Channel(Protocol):
    """The three streams of one runner. `read` returns ("out"|"err", bytes) pieces; `open` turns False at the end of stdout."""

    open: bool

    def filenos(self) -> tuple[list[int], list[int]]:
        """(to poll for reading, to poll for writing)."""
        ...

    def read(self, fd: int) -> list[tuple[str, bytes]]: ...
    def write(self, data: bytes) -> int: ...


@dataclass(kw_only=True)
class Transcript:
    """What a runner said so far."""

    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)

    @property
    def ready(self) -> bool:
        return self.stdout.startswith(READY)

    @property
    def answer(self) -> bytes:
        """Stdout after READY."""
        return bytes(self.stdout[len(READY) :])

    def settled(self, cases: int) -> bool:
        """Whether every case has its line and a value: nothing that comes later changes the verdict.

        Where a case has none, the end is waited for: only then does the kernel's word on memory count.
        """
        values = self.stdout.count(b'"state": "value"')  # within an output, its quotes are escaped
        return values >= cases > 0 and self.stdout.count(b"\n") > cases


def pump(
    channel: Channel, payload: bytes, limits: Limits, *, cases: int = 0, said: bytes = b"", until_ready: bool = False,
    hurry: Callable[[], None] | None = None, patience_s: float = 0.0,
) -> tuple[Kind, Transcript]:  # fmt: skip
    """Write `payload`, read until `cases` are settled or the runner ends. The kind is finished, timeout, output_limit, or
    infra_error (never said ready).

    With `until_ready`, stop after READY: the runner then waits for a job, warm. The pump that brings the job says that it was `said`.
    `hurry` is called once, where that takes longer than `patience_s`.
    """
    transcript = Transcript(stdout=bytearray(said))
    began = time.monotonic()
    deadline = began + limits.wall_s
    pending = memoryview(payload)
    kind: Kind = "finished"
    while channel.open and kind == "finished" and not (transcript.ready if until_ready else transcript.settled(cases)):
        now = time.monotonic()
        if now >= deadline:
            kind = "timeout"
            break
        if hurry is not None and now >= began + patience_s:
            hurry()
            hurry = None
        left = (deadline if hurry is None else min(deadline, began + patience_s)) - now
        readers, writers = channel.filenos()
        poll = select.poll()
        for fd in readers:
            poll.register(fd, select.POLLIN)
        for fd in writers if pending else ():
            poll.register(fd, select.POLLOUT | (select.POLLIN if fd in readers else 0))
        for fd, events in poll.poll(math.ceil(left * 1000)):
            if fd in readers and events & ~select.POLLOUT:
                for stream, data in channel.read(fd):
                    (transcript.stdout if stream == "out" else transcript.stderr).extend(data)
            elif fd in writers:
                try:
                    pending = pending[channel.write(bytes(pending[:_CHUNK])) :]
                except (BrokenPipeError, ConnectionResetError):
                    pending = memoryview(b"")  # the runner is gone or reads no more; what it said until now decides
        if len(transcript.stdout) > limits.output_bytes or len(transcript.stderr) > limits.stderr_bytes:
            kind = "output_limit"
    if not transcript.ready:
        return "infra_error", transcript
    return kind, transcript


class Pipes:
    """The Channel of a subprocess: three pipes of ours."""

    def __init__(self, stdin: int, stdout: int, stderr: int) -> None:
        self.open = True
        self._stdin = stdin
        self._reading = {stdout: "out", stderr: "err"}
        for fd in (stdin, stdout, stderr):
            os.set_blocking(fd, False)

    def filenos(self) -> tuple[list[int], list[int]]:
        return list(self._reading), [self._stdin]

    def read(self, fd: int) -> list[tuple[str, bytes]]:
        stream = self._reading[fd]
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return []
        if not data:
            del self._reading[fd]
            self.open = "out" in self._reading.values()
        return [(stream, data)]

    def write(self, data: bytes) -> int:
        try:
            return os.write(self._stdin, data)
        except BlockingIOError:
            return 0
