"""The Docker backend: hardened containers kept warm, one program each, destroyed afterwards. The only importer of `docker`.

    builders: create > attach > start > runner says ready > pool         run: pool > job > answers        remover: kill and remove

Only what stands under `run` lies on a verdict's path. A container that ran a program never returns to the pool. Its runner
waits on a pipe of ours: when this process dies, the pipe closes and the runner ends; the next process that opens this backend
removes what was left.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from environments.sandbox import base
from environments.sandbox.base import READY, Gate, Kind, Limits, Sandbox, SandboxJob, SandboxResult, SandboxUnavailable
from environments.sandbox.containers import ENVIRONMENT, INSTANCE, LABEL, OWNER, Container, abandoned, hardening, owner, shape
from environments.sandbox.pump import Transcript, pump
from environments.sandbox.seccomp import filter_program

IMAGE = os.environ.get("POLYRL_SANDBOX_IMAGE", "polyrl-sandbox:1")
_BUILDERS = 2
"""Containers made at the same time: a start is some 0.15 s of processor time, and the engine does not make more per second with more."""
_PATIENCE_S, _PING_S = 20, 5
"""For one answer of the engine to a request, and to a ping, before it counts as gone."""
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}  # the engine's words: it may run on another machine than we do


class DockerSandbox(Sandbox):
    """Raises SandboxUnavailable where no engine answers, the image is missing, or a first program does not come back right."""

    name = "docker"
    languages = base.LANGUAGES

    def __init__(self, width: int | None = None, warm: int | None = None) -> None:
        width = width or base.default_width()
        self._gate = Gate(width)
        self._warm_size = 2 * width if warm is None else warm
        self._local = threading.local()
        self._pool: deque[Container] = deque()
        self._leftover: list[Container] = []  # used, and the engine did not answer when they were to be removed
        self._lock = threading.Lock()
        self._missing = 0  # containers that the builders were asked for and have not delivered
        self._removing = 0
        self._closed = False
        self._instance = uuid.uuid4().hex
        self._seccomp = self._check_engine()
        self._reap()
        self._builders = ThreadPoolExecutor(max_workers=_BUILDERS, thread_name_prefix="sandbox-build")
        self._remover = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sandbox-remove")
        probe = self.run(SandboxJob(program="def f(x):\n return x", mode="function", inputs=(1,)))
        if probe.kind != "finished" or b'"value"' not in probe.stdout:
            self.close()
            raise SandboxUnavailable(f"the Docker engine cannot run the image {IMAGE} ({probe.kind}: {probe.stderr_tail[-300:]})")

    @property
    def settled(self) -> bool:
        """Whether the pool is full and what was used is gone: nothing goes on in the background."""
        with self._lock:
            return len(self._pool) >= self._warm_size and not self._missing and not self._removing

    def run(self, job: SandboxJob) -> SandboxResult:
        base.check_language(self, job)
        with self._gate:
            started = time.monotonic()
            container: Container | None = None
            try:
                container = self._take(job.limits)
                kind, transcript = self._talk(container, job)
                answer, complaint = transcript.answer, base.tail(transcript.stderr)
            except Exception as error:  # noqa: BLE001 - the engine's client raises many kinds; all are ours, none the program's
                kind, answer, complaint = "infra_error", b"", f"{type(error).__name__}: {error}"[:500]
            seconds = time.monotonic() - started
            if container is not None:
                self._discard_later(container)
            self._refill()
            return SandboxResult(kind=kind, stdout=answer, stderr_tail=complaint, wall_s=seconds)

    def describe(self) -> str:
        engine = self._api().version()
        where = f"engine {engine['Version']}, image {IMAGE}"
        return f"docker: {where}, up to {self._gate.width} programs at a time, {self._warm_size} containers kept warm"

    def close(self) -> None:
        """Remove every container of this process."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._builders.shutdown(wait=True, cancel_futures=True)
        self._remover.shutdown(wait=True)
        for container in [*self._pool, *self._leftover]:
            container.remove()
        with contextlib.suppress(Exception):  # the engine is gone: the next process that finds it again removes them
            for found in self._api().containers(all=True, filters={"label": f"{INSTANCE}={self._instance}"}):
                Container(self._api, found["Id"]).remove()

    def _talk(self, container: Container, job: SandboxJob) -> tuple[Kind, Transcript]:
        """Let the container run the job. Raises where the engine, and not the program, is why there is no answer."""
        kind, transcript = pump(container, job.payload(), job.limits, cases=len(job.inputs), said=READY)
        if kind == "finished" and transcript.settled(len(job.inputs)):
            return kind, transcript
        if kind == "timeout" and not self._answers():
            raise ConnectionError(f"the Docker engine stopped answering while a program ran, for {_PING_S} s at least")
        if kind != "finished":
            container.kill()
        try:
            # Asked of the engine, which knows it once the container has ended, and only about memory: an exit code is the program's.
            out_of_memory = container.state().get("OOMKilled")
        except Exception:
            # Where the host has decided by itself and the engine is well, no program may turn its end into a failure of ours.
            if kind == "finished" or not self._answers():
                raise
            out_of_memory = False
        return "oom" if out_of_memory else kind, transcript

    # --- the pool -----------------------------------------------------------------------------------------------------

    def _take(self, limits: Limits) -> Container:
        if shape(limits) == shape(Limits()):
            while True:
                with self._lock:
                    if not self._pool:
                        break
                    container = self._pool.popleft()
                if container.alive:
                    return container
                self._discard_later(container)
        return self._create(limits)

    def _refill(self) -> None:
        with self._lock:
            wanted = 0 if self._closed else self._warm_size - len(self._pool) - self._missing
            self._missing += max(0, wanted)
        for _ in range(wanted):
            with contextlib.suppress(RuntimeError):  # shut down meanwhile
                self._builders.submit(self._add)

    def _add(self) -> None:
        container: Container | None = None
        with contextlib.suppress(Exception):  # the next run creates its own and reports why it could not
            container = self._create(Limits())
        with self._lock:
            self._missing -= 1
            if container is not None:
                self._pool.append(container)

    def _discard_later(self, container: Container) -> None:
        with self._lock:
            self._removing += 1
        try:
            self._remover.submit(self._discard, container)
        except RuntimeError:  # shut down: then now
            self._discard(container)

    def _discard(self, container: Container) -> None:
        """Remove it, and those for which the engine did not answer before."""
        with self._lock:
            waiting, self._leftover = [*self._leftover, container], []
        left = [c for c in waiting if not c.remove()]
        with self._lock:
            self._removing -= 1
            self._leftover += left

    def _create(self, limits: Limits) -> Container:
        api = self._api()
        uid = base.unprivileged_uid(next(base.PROGRAMS))
        made = api.create_container(
            IMAGE,
            entrypoint=["/usr/bin/python3"],  # whatever the image says
            command=["-I", "-S", "-B", "-c", base.runner_source(), "0", str(limits.processes), self._seccomp.hex()],
            user=f"{uid}:{uid}",
            environment=ENVIRONMENT,
            use_config_proxy=False,  # the client would hand over the proxies of ~/.docker/config.json, with their passwords
            healthcheck={"test": ["NONE"]},
            hostname="box",
            working_dir="/tmp",
            stdin_open=True,
            network_disabled=True,
            labels={LABEL: "1", OWNER: owner(), INSTANCE: self._instance},
            host_config=api.create_host_config(**hardening(limits)),
        )
        container = Container(self._api, made["Id"])
        try:
            container.start()
        except Exception:
            self._discard_later(container)
            raise
        return container

    # --- the engine ---------------------------------------------------------------------------------------------------

    def _api(self, patience_s: int | None = None) -> Any:
        """The engine's client. One per thread: a requests session is not made to be shared."""
        patience_s = _PATIENCE_S if patience_s is None else patience_s
        clients: dict[int, Any] = self._local.__dict__.setdefault("clients", {})
        if patience_s not in clients:
            import docker

            clients[patience_s] = docker.APIClient(timeout=patience_s, **docker.utils.kwargs_from_env())  # asks the engine nothing yet
        return clients[patience_s]

    def _answers(self) -> bool:
        try:
            self._api(_PING_S).ping()
        except Exception:  # noqa: BLE001
            return False
        return True

    def _check_engine(self) -> bytes:
        """The system call filter for the engine's machine; SandboxUnavailable where the engine cannot be used."""
        try:
            import docker  # noqa: F401
        except ImportError as error:
            raise SandboxUnavailable("the Python package `docker` is missing: pip install docker") from error
        address = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
        advice = "start one, for example with `infra/docker/start-engine.sh`, and set DOCKER_HOST"
        if address.startswith("unix://") and not Path(address.removeprefix("unix://")).exists():
            raise SandboxUnavailable(f"no Docker engine at {address}; {advice}")
        try:
            machine = str(self._api().version()["Arch"])
        except Exception as error:
            raise SandboxUnavailable(f"the Docker engine at {address} does not answer ({type(error).__name__}); {advice}") from error
        try:
            image = self._api().inspect_image(IMAGE)
        except Exception as error:
            raise SandboxUnavailable(f"the Docker engine has no image {IMAGE}; make it with `infra/docker/build-image.sh`") from error
        if volumes := image["Config"].get("Volumes"):
            # Each would be a folder that programs can write to, without a limit, on the engine's disk.
            raise SandboxUnavailable(f"the image {IMAGE} declares volumes ({', '.join(volumes)}); take one without")
        try:
            return filter_program(_MACHINES.get(machine, machine))
        except ValueError as error:
            raise SandboxUnavailable(f"the Docker engine at {address}: {error}") from error

    def _reap(self) -> None:
        """Remove containers whose process is gone."""
        api = self._api()
        for found in api.containers(all=True, filters={"label": f"{LABEL}=1"}):
            if abandoned(found["Labels"].get(OWNER, ""), found["Created"]):
                with contextlib.suppress(Exception):  # someone else may be removing it right now
                    api.remove_container(found["Id"], force=True, v=True)
