"""Which backend this machine gets, decided once per process."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable

from environments.sandbox.base import Sandbox, SandboxUnavailable

_chosen: dict[str, Sandbox] = {}
_passed_over: dict[str, list[str]] = {}
_lock = threading.Lock()


def choose_sandbox(name: str = "auto") -> Sandbox:
    """The process-wide backend: "docker", "bubblewrap", or "auto" (Docker where an engine answers and has the image, else bubblewrap).

    Raises SandboxUnavailable, with what to install, where the wanted backend cannot isolate. Safe to call for every program.
    """
    if name not in ("auto", "docker", "bubblewrap"):
        raise ValueError(f"sandbox {name!r}, wanted auto, docker or bubblewrap")
    with _lock:
        if name not in _chosen:
            _chosen[name], _passed_over[name] = _first_that_works(_openers(name))
        return _chosen[name]


def explain(name: str = "auto") -> str:
    """Which backend `choose_sandbox(name)` gives here, and why none of those before it. Raises SandboxUnavailable as that does."""
    sandbox = choose_sandbox(name)
    return "; ".join([sandbox.describe(), *(f"not {reason}" for reason in _passed_over[name])])


def close_sandboxes() -> None:
    """End every backend of this process and what it keeps warm. The next `choose_sandbox` starts anew."""
    with _lock:
        for sandbox in {id(s): s for s in _chosen.values()}.values():
            sandbox.close()
        _chosen.clear()
        _passed_over.clear()


def _openers(name: str) -> dict[str, Callable[[], Sandbox]]:
    def docker() -> Sandbox:
        from environments.sandbox.docker import DockerSandbox  # the docker package is imported only there

        return DockerSandbox()

    def bubblewrap() -> Sandbox:
        from environments.sandbox.bubblewrap import BubblewrapSandbox

        return BubblewrapSandbox()

    known = {"docker": docker, "bubblewrap": bubblewrap}
    return known if name == "auto" else {name: known[name]}


def _first_that_works(openers: dict[str, Callable[[], Sandbox]]) -> tuple[Sandbox, list[str]]:
    """The backend, and why each one before it was passed over."""
    reasons: list[str] = []
    for name, opener in openers.items():
        try:
            return opener(), reasons
        except SandboxUnavailable as error:
            reasons.append(f"{name}: {error}")
    raise SandboxUnavailable("no sandbox can isolate programs on this machine: " + "; ".join(reasons))


atexit.register(close_sandboxes)
