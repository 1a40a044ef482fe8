"""Runs inside the sandbox, as `python -I -S -B -c <this file> UID PROCESSES FILTER`. Standard library only; imports nothing of ours.

Gives up what it may not need, says "ready", reads one job from stdin, and runs each input in a forked child, so that no case
can see what another left in memory. One line of JSON per input goes to stdout: {"case": 0, "state": "value", "out": "..."}. The
children are hostile, and may be so to this process too: whoever reads the lines must not trust them. No expected value is here
to be stolen.

Every run starts a Python, so imports are counted: json, signal, ctypes and contextlib would double the time to the first line.
The C half of json and of ctypes does all that is needed; signal numbers are the kernel's.
"""

from __future__ import annotations

import _ctypes
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

SIGKILL, SIGXCPU = 9, 24
TMP = "/tmp"
CLEANING_S = 2.0
"""Longest time for emptying TMP between two cases: a million files take longer, and end the job."""


def main() -> None:
    uid, processes, seccomp = int(sys.argv[1]), int(sys.argv[2]), bytes.fromhex(sys.argv[3])
    if os.environ.get("POLYRL_SANDBOX") != "1" or os.getpid() > 100:
        # sweep() kills every process it can see: only in a process namespace of its own may it run at all.
        sys.exit("runner.py runs only inside a sandbox")
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NPROC, processes)
    close_the_door(seccomp)
    prove_room()
    warm_up()
    os.write(1, b"ready\n")
    job = read_job()
    for case, value in enumerate(job["inputs"]):
        state, out = run_case(job, value)
        sweep()
        line = to_json({"case": case, "state": state, "out": out.decode("utf-8", "replace")}) + "\n"
        write_all(1, line.encode())
        if state in ("timeout", "output") or not emptied(TMP):
            break
    os._exit(0)


