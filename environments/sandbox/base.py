"""The types that every sandbox backend speaks, and the gate that bounds how many programs run at the same time."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal, Protocol

Kind = Literal["finished", "timeout", "oom", "output_limit", "infra_error"]
READY = b"ready\n"
"""The runner's first words, written before it has seen the program: without them, nothing of the policy's ran."""

LANGUAGES = ("python",)
"""What `runner.py` knows how to run."""

_FIRST_UID, _UIDS_PER_PROCESS = 100_000_000, 256
PROGRAMS = itertools.count()
"""Numbers the programs of this process, whichever backend runs them."""


class SandboxUnavailable(RuntimeError):
    """No backend can isolate on this machine. The message says what to install."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one job may use."""

    wall_s: float = 12.0  # the whole job, by the host's clock
    case_wall_s: float = 6.0  # one input
    cpu_s: int = 2  # one process; whole seconds, and one more if it is deaf to SIGXCPU
    memory_mb: int = 256  # all processes and temporary files together; one process may map twice that
    processes: int = 32
    open_files: int = 64
    file_mb: int = 8  # one file
    tmp_mb: int = 16  # all temporary files
    case_output_bytes: int = 65_536  # one input's output
    output_bytes: int = 2_000_000  # all outputs, as encoded by the runner
    stderr_bytes: int = 262_144  # more than this kills the job


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxJob:
    """One program and its inputs. Expected outputs have no place here: they never enter a sandbox."""

    program: str
    mode: Literal["function", "stdin"] | str
    """"function": call `entry` with each input (a JSON value). "stdin": run the program once per input (a string)."""
    inputs: tuple[Any, ...]
    entry: str = "f"
    language: str = "python"
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.mode not in ("function", "stdin"):
            raise ValueError(f"mode {self.mode!r} of a sandbox job, wanted function or stdin")

    def payload(self) -> bytes:
        """What the runner reads: the number of bytes on a line of its own, then that many bytes of JSON."""
        limits = self.limits
        body = json.dumps(
            {
                "program": self.program,
                "mode": self.mode,
                "language": self.language,
                "entry": self.entry,
                "inputs": list(self.inputs),
                "case_wall_s": limits.case_wall_s,
                "cpu_s": limits.cpu_s,
                "memory_bytes": 2 * limits.memory_mb << 20,
                "file_bytes": limits.file_mb << 20,
                "open_files": limits.open_files,
                "case_output_bytes": limits.case_output_bytes,
            }
        ).encode()
        return b"%d\n" % len(body) + body


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxResult:
    """What came out. `kind` is decided by the host and the kernel, never from what the program wrote."""

    kind: Kind
    stdout: bytes
    """The runner's lines, one JSON object per input, without READY. Hostile: the program may have written them."""
    stderr_tail: str
    wall_s: float


class Sandbox(Protocol):
    """A backend. `run` may be called from many threads and never raises for anything that a program does.

    It raises ValueError for a job in a language that is not in `languages`: the task's mistake, whatever the policy wrote.
    """

    name: str
    languages: tuple[str, ...]

    def run(self, job: SandboxJob) -> SandboxResult: ...
    def close(self) -> None: ...

    def describe(self) -> str:
        """Which backend this is and how it bounds programs here, in one line for people."""
        ...


def check_language(sandbox: Sandbox, job: SandboxJob) -> None:
    if job.language not in sandbox.languages:
        raise ValueError(f"a program in {job.language!r}; the {sandbox.name} sandbox runs {', '.join(sandbox.languages)}")


def runner_source() -> str:
    """The trusted program that runs inside, handed over on the command line so that an image needs nothing but Python."""
    return resources.files("environments.sandbox").joinpath("runner.py").read_text(encoding="utf-8")


class Gate:
    """At most `width` programs at the same time in this process: `with gate as waited_s: ...`, seconds until there was room."""

    def __init__(self, width: int) -> None:
        if width < 1:
            raise ValueError(f"{width} concurrent sandboxes; wanted at least 1")
        self.width = width
        self._room = threading.BoundedSemaphore(width)

    def __enter__(self) -> float:
        asked = time.monotonic()
        self._room.acquire()
        return time.monotonic() - asked

    def __exit__(self, *_: object) -> None:
        self._room.release()


def unprivileged_uid(number: int) -> int:
    """A uid that owns nothing and that no other program runs as at the same time, whichever process of ours started it.

    `number` is the next of PROGRAMS. Limits on the number of processes count per uid, and so do zombies that nobody has
    collected yet: a uid that comes back soon would let a fork bomb, or a lazy process 1, fail its neighbours.
    """
    return _FIRST_UID + os.getpid() * _UIDS_PER_PROCESS + number % _UIDS_PER_PROCESS


def default_width() -> int:
    """Concurrent programs: POLYRL_SANDBOXES, or 2. Programs are bursts of CPU beside engines that want all of it."""
    return int(os.environ.get("POLYRL_SANDBOXES", "2"))


def tail(data: bytes | bytearray, limit: int = 2000) -> str:
    """The end of hostile bytes as printable text."""
    text = data[-limit:].decode("utf-8", "replace")
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
