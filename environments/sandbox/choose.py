"""Which backend this machine gets, decided once per process."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable

from environments.sandbox.base import Sandbox, SandboxUnavailable

_chosen: dict[str, Sandbox] = {}
_lock = threading.Lock()


def choose_sandbox(name: str = "auto") -> Sandbox:
    """The process-wide backend: "docker", "bubblewrap", or "auto" (Docker where an engine answers and has the image, else bubblewrap).

    Raises SandboxUnavailable, with what to install, where the wanted backend cannot isolate. Safe to call for every program.
    """
    if name not in ("auto", "docker", "bubblewrap"):
        raise ValueError(f"sandbox {name!r}, wanted auto, docker or bubblewrap")
    with _lock:
        if name not in _chosen:
            _chosen[name] = _first_that_works(_openers(name))
        return _chosen[name]


def close_sandboxes() -> None:
    """End every backend of this process and what it keeps warm. The next `choose_sandbox` starts anew."""
    with _lock:
        for sandbox in {id(s): s for s in _chosen.values()}.values():
            sandbox.close()
        _chosen.clear()


def _openers(name: str) -> list[Callable[[], Sandbox]]:
    def docker() -> Sandbox:
        from environments.sandbox.docker import DockerSandbox  # the docker package is imported only there

        return DockerSandbox()

    def bubblewrap() -> Sandbox:
        from environments.sandbox.bubblewrap import BubblewrapSandbox

        return BubblewrapSandbox()

    return {"auto": [docker, bubblewrap], "docker": [docker], "bubblewrap": [bubblewrap]}[name]


def _first_that_works(openers: list[Callable[[], Sandbox]]) -> Sandbox:
    reasons = []
    for opener in openers:
        try:
            return opener()
        except SandboxUnavailable as error:
            reasons.append(str(error))
    raise SandboxUnavailable("no sandbox can isolate programs on this machine: " + "; ".join(reasons))


atexit.register(close_sandboxes)