def close_the_door(seccomp: bytes) -> None:
    """No capability, no new privileges, no look into this process from its children (same uid), and the filter of system calls."""
    header, none = memory((0x20080522).to_bytes(4, sys.byteorder) + bytes(4)), memory(bytes(24))
    call("capset", address(header), address(none))  # changing uid left the inheritable ones
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: both backends did it; a filter may not be installed without
    call("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: no ptrace, no /proc/PID/mem, no /proc/PID/fd
    # struct sock_fprog: number of instructions, then the address of the first.
    code = memory(seccomp)
    program = memory((len(seccomp) // 8).to_bytes(8, sys.byteorder) + address(code).to_bytes(8, sys.byteorder))
    call("prctl", 22, 2, address(program), 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


class _Word(_ctypes._SimpleCData):  # type: ignore[name-defined,misc,type-arg]
    _type_ = "L"


class _Buffer(_ctypes.Array):  # type: ignore[type-arg]
    """The address of bytes, eight at least."""

    _type_ = _Word
    _length_ = 1


def memory(content: bytes) -> _Buffer:
    return _Buffer.from_buffer(bytearray(content))


def address(held: _Buffer) -> int:
    return _ctypes.addressof(held)


def call(name: str, *arguments: int) -> None:
    """A function of the C library that returns 0, or the end."""
    function = _ctypes.dlsym(_ctypes.dlopen(None, 0), name)  # type: ignore[attr-defined,arg-type]
    if _ctypes.call_function(function, tuple(_Word(a) for a in arguments)) != 0:  # type: ignore[attr-defined]
        sys.exit(f"{name}{arguments} failed: this kernel or the sandbox's host does not allow it")


def prove_room() -> None:
    """Start one process, before the host counts on this runner: where that fails, no program is to blame."""
    try:
        pid = os.fork()
    except OSError as error:
        sys.exit(f"no process can be started here: {error}")
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def warm_up() -> None:
    """What Python makes at its first use (the types of syntax trees, half the time of a short case) is then there in every child."""
    compile("", "nothing", "exec")
    open(0, encoding="utf-8", closefd=False)  # noqa: SIM115


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
    state, out = collect(pid, reader, job)
    os.close(reader)
    if state != "done":
        os.kill(pid, SIGKILL)
    _, status, used = os.wait4(pid, 0)
    if state == "done" and status != 0:
        # The limit counts ticks, and `used` what the scheduler gave, which may be less on a machine that others share: so the signal
        # says whether time was up, and `used` only of a program that was deaf to it and killed a second later.
        used_up = used.ru_utime + used.ru_stime > job["cpu_s"] - 0.1
        state = "timeout" if status & 127 == SIGXCPU or used_up else "error"
    return "value" if state == "done" else state, out


def collect(pid: int, reader: int, job: dict[str, Any]) -> tuple[str, bytes]:
    """Read the child's output until it ends ("done"), is too long ("output"), or is too late ("timeout")."""
    deadline = time.monotonic() + job["case_wall_s"]
    os.set_blocking(reader, False)
    child_end = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    poll.register(child_end, select.POLLIN)
    out, limit, open_end, ended = b"", job["case_output_bytes"], True, False
    try:
        while not ended:
            left = deadline - time.monotonic()
            if left <= 0:
                return "timeout", b""
            # Asked before reading: what a child wrote before it ended is in the pipe by then. A grandchild may hold the pipe open.
            ended = any(fd == child_end for fd, _ in poll.poll(left * 1000))
            while open_end:
                try:
                    chunk = os.read(reader, 65536)
                except BlockingIOError:
                    break
                out += chunk
                if len(out) > limit:
                    return "output", b""
                if not chunk:
                    open_end = False
                    poll.unregister(reader)
        return "done", out
    finally:
        os.close(child_end)


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
    os.nice(10)  # all share one processor: the runner must get to end them when their time is up
    _limit(resource.RLIMIT_CPU, job["cpu_s"], job["cpu_s"] + 1)
    _limit(resource.RLIMIT_AS, job["memory_bytes"])
    _limit(resource.RLIMIT_FSIZE, job["file_bytes"])
    _limit(resource.RLIMIT_NOFILE, job["open_files"])
    LANGUAGES[job["language"]](job, value, writer)


def run_python(job: dict[str, Any], value: Any, writer: int) -> None:
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # the site module, left out here, would give these
    space: dict[str, Any] = {"__name__": "__main__", "__builtins__": builtins}
    exec(compile(job["program"], "program.py", "exec"), space)  # the reason why this process is boxed in
    if job["mode"] == "function":
        write_all(writer, to_json(space[job["entry"]](value)).encode())


LANGUAGES = {"python": run_python}
"""One per value of SandboxJob.language. In the child, all limits set: run job["program"] on the input, write the output."""


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


def emptied(folder: str) -> bool:
    """Whether nothing that a case wrote is left for the next one to read. Flattens before it deletes, so that no depth matters."""
    deadline, number = time.monotonic() + CLEANING_S, 0
    try:
        while names := os.listdir(folder):
            for name in names:
                path = f"{folder}/{name}"
                try:
                    os.unlink(path)
                except IsADirectoryError:
                    os.chmod(path, 0o700)
                    for inner in os.listdir(path):
                        number += 1
                        move_up(f"{path}/{inner}", f"{folder}/.{number}.moved")
                    os.rmdir(path)
                if time.monotonic() > deadline:
                    return False
    except OSError:
        return False
    return True


def move_up(path: str, to: str) -> None:
    try:
        os.rename(path, to)
    except PermissionError:  # a folder without its write bit: its ".." could not be changed
        os.chmod(path, 0o700)
        os.rename(path, to)


def write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _limit(which: int, soft: int, hard: int | None = None) -> None:
    """Of this process and those that it starts; `hard` is `soft` unless it is given. Never more than it had."""
    most = resource.getrlimit(which)[1]
    limits = (soft, soft if hard is None else hard)
    resource.setrlimit(which, limits if most == resource.RLIM_INFINITY else (min(limits[0], most), min(limits[1], most)))


main()
