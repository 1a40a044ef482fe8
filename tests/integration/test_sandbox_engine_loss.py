"""A Docker engine that dies, hangs or comes back: every run says infra_error, none becomes a score, and nothing waits for ever."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from environments.code import judged
from environments.sandbox import Limits
from environments.sandbox import docker as docker_backend
from environments.sandbox.docker import DockerSandbox
from rl_core.types import Status
from tests.integration.sandboxes import HONEST, Attempt, attempt, open_backend

SLEEPS = "import time\ndef f(x): time.sleep(30); return x*2"


class Relay:
    """Stands between us and the real engine: a Unix socket that can be cut, or hold everything back."""

    def __init__(self, path: Path, engine: str) -> None:
        self.path, self._engine = path, engine
        self._held = threading.Event()
        self._held.set()
        self._sockets: list[socket.socket] = []
        self.open()

    def open(self) -> None:
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(self.path))
        self._listening.listen(64)
        threading.Thread(target=self._accept, args=(self._listening,), daemon=True).start()

    def cut(self) -> None:
        """As an engine that was killed: every connection ends, and nobody listens."""
        self.path.unlink()
        for s in [self._listening, *self._sockets]:
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
            s.close()
        self._sockets.clear()

    def hold(self) -> None:
        """As an engine that hangs: connections stay, and no byte passes."""
        self._held.clear()

    def release(self) -> None:
        self._held.set()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                client = listening.accept()[0]
            except OSError:
                return
            engine = socket.socket(socket.AF_UNIX)
            engine.connect(self._engine)
            self._sockets += [client, engine]
            for source, target in ((client, engine), (engine, client)):
                threading.Thread(target=self._forward, args=(source, target), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                self._held.wait()
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@pytest.fixture
def relay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Relay]:
    open_backend("docker")
    address = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    if not address.startswith("unix://"):
        pytest.skip("the engine is not behind a Unix socket")
    relay = Relay(tmp_path / "s", address.removeprefix("unix://"))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{relay.path}")
    monkeypatch.setattr(docker_backend, "_PATIENCE_S", 3)
    monkeypatch.setattr(docker_backend, "_PING_S", 1)
    yield relay
    relay.release()
    relay.cut()


@pytest.fixture
def sandbox(relay: Relay) -> Iterator[DockerSandbox]:
    sandbox = DockerSandbox(width=2, warm=1)
    yield sandbox
    sandbox.close()


def start(sandbox: DockerSandbox, limits: Limits) -> tuple[threading.Thread, list[Attempt]]:
    done: list[Attempt] = []
    thread = threading.Thread(target=lambda: done.append(attempt(sandbox, SLEEPS, limits=limits)))
    thread.start()
    thread.join(1.0)  # it sleeps by now
    assert not done
    return thread, done


def assert_ours(tried: Attempt) -> None:
    assert tried.result.kind == "infra_error", tried
    assert judged(tried.result, tried.score) == (Status.INFRA_ERROR, None)


pytestmark = pytest.mark.docker


def test_an_engine_that_dies_fails_programs_under_way_and_later_ones_until_it_is_back(relay: Relay, sandbox: DockerSandbox) -> None:
    thread, done = start(sandbox, Limits(wall_s=200.0, case_wall_s=150.0))  # far beyond this test's time: noticed, not timed out
    relay.cut()
    thread.join()
    assert_ours(done[0])
    assert_ours(attempt(sandbox, HONEST))
    relay.open()
    assert attempt(sandbox, HONEST, limits=Limits()).paid


def test_an_engine_that_hangs_is_no_time_out_of_the_program(relay: Relay, sandbox: DockerSandbox) -> None:
    thread, done = start(sandbox, Limits(wall_s=3.0, case_wall_s=150.0))
    relay.hold()
    thread.join()
    assert_ours(done[0])
    relay.release()
    assert attempt(sandbox, HONEST, limits=Limits()).paid


def test_no_container_is_left_when_the_engine_was_away_while_it_was_to_be_removed(relay: Relay, sandbox: DockerSandbox) -> None:
    thread, _ = start(sandbox, Limits(wall_s=200.0, case_wall_s=150.0))
    assert containers_of(sandbox)
    relay.cut()
    thread.join()
    relay.open()
    assert attempt(sandbox, HONEST, limits=Limits()).paid
    sandbox.close()
    assert not containers_of(sandbox)


def containers_of(sandbox: DockerSandbox) -> set[str]:
    label = f"{docker_backend.INSTANCE}={sandbox._instance}"
    return {c["Id"] for c in sandbox._api().containers(all=True, filters={"label": label})}
