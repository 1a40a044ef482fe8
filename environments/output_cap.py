"""What a host prints, bounded: an environment that prints a gigabyte must fill neither a disk nor the driver's terminal.

print, C code, child processes --> pipe in place of fd 1 and 2 --> a thread --> the first BURST bytes, then RATE bytes a second
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable

BURST = 256 << 10
RATE = 4 << 10
"""Bytes per second that stay allowed: a log of a day is some 350 MB at the very most, and a line of cause always gets through."""
CHUNK = 1 << 16


class Allowance:
    """A bucket of bytes that fills up at RATE."""

    def __init__(self, now: Callable[[], float] = time.monotonic, burst: int = BURST, rate: float = RATE) -> None:
        self._now, self._burst, self._rate = now, burst, rate
        self._left, self._then = float(burst), now()
        self._dropped = 0

    def pass_on(self, chunk: bytes) -> bytes:
        """As much of `chunk` as is allowed, with a note of what was left out since the last time."""
        now = self._now()
        self._left = min(self._burst, self._left + (now - self._then) * self._rate)
        self._then = now
        kept = chunk[: int(self._left)]
        self._left -= len(kept)
        if not kept:
            self._dropped += len(chunk)
            return b""
        note = f"\n[... {self._dropped} bytes of output left out ...]\n".encode() if self._dropped else b""
        self._dropped = len(chunk) - len(kept)
        return note + kept


def cap_output() -> None:
    """Put the cap before this process's standard output and error, for good. Children inherit it."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for fd in (1, 2):
        target = os.dup(fd)
        reading, writing = os.pipe()
        os.dup2(writing, fd)
        os.close(writing)
        threading.Thread(target=pump, args=(reading, target), name=f"output-{fd}", daemon=True).start()


def pump(reading: int, target: int) -> None:
    """Copy until the pipe ends."""
    allowance = Allowance()
    while chunk := os.read(reading, CHUNK):
        rest = allowance.pass_on(chunk)
        while rest:
            rest = rest[os.write(target, rest) :]
