"""A child process that answers one line for each line, within a time, or is killed."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time
import weakref
from collections.abc import Sequence
from typing import Any

MAX_LINE = 1 << 20
"""Bytes of one answer; a child that writes more is broken."""

ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""All that the child learns of ours: no keys, no tokens."""


class Late(Exception):
    """No answer in time. The child has been killed."""


class Died(OSError):
    """The child ended, or wrote what is no answer."""


class LineProcess:
    """`ask` is for one thread at a time."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=ENVIRONMENT, cwd="/", start_new_session=True,
        )  # fmt: skip
        self._end = weakref.finalize(self, _end, self._process)  # also when this process exits
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Raises Late or Died, after either of which the child is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._read_line(time.monotonic() + seconds)
            answer = json.loads(line)
        except Late:
            self.close()
            raise
        except (OSError, ValueError) as error:
            self.close()
            raise Died(f"a scoring process ended: {error}") from error
        if not isinstance(answer, dict):
            self.close()
            raise Died("a scoring process wrote what is no answer")
        return answer

    def close(self) -> None:
        self._end()

    def _read_line(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        stream, found = self._process.stdout.fileno(), b""
        while not found.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([stream], [], [], left)[0]:
                raise Late("no answer in time")
            part = os.read(stream, 65536)
            if not part or len(found) > MAX_LINE:
                raise Died(f"exit code {self._process.poll()}")
            found += part
        return found


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
