"""The Docker backend: hardened containers kept warm, one program each, destroyed afterwards. The only importer of `docker`.

    refill thread: create > attach > start > runner says ready > pool        run: pool > job > answers > kill and remove

A container that ran a program never returns to the pool. Its runner waits on a pipe of ours: when this process dies, the pipe
closes and the runner ends; the next process that opens this backend removes what was left.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from environments.sandbox import base
from environments.sandbox.base import READY, Gate, Kind, Limits, Sandbox, SandboxJob, SandboxResult, SandboxUnavailable
from environments.sandbox.pump import Transcript, pump

IMAGE = os.environ.get("POLYRL_SANDBOX_IMAGE", "polyrl-sandbox:1")
_LABEL, _OWNER = "polyrl.sandbox", "polyrl.owner"


class DockerSandbox(Sandbox):
    """Raises SandboxUnavailable where no engine answers, the image is missing, or a first program does not come back right."""

    name = "docker"

    def __init__(self, width: int | None = None, warm: int | None = None) -> None:
        width = width or base.default_width()
        self._gate = Gate(width)
        self._warm_size = width if warm is None else warm
        self._local = threading.local()
        self._counter = itertools.count()
        self._pool: deque[_Container] = deque()
        self._lock = threading.Lock()
        self._missing = 0  # containers that the background was asked for and has not delivered
        self._closed = False
        self._check_engine()
        self._reap()
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sandbox-refill")
        probe = self.run(SandboxJob(program="def f(x):\n return x", mode="function", inputs=(1,)))
        if probe.kind != "finished" or b'"value"' not in probe.stdout:
            self.close()
            raise SandboxUnavailable(f"the Docker engine cannot run the image {IMAGE} ({probe.kind}: {probe.stderr_tail[-300:]})")

    def run(self, job: SandboxJob) -> SandboxResult:
        payload = job.payload()
        with self._gate.slot():
            started = time.monotonic()
            container: _Container | None = None
            try:
                container = self._take(job.limits)
                kind, transcript = self._talk(container, payload, job.limits)
                # Only where the host has not decided by itself: no program may turn its own end into a failure of ours.
                kind = "infra_error" if container.lost and kind == "finished" else kind
                answer, complaint = transcript.answer, base.tail(transcript.stderr)
            except Exception as error:  # noqa: BLE001 - the engine's client raises many kinds; all are ours, none the program's
                kind, answer, complaint = "infra_error", b"", f"{type(error).__name__}: {error}"[:500]
            finally:
                if container is not None:
                    self._in_background(container.remove)
                self._refill()
            return SandboxResult(kind=kind, stdout=answer, stderr_tail=complaint, wall_s=time.monotonic() - started)

    def close(self) -> None:
        """Remove every container of this process."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._background.shutdown(wait=True, cancel_futures=False)
        while self._pool:
            self._pool.popleft().remove()

    def _talk(self, container: _Container, payload: bytes, limits: Limits) -> tuple[Kind, Transcript]:
        kind, transcript = pump(container, payload, limits)
        if kind != "finished":
            container.kill()
        # Asked of the engine, and only about memory: an exit code is the program's to choose.
        if container.state().get("OOMKilled"):
            kind = "oom"
        return kind, transcript

    # --- the pool -----------------------------------------------------------------------------------------------------

    def _take(self, limits: Limits) -> _Container:
        if _shape(limits) == _shape(Limits()):
            while True:
                with self._lock:
                    if not self._pool:
                        break
                    container = self._pool.popleft()
                if container.alive:
                    return container
                self._in_background(container.remove)
        return self._create(limits)

    def _refill(self) -> None:
        with self._lock:
            wanted = 0 if self._closed else self._warm_size - len(self._pool) - self._missing
            self._missing += max(0, wanted)
        for _ in range(wanted):
            self._in_background(self._add)

    def _add(self) -> None:
        try:
            container = self._create(Limits())
        except Exception:  # noqa: BLE001 - the next run creates its own and reports why it could not
            with self._lock:
                self._missing -= 1
            return
        with self._lock:
            self._missing -= 1
            self._pool.append(container)

    def _in_background(self, work: Any) -> None:
        try:
            self._background.submit(work)
        except RuntimeError:  # shut down: then now
            work()

    def _create(self, limits: Limits) -> _Container:
        api = self._api()
        uid = base.unprivileged_uid(next(self._counter))
        made = api.create_container(
            IMAGE,
            command=["/usr/bin/python3", "-I", "-S", "-B", "-c", base.runner_source(), "0", str(limits.processes)],
            user=f"{uid}:{uid}",
            environment={"POLYRL_SANDBOX": "1", "PATH": "/nowhere", "HOME": "/tmp", "LANG": "C.UTF-8"},
            hostname="box",
            working_dir="/tmp",
            stdin_open=True,
            network_disabled=True,
            labels={_LABEL: "1", _OWNER: _owner()},
            host_config=api.create_host_config(**hardening(limits)),
        )
        container = _Container(self._api, made["Id"])
        try:
            container.start()
        except Exception:
            container.remove()
            raise
        return container

    # --- the engine ---------------------------------------------------------------------------------------------------

    def _api(self) -> Any:
        """The engine's client. One per thread: a requests session is not made to be shared."""
        if not hasattr(self._local, "api"):
            import docker

            self._local.api = docker.APIClient(timeout=60, **docker.utils.kwargs_from_env())  # asks the engine nothing yet
        return self._local.api

    def _check_engine(self) -> None:
        try:
            import docker  # noqa: F401
        except ImportError as error:
            raise SandboxUnavailable("the Python package `docker` is missing: pip install docker") from error
        address = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
        advice = "start one, for example with `infra/docker/start-engine.sh`, and set DOCKER_HOST"
        if address.startswith("unix://") and not Path(address.removeprefix("unix://")).exists():
            raise SandboxUnavailable(f"no Docker engine at {address}; {advice}")
        try:
            self._api().ping()
        except Exception as error:
            raise SandboxUnavailable(f"the Docker engine at {address} does not answer ({type(error).__name__}); {advice}") from error
        try:
            self._api().inspect_image(IMAGE)
        except Exception as error:
            raise SandboxUnavailable(f"the Docker engine has no image {IMAGE}; make it with `infra/docker/build-image.sh`") from error

    def _reap(self) -> None:
        """Remove containers whose process is gone."""
        api = self._api()
        for found in api.containers(all=True, filters={"label": f"{_LABEL}=1"}):
            if _abandoned(found["Labels"].get(_OWNER, ""), found["Created"]):
                with contextlib.suppress(Exception):  # someone else may be removing it right now
                    api.remove_container(found["Id"], force=True, v=True)


