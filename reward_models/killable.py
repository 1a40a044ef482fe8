"""Calls on hostile input that end in time, whatever the input: the client of `killable_server`.

    service = KillableService("reward_models.math_symbolic", width=2, cpu_s=2.0)
    service.call({"pairs": [["x", "x"]], "form": "any"})   ->   Outcome(state="done", value={"equal": [True], ...}, cpu_s=0.01)

One server process per service, one child of it per call. Safe from many threads at a time. A call that uses up its processor time
is "late": the input's fault. A machine that gave it none, a server that died or a queue that never moved is ours: ServiceFailed.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as LateFuture
from dataclasses import dataclass
from typing import IO, Any, Literal

START_S = 120.0
"""Importing sympy on a machine that is busy with everything else."""

State = Literal["done", "failed", "late"]


class ServiceFailed(RuntimeError):
    """No answer through a fault of ours: it may never become a score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a call ended. "failed": the function raised; `value` is then its message."""

    state: State
    value: Any
    cpu_s: float  # processor seconds of the child


class KillableService:
    """Starts its server at the first call, and again when it died."""

    def __init__(
        self, module: str, *, width: int = 2, cpu_s: float = 2.0, wall_s: float = 30.0, memory_mb: int = 1024, queue_s: float = 120.0
    ) -> None:
        self.cpu_s, self.wall_s, self.queue_s = cpu_s, wall_s, queue_s
        self._arguments = [module, str(width), str(cpu_s), str(wall_s), str(memory_mb)]
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._owner = os.getpid()

    def call(self, value: Any) -> Outcome:
        """The function's outcome on `value` (JSON). Raises ServiceFailed. Waits at most queue_s for its turn, then wall_s."""
        for attempt in (1, 2):
            server = self._running()
            try:
                reply = server.ask(value).result(timeout=self.queue_s + self.wall_s)
                break
            except LateFuture:
                raise ServiceFailed(f"no answer within {self.queue_s + self.wall_s:.0f} s; the queue before it did not move") from None
            except (ConnectionError, OSError) as error:
                if attempt == 2 or server.closing:
                    why = "was closed" if server.closing else "died twice"
                    raise ServiceFailed(f"the verifier's server {why}: {error}") from error
        if reply["state"] == "stalled":
            raise ServiceFailed(f"the machine gave a verifier no processor time for {self.wall_s:.0f} s")
        return Outcome(state=reply["state"], value=reply["value"], cpu_s=reply["cpu_s"])

    @property
    def pid(self) -> int | None:
        """Of the server, while it runs."""
        return self._server.process.pid if self._server else None

    def close(self) -> None:
        """End the server and what it runs."""
        with self._lock:
            server, self._server = self._server, None
        if server is not None and self._owner == os.getpid():
            server.close()

    def _running(self) -> _Server:
        with self._lock:
            if self._server is not None and self._owner != os.getpid():
                self._server = None  # a fork of the process that owns it: its pipes are not ours to use
            if self._server is None or self._server.dead:
                if self._server is not None:
                    self._server.close()
                self._server, self._owner = _Server(self._arguments), os.getpid()
            return self._server


class _Server:
    """One server process, and the thread that hands out its replies."""

    def __init__(self, arguments: list[str]) -> None:
        code = "from reward_models.killable_server import main; main()"
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/", start_new_session=True,
            env={"PYTHONPATH": path, "PATH": os.environ.get("PATH", ""), "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
        )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._stdin: IO[bytes] = self.process.stdin
        self._stdout: IO[bytes] = self.process.stdout
        self._ids = itertools.count()
        self._lock = threading.Lock()  # over the table; never held while a pipe is written to, as the reader needs it to drain the other
        self._writing = threading.Lock()
        self._asked: dict[int, Future[dict[str, Any]]] = {}
        self._ready: Future[None] = Future()
        self.dead = self.closing = False
        self._reader = threading.Thread(target=self._hand_out, name="killable", daemon=True)
        self._reader.start()
        try:
            self._ready.result(timeout=START_S)
        except (LateFuture, ConnectionError) as error:
            self.close()
            raise ServiceFailed(
                f"the verifier's server did not start: {error or 'too slow'}; try `python -c 'import math_verify'`"
            ) from error

    def ask(self, value: Any) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = Future()
        with self._lock:
            if self.dead:
                raise ConnectionError("it has ended")
            number = next(self._ids)
            self._asked[number] = future
        with self._writing:
            self._stdin.write(json.dumps({"id": number, "value": value}).encode() + b"\n")
            self._stdin.flush()
        return future

    def close(self) -> None:
        self.closing = True
        self.process.kill()  # its children die with it
        self.process.wait()
        self._reader.join()
        self._stdin.close()
        self._stdout.close()

    def _hand_out(self) -> None:
        for line in self._stdout:
            reply = json.loads(line)
            if "ready" in reply:
                self._ready.set_result(None)
                continue
            with self._lock:
                future = self._asked.pop(reply["id"])
            future.set_result(reply)
        with self._lock:
            self.dead = True
            waiting: list[Future[Any]] = [*self._asked.values(), *([] if self._ready.done() else [self._ready])]
            self._asked.clear()
        for future in waiting:
            future.set_exception(ConnectionError("the server has ended"))


_services: dict[str, KillableService] = {}
_services_lock = threading.Lock()


def service(module: str) -> KillableService:
    """This process's service for `module`, ended with the process."""
    with _services_lock:
        if module not in _services:
            _services[module] = KillableService(module)
            atexit.register(_services[module].close)
        return _services[module]
