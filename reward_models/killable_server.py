"""Runs functions on hostile input, each call in a child of its own that the kernel ends when it has used up its time.

    python -c "...killable_server.main()" MODULE WIDTH CPU_S WALL_S MEMORY_MB

    stdin   {"id": 7, "value": ...}                                     one JSON object per line
    stdout  {"id": 7, "state": "done", "value": ..., "cpu_s": 0.01}     states: done, failed, late, stalled

The server imports MODULE once, warms it up, and forks: a child starts in milliseconds and leaves nothing behind. It never
handles a value itself, so no input can hold it. Calls that have run for PATIENCE_S go on at a low priority in
places of their own, so that cheap calls keep their turn while expensive ones come in.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass
from types import ModuleType
from typing import Any

PATIENCE_S = 0.25
SLOW_WIDTH = 8
"""Expensive calls under way beside the WIDTH cheap ones."""
SLOW_NICENESS = 10
"""Low enough that cheap calls come first, high enough that an expensive one still moves on a busy machine."""
GUILTY_SHARE = 0.15
"""Share of its processor time that a call must have had for its lateness to be its own fault and not the machine's."""
MAX_REPLY_BYTES = 65_536
TICK_S = 1.0
PR_SET_PDEATHSIG = 1


@dataclass(slots=True)
class Call:
    """A child under way."""

    id: int
    pid: int
    pipe: int
    started: float
    reply: bytes = b""
    slow: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What one call may use."""

    width: int
    cpu_s: float
    wall_s: float
    memory_mb: int


class Server:
    """One event loop over stdin and the children's pipes."""

    def __init__(self, module: ModuleType, bounds: Bounds) -> None:
        self.module, self.bounds = module, bounds
        self.waiting: deque[dict[str, Any]] = deque()
        self.calls: dict[int, Call] = {}  # by pipe
        self.parent, self.pid = os.getppid(), os.getpid()

    def run(self) -> None:
        """Until stdin ends or its owner is gone; then every child is ended."""
        poll = select.poll()
        poll.register(0, select.POLLIN)
        pending = b""
        try:
            while os.getppid() == self.parent:
                for fd, _ in poll.poll(1000 * self.patience()):
                    if fd == 0:
                        data = os.read(0, 1 << 20)
                        if not data:
                            return
                        *lines, pending = (pending + data).split(b"\n")
                        self.waiting.extend(json.loads(line) for line in lines)
                    elif self.hear(self.calls[fd]):
                        poll.unregister(fd)
                self.end_late()
                while self.waiting and sum(not c.slow for c in self.calls.values()) < self.bounds.width:
                    poll.register(self.start(self.waiting.popleft()), select.POLLIN)
        finally:
            for call in self.calls.values():
                os.kill(call.pid, signal.SIGKILL)

    def patience(self) -> float:
        """Seconds until some call is to be moved or ended."""
        now = time.monotonic()
        next_events = [
            c.started + (self.bounds.wall_s if c.slow or now - c.started > PATIENCE_S else PATIENCE_S) for c in self.calls.values()
        ]
        return max(0.0, min([now + TICK_S, *next_events]) - now) + 0.001

    def start(self, request: dict[str, Any]) -> int:
        """Fork a child for `request`; returns the pipe that it answers on."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                code = self.child(request["value"], writer)
            except BaseException:  # noqa: BLE001 - out of memory, too deep: the child's end says so
                code = 1
            os._exit(code)
        os.close(writer)
        self.calls[reader] = Call(id=request["id"], pid=pid, pipe=reader, started=time.monotonic())
        return reader

    def child(self, value: Any, writer: int) -> int:
        """In the child: bound everything, then call."""
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.pid:
            return 1  # it was killed between the fork and this line, and no signal will come
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 0)
        os.dup2(nowhere, 1)  # the server's own lines are not a child's to write
        # The default action of SIGPROF ends a process inside the kernel: no loop of C that holds the interpreter can put it off.
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, self.bounds.cpu_s)
        memory = self.bounds.memory_mb << 20
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        try:
            reply = {"state": "done", "value": self.module.handle(value)}
        except MemoryError:
            return 1
        except Exception as error:  # noqa: BLE001 - sympy raises whatever it likes
            reply = {"state": "failed", "value": f"{type(error).__name__}: {error}"[:500]}
        data = json.dumps(reply).encode()
        while data:
            data = data[os.write(writer, data) :]
        return 0

    def hear(self, call: Call) -> bool:
        """Read from a child; True when it has ended and its reply was passed on."""
        data = os.read(call.pipe, 65_536)
        call.reply += data
        if data and len(call.reply) <= MAX_REPLY_BYTES:
            return False
        self.finish(call, flooded=bool(data))
        return True

    def end_late(self) -> None:
        """Move calls that take long aside, and end those that take too long."""
        now = time.monotonic()
        slow = sum(c.slow for c in self.calls.values())
        for call in list(self.calls.values()):
            if now - call.started >= self.bounds.wall_s:
                os.kill(call.pid, signal.SIGKILL)  # its pipe ends, and hear() does the rest
            elif not call.slow and now - call.started >= PATIENCE_S and slow < SLOW_WIDTH:
                call.slow, slow = True, slow + 1
                os.setpriority(os.PRIO_PROCESS, call.pid, SLOW_NICENESS)

    def finish(self, call: Call, *, flooded: bool) -> None:
        """Reap the child and pass its reply on."""
        if flooded:
            os.kill(call.pid, signal.SIGKILL)
        _, status, usage = os.wait4(call.pid, 0)
        os.close(call.pipe)
        del self.calls[call.pipe]
        cpu_s = usage.ru_utime + usage.ru_stime
        reply = {"state": "late", "value": "a reply without end"} if flooded else self.judge(status, call.reply, cpu_s)
        line = json.dumps({"id": call.id, "cpu_s": round(cpu_s, 4), **reply}).encode() + b"\n"
        while line:
            line = line[os.write(1, line) :]

    def judge(self, status: int, reply: bytes, cpu_s: float) -> dict[str, Any]:
        """What a child's end means. Its own words count only if it ended by itself."""
        if status == 0 and reply:
            value: dict[str, Any] = json.loads(reply)
            return value
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            guilty = cpu_s >= GUILTY_SHARE * self.bounds.cpu_s
            return {"state": "late" if guilty else "stalled", "value": f"killed after {cpu_s:.2f} s of processor time"}
        return {"state": "late", "value": f"used up its time or memory: {cpu_s:.2f} s, status {status}"}


def main() -> None:
    """Serve until stdin ends."""
    name, width, cpu_s, wall_s, memory_mb = sys.argv[1:]
    module = importlib.import_module(name)
    module.warm_up()
    gc.freeze()  # children share these pages until somebody writes to them
    os.write(1, b'{"ready": true}\n')
    Server(module, Bounds(width=int(width), cpu_s=float(cpu_s), wall_s=float(wall_s), memory_mb=int(memory_mb))).run()
