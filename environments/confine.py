"""What a host's process may take of the machine: a number of processes, bounded by the kernel where it lets us, and counted everywhere.

An environment is trusted code, but a mistake in one may fork without end or leak. The kernel's control group binds everything that the
process starts; where it cannot be made, a limit on the user's processes does (root has none), and counting is what is left.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import time
from pathlib import Path

import psutil

from environments.sandbox.cgroups import Cgroup

log = logging.getLogger(__name__)

MAX_TASKS = 1024
"""Processes and threads of one host and all that it starts. A host of a busy run has some 200."""
MAX_CHILDREN = 256
KILL_ROUNDS = 50
QUIET_S = 0.05
"""Without an attempt to start anything, after which nothing will."""

V2, V1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/pids")
PREFIX = "polyrl-host-"


class Confinement:
    """Of the process that makes it."""

    def __init__(self) -> None:
        sweep()
        self._group: Path | None = None
        try:
            self._group = join_group()
        except OSError as error:
            log.info("no control group for this environment host: %s", error)
        if self._group is None and os.getuid() != 0:
            mine = sum(p.info["num_threads"] or 0 for p in psutil.process_iter(["uids", "num_threads"]) if _is_mine(p))
            _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
            wanted = mine + MAX_TASKS
            resource.setrlimit(resource.RLIMIT_NPROC, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))

    def excess(self) -> str:
        """Why the host must end, as a clause; "" while what it has started is within bounds."""
        if self._group is not None:
            with contextlib.suppress(OSError, ValueError):
                tasks = int((self._group / "pids.current").read_text())
                return f"its environments have started {tasks} processes and threads" if tasks > 0.9 * MAX_TASKS else ""
        children = len(psutil.Process().children(recursive=True))
        return f"its environments have started {children} processes" if children > MAX_CHILDREN else ""

    def kill_others(self) -> None:
        """Everything that this process has started. A thread of it may be starting more meanwhile: the kernel is told to refuse
        that first, and where it cannot be told, a few rounds win most races."""
        if self._group is not None:
            with contextlib.suppress(OSError):
                (self._group / "pids.max").write_text("0")
        elif os.getuid() != 0:
            resource.setrlimit(resource.RLIMIT_NPROC, (0, resource.getrlimit(resource.RLIMIT_NPROC)[1]))
        for _ in range(KILL_ROUNDS):
            others = self._others()
            if not others:
                return
            for pid in others:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, 9)
            time.sleep(0.02)

    def let_end(self) -> None:
        """After `kill_others`, for a process that Ray is to end: it takes a new thread for that, and without one it aborts and is reported
        as a crash. None is allowed where something still tries to start processes, or where nobody counts who was refused."""
        if self._group is None:
            return
        with contextlib.suppress(OSError):
            refused = (self._group / "pids.events").read_text()
            time.sleep(QUIET_S)
            if (self._group / "pids.events").read_text() == refused:
                (self._group / "pids.max").write_text(str(MAX_TASKS))

    def _others(self) -> set[int]:
        """Processes that this one has started, or that are in its group, and are not dead."""
        me = psutil.Process()
        pids = {child.pid for child in me.children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE}
        if self._group is not None:
            with contextlib.suppress(OSError):
                pids |= {int(pid) for pid in (self._group / "cgroup.procs").read_text().split()}
        return pids - {me.pid}


def join_group() -> Path:
    """Put this process, and so all that it starts, into a new group. Raises OSError where that is not allowed."""
    root = V1
    if (V2 / "cgroup.controllers").is_file():
        root = V2
        (root / "cgroup.subtree_control").write_text("+pids")
    elif not (root / "cgroup.procs").is_file():
        raise FileNotFoundError(f"no pids controller below {V2}")
    folder = root / f"{PREFIX}{os.getpid()}"
    folder.mkdir(exist_ok=True)
    (folder / "pids.max").write_text(str(MAX_TASKS))
    (folder / "cgroup.procs").write_text(str(os.getpid()))
    return folder


def sweep() -> None:
    """Kill what the hosts that have died left in their groups, and remove these."""
    for folder in (*V2.glob(f"{PREFIX}*"), *V1.glob(f"{PREFIX}*")):
        owner = folder.name.removeprefix(PREFIX)
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            Cgroup([folder]).remove()


def resident_bytes() -> int:
    """Memory of this process that lies in RAM and is its own: what it shares with others, such as Ray's object store, does not count."""
    pages = [int(n) for n in Path("/proc/self/statm").read_text().split()[:3]]
    return (pages[1] - pages[2]) * os.sysconf("SC_PAGE_SIZE")


def _is_mine(process: psutil.Process) -> bool:
    uids = process.info["uids"]
    return uids is not None and uids.real == os.getuid()
