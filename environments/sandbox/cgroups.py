"""Memory, process and processor limits over a whole tree of processes, where this process may write to cgroups (v1 or v2).

A group begins as idle work (Linux 5.15): it runs in what engines and learners leave of the processors and is never in their way, until
`hurry` gives it the weight of any other process. Its own memory, process and processor limits hold all the time.

Resource limits bind single processes; a control group binds all that a program forks. Without the right to make one, a
sandbox still has the former: `CgroupFactory.open` then returns None.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from pathlib import Path

from environments.sandbox.base import Limits

_ROOT = Path("/sys/fs/cgroup")
_OVERHEAD = 8
"""Processes of the sandbox itself beside the program's."""

_IDLE = "cpu.idle"
_OPTIONAL = ("memory.swap.max", "memory.memsw.limit_in_bytes", _IDLE)
"""There only where the kernel accounts for swap (v2 counts swap alone, v1 counts memory and swap together) and knows idle groups."""


class Cgroup:
    """One group, in one directory (v2) or one per controller (v1)."""

    def __init__(self, folders: list[Path]) -> None:
        self.folders = folders

    @property
    def joins(self) -> list[str]:
        """Files into which a process writes its id to join."""
        return [str(folder / "cgroup.procs") for folder in self.folders]

    def hurry(self) -> None:
        """Idle work no longer."""
        for folder in self.folders:
            if (folder / _IDLE).exists():
                (folder / _IDLE).write_text("0")

    @property
    def out_of_memory(self) -> bool:
        """Whether the kernel killed one of its processes for memory."""
        for folder in self.folders:
            for name in ("memory.events", "memory.oom_control"):
                with contextlib.suppress(OSError):
                    counts = dict(line.split() for line in (folder / name).read_text().splitlines())
                    if int(counts.get("oom_kill", 0)) > 0:
                        return True
        return False

    def remove(self) -> None:
        """Kill what is left in it, and delete it."""
        for folder in self.folders:
            for _ in range(100):
                with contextlib.suppress(OSError):
                    for pid in (folder / "cgroup.procs").read_text().split():
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(int(pid), 9)
                try:
                    folder.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:  # a killed process takes a moment to leave
                    time.sleep(0.01)


class CgroupFactory:
    """Makes groups below `root`. `why_not` says why it cannot, if it cannot."""

    def __init__(self, root: Path = _ROOT) -> None:
        self._root = root
        self._counter = itertools.count()
        self._v2 = (root / "cgroup.controllers").is_file()
        self.why_not = ""
        self._with_cpu = False
        """One processor per program, where there is that controller; without, each process still has its own limit of seconds."""
        try:
            self._prepare()
            probe = self._make(Limits())
            probe.remove()
        except OSError as error:
            self.why_not = f"{type(error).__name__}: {error}"

    def open(self, limits: Limits) -> Cgroup | None:
        return None if self.why_not else self._make(limits)

    def _prepare(self) -> None:
        if self._v2:
            controllers = set((self._root / "cgroup.controllers").read_text().split())
            missing = {"memory", "pids"} - controllers
            if missing:
                raise FileNotFoundError(f"cgroup v2 without the controllers {sorted(missing)}")
            self._with_cpu = "cpu" in controllers
            (self._root / "cgroup.subtree_control").write_text("+memory +pids" + " +cpu" * self._with_cpu)
            return
        self._with_cpu = (self._root / "cpu" / "cgroup.procs").is_file()
        if not all((self._root / name / "cgroup.procs").is_file() for name in ("memory", "pids")):
            raise FileNotFoundError(f"no cgroup controllers memory and pids below {self._root}")

    def _make(self, limits: Limits) -> Cgroup:
        name = f"polyrl-{os.getpid()}-{next(self._counter)}"
        settings = self._settings(limits)
        group = Cgroup([self._root / controller / name for controller in settings])
        try:
            for folder, files in zip(group.folders, settings.values(), strict=True):
                folder.mkdir()
                for file, value in files.items():
                    if file not in _OPTIONAL or (folder / file).exists():
                        (folder / file).write_text(value)
        except OSError:
            group.remove()
            raise
        return group

    def _settings(self, limits: Limits) -> dict[str, dict[str, str]]:
        """{folder below the root: {file: value}}: one folder for all controllers in version 2, one for each in version 1."""
        memory, processes = str(limits.memory_mb << 20), str(limits.processes + _OVERHEAD)
        if self._v2:
            together = {"memory.max": memory, "memory.swap.max": "0", "pids.max": processes}
            return {"": together | ({"cpu.max": "100000 100000", _IDLE: "1"} if self._with_cpu else {})}
        processor = {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "100000", _IDLE: "1"}
        return ({"cpu": processor} if self._with_cpu else {}) | {
            "memory": {"memory.limit_in_bytes": memory, "memory.memsw.limit_in_bytes": memory}, "pids": {"pids.max": processes},
        }  # fmt: skip
