"""Runs inside the sandbox, as `python -I -S -B -c <this file> UID PROCESSES`. Standard library only; imports nothing of ours.

Says "ready", reads one job from stdin, and runs each input in a forked child, so that no case can see what another left in
memory. One line of JSON per input goes to stdout: {"case": 0, "state": "value", "out": "..."}. The children are hostile, and
may be so to this process too: whoever reads the lines must not trust them. No expected value is here to be stolen.

Every run starts a Python, so imports are counted: json, signal and contextlib would double the time to the first line. The C
half of json does all that is needed; signal numbers are the kernel's.
"""

from __future__ import annotations

import builtins
import os
import resource
import select
import sys
import time
from _json import encode_basestring_ascii, make_encoder, make_scanner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SIGKILL = 9


def main() -> None:
    uid, processes = int(sys.argv[1]), int(sys.argv[2])
    if os.environ.get("POLYRL_SANDBOX") != "1" or os.getpid() > 100:
        # sweep() kills every process it can see: only in a process namespace of its own may it run at all.
        sys.exit("runner.py runs only inside a sandbox")
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NPROC, processes)
    os.write(1, b"ready\n")
    job = read_job()
    for case, value in enumerate(job["inputs"]):
        state, out = run_case(job, value)
        sweep()
        line = to_json({"case": case, "state": state, "out": out.decode("utf-8", "replace")}) + "\n"
        write_all(1, line.encode())
        if state in ("timeout", "output"):
            return


def read_job() -> dict[str, Any]:
    """The job: its length on a line, then so many bytes of JSON. Ends the process if the host hung up."""
    stream = sys.stdin.buffer
    header = stream.readline(32)
    if not header.endswith(b"\n"):
        os._exit(0)
    size = int(header)
    body = stream.read(size)
    if len(body) != size:
        os._exit(0)
    job: dict[str, Any] = make_scanner(Scanning)(body.decode(), 0)[0]  # type: ignore[arg-type]
    return job


class Scanning:
    """What json.loads would set by default."""

    strict, object_hook, object_pairs_hook = True, None, None
    parse_float, parse_int, parse_constant = float, int, float
    memo: dict[str, str] = {}  # noqa: RUF012


def to_json(value: object) -> str:
    """As json.dumps does it; raises TypeError or ValueError for what is not JSON."""
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    return "".join(make_encoder({}, not_json, encode_basestring_ascii, None, ": ", ", ", False, False, True)(value, 0))


def not_json(value: object) -> None:
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def run_case(job: dict[str, Any], value: object) -> tuple[str, bytes]:
    """(state, output) of one input. States: value, error, timeout, output (too much of it)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reader)
            child(job, value, writer)
            code = 0
        except SystemExit as end:
            code = 0 if end.code in (None, 0) else 1
        except BaseException as error:  # noqa: BLE001 - whatever the program raises ends here
            complain(error)
        finally:
            flush_and_exit(code)
    os.close(writer)
    state, out, ended = collect(pid, reader, job)
    os.close(reader)
    if not ended:
        os.kill(pid, SIGKILL)
        ended = os.wait4(pid, 0)[1:]
    status, used = ended
    if state == "done" and status != 0:
        # The kernel's two counts of processor time differ by a tick or so.
        state = "timeout" if used.ru_utime + used.ru_stime > job["cpu_s"] - 0.1 else "error"
    return "value" if state == "done" else state, out


def collect(pid: int, reader: int, job: dict[str, Any]) -> tuple[str, bytes, tuple[Any, ...]]:
    """Read the child's output until it ends, is too long, or is too late. (state, output, (wait status, usage) or ())."""
    deadline = time.monotonic() + job["case_wall_s"]
    os.set_blocking(reader, False)
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    ended: tuple[Any, ...] = ()
    out, limit, open_end = b"", job["case_output_bytes"], True
    while True:
        if open_end:
            poll.poll(20)
        else:
            time.sleep(0.002)
        # Asked before reading: what a child wrote before it ended is in the pipe by then.
        if not ended:
            done, *rest = os.wait4(pid, os.WNOHANG)
            ended = tuple(rest) if done else ()
        while open_end:
            try:
                chunk = os.read(reader, 65536)
            except BlockingIOError:
                break
            open_end = bool(chunk)
            out += chunk
            if len(out) > limit:
                return "output", b"", ended
        if ended:
            return "done", out, ended
        if time.monotonic() > deadline:
            return "timeout", b"", ended


def child(job: dict[str, Any], value: Any, writer: int) -> None:
    """In the forked child: run the program on one input, its output on `writer`."""
    text = value if job["mode"] == "stdin" else ""
    stdin = os.memfd_create("stdin")
    write_all(stdin, text.encode())
    os.lseek(stdin, 0, os.SEEK_SET)
    os.dup2(stdin, 0)
    os.dup2(writer if job["mode"] == "stdin" else os.open("/dev/null", os.O_WRONLY), 1)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - the program's, until the process ends
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    _limit(resource.RLIMIT_CPU, job["cpu_s"])
    _limit(resource.RLIMIT_AS, job["memory_bytes"])
    _limit(resource.RLIMIT_FSIZE, job["file_bytes"])
    _limit(resource.RLIMIT_NOFILE, job["open_files"])
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # the site module, left out here, would give these
    space: dict[str, Any] = {"__name__": "__main__", "__builtins__": builtins}
    exec(compile(job["program"], "program.py", "exec"), space)  # the reason why this process is boxed in
    if job["mode"] == "function":
        write_all(writer, to_json(space[job["entry"]](value)).encode())


def complain(error: BaseException) -> None:
    """The error in one line on stderr, for people; its text may be the program's and may raise in turn."""
    try:
        os.write(2, f"{type(error).__name__}: {error}\n".encode("utf-8", "replace")[:1000])
    except BaseException:  # noqa: BLE001
        return


def flush_and_exit(code: int) -> None:
    try:
        sys.stdout.flush()
    except BaseException:  # noqa: BLE001 - a program may have replaced or closed it
        code = 1
    os._exit(code)


def sweep() -> None:
    """End whatever a case left behind: all processes of this namespace but init and this one."""
    try:
        os.kill(-1, SIGKILL)
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except (ProcessLookupError, PermissionError, ChildProcessError):
        return


def write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _limit(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


main()