def hardening(limits: Limits) -> dict[str, Any]:
    """The host config of every container: every privilege and resource that a program has is listed here.

    No `init`: the runner is process 1, which nothing inside can kill and which reaps what it adopts.
    """
    memory = f"{limits.memory_mb}m"
    return {
        "network_mode": "none",
        "read_only": True,
        "tmpfs": {"/tmp": f"rw,noexec,nosuid,nodev,size={limits.tmp_mb}m,nr_inodes=4k,mode=1777"},
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],  # the engine's default seccomp profile stays on
        "pids_limit": limits.processes + 8,
        "mem_limit": memory,
        "memswap_limit": memory,  # the sum with swap: no swap
        "oom_score_adj": 500,
        "nano_cpus": 1_000_000_000,
        "ulimits": [
            {"Name": "nofile", "Soft": limits.open_files, "Hard": limits.open_files},
            {"Name": "fsize", "Soft": limits.file_mb << 20, "Hard": limits.file_mb << 20},
            {"Name": "core", "Soft": 0, "Hard": 0},
        ],
        "ipc_mode": "none",
        "log_config": {"Type": "none"},
    }


class _Container:
    """One container and the socket to its runner; a Channel for `pump`."""

    def __init__(self, api: Any, container_id: str) -> None:
        self.open = True
        self.lost = False
        """The engine stopped answering about it: what happened inside is unknown."""
        self._api = api
        self._id = container_id
        self._stream: Any = None
        self._buffer = bytearray()

    def start(self) -> None:
        """Attach, start, and wait until the runner is ready for a job."""
        self._stream = self._api().attach_socket(self._id, params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
        self._socket.setblocking(False)
        self._api().start(self._id)
        kind, transcript = pump(self, b"", Limits(wall_s=60), until_ready=True)
        if not transcript.ready:
            raise RuntimeError(f"a container did not get ready ({kind}): {base.tail(transcript.stderr)[-300:]}")
        # For the next pump, so that one rule holds: no READY, no run.
        self._buffer = bytearray(struct.pack(">BxxxL", 1, len(READY)) + READY)

    @property
    def alive(self) -> bool:
        """Whether the runner still waits: it says nothing, and the socket is open."""
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLIN)
        return not poll.poll(0)

    @property
    def _socket(self) -> socket.socket:
        found: socket.socket = getattr(self._stream, "_sock", self._stream)
        return found

    def filenos(self) -> tuple[list[int], list[int]]:
        return [self._socket.fileno()], [self._socket.fileno()]

    def read(self, fd: int) -> list[tuple[str, bytes]]:
        """Frames of the engine's stream: one byte of stream number, three of nothing, four of length, then the data."""
        try:
            data = self._socket.recv(65_536)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            data = b""
        self.open = bool(data)
        self._buffer += data
        pieces = []
        while len(self._buffer) >= 8:
            stream, length = struct.unpack(">BxxxL", self._buffer[:8])
            if len(self._buffer) < 8 + length:
                break
            pieces.append(("out" if stream == 1 else "err", bytes(self._buffer[8 : 8 + length])))
            del self._buffer[: 8 + length]
        return pieces

    def write(self, data: bytes) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0

    def state(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = self._api().inspect_container(self._id)["State"]
        except Exception:  # noqa: BLE001
            self.lost = True
            return {}
        return found

    def kill(self) -> None:
        """End everything inside at once. Kills the container, not only our connection to it.

        Hang up first: the engine waits for a reader of the streams before it answers anything else about the container, and a
        program that floods them held it for a minute.
        """
        self._hang_up()
        with contextlib.suppress(Exception):  # it may have ended by itself
            self._api().kill(self._id)

    def remove(self) -> None:
        self._hang_up()
        with contextlib.suppress(Exception):  # what stays is reaped by the next process that opens this backend
            self._api().remove_container(self._id, force=True, v=True)

    def _hang_up(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # closing alone leaves it open for as long as the HTTP response holds it
            with contextlib.suppress(OSError):
                self._stream.close()
            self._stream = None


def _shape(limits: Limits) -> tuple[int, ...]:
    """What of the limits is fixed when a container is created."""
    return (limits.memory_mb, limits.processes, limits.open_files, limits.file_mb, limits.tmp_mb)


def _owner() -> str:
    """This process, told apart from any that had or will have its id: boot, process namespace, id, start time."""
    return f"{_machine()}|{os.getpid()}|{_start_time(os.getpid())}"


def _abandoned(owner: str, created: float) -> bool:
    """Whether a container's process is gone. Of another machine or boot we cannot know, so its containers get an hour."""
    machine, _, rest = owner.partition("|")
    pid, _, started = rest.partition("|")
    if machine == _machine() and pid.isdigit():
        return _start_time(int(pid)) != started
    return time.time() - created > 3600


def _machine() -> str:
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}:{os.readlink('/proc/self/ns/pid')}"


def _start_time(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
